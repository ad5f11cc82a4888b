"""Weights out of what a run leaves when its machines are gone, on one CPU: DeepSpeed's own shards, or resume state.

`engine.save_checkpoint` writes, for each rank, its share of the fp32 master copies, flattened. ZeRO-3 splits every
parameter over the ranks, ZeRO-1 and 2 split each group of parameters laid end to end. Names and shapes stand in the
model states, in the order in which the parameters lie in the shares. DeepSpeed's own zero_to_fp32.py reads them alike,
but unpickles whatever the files hold.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero_ds.config.loading import validate
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import check_vacant
from zero_ds.runtime.safetensors import spans
from zero_ds.runtime.torch_files import read_torch_file
from zero_ds.training import stages
from zero_ds.training.blueprint import blueprint, weights_names
from zero_ds.training.checkpoint.checkpoint import CheckpointError, check_hash, find_checkpoint
from zero_ds.training.checkpoint.foreign import WeightsDifferError, identity, write_result
from zero_ds.training.checkpoint.optimizer_state import PIECE
from zero_ds.training.deepspeed import resolve_precision

logger = logging.getLogger(__name__)

SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MAPPED = 512 << 20
"""Bytes that are read before the files are mapped anew: until then what was read counts as this process's memory."""


class _Ignored:
    """Stands in for an object of DeepSpeed of which nothing is wanted."""

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
"""All that DeepSpeed's files name besides tensors."""


@dataclass(frozen=True)
class Extent:
    """A run of elements in a rank's share."""

    rank: int
    flat: int
    """Which of its flattened tensors."""
    start: int
    stop: int


class ZeroCheckpoint:
    """A folder written by DeepSpeed's `engine.save_checkpoint` under ZeRO-1, 2 or 3 by any number of ranks."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there and where; no weight yet.

        Raises:
            ConfigError: no such folder, a rank's file missing or damaged, shares that do not hold what they should.
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
                f"{self.folder} is no ZeRO checkpoint of DeepSpeed ({type(error).__name__}: {error})."
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
        """A parameter's master copy, float32, in pieces of its flattened form."""
        for extent in self._extents[name]:
            for start in range(extent.start, extent.stop, PIECE):
                yield self._kept.take(extent.rank, extent.flat, start, min(start + PIECE, extent.stop))

    def flats(self, rank: int) -> list[torch.Tensor]:
        """A rank's share: flattened float32 tensors, in the file until they are used."""
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
        """ZeRO-3: of each parameter every rank holds an equal part, the last ones padded; parts lie end to end."""
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
        """ZeRO-1 and 2: the parameters of a group lie end to end, and the whole is cut into one part a rank."""
        world, found = len(sizes), {}
        paddings = paddings or [[0] * len(group) for group in groups]
        if any(len(flats) != len(groups) for flats in sizes) or [len(p) for p in paddings] != [len(g) for g in groups]:
            raise ConfigError(f"{self.folder} has {len(groups)} groups of parameters, and shares of another number.")
        for number, group in enumerate(groups):
            held = [flats[number] for flats in sizes]
            offset = 0
            for place, (name, shape) in enumerate(group.items()):
                extents: list[Extent] = []
                begin = 0  # of the rank's part
                for rank in range(world):
                    low, high = max(offset, begin), min(offset + shape.numel(), begin + held[rank])
                    if low < high:
                        extents.append(Extent(rank, number, low - begin, high - begin))
                    begin += held[rank]
                found[name] = extents
                offset += shape.numel() + paddings[number][place]
            align = 2 * world  # by so many elements DeepSpeed fills a group up
            if math.ceil(offset / align) != math.ceil(sum(held) / align):
                raise ConfigError(
                    f"group {number} in {self.folder} has {sum(held)} elements where its parameters have {offset}."
                )
        return found


class _Shares:
    """The ranks' shares, mapped from their files when they are asked for, and unmapped now and then."""

    def __init__(self, checkpoint: ZeroCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._mapped: dict[int, list[torch.Tensor]] = {}
        self._read = 0

    def take(self, rank: int, flat: int, start: int, stop: int) -> torch.Tensor:
        if self._read >= MAPPED:
            self._mapped.clear()
            self._read = 0
        if rank not in self._mapped:
            self._mapped[rank] = self._checkpoint.flats(rank)
        self._read += 4 * (stop - start)
        return self._mapped[rank][flat][start:stop]


def _within(sizes: list[int], rank: int, start: int, stop: int) -> list[Extent]:
    """Elements start..stop of a rank's flattened tensors laid end to end."""
    extents, begin = [], 0
    for flat, size in enumerate(sizes):
        low, high = max(start, begin), min(stop, begin + size)
        if low < high:
            extents.append(Extent(rank, flat, low - begin, high - begin))
        begin += size
    return extents


def _tagged(folder: Path) -> Path:
    """The folder with the shards: itself, or the one that DeepSpeed's `latest` names in it."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}.")
    latest = folder / "latest"
    if latest.is_file() and not any(SHARD.fullmatch(path.name) for path in folder.iterdir()):
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"\w[\w.-]*", tag) or not (folder / tag).is_dir():
            raise ConfigError(f"{latest} names no folder beside it; name the folder with the *_optim_states.pt files.")
        return folder / tag
    return folder


def _rank_files(folder: Path) -> list[Path]:
    """The optimizer states of ranks 0, 1, ...: all of them."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := SHARD.fullmatch(path.name):
            if int(match[2]):
                raise ConfigError(
                    f"{path} is of a model-parallel run, which zero_ds has not; use the trainer's own tools."
                )
            if int(match[1]) in found:
                raise ConfigError(
                    f"{folder} holds two files of rank {int(match[1])}, of two runs; remove the older ones."
                )
            found[int(match[1])] = path
    if not found:
        raise ConfigError(
            f"{folder} holds neither shards of DeepSpeed (*_optim_states.pt) nor resume state of zero_ds (resume/)."
        )
    for rank in range(max(found) + 1):
        if rank not in found:
            raise ConfigError(
                f"{folder} lacks the share of rank {rank} (zero_pp_rank_{rank}_mp_rank_00_optim_states.pt)."
            )
    return [found[rank] for rank in sorted(found)]


def _dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The type that the run computed in."""
    for key, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        if (ds_config.get(key) or {}).get("enabled") is True:
            return dtype
    return torch.float32


def consolidate_shards(folder: Path, config: RunConfig, out: Path) -> Path:
    """Weights of a ZeRO checkpoint of DeepSpeed as the result folder `out`; returns its commit.

    config: of the run that saved it, which says what trained and against which models. Memory: a piece of a parameter,
    the headers of all files, and MAPPED bytes of what was read last.

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
    manifest = {**identity(config, model.plan), "origin": origin}

    def pieces(name: str) -> Iterable[torch.Tensor]:
        return checkpoint.pieces(wanted[name])

    return write_result(out, config, manifest, checkpoint.step, declared, pieces)


def holds_resume_state(folder: Path) -> bool:
    """Whether `folder` is a run or a commit of ours."""
    return (folder / "manifest.json").is_file() or any(folder.glob("step-*/manifest.json"))


def consolidate_state(folder: Path, out: Path) -> Path:
    """Weights of one of our own commits out of its resume state, where the weights file is lost or damaged.

    The manifest's hash of the weights says whether they are what they were, to the byte.

    Raises:
        CheckpointError: no commit, or a damaged state.
        ConfigError: the state does not give those weights; `out` exists.
    """
    check_vacant(out)
    commit = find_checkpoint(folder)
    path = commit.folder / "resume" / "state.safetensors"
    check_hash(path, str(commit.progress().get("state_sha256")))
    config = validate(RunConfig, commit.manifest.get("config"), what=f"manifest of {commit.folder}")
    held = {name.removeprefix("master/"): span for name, span in spans(path).items() if name.startswith("master/")}
    expected = str(commit.manifest.get("weights_sha256"))
    kinds = [torch.bfloat16, torch.float32, torch.float16]
    if config.precision != "auto":  # else the machine decided, which may have been another than this
        kinds = [resolve_precision(config)]

    def pieces(name: str) -> Iterator[torch.Tensor]:
        with path.open("rb") as file:
            file.seek(held[name].start)
            left = held[name].size
            while left:
                block = bytearray(file.read(min(left, 4 * PIECE)))
                yield torch.frombuffer(block, dtype=torch.float32)
                left -= len(block)

    for dtype in kinds:
        declared = [(name, dtype, torch.Size(span.shape)) for name, span in held.items()]
        try:
            return write_result(out, config, commit.manifest, commit.step, declared, pieces, expected)
        except WeightsDifferError:
            continue
    raise CheckpointError(
        f"the state in {commit.folder} does not give the weights that its manifest names; use another commit."
    )
