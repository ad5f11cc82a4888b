"""Loads a checkpoint into a model and an engine; every rank reads its own share of the state and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero_ds.runtime import distributed
from zero_ds.runtime.safetensors import joint_spans
from zero_ds.runtime.zero3 import gathered, is_partitioned, parameter_shape
from zero_ds.training.checkpoint import KEYS
from zero_ds.training.checkpoint.checkpoint import Checkpoint, CheckpointError, Progress, check_hash
from zero_ds.training.engine import Engine


def load_weights_(
    targets: dict[str, torch.nn.Parameter], checkpoint: Checkpoint, skip: Callable[[str], bool]
) -> set[str]:
    """Copies a checkpoint's weights into the parameters of the same names; returns the names copied. A collective.

    One tensor is in memory at a time. Where ZeRO-3 partitions parameters, only rank 0 reads.

    skip: whether a weight of this name may be ignored if the model has no such parameter (translators, for example,
    where the decoder is the full model).

    Raises:
        CheckpointError: a damaged file, a name that the model does not have, or another shape.
    """
    copied = set()
    _check_together(checkpoint.weights_files())
    with checkpoint.open_weights() as file:
        for name in file.keys():  # noqa: SIM118 - it is not a mapping
            parameter = targets.get(name)
            if parameter is None:
                if skip(name):
                    continue
                raise CheckpointError(
                    f"{checkpoint.folder} holds {name}, which this model does not have; it was made for another model."
                )
            shape, stored = tuple(parameter_shape(parameter)), tuple(file.get_slice(name).get_shape())
            if stored != shape:
                raise CheckpointError(
                    f"{name} in {checkpoint.folder} has shape {stored}, but in the model it has {shape}."
                )
            copy_into_(parameter, file, name)
            copied.add(name)
    return copied


def copy_into_(parameter: torch.nn.Parameter, file: Any, name: str) -> None:
    """Copies the tensor `name` of an open safetensors file into a parameter, partitioned or whole. A collective."""
    with gathered([parameter], modifier_rank=0), torch.no_grad():
        if distributed.is_rank_zero() or not is_partitioned(parameter):
            parameter.copy_(file.get_tensor(name).to(parameter.dtype))


def restore_(engine: Engine, checkpoint: Checkpoint) -> Progress:
    """Restores master copies, moments, step counts and loss scale; returns the run's progress. A collective.

    Raises:
        CheckpointError: damaged state, or state of other parameters than the run trains.
    """
    progress, state = _resume_state(checkpoint)
    if state.names != set(engine.named):
        other = min(state.names ^ set(engine.named))
        raise CheckpointError(
            f"{checkpoint.folder} was saved by a run that trains other parameters (the first: {other})."
        )
    if missing := sorted(set(engine.parts) - set(progress["optimizer_steps"])):
        raise CheckpointError(
            f"{checkpoint.folder}/resume/progress.json is damaged: it has no step count of the {missing[0]}; use "
            "another checkpoint."
        )
    for name, parameter in engine.named.items():
        state.put_(engine, name, parameter)
    engine.state.set_steps(progress["optimizer_steps"])
    engine.state.set_loss_scale(progress["loss_scale"])
    return progress


def carry_over_(engine: Engine, checkpoint: Checkpoint) -> list[str]:
    """Gives each part that trains in both runs the optimizer state it had in the earlier one. A collective.

    Returns the names of these parts. All other parts start with fresh moments.

    Raises:
        CheckpointError: damaged state, or a part of which the earlier run trained only some parameters.
    """
    progress, state = _resume_state(checkpoint)
    carried = []
    for part, names in engine.parts.items():
        common = state.names & set(names)
        if not common:
            continue
        if missing := sorted(set(names) - common):
            raise CheckpointError(
                f"{checkpoint.folder} trained only some of the {part} (not {missing[0]}), so its optimizer cannot go "
                "on; use init_from, or train the same parameters."
            )
        for name in names:
            state.put_(engine, name, engine.named[name])
        carried.append(str(part))
    engine.state.set_steps({part: progress["optimizer_steps"][part] for part in carried})
    return carried


class _StateFiles:
    """The files of state on disk, mapped into memory."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._spans = joint_spans(paths)
        self._bytes: dict[Path, np.memmap[Any, np.dtype[np.uint8]]] = {}
        self.names = {name.split("/", 1)[1] for name in self._spans}
        """Names of the parameters whose state it holds."""

    def put_(self, engine: Engine, name: str, parameter: torch.nn.Parameter) -> None:
        """Copies this rank's share of a parameter's master copy and moments into the engine."""
        start, count = engine.state.span_to_set(parameter)
        for key in KEYS:
            span = self._spans[f"{key}/{name}"]
            if span.file not in self._bytes:
                self._bytes[span.file] = np.memmap(span.file, dtype=np.uint8, mode="r")
            begin = span.start + 4 * start
            values = np.array(self._bytes[span.file][begin : begin + 4 * count]).view(np.float32)
            engine.state.set_held(parameter, key, torch.from_numpy(values))


def _resume_state(checkpoint: Checkpoint) -> tuple[Progress, _StateFiles]:
    """Opens a checkpoint's resume state, after comparing it with its hashes. A collective.

    Raises:
        CheckpointError: the state is missing or damaged.
    """
    progress, files = checkpoint.progress(), checkpoint.state_files()
    _check_together(files)
    return progress, _StateFiles(files)


def _check_together(files: Mapping[Path, str]) -> None:
    """Checks the hashes of files that all ranks are about to read: each rank reads some of them. A collective.

    Raises:
        CheckpointError: one of this rank's files is missing or damaged; the watch ends the other ranks.
    """
    for path, expected in list(files.items())[distributed.rank() :: distributed.world_size()]:
        check_hash(path, expected)
    distributed.wait_for_all()
