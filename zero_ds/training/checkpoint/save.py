"""Saves a checkpoint: written into a temporary folder, compared with the live model, synced, renamed, and only then
does `latest` move.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zero_ds.runtime import distributed, lock
from zero_ds.runtime.failure import WATCH
from zero_ds.runtime.files import disk_sentence, write_atomically
from zero_ds.runtime.safetensors import SafetensorsStream
from zero_ds.runtime.zero3 import parameter_shape
from zero_ds.training.checkpoint import KEYS
from zero_ds.training.checkpoint.best import best_folder
from zero_ds.training.checkpoint.checkpoint import FOLDER_NAME, CheckpointError, Progress
from zero_ds.training.checkpoint.comparison import Comparison
from zero_ds.training.checkpoint.manifest import Manifest, versions, write_manifest
from zero_ds.training.engine import Engine


def save_checkpoint(run: Path, engine: Engine, manifest: Manifest, progress: Progress, keep: int) -> Path:
    """Saves a checkpoint after `progress["step"]` steps and returns its folder. A collective.

    Parameters are gathered one piece at a time, and rank 0 writes them. The newest `keep` checkpoints stay.

    Raises:
        CheckpointError: the disk refused, the gathered content differs from the live model (`Comparison`), or another
            job has taken the folder; earlier checkpoints are unchanged.
    """
    step = progress["step"]
    final, temporary = run / f"step-{step:06d}", run / f".step-{step:06d}.{uuid.uuid4().hex[:12]}.tmp"
    writer = _Writer(temporary, engine) if distributed.is_rank_zero() else None
    comparison = Comparison(engine.state)
    for name, parameter in engine.named.items():
        comparison.add(name, parameter)
        for key in KEYS:
            for piece in engine.state.pieces(parameter, key):
                if writer is not None:
                    comparison.add_piece(key, piece)
                    writer.add(name, key, piece)
    optimizer_steps, loss_scale = engine.state.steps(), engine.state.loss_scale()
    _refuse_difference(comparison.verdict(), writer, step)
    if writer is not None:
        writer.finish(
            {**manifest, "step": step, "versions": versions()},
            {**progress, "optimizer_steps": optimizer_steps, "loss_scale": loss_scale},
            final,
        )
    _stop_all_on_error(writer, run, step)
    if writer is not None:
        _delete_old(run, step, keep)
    distributed.barrier()
    return final


class UnlikeLiveError(CheckpointError):
    """A checkpoint would differ from the live model."""

    may_pass = True  # memory that fails does not fail in the same way twice; a setting does, and the launcher notices


class TakenError(CheckpointError):
    """Another job has taken over the run folder."""


def _refuse_difference(difference: str | None, writer: _Writer | None, step: int) -> None:
    """Raises on every rank if the gathered content differs from the live model.

    difference: as `Comparison.verdict` returned it, the same on every rank.
    """
    if difference is None:
        return
    sentence = f"step {step} is not saved: {difference}; earlier checkpoints are intact. Try another zero=NAME."
    if writer is not None:
        shutil.rmtree(writer.folder, ignore_errors=True)
        WATCH.record(sentence)
    raise UnlikeLiveError(sentence)


def _stop_all_on_error(writer: _Writer | None, run: Path, step: int) -> None:
    """Raises on every rank if rank 0 could not write. A collective."""
    error = writer.error if writer is not None else None
    sentence, final = f"step {step} could not be saved by rank 0.", True
    taken = isinstance(error, TakenError)
    if error is not None and writer is not None:
        shutil.rmtree(writer.folder, ignore_errors=True)
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        sentence = f"step {step} could not be saved in {run}: {reason}; earlier checkpoints are intact."
        # a full disk stays full; a file server that did not answer may answer the next attempt
        final = not isinstance(error, OSError) or disk_sentence(error) is not None
        if not taken:
            WATCH.record(sentence, final)  # before the other ranks know
    failures, passing, takeovers = distributed.sum_over_ranks(error is not None, not final, taken)
    if takeovers:
        WATCH.folder = None  # the launcher of the other job would take this reason for its own
    if failures:
        raised = CheckpointError(sentence)
        raised.may_pass = bool(passing)
        raise raised


def _delete_old(run: Path, step: int, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints up to `step`, and the best one."""
    folders = {int(path.name.removeprefix("step-")): path for path in run.iterdir() if FOLDER_NAME.fullmatch(path.name)}
    up_to_now = [folders[number] for number in sorted(folders) if number <= step]
    best = best_folder(run)
    for folder in up_to_now[:-keep]:
        if folder == best:
            continue
        shutil.rmtree(folder, ignore_errors=True)


class _Writer:
    """Rank 0's side of saving. It keeps the first error for later, because the other ranks are in collectives."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.error: OSError | CheckpointError | None = None
        self.folder = folder
        self.dtypes = {n: p.dtype for n, p in engine.named.items()}
        shapes = {n: parameter_shape(p) for n, p in engine.named.items()}
        self._try(self._open, shapes)

    def add(self, name: str, key: str, piece: torch.Tensor) -> None:
        """Appends a piece of one of a parameter's tensors (`KEYS`); the master copy also becomes the weight."""
        self._try(self._add, name, key, piece)

    def finish(self, manifest: Manifest, progress: Progress, final: Path) -> None:
        """Closes the files, writes what describes them, and moves the folder to its place."""
        self._try(self._finish, manifest, progress)
        self._try(self._publish, final)

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        if self.error is None:
            try:
                action(*arguments)
            except (OSError, CheckpointError) as error:
                self.error = error

    def _open(self, shapes: dict[str, torch.Size]) -> None:
        (self.folder / "resume").mkdir(parents=True)
        self.weights = SafetensorsStream(
            self.folder / "weights.safetensors", [(n, self.dtypes[n], shape) for n, shape in shapes.items()]
        )
        self.state = SafetensorsStream(
            self.folder / "resume" / "state.safetensors",
            [(f"{key}/{n}", torch.float32, shape) for n, shape in shapes.items() for key in KEYS],
        )

    def _add(self, name: str, key: str, piece: torch.Tensor) -> None:
        if key == "master":
            self.weights.write(name, piece.to(self.dtypes[name]))
        self.state.write(f"{key}/{name}", piece)

    def _finish(self, manifest: Manifest, progress: Progress) -> None:
        weights_sha256, state_sha256 = self.weights.close(), self.state.close()
        write_manifest(self.folder, {**manifest, "weights_sha256": weights_sha256})
        described = json.dumps({**progress, "state_sha256": state_sha256}, indent=2)
        write_atomically(self.folder / "resume" / "progress.json", described + "\n")
        sync_folder(self.folder / "resume")
        sync_folder(self.folder)

    def _publish(self, final: Path) -> None:
        if (taken := lock.lost(final.parent)) is not None:
            raise TakenError(taken)
        if final.is_dir():  # newer than `latest`: left by a kill before `latest` moved, or by a run that was set back
            shutil.rmtree(final)
        self.folder.rename(final)
        sync_folder(final.parent)
        write_atomically(final.parent / "latest", final.name + "\n")
        sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries, so that files written into it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
