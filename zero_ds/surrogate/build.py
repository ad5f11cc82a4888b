"""Cuts a surrogate T(k, e) out of its target: an ordinary Hugging Face folder, streamed from file to file.

Source: section 1.2 and Figure 4 of the paper. All arithmetic on layer numbers is in model/layer_plan.py.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zero_ds.model.decoders.cut import check_cut, cut_config, cut_entries, read_again
from zero_ds.model.decoders.dense import dense_config
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.decoders.shrink import causal_class
from zero_ds.model.layer_plan import LayerPlan, Replaced, SurrogateInfo
from zero_ds.runtime.errors import ConfigError, one_line
from zero_ds.runtime.files import check_vacant, new_folder
from zero_ds.runtime.safetensors import Span, Tensor, content_hash, write_shards
from zero_ds.surrogate.dense import dense_tensors

logger = logging.getLogger(__name__)

COPIED = re.compile(
    r"(tokenizer.*|special_tokens_map|generation_config|chat_template|vocab|merges|added_tokens)\.(json|jinja|txt|model)"
)
"""Names of files that are copied unchanged from the target."""
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates that a tokenizer has besides its default one; copied as well."""


def build_surrogate(
    target: DecoderFolder | Path, replaced: Iterable[Replaced], out: Path, *, dense_width: int | None = None
) -> SurrogateInfo:
    """Writes the surrogate of `target` to the folder `out`: an ordinary Hugging Face folder plus surrogate.json.

    Bytes are copied from file to file; neither model is ever held in memory. Of a multimodal model only the decoder is
    cut, into a folder of its causal LM's class. If `out` already holds this very surrogate, its files are checked and
    nothing is written.

    dense_width: units of a dense network in place of every translator's experts; None means that translators are copies
    of layers.

    Raises:
        ConfigError: ranges that do not fit, an `out` that holds something else, missing or damaged weights, or not
            enough disk space.
    """
    target, existing = DecoderFolder.of(target), DecoderFolder(out)
    if existing.surrogate is not None:
        return _check_same(existing, target, LayerPlan(existing.surrogate.plan.depth, tuple(replaced)), dense_width)
    family = target.family
    plan = LayerPlan(target.depth, tuple(replaced))
    check_vacant(out)
    tensors = target.spans
    target.check_class_tensors()
    written: list[tuple[str, Tensor]] = [
        (name, tensors[source]) for source, name in _renamed(list(tensors), family.layer_prefix, plan)
    ]
    config, hashes = _cut_config(target, plan), target.text_hashes
    if dense_width is not None:
        config, written = _with_dense(target, plan, config, written, dense_width)
    copied = [file for file in target.path.iterdir() if COPIED.fullmatch(file.name) and file.is_file()]
    copied += sorted((target.path / NAMED_TEMPLATES).glob("*.jinja"))
    copied += target.own_code
    needed = sum(span.size for _, span in written)
    with new_folder(out, need=needed) as folder, ThreadPoolExecutor(1) as background:
        embeddings = background.submit(content_hash, tensors[family.embeddings])
        write_shards(written, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in copied:
            written_to = folder / file.relative_to(target.path)
            written_to.parent.mkdir(exist_ok=True)
            written_to.write_bytes(file.read_bytes())
        info = SurrogateInfo(
            family=family.name,
            target=str(target),
            target_hash=target.hash(),
            plan=plan,
            kept_parameters=sum(span.parameters for _, span in written),
            target_parameters=sum(span.parameters for span in tensors.values()),
            dense_width=dense_width,
            hashes={**hashes, "embeddings": embeddings.result()},
        )
        (folder / "surrogate.json").write_text(json.dumps(info.to_json(), indent=2) + "\n", encoding="utf-8")
    return info


def _check_same(
    existing: DecoderFolder, target: DecoderFolder, plan: LayerPlan, dense_width: int | None
) -> SurrogateInfo:
    """Returns the content of an existing surrogate.json, after checking that it is this plan of this target.

    Raises:
        ConfigError: it is another surrogate, or its weights are missing or damaged.
    """
    info = existing.surrogate
    assert info is not None
    same = info.plan == plan and info.dense_width == dense_width
    if target.hash(like=info.target_hash) != info.target_hash or not same:
        raise ConfigError(f"{existing} holds another surrogate, {info.plan} of {info.target}; choose another --out.")
    _ = existing.spans  # raises if the weights are incomplete
    return info


def _cut_config(target: DecoderFolder, plan: LayerPlan) -> dict[str, Any]:
    """Returns the surrogate's config.json: the target's own entries, with lists that have an entry per layer cut.

    Such lists are written out even where the target's config leaves them to a default, because a default that depends
    on the layer number (every sixth layer is global) would count the surrogate's layers.
    """
    config = dict(target.raw_config)
    text = target.text_config()
    if not target.is_registered:
        return _cut_verified(target, plan)
    if target.is_multimodal:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config = text.to_dict()
        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    config["num_hidden_layers"] = plan.surrogate_depth
    for key in target.family.per_layer_config or ():
        values = config.get(key) or getattr(text, key, None)
        if isinstance(values, list):
            if len(values) != plan.depth:
                raise ConfigError(
                    f"{target.config_file} lists {len(values)} {key} for {plan.depth} layers; fetch it again."
                )
            config[key] = [values[source] for source in plan.sources]
    return config


def _cut_verified(target: DecoderFolder, plan: LayerPlan) -> dict[str, Any]:
    """Returns the surrogate's config.json for a class that no family describes, after the cut was checked.

    Raises:
        ConfigError: as `check_cut`; the class reads an entry of config.json otherwise than its own config has it.
    """
    text = target.text_config()
    check_cut(text, target.family, plan.sources)
    config = text.to_dict() if target.is_multimodal else dict(target.raw_config)
    if target.is_multimodal:
        config["architectures"] = [causal_class(text).__name__]
    entries = cut_entries(text, target.family, plan.sources)
    config |= {text.attribute_map.get(name, name): value for name, value in entries.items()}
    try:
        read = read_again(text, config)
    except Exception as error:  # transformers raises many exception types for entries that it does not accept
        raise ConfigError(
            f"{type(text).__name__} does not accept a surrogate {plan} ({one_line(error)}); replace other layers."
        ) from None
    for name, value in entries.items():
        if name != "per_layer_config" and vars(read).get(text.attribute_map.get(name, name), value) != value:
            raise ConfigError(
                f"{type(text).__name__} cannot state {name} for {plan.surrogate_depth} layers; replace other layers."
            )
    return config


def _with_dense(
    target: DecoderFolder, plan: LayerPlan, config: dict[str, Any], copied: list[tuple[str, Tensor]], width: int
) -> tuple[dict[str, Any], list[tuple[str, Tensor]]]:
    """Returns config.json and tensors of a surrogate with dense translators, from those with copied ones.

    Raises:
        ConfigError: the target has no experts, or its class no dense layers there.
    """
    text = target.text_config()
    cut = cut_config(text, target.family, plan.sources)
    dense, entries = dense_config(target, cut, plan.translators, width)
    stored = target.spans[target.family.embeddings].dtype
    written = dense_tensors(target, dense, copied, plan.translators, stored)
    return {**config, **{text.attribute_map.get(name, name): value for name, value in entries.items()}}, written


def kept_tensors(
    plan: LayerPlan, prefix: str, surrogate: dict[str, Span], target: dict[str, Span]
) -> list[tuple[str, Span, Span | None]]:
    """Returns every tensor of a surrogate, except those of the translators, with the target's tensor it should equal.

    prefix: prefix of the layers' tensors (`Family.layer_prefix`). An entry holds the name in the surrogate, the bytes
    there, and the bytes in the target, or None if the target has no such tensor.
    """
    pattern = _layer_pattern(prefix)
    found = []
    for name, span in surrogate.items():
        match = pattern.fullmatch(name)
        if match and int(match[1]) not in plan.kept:
            continue
        source = f"{prefix}{plan.kept[int(match[1])]}{match[2]}" if match else name
        found.append((name, span, target.get(source)))
    return found


def _renamed(names: list[str], prefix: str, plan: LayerPlan) -> Iterator[tuple[str, str]]:
    """Yields the names in target and surrogate of all the surrogate's tensors, in the target's order.

    Raises:
        ConfigError: the target's tensors lack a whole layer.
    """
    made_from: dict[int, list[int]] = {}
    for number, (source, _) in enumerate(plan.layers):
        made_from.setdefault(source, []).append(number)
    pattern = _layer_pattern(prefix)
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


def _layer_pattern(prefix: str) -> re.Pattern[str]:
    """Returns the pattern of a layer's tensor: group 1 is the number of the layer, group 2 the rest of the name."""
    return re.compile(re.escape(prefix) + r"(\d+)(\..+)")
