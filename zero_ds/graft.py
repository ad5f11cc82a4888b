"""Grafting: an encoder trained against a surrogate, plugged into the full language model without training.

A graft is not a copy of anything: it is the target's own weights, read where they are, with the trained encoder and
adapter. `load_graft` makes the model; `compatibility` says beforehand whether the two belong together.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero_ds import lora
from zero_ds.checkpoint import Commit, find_commit, load_weights_
from zero_ds.config import AdapterConfig, ConfigError, EncoderConfig, RunConfig, validate
from zero_ds.families import family_of
from zero_ds.hub import local_folder
from zero_ds.model import Assembly, VisionLanguageModel, assemble
from zero_ds.pretrained import text_config
from zero_ds.shards import target_hash
from zero_ds.stages import SURROGATE_ONLY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One line of the compatibility report."""

    what: str
    trained_with: str
    here: str

    @property
    def fits(self) -> bool:
        return self.trained_with == self.here


def run_config(commit: Commit) -> RunConfig:
    """The configuration a commit was trained with."""
    return validate(RunConfig, commit.manifest["config"], what=f"manifest of {commit.folder}")


def compatibility(commit: Commit, target: Path) -> list[Check]:
    """Compares what the weights were trained with against a target model."""
    manifest = commit.manifest
    width = manifest_width(commit)
    return [
        Check("family", str(manifest.get("family")), family_of(target).name),
        Check("hidden size", str(width), str(text_config(target).hidden_size)),
        Check("target's config and weights", str(manifest.get("target_hash")), target_hash(target)),
    ]


def manifest_width(commit: Commit) -> int:
    """Width of the adapter's output, read from the weights' header."""
    from safetensors import safe_open

    with safe_open(commit.folder / "weights.safetensors", framework="pt") as file:
        for name in ("aligner.weight", "adapter.2.weight", "adapter.2.bias"):
            if name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                return int(file.get_slice(name).get_shape()[0])
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
    commit = find_commit(weights)
    config = run_config(commit)
    folder = local_folder(str(decoder))
    plain = not (folder / "surrogate.json").is_file()
    if config.lora is not None and not plain:
        raise ConfigError(f"{commit.folder} was trained with LoRA on its target, and {folder} is a surrogate.")
    assert config.encoder is None or isinstance(config.encoder, EncoderConfig)
    model = assemble(
        Assembly(
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
        load_weights_(
            model.named_targets(), find_commit(start), skip=lambda name: plain and name.startswith(SURROGATE_ONLY)
        )
    if config.lora is not None:
        lora.merge_(model.decoder)
    return model.eval()


def load_graft(weights: str | Path, target: str | Path, **options: Any) -> VisionLanguageModel:
    """The full model with the trained encoder, after the compatibility check.

    Raises:
        ConfigError: the weights were trained for another model; names what differs.
    """
    commit = find_commit(weights)
    for check in compatibility(commit, local_folder(str(target))):
        if not check.fits:
            raise ConfigError(
                f"{commit.folder} cannot be grafted into {target}: {check.what} is {check.here}, "
                f"trained with {check.trained_with}."
            )
    return load_trained(weights, target, **options)
