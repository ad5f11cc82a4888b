"""Writes weights from elsewhere as a run folder, with the manifest that readers of runs need."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.files import new_folder, write_atomically
from zero_ds.runtime.safetensors import SafetensorsStream, content_sha256
from zero_ds.training.checkpoint import PIECE
from zero_ds.training.checkpoint.checkpoint import CheckpointError
from zero_ds.training.checkpoint.manifest import Manifest, describe_run, versions, write_manifest
from zero_ds.training.checkpoint.save import sync_folder

logger = logging.getLogger(__name__)

Declared = tuple[str, torch.dtype, torch.Size]
"""Name, type and shape of a tensor in a weights file."""


class WeightsDifferError(CheckpointError):
    """The weights written are not those that were expected."""


def write_result(
    out: Path,
    config: RunConfig,
    manifest: Manifest | dict[str, Any],
    step: int,
    tensors: Sequence[Declared],
    pieces: Callable[[str], Iterable[torch.Tensor]],
    expected_sha256: str | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Writes the new run folder `out` with one checkpoint, without resume state; returns the checkpoint's folder.

    manifest: fields besides those that follow from `config`; with `weights_files`, the result says in the same way what
    its weights are. pieces: maps a tensor's name to its elements in order, as pieces of the flattened tensor, of which
    one is in memory at a time. expected_sha256: SHA-256 of the weights in the same way, if it is known. write_more:
    writes more into the checkpoint's folder.

    Raises:
        ConfigError: `out` is not empty, or the disk has too little space.
        CheckpointError: a number that is not finite. WeightsDifferError: another hash than the expected one.
    """
    config = config.model_copy(update={"out": str(out)})
    name = f"step-{step:06d}"
    size = sum(shape.numel() * dtype.itemsize for _, dtype, shape in tensors)
    with new_folder(out, need=size) as folder:
        (folder / name).mkdir()
        written = _write_weights(folder / name / "weights.safetensors", tensors, pieces, "weights_files" in manifest)
        if expected_sha256 not in (None, written["weights_sha256"]):
            raise WeightsDifferError(f"the weights for {out} are not those that were expected.")
        if write_more is not None:
            write_more(folder / name)
        known = cast(Manifest, manifest)
        write_manifest(
            folder / name, {**describe_run(config), "versions": versions(), **known, "step": step, **written}
        )
        write_atomically(folder / "config.yaml", config.dump())
        write_atomically(folder / "latest", name + "\n")
        sync_folder(folder / name)
        sync_folder(folder)
    return out / name


def _write_weights(
    file: Path, tensors: Sequence[Declared], pieces: Callable[[str], Iterable[torch.Tensor]], by_content: bool
) -> Manifest:
    """Writes the weights file and returns the fields of the manifest about it.

    by_content: whether `weights_sha256` is that of the tensors, or of the file.

    Raises:
        CheckpointError: a number that is not finite.
    """
    stream = SafetensorsStream(file, tensors, digests=True)
    size = sum(shape.numel() * dtype.itemsize for _, dtype, shape in tensors)
    with tqdm(total=size, desc="writing", unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        for tensor, dtype, _ in tensors:
            for piece in pieces(tensor):
                if not bool(torch.isfinite(piece).all()):
                    raise CheckpointError(f"{tensor} holds a number that is not finite; use another checkpoint.")
                stream.write(tensor, piece.to(dtype))
                bar.update(piece.numel() * dtype.itemsize)
    of_file = stream.close()
    if not by_content:
        return {"weights_sha256": of_file}
    return {"weights_sha256": content_sha256(stream.digests), "weights_files": {file.name: of_file}}


def in_pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields a tensor's elements in order, `PIECE` of them at a time."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        yield flat[start : start + PIECE]
