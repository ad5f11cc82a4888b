"""Measures the next-token loss of a checkpoint on held-out samples, as its run measures it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zero_ds.config.schema import RunConfig, SourceConfig
from zero_ds.data.once import Once
from zero_ds.grafting.compatibility import run_config
from zero_ds.grafting.load import load_graft, load_trained
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.precision import fast_dtype
from zero_ds.training.checkpoint.checkpoint import find_checkpoint
from zero_ds.training.folders import ModelFolders
from zero_ds.training.setup import make_loader
from zero_ds.training.validation import held_out, mean_loss


def heldout_loss(
    weights: Path,
    sources: Sequence[SourceConfig] = (),
    *,
    decoder: str | None = None,
    batch: int = 8,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Returns loss, tokens, samples and skipped samples, on as many ranks as the launcher started. A collective.

    weights: folder of a run or of one of its checkpoints. sources: samples to measure; none stands for those that the
    run holds out. decoder: folder or hub id of the language model; None is the run's own. batch: rows of a pass.

    Raises:
        ConfigError, CheckpointError: the run holds out no samples, or does not fit the language model.
        DataError: a sample that cannot be used, unless the run skips such samples.
    """
    if distributed.world_size() > 1:
        distributed.initialize()
    checkpoint = find_checkpoint(weights)
    config = _with_samples(run_config(checkpoint), weights, sources, batch)
    folders = ModelFolders.of(config)
    options: dict[str, Any] = {"dtype": dtype or fast_dtype()}
    if decoder is None:
        model = load_trained(checkpoint.folder, folders.decoder, **options)
    else:
        folder = DecoderFolder(local_folder(decoder))
        folders = dataclasses.replace(folders, decoder=folder)
        load = load_trained if folder.is_surrogate else load_graft
        model = load(checkpoint.folder, folder, **options)
    model.to(distributed.device())
    loader = make_loader(config, model, folders=folders)
    parts = [Once(loader, records, config.validation.limit) for records in held_out(config)]
    return {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, **mean_loss(model, parts)}


def _with_samples(config: RunConfig, weights: Path, sources: Sequence[SourceConfig], batch: int) -> RunConfig:
    """Returns the configuration of a run with the samples that are measured, and only as much other data as needed."""
    held = config.validation
    if sources:
        held = held.model_copy(update={"sources": tuple(sources), "share": 0.0, "limit": None})
    if not held.active:
        raise ConfigError(f"{weights} holds out no samples; name some with --data.")
    changes: dict[str, Any] = {"prepared": None}
    if not held.share:
        changes["sources"] = held.sources
    data = config.data.model_copy(update=changes)
    return config.model_copy(update={"validation": held, "data": data, "micro_batch": batch})
