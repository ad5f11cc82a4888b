"""Export to transformers' own `LlavaForConditionalGeneration`: a folder that loads without any code of ours."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zero_ds.checkpoint import find_commit, versions
from zero_ds.config import ConfigError, DataConfig, RunConfig
from zero_ds.data.conversations import PLACEHOLDER, WRAPPERS, Turn
from zero_ds.data.images import ImageProcessor
from zero_ds.data.loader import SampleEncoder
from zero_ds.data.sources import Sample
from zero_ds.files import check_vacant, new_folder
from zero_ds.graft import load_graft, run_config
from zero_ds.hub import local_folder
from zero_ds.model import VisionLanguageModel, sample_encoder

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference of log-probabilities between source and exported folder."""


def export_llava(weights: Path, target: str, out: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Writes encoder, adapter and target as one Llava folder with processor and chat template, and proves it.

    The folder is loaded afresh in another process, by transformers alone, and must give the source's logits on a
    picture and on text; if not, nothing is left behind. Returns the proof, which is also written as proof.json.

    Raises:
        ConfigError: `out` exists, the model uses something Llava cannot express, or the proof fails.
    """
    from transformers import LlavaForConditionalGeneration

    check_vacant(out)
    config = run_config(find_commit(weights))
    if config.encoder is None:
        raise ConfigError(f"{weights} has no vision encoder to export.")
    if config.adapter.boundary_tokens or config.encoder.patch_norm:
        raise ConfigError("Llava has no image-boundary embeddings and no norm on patch tokens; this run uses them.")
    if config.data.image_grid:
        raise ConfigError("Llava shows every picture once; this run was trained with data.image_grid.")
    model = load_graft(weights, target, dtype=dtype)
    folder = local_folder(target)
    with new_folder(out) as written:
        processor = llava_processor(model, folder, config)
        image_token_id = processor.image_token_id
        llava = LlavaForConditionalGeneration(llava_config(model, config.encoder.feature_layer, image_token_id))
        llava = cast(Any, llava).to(dtype).eval()
        fill_llava_(llava, model)
        llava.generation_config = cast(Any, model.decoder).generation_config
        llava.save_pretrained(written, safe_serialization=True)
        processor.save_pretrained(written)
        proof = prove(written, model, config, folder)
        (written / "proof.json").write_text(json.dumps(proof, indent=2) + "\n", encoding="utf-8")
        for path in written.iterdir():
            path.chmod(0o644)
    return proof


def llava_config(model: VisionLanguageModel, feature_layer: int, image_token_id: int) -> Any:
    from transformers import LlavaConfig

    assert model.encoder is not None and model.encoder_family is not None
    text = cast(Any, model.decoder).config
    vision = model.encoder_family.vision_config(model.encoder)
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=feature_layer,
        image_seq_length=model.tokens_per_image(),
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


@torch.no_grad()
def fill_llava_(llava: nn.Module, model: VisionLanguageModel) -> None:
    """Copies every tensor; a name on one side only is an error, so that nothing stays random."""
    assert model.encoder is not None and model.adapter is not None
    inner = cast(Any, llava).model
    inner.multi_modal_projector.load_state_dict(projector(model))
    inner.vision_tower.load_state_dict(model.encoder.state_dict())
    backbone = getattr(model.decoder, model.family.backbone)
    embeddings = cast(Any, model.decoder).get_input_embeddings().weight
    rows = inner.language_model.get_input_embeddings().weight
    if rows.shape != embeddings.shape:
        raise ConfigError("the image placeholder does not fit into the target's vocabulary.")
    inner.language_model.load_state_dict(backbone.state_dict())
    cast(Any, llava).lm_head.weight.copy_(cast(Any, model.decoder).get_output_embeddings().weight)


def projector(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Adapter, and aligner if there is one, as the two linear layers of Llava's projector.

    Two linear layers in a row are one. Llava's inner width is that of its decoder: a narrower adapter is filled up with
    units that are zero before and, as GELU(0) = 0, behind the activation.

    Raises:
        ConfigError: the adapter is wider than the decoder.
    """
    adapter, aligner = cast(Any, model.adapter), model.aligner
    first, last = adapter[0], adapter[2]
    if aligner is None:
        return {
            "linear_1.weight": first.weight,
            "linear_1.bias": first.bias,
            "linear_2.weight": last.weight,
            "linear_2.bias": last.bias,
        }
    room = aligner.out_features - first.out_features
    if room < 0:
        raise ConfigError(f"Llava has no room for an adapter wider than its decoder ({first.out_features} units).")
    dtype = last.weight.dtype
    wide = aligner.weight.double()
    return {
        "linear_1.weight": nn.functional.pad(first.weight, (0, 0, 0, room)),
        "linear_1.bias": nn.functional.pad(first.bias, (0, room)),
        "linear_2.weight": nn.functional.pad((wide @ last.weight.double()).to(dtype), (0, room)),
        "linear_2.bias": (wide @ last.bias.double() + aligner.bias.double()).to(dtype),
    }


def llava_processor(model: VisionLanguageModel, target: Path, config: RunConfig) -> Any:
    """Tokenizer, image processor that pads like training, and a chat template that words the prompt like training."""
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    assert model.encoder is not None and model.encoder_family is not None and config.encoder is not None
    vision = model.encoder_family.vision_config(model.encoder)
    tokenizer = AutoTokenizer.from_pretrained(target)
    image_token = placeholder_token(model, tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    own = Path(config.data.chat_template).read_text(encoding="utf-8") if config.data.chat_template else None
    settings = ImageProcessor.from_folder(local_folder(config.encoder.path), vision.image_size)
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=True,
            size={"height": settings.size, "width": settings.size},
            crop_size={"height": settings.size, "width": settings.size},
            image_mean=settings.mean,
            image_std=settings.std,
            resample=settings.resample,
        ),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        image_token=image_token,
        num_additional_image_tokens=model.encoder_family.prefix_tokens,
        chat_template=chat_template(own or tokenizer.chat_template, image_token, config.data),
    )


def placeholder_token(model: VisionLanguageModel, tokenizer: Any) -> str:
    """A special token of the target's vocabulary that stands for an image.

    Raises:
        ConfigError: the family names none that this vocabulary has.
    """
    vocabulary = tokenizer.get_vocab()
    for token in (PLACEHOLDER, *model.family.image_tokens):
        if token in vocabulary:
            return token
    raise ConfigError(
        f"the vocabulary has none of the {model.family.name} family's spare tokens "
        f"({', '.join(model.family.image_tokens) or 'none named'}); name one in families/{model.family.name}.py."
    )


def chat_template(own: str, image_token: str, data: DataConfig) -> str:
    """The target's template behind a few lines that turn lists of image and text into what training wrote.

    A picture and a question become the fixed image prompt, a system prompt is set as in training, and plain string
    contents stay as they are.
    """
    wrapper = WRAPPERS[0] if data.image_prompt != "off" else "{image}\n{question}"
    before, after = wrapper.split("{image}")
    between = after.split("{question}")[0]
    system = ""
    if data.system_prompt is not None:
        system = (
            "{%- if not messages or messages[0].role != 'system' -%}"
            f"{{%- set ns.messages = [{{'role': 'system', 'content': {json.dumps(data.system_prompt)}}}] -%}}"
            "{%- endif -%}"
        )
    thinks = "{%- set enable_thinking = false -%}" if "enable_thinking" in own else ""
    return (
        f"{thinks}"
        "{%- set ns = namespace(messages=[], text='', images=0) -%}"
        + system
        + "{%- for message in messages -%}{%- if message.content is string -%}"
        "{%- set ns.messages = ns.messages + [message] -%}"
        "{%- else -%}"
        "{%- set ns.text = '' -%}{%- set ns.images = 0 -%}"
        "{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}{%- set ns.images = ns.images + 1 -%}"
        "{%- elif part.type == 'text' -%}{%- set ns.text = ns.text + part.text -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if ns.images -%}"
        f"{{%- set ns.text = {json.dumps(before)} + {json.dumps(image_token)} * ns.images + {json.dumps(between)}"
        " + ns.text -%}"
        "{%- endif -%}"
        "{%- set ns.messages = ns.messages + [{'role': message.role, 'content': ns.text}] -%}"
        "{%- endif -%}{%- endfor -%}"
        "{%- set messages = ns.messages -%}" + own
    )


PROOF_SCRIPT = """
import json, sys
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
assert "zero_ds" not in sys.modules
folder, picture, question = sys.argv[1:4]
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
result = []
for contents in ([{"type": "image"}, {"type": "text", "text": question}], [{"type": "text", "text": question}]):
    prompt = processor.apply_chat_template([{"role": "user", "content": contents}], add_generation_prompt=True)
    images = [Image.open(picture)] if len(contents) == 2 else None
    inputs = processor(text=prompt, images=images, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].float()
        answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs.input_ids.shape[1]:]
    result.append({"prompt_tokens": inputs.input_ids.shape[1], "log_probs": logits.log_softmax(-1).tolist(),
                   "answer": answer.tolist()})
print("PROOF" + json.dumps(result))
"""


def prove(folder: Path, model: VisionLanguageModel, config: RunConfig, target: Path) -> dict[str, Any]:
    """Loads the exported folder in a fresh process without this package and compares it with the source.

    One prompt with a picture and one without: log-probabilities of the next token over the vocabulary, and 16 greedy
    tokens.

    Raises:
        ConfigError: they differ; the message says by how much and on which prompt.
    """
    import tempfile

    from PIL import Image

    assert config.encoder is not None and model.encoder is not None and model.encoder_family is not None
    question = "what is shown here?"
    size = model.encoder_family.vision_config(model.encoder).image_size
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "picture.png"
        gradient = Image.linear_gradient("L").resize((size, size))
        Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).save(picture)
        done = subprocess.run(
            [sys.executable, "-c", PROOF_SCRIPT, str(folder.resolve()), str(picture), question],
            capture_output=True,
            text=True,
            cwd=scratch,
        )
        line = next((text for text in done.stdout.splitlines() if text.startswith("PROOF")), None)
        if line is None:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
            raise ConfigError(f"transformers alone could not load the exported folder: {reason}")
        theirs = json.loads(line.removeprefix("PROOF"))
        fixed = "off" if config.data.image_prompt == "off" else "fixed"
        data = config.data.model_copy(update={"image_prompt": fixed})
        encoder = sample_encoder(model, target, local_folder(config.encoder.path), data)
        proof: dict[str, Any] = {"versions": versions(), "prompts": []}
        for images, result in zip(((str(picture),), ()), theirs, strict=True):
            log_probs, answer, length = _answer(model, encoder, question, images)
            gap = float((log_probs - torch.tensor(result["log_probs"])).abs().max())
            kind = "a picture" if images else "text alone"
            same = answer == result["answer"][: len(answer)]
            proof["prompts"].append({"prompt": kind, "largest_log_prob_difference": gap, "greedy_tokens_equal": same})
            tolerance = TOLERANCE[next(model.parameters()).dtype]
            if length != result["prompt_tokens"] or not gap <= tolerance or (not same and tolerance < 1e-3):
                raise ConfigError(
                    f"the exported model differs from its source on a prompt with {kind}: {length} against "
                    f"{result['prompt_tokens']} prompt tokens, log-probabilities apart by {gap:.2g} "
                    f"(at most {tolerance})."
                )
    return proof


@torch.no_grad()
def _answer(
    model: VisionLanguageModel, encoder: SampleEncoder, question: str, images: tuple[str, ...]
) -> tuple[torch.Tensor, list[int], int]:
    """Log-probabilities behind the prompt (vocabulary), 16 greedy tokens at most, and the prompt's length."""
    asked = f"{PLACEHOLDER}\n{question}" if images else question
    sample = Sample("proof", (Turn("user", asked),), images)
    encoded = encoder.encode(encoder.turns(sample), generate=True)
    pixels = encoder.pixels(sample) if images else None
    ids = torch.tensor([encoded.input_ids])
    end = encoder.template.end_of_turn()
    first: torch.Tensor | None = None
    answer: list[int] = []
    for _ in range(16):
        hidden = model.hidden_states(ids, torch.ones_like(ids), pixels)[:, -1]
        log_probs = model.logits(hidden)[0].float().log_softmax(-1)
        first = log_probs if first is None else first
        answer.append(int(log_probs.argmax()))
        if answer[-1] == end:
            break
        ids = torch.cat([ids, torch.tensor([[answer[-1]]])], dim=1)
    assert first is not None
    return first, answer, len(encoded.input_ids)
