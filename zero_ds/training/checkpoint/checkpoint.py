"""Commits of a run: trainable weights with a manifest, and apart from them the state to resume from.

    RUN/config.yaml                     the resolved configuration, and deepspeed.json as DeepSpeed got it
    RUN/latest                          name of the newest complete commit
    RUN/step-000200/weights.safetensors trainable parameters only, in the training precision
    RUN/step-000200/manifest.json       stage, base models with hashes, LayerPlan, step, versions, hash of the weights
    RUN/step-000200/resume/             fp32 master copy and both moments of each trainable parameter; step and position

A commit is written to a temporary folder, synced, renamed, and only then does `latest` move.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero_ds import __version__
from zero_ds.config.schema import RunConfig
from zero_ds.model.loading import HASH_VERSION
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.failure import WATCH
from zero_ds.runtime.files import open_regular, write_atomically
from zero_ds.runtime.safetensors import SafetensorsStream, spans
from zero_ds.runtime.zero3 import gathered, is_partitioned, parameter_shape
from zero_ds.training.checkpoint.optimizer_state import KEYS
from zero_ds.training.engine import Engine

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"step-(\d{6,})")


class CheckpointError(ValueError):
    """A commit that cannot be written, or that does not fit what wants to read it."""


def versions() -> dict[str, str]:
    """Versions of what made a file."""
    from importlib.metadata import version

    packages = ("torch", "deepspeed", "transformers")
    return {"zero_ds": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}


def save(
    run: Path,
    engine: Engine,
    manifest: dict[str, Any],
    progress: dict[str, Any],
    keep: int,
) -> Path:
    """Commits the run after `progress['step']` steps. Every rank calls it; rank 0 writes, one parameter at a time.

    Raises:
        CheckpointError: the disk refused; earlier commits are as they were.
    """
    name = f"step-{progress['step']:06d}"
    final, temporary = run / name, run / f".{name}.tmp"
    writer = _Writer(temporary, engine) if distributed.is_rank_zero() else None
    for parameter_name, parameter in engine.named.items():
        for key in KEYS:
            for piece in engine.state.pieces(parameter, key):
                if writer is not None:
                    writer.add(parameter_name, key, piece)
    progress = {**progress, "optimizer_steps": engine.state.steps(), "loss_scale": engine.state.loss_scale()}
    if writer is not None:
        writer.finish({**manifest, "step": progress["step"], "versions": versions()}, progress, final)
    if writer is not None and writer.error:
        shutil.rmtree(temporary, ignore_errors=True)
        sentence = f"step {progress['step']} could not be saved in {run}: {writer.error}; earlier commits are intact."
        WATCH.record(sentence)  # before the other ranks know
    failures = distributed.sum_over_ranks(1.0 if writer is not None and writer.error else 0.0)[0]
    if failures:
        if writer is not None:
            raise CheckpointError(sentence)
        raise CheckpointError(f"step {progress['step']} could not be saved by rank 0.")
    if writer is not None:
        steps = {int(path.name[5:]): path for path in run.iterdir() if COMMIT.fullmatch(path.name)}
        for old in [steps[step] for step in sorted(steps) if step <= progress["step"]][:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return final


class _Writer:
    """Rank 0's side of a commit. The first error is kept, for the other ranks are still in collectives."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.error: str | None = None
        self.folder = folder
        self.dtypes = {n: p.dtype for n, p in engine.named.items()}
        shapes = {n: parameter_shape(p) for n, p in engine.named.items()}
        self._try(self._open, shapes)

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        if self.error is None:
            try:
                action(*arguments)
            except OSError as error:
                self.error = f"{error.strerror or error}"

    def _open(self, shapes: dict[str, torch.Size]) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "resume").mkdir(parents=True)
        self.weights = SafetensorsStream(
            self.folder / "weights.safetensors", [(n, self.dtypes[n], shape) for n, shape in shapes.items()]
        )
        self.state = SafetensorsStream(
            self.folder / "resume" / "state.safetensors",
            [(f"{key}/{n}", torch.float32, shape) for n, shape in shapes.items() for key in KEYS],
        )

    def add(self, name: str, key: str, piece: torch.Tensor) -> None:
        self._try(self._add, name, key, piece)

    def _add(self, name: str, key: str, piece: torch.Tensor) -> None:
        if key == "master":
            self.weights.write(name, piece.to(self.dtypes[name]))
        self.state.write(f"{key}/{name}", piece)

    def finish(self, manifest: dict[str, Any], progress: dict[str, Any], final: Path) -> None:
        self._try(self._finish, manifest, progress)
        self._try(self._publish, final)

    def _publish(self, final: Path) -> None:
        """The commit under its name, and then `latest`."""
        if final.is_dir():  # behind `latest`: left by a kill before it moved, or by a run that was set back
            shutil.rmtree(final)
        self.folder.rename(final)
        sync_folder(final.parent)
        write_atomically(final.parent / "latest", final.name + "\n")
        sync_folder(final.parent)

    def _finish(self, manifest: dict[str, Any], progress: dict[str, Any]) -> None:
        content = {**manifest, "weights_sha256": self.weights.close()}
        progress = {**progress, "state_sha256": self.state.close()}
        write_atomically(self.folder / "manifest.json", json.dumps(content, indent=2) + "\n")
        write_atomically(self.folder / "resume" / "progress.json", json.dumps(progress, indent=2) + "\n")
        sync_folder(self.folder / "resume")
        sync_folder(self.folder)


def sync_folder(folder: Path) -> None:
    """Makes sure that what was written into the folder outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A complete commit on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def progress(self) -> dict[str, Any]:
        """What is saved beside the optimizer's state: the step, and the state's hash.

        Raises:
            CheckpointError: missing or damaged.
        """
        path = self.folder / "resume" / "progress.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); use another commit.") from None

    def weights(self) -> dict[str, torch.Tensor]:
        """All trainable weights, checked against the manifest's hash.

        Raises:
            CheckpointError: the file is missing or differs from what was written.
        """
        from safetensors.torch import load_file

        path = self.folder / "weights.safetensors"
        check_hash(path, str(self.manifest.get("weights_sha256")))
        return dict(load_file(path))

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Weights whose names start with `prefix`, without it."""
        return {n.removeprefix(prefix): t for n, t in self.weights().items() if n.startswith(prefix)}


def check_hash(path: Path, expected: str) -> None:
    """Raises CheckpointError unless the file has this SHA-256."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; use another commit.") from None
    if digest.hexdigest() != expected:
        raise CheckpointError(f"{path} is damaged: its content is not what was saved; use another commit.")


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The commit at `path`: a commit folder, or a run folder, of which the newest commit is taken.

    Raises:
        CheckpointError: neither of the two, or a manifest that cannot be read.
    """
    folder = Path(path)
    latest = folder / "latest"
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not COMMIT.fullmatch(name):
            raise CheckpointError(f"{latest} names no commit; write the name of a step-* folder into it.")
        folder = folder / name
    file = folder / "manifest.json"
    if not file.is_file():
        raise CheckpointError(f"{path} holds no commit (no manifest.json); was the run finished?")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        int(manifest["step"]), dict(manifest.get("relies_on") or {})
        return Checkpoint(folder, manifest)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); use another commit.") from None


def load_weights_(targets: dict[str, torch.nn.Parameter], commit: Checkpoint, skip: Callable[[str], bool]) -> set[str]:
    """Copies a commit's weights into parameters of the same names. Every rank calls it; returns the names copied.

    One tensor is in memory at a time; into partitions only rank 0 reads. `skip` says which names may be left out
    (translators, where the decoder has none).

    Raises:
        CheckpointError: a damaged file, a name the model does not have, or another shape.
    """
    from safetensors import safe_open

    copied = set()
    path = commit.folder / "weights.safetensors"
    _check_on_rank_zero(path, str(commit.manifest.get("weights_sha256")))
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            parameter = targets.get(name)
            if parameter is None:
                if skip(name):
                    continue
                raise CheckpointError(
                    f"{commit.folder} holds {name}, which this model has not; it was made for another model."
                )
            shape, stored = tuple(parameter_shape(parameter)), tuple(file.get_slice(name).get_shape())
            if stored != shape:
                raise CheckpointError(f"{name} in {commit.folder} has shape {stored}, the model's has {shape}.")
            with gathered([parameter], modifier_rank=0), torch.no_grad():
                if distributed.is_rank_zero() or not is_partitioned(parameter):
                    parameter.copy_(file.get_tensor(name).to(parameter.dtype))
            copied.add(name)
    return copied


def restore_(engine: Engine, commit: Checkpoint) -> dict[str, Any]:
    """Puts master copies, moments and step count back into the engine; returns the run's progress. A collective.

    Raises:
        CheckpointError: damaged state, or state of other parameters than the run trains.
    """
    progress, state = _resume_state(commit)
    if state.names != set(engine.named):
        other = sorted(state.names ^ set(engine.named))[0]
        raise CheckpointError(f"{commit.folder} was saved by a run that trains other parameters (first: {other}).")
    for name, parameter in engine.named.items():
        state.put_(engine, name, parameter)
    engine.state.set_steps(progress["optimizer_steps"])
    engine.state.set_loss_scale(progress["loss_scale"])
    return progress


def carry_over_(engine: Engine, commit: Checkpoint) -> list[str]:
    """Gives every part that trains in both runs the optimizer state it had there; returns their names. A collective.

    Raises:
        CheckpointError: damaged state, or a part of which only some parameters trained there.
    """
    progress, state = _resume_state(commit)
    carried = []
    for part, names in engine.parts.items():
        if not (common := state.names & set(names)):
            continue
        if missing := sorted(set(names) - common):
            raise CheckpointError(
                f"{commit.folder} trained only some of the {part} (not {missing[0]}), so its optimizer cannot go on; "
                "use init_from, or train the same parameters."
            )
        for name in names:
            state.put_(engine, name, engine.named[name])
        carried.append(str(part))
    engine.state.set_steps({part: progress["optimizer_steps"][part] for part in carried})
    return carried


class _StateFile:
    """The resume state on disk, of which every rank reads what it holds and no more."""

    def __init__(self, path: Path) -> None:
        self._spans = spans(path)
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self.names = {name.split("/", 1)[1] for name in self._spans}

    def put_(self, engine: Engine, name: str, parameter: torch.nn.Parameter) -> None:
        start, count = engine.state.span_to_set(parameter)
        for key in KEYS:
            begin = self._spans[f"{key}/{name}"].start + 4 * start
            values = np.array(self._bytes[begin : begin + 4 * count]).view(np.float32)
            engine.state.set_held(parameter, key, torch.from_numpy(values))


def _resume_state(commit: Checkpoint) -> tuple[dict[str, Any], _StateFile]:
    """Progress and state of a commit, checked.

    Raises:
        CheckpointError: missing or damaged.
    """
    progress = commit.progress()
    path = commit.folder / "resume" / "state.safetensors"
    _check_on_rank_zero(path, str(progress.get("state_sha256")))
    return progress, _StateFile(path)


def _check_on_rank_zero(path: Path, expected: str) -> None:
    """The hash of a file that all ranks are about to read, which one of them reads for it; the others wait."""
    with distributed.rank_zero_first():
        if distributed.is_rank_zero():
            check_hash(path, expected)


def check_manifest(commit: Checkpoint, expected: dict[str, Any], allow: Iterable[str] = ()) -> None:
    """Compares fields of a manifest with what a consumer needs.

    Raises:
        ConfigError: a field that differs, naming it and both values.
    """
    for key, value in expected.items():
        stated = commit.manifest.get(key)
        if stated == value or key in set(allow):
            continue
        if key.endswith("_hash") and len({str(one).startswith(HASH_VERSION) for one in (stated, value) if one}) == 2:
            raise ConfigError(
                f"{commit.folder} cannot be compared: one of its {key}, {stated}, and what it should be, {value}, was "
                "taken by an early version of zero_ds, in another way; make both with one version."
            )
        raise ConfigError(f"{commit.folder} does not fit: its {key} is {stated!r}, here it is {value!r}.")


def manifest_of(config: RunConfig) -> dict[str, Any]:
    """What a manifest says of the run itself."""
    return {"stage": config.stage, "config": config.model_dump(mode="json"), "fingerprint": config.fingerprint()}


# -- the names of before, until every package uses the new ones --------------------------------------------------------

Commit = Checkpoint
find_commit = find_checkpoint
