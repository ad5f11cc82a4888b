"""Grafting: an encoder trained against a surrogate, plugged into the full language model without training.

A graft is not a copy of anything: it is the target's own weights, read where they are, with the trained encoder and
adapter. `load_graft` makes the model; `compatibility` says beforehand whether the two belong together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zero_ds.config.loading import validate
from zero_ds.config.schema import AdapterConfig, EncoderConfig, RunConfig
from zero_ds.model import lora
from zero_ds.model.adapter import output_width
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders import family_of
from zero_ds.model.decoders.folder import decoder_spans, decoder_tensors, relied_on, text_config, text_hashes
from zero_ds.model.layer_plan import LayerPlan, read_surrogate
from zero_ds.model.loading import model_hash
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.safetensors import Span, content_hash, locate, same_bytes, spans
from zero_ds.surrogate.build import kept_tensors
from zero_ds.training.checkpoint.checkpoint import Checkpoint, CheckpointError, check_hash, find_checkpoint
from zero_ds.training.checkpoint.load import load_weights_
from zero_ds.training.checkpoint.peft_folder import is_peft_folder
from zero_ds.training.stages import SURROGATE_ONLY, decoder_kind, trained_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One line of the compatibility report."""

    name: str
    """By which a difference is accepted."""
    what: str
    trained_with: str
    here: str
    fits: bool | None
    """None: one side is not known, as `here` says."""


ACCEPTABLE = ("family", "target", "tokenizer", "template", "embeddings", "encoder", "kept-layers")
"""Checks whose difference may be accepted by name; of another hidden size nothing can be grafted."""


def run_config(commit: Checkpoint) -> RunConfig:
    """The configuration a commit was trained with."""
    return validate(RunConfig, commit.manifest.get("config"), what=f"manifest of {commit.folder}")


def compatibility(
    commit: Checkpoint, target: Path, *, thorough: bool = False, surrogate: str | None = None
) -> list[Check]:
    """Compares what the weights were trained with against a target model.

    thorough: also read the whole embeddings, and compare all that the surrogate kept with the target's, byte for byte,
    a block at a time. surrogate: where it lies now, if not where the run found it.

    Raises:
        ConfigError: weights without an adapter, a damaged or missing folder.
        CheckpointError: damaged weights; of damage behind their header only where `thorough`.
    """
    manifest, config = commit.manifest, run_config(commit)
    width, here = manifest_width(commit), int(text_config(target).hidden_size)
    if thorough:
        check_hash(commit.folder / "weights.safetensors", str(manifest.get("weights_sha256")))
    recorded = str(manifest.get("target_hash"))
    now = model_hash(target, like=recorded)
    checks = [
        Check("stage", "stage", config.stage, _trained(config), True),
        _check("family", "family", str(manifest.get("family")), family_of(target).name),
        _check("hidden-size", "hidden size", str(width), str(here)),
        _check("target", "target's config and weights", recorded, now),
    ]
    relied, text = _relied_on(manifest, config, surrogate), text_hashes(target)
    checks.append(_check("tokenizer", "tokenizer", relied.get("tokenizer"), text["tokenizer"]))
    if config.data.chat_template:
        checks.append(Check("template", "chat template", "the run's own", config.data.chat_template, True))
    else:
        checks.append(_check("template", "chat template", relied.get("template"), text["template"]))
    # a run against the target itself relied on embeddings that the target's hash has samples of
    if width == here and (recorded != now or (thorough and manifest.get("plan"))):
        embeddings = content_hash(locate(decoder_tensors(target))[family_of(target).embeddings])
        checks.append(_check("embeddings", "word embeddings", relied.get("embeddings"), embeddings))
    if config.encoder is not None:
        began_with = manifest.get("encoder_hash")
        encoder = model_hash(local_folder(config.encoder.path), like=str(began_with))
        checks.append(_check("encoder", "vision encoder", began_with, encoder))
    early = _trained_early(commit, config)
    if early is not None:
        what = "the source of the kept layers"
        checks.append(Check("kept-layers", what, f"{early}, which trained them", "the target", False))
    elif thorough and width == here and manifest.get("plan"):
        checks.append(_kept_layers(manifest, config, target, surrogate))
    return checks


def refuse_differences(commit: Checkpoint, target: str | Path, checks: Iterable[Check], accept: Iterable[str]) -> None:
    """Refuses weights that do not fit, unless the difference is accepted by name.

    Raises:
        ConfigError: the first difference that is not accepted; a name that is none.
    """
    accept = tuple(accept)
    for name in accept:
        if name not in ACCEPTABLE:
            raise ConfigError(f"nothing called '{name}' can be accepted{did_you_mean(name, list(ACCEPTABLE))}")
    for check in checks:
        if check.fits is False and check.name not in accept:
            way = f"; --accept {check.name} grafts them nevertheless" if check.name in ACCEPTABLE else ""
            raise ConfigError(
                f"{commit.folder} cannot be grafted into {target}: {check.what} is {check.here}, "
                f"trained with {check.trained_with}{way}."
            )


def _check(name: str, what: str, trained_with: str | None, here: str) -> Check:
    """Equal, different, or, where nothing was recorded, unknown."""
    if not trained_with:
        return Check(name, what, "not recorded", here or "none", None)
    return Check(name, what, trained_with, here or "none", trained_with == here)


def _trained(config: RunConfig) -> str:
    return f"{config.stage}, which trains {', '.join(trained_parts(config))} against the {decoder_kind(config)}"


def _relied_on(manifest: dict[str, Any], config: RunConfig, surrogate: str | None) -> dict[str, str]:
    """What the run recorded of tokenizer, template and embeddings, or else the surrogate it was trained in."""
    if recorded := manifest.get("relies_on"):
        return dict(recorded)
    folder = _surrogate_folder(config, surrogate) if decoder_kind(config) == "surrogate" else None
    return relied_on(folder) if folder is not None else {}


def _surrogate_folder(config: RunConfig, surrogate: str | None) -> Path | None:
    """Where the surrogate lies, if it is still there."""
    path = surrogate or config.surrogate
    if path is None or (surrogate is None and not (Path(path) / "surrogate.json").is_file()):
        return None
    return local_folder(path)


def _trained_early(commit: Checkpoint, config: RunConfig) -> Path | None:
    """The commit, of this run or of those it started from, that holds trained kept layers (the starred control)."""
    starts = [Path(start) for start in config.starts]
    commits = [find_checkpoint(start) for start in starts if start.is_dir() and not is_peft_folder(start)]
    for one in [*commits, commit]:
        if any(name.startswith("early.") for name in _trained_tensors(one)):
            return one.folder
    return None


def _trained_tensors(commit: Checkpoint) -> dict[str, Span]:
    """The tensors of a commit by name, from its weights' header.

    Raises:
        CheckpointError: the file is missing, truncated, or none of safetensors.
    """
    path = commit.folder / "weights.safetensors"
    try:
        return spans(path)
    except ConfigError:
        raise CheckpointError(f"{path} is missing or damaged; use another commit, or zero-ds consolidate.") from None


def _kept_layers(manifest: dict[str, Any], config: RunConfig, target: Path, surrogate: str | None) -> Check:
    """Whether all that the surrogate did not replace is the target's, byte for byte."""
    name, what = "kept-layers", "kept layers"
    folder = _surrogate_folder(config, surrogate)
    if folder is None:
        return Check(name, what, str(config.surrogate), f"{config.surrogate} is not here; name --surrogate", None)
    plan = LayerPlan.from_json(manifest["plan"])
    if (other := read_surrogate(folder).plan) != plan:
        return Check(name, f"the cut of {folder}", str(plan), str(other), False)
    pairs = kept_tensors(plan, family_of(target).layer_prefix, decoder_spans(folder), decoder_spans(target))
    size = sum(left.size for _, left, _ in pairs)
    with tqdm(total=size, desc="comparing", unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        for tensor, left, right in pairs:
            if right is None or not same_bytes(left, right, bar):
                return Check(name, "the first kept tensor that differs", f"the one in {folder}", tensor, False)
    count = f"{len(plan.kept)} layers, {len(pairs)} tensors, {size:,} bytes equal"
    return Check(name, what, count, count, True)


def manifest_width(commit: Checkpoint) -> int:
    """Width of the adapter's output, read from the weights' header."""
    width = output_width({name: span.shape for name, span in _trained_tensors(commit).items()})
    if width is not None:
        return width
    raise ConfigError(f"{commit.folder} holds no adapter, so there is nothing to graft; name a run of a later stage.")


def load_trained(
    weights: str | Path,
    decoder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    earlier: list[Path] | None = None,
) -> VisionLanguageModel:
    """Encoder and adapter of a run on any decoder folder: its surrogate (with the run's translators) or its target.

    What the run started from supplies what the run itself did not train; `earlier` overrides where these lie.

    Raises:
        ConfigError, CheckpointError: weights that do not fit the decoder, naming the tensor or the field.
    """
    commit = find_checkpoint(weights)
    config = run_config(commit)
    folder = local_folder(str(decoder))
    plain = not (folder / "surrogate.json").is_file()
    if config.lora is not None and not plain:
        raise ConfigError(f"{commit.folder} was trained with LoRA on its target, and {folder} is a surrogate.")
    assert config.encoder is None or isinstance(config.encoder, EncoderConfig)
    model = build_model(
        ModelSpec(
            decoder=folder,
            encoder=local_folder(config.encoder.path) if config.encoder else None,
            encoder_config=config.encoder,
            adapter_config=config.adapter or AdapterConfig(),
            dtype=dtype,
            attention=attention,
            lora=config.lora,
        )
    )
    starts = [Path(path) for path in config.starts] if earlier is None else earlier
    for start in [*starts, commit.folder]:
        if is_peft_folder(start):
            continue  # the run has trained all of these adapters on
        load_weights_(
            model.named_targets(), find_checkpoint(start), skip=lambda name: plain and name.startswith(SURROGATE_ONLY)
        )
    if config.lora is not None:
        lora.merge_(model.decoder)
    return model.eval()


def load_graft(
    weights: str | Path, target: str | Path, *, accept: Iterable[str] = (), **options: Any
) -> VisionLanguageModel:
    """The full model with the trained encoder, after the compatibility check (not the thorough one).

    accept: names of checks (ACCEPTABLE) whose difference does not matter.

    Raises:
        ConfigError: the weights were trained for another model; names what differs.
    """
    commit = find_checkpoint(weights)
    refuse_differences(commit, target, compatibility(commit, local_folder(str(target))), accept)
    return load_trained(weights, target, **options)
