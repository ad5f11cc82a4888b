"""Surrogates T(k, e): which layers they keep (LayerPlan), and the writer that streams them out of the target.

Source: section 1.2 and Figure 4 of the paper. All arithmetic on layer numbers in this project is in `LayerPlan`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zero_ds.model.decoders import family_of
from zero_ds.model.decoders.folder import decoder_spans, depth_of, is_multimodal, text_config, text_hashes
from zero_ds.model.layer_plan import LayerPlan, Replaced, SurrogateInfo
from zero_ds.model.loading import model_hash
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import check_vacant, new_folder
from zero_ds.runtime.safetensors import Span, content_hash, write_shards

logger = logging.getLogger(__name__)

COPIED = re.compile(
    r"(tokenizer.*|special_tokens_map|generation_config|chat_template|vocab|merges|added_tokens)\.(json|jinja|txt|model)"
)


def build_surrogate(target: Path, replaced: Iterable[Replaced], out: Path) -> SurrogateInfo:
    """Writes the surrogate of `target` to the new folder `out`: an ordinary Hugging Face folder plus surrogate.json.

    Bytes are copied from file to file; neither model is ever held in memory. Of a multimodal class the decoder alone is
    cut, into a folder of its causal LM's class.

    Raises:
        ConfigError: ranges that do not fit, an existing `out`, missing or damaged weights, too little disk space.
    """
    family = family_of(target)
    plan = LayerPlan(depth_of(target), tuple(replaced))
    check_vacant(out)
    tensors = decoder_spans(target)
    written = [(name, tensors[source]) for source, name in _renamed(list(tensors), family.layer_prefix, plan)]
    config, hashes = _cut_config(target, plan), text_hashes(target)
    copied = [file for file in target.iterdir() if COPIED.fullmatch(file.name) and file.is_file()]
    with new_folder(out, need=sum(span.size for _, span in written)) as folder, ThreadPoolExecutor(1) as aside:
        embeddings = aside.submit(content_hash, tensors[family.embeddings])
        write_shards(written, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in copied:
            (folder / file.name).write_bytes(file.read_bytes())
        info = SurrogateInfo(
            family=family.name,
            target=str(target),
            target_hash=model_hash(target),
            plan=plan,
            kept_parameters=sum(span.parameters for _, span in written),
            target_parameters=sum(span.parameters for span in tensors.values()),
            hashes={**hashes, "embeddings": embeddings.result()},
        )
        (folder / "surrogate.json").write_text(json.dumps(info.to_json(), indent=2) + "\n", encoding="utf-8")
    return info


def _cut_config(target: Path, plan: LayerPlan) -> dict[str, Any]:
    """config.json of the surrogate: the target's own words, per-layer lists written out and cut like the layers.

    Written out, because a default that counts layers (every sixth is global) would count the surrogate's.
    """
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    text = text_config(target)
    if is_multimodal(target):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config = text.to_dict()
        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    config["num_hidden_layers"] = plan.surrogate_depth
    for key in family_of(target).per_layer_config:
        values = config.get(key) or getattr(text, key, None)
        if isinstance(values, list):
            if len(values) != plan.depth:
                raise ConfigError(
                    f"{target / 'config.json'} lists {len(values)} {key} for {plan.depth} layers; fetch it again."
                )
            config[key] = plan.cut_list(values)
    return config


def kept_tensors(
    plan: LayerPlan, prefix: str, surrogate: dict[str, Span], target: dict[str, Span]
) -> list[tuple[str, Span, Span | None]]:
    """(name in the surrogate, its bytes there, the target's bytes it should equal) of all but the translators.

    prefix: of the layers' tensors. Without the target's bytes: it has no such tensor.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d+)(\..+)")
    found = []
    for name, span in surrogate.items():
        match = pattern.fullmatch(name)
        if match and int(match[1]) not in plan.kept:
            continue
        source = f"{prefix}{plan.kept[int(match[1])]}{match[2]}" if match else name
        found.append((name, span, target.get(source)))
    return found


def _renamed(names: list[str], prefix: str, plan: LayerPlan) -> Iterator[tuple[str, str]]:
    """(name in the target, name in the surrogate) of all the surrogate's tensors, in the target's order."""
    made_from: dict[int, list[int]] = {}
    for number, (source, _) in enumerate(plan.layers):
        made_from.setdefault(source, []).append(number)
    pattern = re.compile(re.escape(prefix) + r"(\d+)(\..+)")
    seen: set[int] = set()
    for name in names:
        match = pattern.fullmatch(name)
        if not match:
            yield name, name
            continue
        seen.add(int(match[1]))
        for number in made_from.get(int(match[1]), ()):
            yield name, f"{prefix}{number}{match[2]}"
    missing = set(range(plan.depth)) - seen
    if missing:
        raise ConfigError(f"the weights hold no layer {min(missing)} although config.json counts {plan.depth} layers.")
