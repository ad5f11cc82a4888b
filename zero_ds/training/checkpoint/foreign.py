"""Result folders that no run of ours has written: weights from elsewhere, with the manifest that consumers ask for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zero_ds.config.schema import RunConfig
from zero_ds.model.decoders import family_of
from zero_ds.model.decoders.folder import relied_on
from zero_ds.model.layer_plan import LayerPlan
from zero_ds.model.loading import model_hash
from zero_ds.runtime.files import new_folder, write_atomically
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.safetensors import SafetensorsStream
from zero_ds.training import stages
from zero_ds.training.checkpoint.checkpoint import CheckpointError, manifest_of, sync_folder, versions
from zero_ds.training.checkpoint.optimizer_state import PIECE

logger = logging.getLogger(__name__)

Declared = tuple[str, torch.dtype, torch.Size]
"""Name, type and shape of a tensor in a weights file."""


class WeightsDifferError(CheckpointError):
    """What was written is not what it should have become."""


def identity(config: RunConfig, plan: LayerPlan | None) -> dict[str, Any]:
    """What a manifest says of the models that the weights belong to, read from their folders.

    Raises:
        ConfigError: a folder that is not there.
    """
    target = local_folder(config.target)
    with_encoder = config.encoder is not None and stages.STAGES[config.stage].vision
    trained_in = stages.decoder_kind(config) == "surrogate" and config.surrogate
    return {
        "family": family_of(target).name,
        "target": config.target,
        "target_hash": model_hash(target),
        "encoder_hash": model_hash(local_folder(config.encoder.path)) if with_encoder and config.encoder else None,
        "plan": plan.to_json() if plan else None,
        "relies_on": relied_on(local_folder(config.surrogate) if trained_in and config.surrogate else target),
    }


def write_result(
    out: Path,
    config: RunConfig,
    manifest: dict[str, Any],
    step: int,
    tensors: Sequence[Declared],
    pieces: Callable[[str], Iterable[torch.Tensor]],
    expected_sha256: str | None = None,
) -> Path:
    """Writes the new folder `out` as a run leaves it, with one commit; returns the commit's folder.

    pieces: name -> the tensor's elements in order, in pieces of its flattened form, of which one is in memory at a
    time. There is no state to resume from. expected_sha256: of the weights file, where it is known.

    Raises:
        ConfigError: `out` holds something, or there is too little space.
        CheckpointError: a number that is not finite; WeightsDifferError: another hash than the expected one.
    """
    config = config.model_copy(update={"out": str(out)})
    size = sum(shape.numel() * dtype.itemsize for _, dtype, shape in tensors)
    name = f"step-{step:06d}"
    with new_folder(out, need=size) as folder:
        commit = folder / name
        commit.mkdir()
        stream = SafetensorsStream(commit / "weights.safetensors", tensors)
        with tqdm(total=size, desc="writing", unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
            for tensor, dtype, _ in tensors:
                for piece in pieces(tensor):
                    if not bool(torch.isfinite(piece).all()):
                        raise CheckpointError(f"{tensor} holds a number that is not finite; use another checkpoint.")
                    stream.write(tensor, piece.to(dtype))
                    bar.update(piece.numel() * dtype.itemsize)
        content = {**manifest_of(config), "versions": versions(), **manifest, "step": step}
        content["weights_sha256"] = stream.close()
        if expected_sha256 not in (None, content["weights_sha256"]):
            raise WeightsDifferError(f"the weights for {out} are not those that were expected.")
        write_atomically(commit / "manifest.json", json.dumps(content, indent=2) + "\n")
        write_atomically(folder / "config.yaml", config.dump())
        write_atomically(folder / "latest", name + "\n")
        for written in (commit, folder):
            sync_folder(written)
    return out / name


def in_pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's elements in order, PIECE of them at a time."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        yield flat[start : start + PIECE]
