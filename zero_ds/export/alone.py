"""The format of a run without a vision encoder: a causal language model, like the target's own folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from zero_ds.export.formats import LoadedTensor
from zero_ds.export.source import Source
from zero_ds.export.text import TextSettings
from zero_ds.model import lora
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.safetensors import Tensor


class LanguageModelFormat:
    """The causal LM of the decoder's family, under the tensor names of its class."""

    name = "causal-lm"
    tag = "causal-lm"
    remote_code = False
    usage = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
messages = [{{"role": "user", "content": "Which is larger, 8.11 or 8.3?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output_ids = model.generate(**inputs.to(model.device), max_new_tokens=50)
print(tokenizer.decode(output_ids[0], skip_special_tokens=True))
"""

    def lacks(self, source: Source) -> str | None:
        """Returns None: the class of the family expresses every language model."""
        return None

    def tensors(self, source: Source) -> list[tuple[str, Tensor]]:
        return list(source.decoder_tensors().items())

    def loaded_tensors(self, source: Source, model: VisionLanguageModel) -> Iterator[LoadedTensor]:
        merged = source.merged_weights()
        for name, parameter in lora.without(model.decoder):
            yield LoadedTensor(name, parameter.detach(), exact=name not in merged)

    def expected_shapes(self, source: Source, texts: TextSettings) -> dict[str, tuple[int, ...]]:
        return dict(source.decoder.expected_shapes)

    def write_files(self, source: Source, texts: TextSettings, folder: Path) -> None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config = source.text
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]  # not a multimodal target's class
        config.dtype = source.dtype
        config.save_pretrained(folder)
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in ("_name_or_path", "_model_name_or_path"):
            content.pop(name, None)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        texts.tokenizer.save_pretrained(folder)
        generation = json.dumps(texts.generation, indent=2) + "\n"
        (folder / "generation_config.json").write_text(generation, encoding="utf-8")
