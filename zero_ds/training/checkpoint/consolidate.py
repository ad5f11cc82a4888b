"""Weights in one file, on one CPU: from the files of several ranks, from resume state, or from DeepSpeed's own shards.

DeepSpeed's `engine.save_checkpoint` writes each rank's share of the fp32 master copies, flattened. ZeRO-3 splits every
parameter over the ranks; ZeRO-1 and 2 lay each group of parameters end to end and split the whole. Names and shapes are
in the model states, in the order that the parameters have in the shares. DeepSpeed's own zero_to_fp32.py reads the
files in the same way, but unpickles anything they hold.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero_ds.config.loading import validate
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import check_vacant, write_atomically
from zero_ds.runtime.safetensors import SafetensorsStream, Span, joint_spans, torch_dtype
from zero_ds.runtime.torch_files import read_torch_file
from zero_ds.training import stages
from zero_ds.training.blueprint import blueprint, weights_names
from zero_ds.training.checkpoint import PIECE
from zero_ds.training.checkpoint.checkpoint import Checkpoint, CheckpointError, check_hash, find_checkpoint
from zero_ds.training.checkpoint.foreign import Declared, WeightsDifferError, write_result
from zero_ds.training.checkpoint.manifest import Manifest, describe_models
from zero_ds.training.checkpoint.save import sync_folder
from zero_ds.training.deepspeed import resolve_precision

logger = logging.getLogger(__name__)

SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MAPPED = 512 << 20
"""Number of bytes read before the files are mapped again: until then they count as memory of this process."""


class _Ignored:
    """Replaces an object of DeepSpeed that is not needed."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


STAND_INS: dict[str, Any] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Ignored,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Ignored,
    "deepspeed.utils.tensor_fragment.fragment_address": _Ignored,
}
"""Classes that DeepSpeed's files name besides tensors, and the types that they are read as."""


@dataclass(frozen=True)
class Extent:
    """Consecutive elements in a rank's share."""

    rank: int
    flat: int
    """Index of the flattened tensor in the share."""
    start: int
    stop: int


class ZeroCheckpoint:
    """A folder that any number of ranks wrote with DeepSpeed's `engine.save_checkpoint` under ZeRO-1, 2 or 3."""

    def __init__(self, folder: Path) -> None:
        """Reads names, shapes and positions of the parameters, but no weight yet.

        Raises:
            ConfigError: the folder does not exist, a rank's file is missing or damaged, or a share has another size
                than its parameters.
        """
        self.folder = _tagged(folder)
        self.files = _rank_files(self.folder)
        world = len(self.files)
        first = self._optimizer(0)
        try:
            self.stage = int(first["zero_stage"])
            partitions = first["partition_count"]
            self.key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
            paddings = [[int(count) for count in group] for group in first.get("param_alignment_paddings") or ()]
            names = "zero_pp_rank_0_mp_rank_00_model_states.pt" if self.stage == 3 else "mp_rank_00_model_states.pt"
            states = read_torch_file(self.folder / names, STAND_INS)
            groups = [
                {str(name): torch.Size(shape) for name, shape in group.items()} for group in states["param_shapes"]
            ]
            self.step = int(states.get("global_steps", 0))
            self.version = str(states.get("ds_version"))
            self.dtype = _dtype(states.get("ds_config") or {})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{self.folder} is not a ZeRO checkpoint of DeepSpeed ({type(error).__name__}: {error})."
            ) from None
        expected = max(partitions) if isinstance(partitions, list) else partitions
        if expected != world:
            raise ConfigError(
                f"{self.folder} was saved by {expected} ranks and holds the shares of {world}; find the others."
            )
        self.shapes = {name: shape for group in groups for name, shape in group.items()}
        sizes = [self._sizes(rank) for rank in range(world)]
        self._kept = _Shares(self)
        if self.stage == 3:
            self._extents = self._split_by_parameter(sizes)
        else:
            self._extents = self._split_by_group(sizes, groups, paddings)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yields a parameter's master copy in float32, as pieces of the flattened tensor."""
        for extent in self._extents[name]:
            for start in range(extent.start, extent.stop, PIECE):
                yield self._kept.take(extent.rank, extent.flat, start, min(start + PIECE, extent.stop))

    def flats(self, rank: int) -> list[torch.Tensor]:
        """Returns a rank's share: flattened float32 tensors, mapped from the file."""
        found = self._optimizer(rank).get(self.key)
        if not isinstance(found, list) or not all(
            isinstance(flat, torch.Tensor) and flat.dtype == torch.float32 and flat.dim() == 1 for flat in found
        ):
            raise ConfigError(f"{self.files[rank]} holds no fp32 master copies ({self.key}).")
        return found

    def _optimizer(self, rank: int) -> dict[str, Any]:
        content = read_torch_file(self.files[rank], STAND_INS)
        state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
        if not isinstance(state, dict):
            raise ConfigError(f"{self.files[rank]} holds no state of a ZeRO optimizer.")
        return state

    def _sizes(self, rank: int) -> list[int]:
        return [flat.numel() for flat in self.flats(rank)]

    def _split_by_parameter(self, sizes: list[list[int]]) -> dict[str, list[Extent]]:
        """Finds the extents of each parameter under ZeRO-3.

        Every rank holds an equal part of each parameter, the last ranks' padded. A rank's parts follow each other.
        """
        world, found, offset = len(sizes), {}, 0
        for name, shape in self.shapes.items():
            part = math.ceil(shape.numel() / world)
            extents: list[Extent] = []
            for rank in range(world):
                wanted = min(part, max(0, shape.numel() - rank * part))
                extents += _within(sizes[rank], rank, offset, offset + wanted)
            found[name] = extents
            offset += part
        for rank, flats in enumerate(sizes):
            if sum(flats) != offset:
                raise ConfigError(f"{self.files[rank]} holds {sum(flats)} elements where its parameters have {offset}.")
        return found

    def _split_by_group(
        self, sizes: list[list[int]], groups: list[dict[str, torch.Size]], paddings: list[list[int]]
    ) -> dict[str, list[Extent]]:
        """Finds the extents of each parameter under ZeRO-1 and 2.

        The parameters of a group follow each other, each with its padding, and the whole is cut into a part per rank.
        """
        world, found = len(sizes), {}
        paddings = paddings or [[0] * len(group) for group in groups]
        if any(len(flats) != len(groups) for flats in sizes) or [len(p) for p in paddings] != [len(g) for g in groups]:
            raise ConfigError(f"{self.folder} has {len(groups)} groups of parameters, and shares of another number.")
        for number, group in enumerate(groups):
            held = [flats[number] for flats in sizes]
            offset = 0
            for padding, (name, shape) in zip(paddings[number], group.items(), strict=True):
                extents: list[Extent] = []
                begin = 0  # first element of the rank's part
                for rank in range(world):
                    low, high = max(offset, begin), min(offset + shape.numel(), begin + held[rank])
                    if low < high:
                        extents.append(Extent(rank, number, low - begin, high - begin))
                    begin += held[rank]
                found[name] = extents
                offset += shape.numel() + padding
            align = 2 * world  # DeepSpeed pads a group to a multiple of this
            if math.ceil(offset / align) != math.ceil(sum(held) / align):
                raise ConfigError(
                    f"group {number} in {self.folder} has {sum(held)} elements where its parameters have {offset}."
                )
        return found


class _Shares:
    """The ranks' shares, mapped from their files on first use and unmapped after every `MAPPED` bytes."""

    def __init__(self, checkpoint: ZeroCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._mapped: dict[int, list[torch.Tensor]] = {}
        self._read = 0

    def take(self, rank: int, flat: int, start: int, stop: int) -> torch.Tensor:
        """Returns elements of one of a rank's flattened tensors."""
        if self._read >= MAPPED:
            self._mapped.clear()
            self._read = 0
        if rank not in self._mapped:
            self._mapped[rank] = self._checkpoint.flats(rank)
        self._read += 4 * (stop - start)
        return self._mapped[rank][flat][start:stop]


def _within(sizes: list[int], rank: int, start: int, stop: int) -> list[Extent]:
    """Returns the extents of elements `start` to `stop`, counted through all of a rank's flattened tensors.

    sizes: number of elements of each of these tensors.
    """
    extents, begin = [], 0
    for flat, size in enumerate(sizes):
        low, high = max(start, begin), min(stop, begin + size)
        if low < high:
            extents.append(Extent(rank, flat, low - begin, high - begin))
        begin += size
    return extents


def _tagged(folder: Path) -> Path:
    """Returns the folder with the shards: `folder` itself, or the one in it that DeepSpeed's `latest` names.

    Raises:
        ConfigError: neither exists.
    """
    if not folder.is_dir():
        raise ConfigError(f"folder {folder} does not exist; name the one that engine.save_checkpoint wrote.")
    latest = folder / "latest"
    if latest.is_file() and not any(SHARD.fullmatch(path.name) for path in folder.iterdir()):
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"\w[\w.-]*", tag) or not (folder / tag).is_dir():
            raise ConfigError(
                f"{latest} does not name a folder next to it; name the folder with the *_optim_states.pt files."
            )
        return folder / tag
    return folder


def _rank_files(folder: Path) -> list[Path]:
    """Returns the files with the optimizer states of rank 0, 1, ...

    Raises:
        ConfigError: some are missing, or there are two of one rank.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := SHARD.fullmatch(path.name):
            if int(match[2]):
                raise ConfigError(
                    f"{path} is from a model-parallel run, which zero_ds does not support; use that trainer's tools."
                )
            if int(match[1]) in found:
                raise ConfigError(
                    f"{folder} holds two files of rank {int(match[1])}, so of two runs; remove the older ones."
                )
            found[int(match[1])] = path
    if not found:
        raise ConfigError(
            f"{folder} holds neither shards of DeepSpeed (*_optim_states.pt) nor a checkpoint of zero_ds (resume/)."
        )
    for rank in range(max(found) + 1):
        if rank not in found:
            raise ConfigError(
                f"{folder} lacks the share of rank {rank} (zero_pp_rank_{rank}_mp_rank_00_optim_states.pt)."
            )
    return [found[rank] for rank in sorted(found)]


def _dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Returns the type that the run computed in, from its DeepSpeed configuration."""
    for key, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        if (ds_config.get(key) or {}).get("enabled") is True:
            return dtype
    return torch.float32


def consolidate_shards(folder: Path, config: RunConfig, out: Path) -> Path:
    """Writes the weights of DeepSpeed's ZeRO checkpoint as the run folder `out`; returns the checkpoint's folder.

    config: of the run that saved it, which says what trained and against which models. Memory: a piece of a parameter,
    the headers of all files, and up to `MAPPED` bytes that were read last.

    Raises:
        ConfigError: see `ZeroCheckpoint`; other parameters, or other shapes, than `config` trains; `out` exists.
        CheckpointError: a number that is not finite.
    """
    check_vacant(out)
    stages.stage_of(config)
    checkpoint = ZeroCheckpoint(folder)
    model = blueprint(config)
    names = weights_names(model, stages.trained_parts(config))
    if unknown := sorted(set(checkpoint.shapes) - set(names)):
        raise ConfigError(
            f"{checkpoint.folder} holds {unknown[0]} (and {len(unknown) - 1} more), which stage {config.stage} on "
            "these models does not train; name the recipe of the run that saved it."
        )
    if missing := sorted(set(names) - set(checkpoint.shapes)):
        raise ConfigError(
            f"{checkpoint.folder} lacks {missing[0]} (and {len(missing) - 1} more), which stage {config.stage} on "
            "these models trains; name the recipe of the run that saved it."
        )
    for name, parameter in model.named_parameters():
        if name in names and parameter.shape != checkpoint.shapes[name]:
            raise ConfigError(
                f"{name} in {checkpoint.folder} has shape {tuple(checkpoint.shapes[name])}, the recipe's model has "
                f"{tuple(parameter.shape)}; name the recipe of the run that saved it."
            )
    wanted = {weights: tree for tree, weights in names.items()}
    declared = [(name, checkpoint.dtype, checkpoint.shapes[tree]) for name, tree in wanted.items()]
    origin = {"layout": f"ZeRO-{checkpoint.stage}", "ranks": len(checkpoint.files), "deepspeed": checkpoint.version}
    # the weights are named by their content, as those that the run itself saves
    manifest: Manifest = {**describe_models(config, model.plan), "origin": origin, "weights_files": {}}

    def pieces(name: str) -> Iterable[torch.Tensor]:
        return checkpoint.pieces(wanted[name])

    return write_result(out, config, manifest, checkpoint.step, declared, pieces)


def holds_resume_state(folder: Path) -> bool:
    """Returns whether `folder` is a run folder or a checkpoint of zero_ds."""
    return (folder / "manifest.json").is_file() or any(folder.glob("step-*/manifest.json"))


def consolidate_checkpoint(folder: Path, out: Path, *, with_state: bool = False) -> Path:
    """Writes the weights of one of our checkpoints as a single file; returns the checkpoint's folder.

    If files of weights are lost or damaged, they are computed from the resume state. In either case, the manifest's
    hash proves that every byte is as it was saved. The result does not depend on how many ranks saved the checkpoint.

    with_state: whether the result also has the resume state, in a single file, so that a run can go on from it.

    Raises:
        CheckpointError: the run has no checkpoint, its state is damaged, or the state does not give those weights.
        ConfigError: `out` exists.
    """
    check_vacant(out)
    checkpoint = find_checkpoint(folder)
    config = validate(RunConfig, checkpoint.manifest.get("config"), what=f"manifest of {checkpoint.folder}")
    if with_state:
        _check_state(checkpoint)
    for declared, pieces in _sources(checkpoint, config):
        try:
            return write_result(
                out,
                config,
                checkpoint.manifest,
                checkpoint.step,
                declared,
                pieces,
                expected_sha256=checkpoint.weights_sha256,
                write_more=(lambda target: _write_state(checkpoint, target)) if with_state else None,
            )
        except WeightsDifferError:
            continue
    raise CheckpointError(
        f"the state in {checkpoint.folder} does not give the weights that its manifest names; use another checkpoint."
    )


def _sources(
    checkpoint: Checkpoint, config: RunConfig
) -> Iterator[tuple[list[Declared], Callable[[str], Iterable[torch.Tensor]]]]:
    """Yields what the weights may be written from: their files if these are whole, and then the resume state.

    Each time: names, dtypes and shapes of the weights, and the function that maps a name to pieces of the tensor.

    Raises:
        CheckpointError: the state is needed and damaged.
    """
    try:
        checkpoint.check_weights()
    except CheckpointError as error:
        logger.warning("%s The weights are computed from the resume state.", error)
    else:
        held = checkpoint.weight_spans()
        yield (
            [(name, torch_dtype(span.dtype), torch.Size(span.shape)) for name, span in held.items()],
            lambda name: _stored_pieces(held[name]),
        )
        return
    _check_state(checkpoint)
    state = joint_spans(checkpoint.state_files())
    masters = {name.removeprefix("master/"): span for name, span in state.items() if name.startswith("master/")}
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    if config.precision != "auto":  # with auto, another machine than this one decided
        dtypes = [resolve_precision(config)]
    for dtype in dtypes:
        yield (
            [(name, dtype, torch.Size(span.shape)) for name, span in masters.items()],
            lambda name: _stored_pieces(masters[name]),
        )


def _check_state(checkpoint: Checkpoint) -> None:
    for path, expected in checkpoint.state_files().items():
        check_hash(path, expected)


def _write_state(checkpoint: Checkpoint, target: Path) -> None:
    """Writes the resume state of a checkpoint, which has been checked, as one file into another checkpoint's folder."""
    state = joint_spans(checkpoint.state_files())
    (target / "resume").mkdir()
    path = target / "resume" / "state.safetensors"
    stream = SafetensorsStream(path, [(name, torch.float32, torch.Size(span.shape)) for name, span in state.items()])
    for name, span in state.items():
        for piece in _stored_pieces(span):
            stream.write(name, piece)
    progress = {
        key: value for key, value in checkpoint.progress().items() if key not in ("state_sha256", "state_files")
    }
    described = json.dumps({**progress, "state_files": {path.name: stream.close()}}, indent=2)
    write_atomically(target / "resume" / "progress.json", described + "\n")
    sync_folder(target / "resume")


def _stored_pieces(span: Span) -> Iterator[torch.Tensor]:
    """Yields the elements of a stored tensor, as pieces of the flattened tensor."""
    with span.file.open("rb") as file:
        file.seek(span.start)
        left = span.size
        while left:
            block = bytearray(file.read(min(left, 4 * PIECE)))
            yield torch.frombuffer(block, dtype=torch_dtype(span.dtype))
            left -= len(block)
