"""A run whose optimizer state or parameters are on a disk gives the numbers of one in memory, and can be resumed.

DeepSpeed (0.19) has five faults there, each of which one of these tests meets: every model that is loaded deletes the
parameters of those before it on the disk, parameters that are read ahead of time break the next step, gradients that do
not begin at a block are not read back, moments do not exist before the first step, and nothing can be restored into a
parameter that is on the disk.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.zero3 import _aligned_pieces
from zero_ds.training.deepspeed import release_disks, take_disks
from zero_ds.training.gathering import BUFFER, BUFFERS, Units, follow_layers_

sys.path[:0] = [str(ROOT / "tools")]

import sweep_deepspeed as sweep  # noqa: E402

# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(made: Callable[..., Path], small: Path, data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    places = {"llama": made("llama", tied=True), "surrogate": small, "clip": made("clip"), "data": data.parent}
    for name, place in places.items():
        (folder / name).symlink_to(place)
    return folder


def train_on_disks(variants: list[sweep.Variant], models: Path, folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the findings of the sweep, and the numbers of files that were swapped to."""
    from fake_disk import use_fake_disk

    use_fake_disk()
    found, files = [], []
    for number, variant in enumerate(variants):
        found.append(sweep.try_variant(variant, models, folder / str(number)))
        files.append(len(list((folder / str(number)).rglob("*.swp"))))
    return found, files


PIPELINES = {f"zero_optimization.offload_optimizer.pipeline_{name}": True for name in ("read", "write")}


@pytest.mark.parametrize(
    ("ranks", "variants"),
    [
        (1, [sweep.Variant("", None, "3, all on disk")]),
        pytest.param(
            2,
            [
                sweep.Variant("", None, "3, all on disk"),
                sweep.Variant("", None, "3, disk"),
                sweep.Variant("aio.intra_op_parallelism", 2, "3, disk"),
                sweep.Variant("aio.queue_depth", 32, "3, all on disk", more=PIPELINES),
            ],
            marks=pytest.mark.slow(reason="four runs on two ranks, with a resume each"),
        ),
    ],
    ids=["everything", "two ranks"],
)
def test_swapped_runs_equal_those_in_memory_and_resume(
    models: Path, tmp_path: Path, ranks: int, variants: list[sweep.Variant]
) -> None:
    todo = [sweep.Variant("", None, "3"), *variants]
    for found, files in run_ranks(train_on_disks, ranks, todo, models, tmp_path):
        memory, *swapped = found
        assert [sweep.verdict(one, memory) for one in swapped] == ["works"] * len(variants)
        assert files[0] == 0 and all(number >= 2 * 3 for number in files[1:]), "nothing was swapped"


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.integers(0, 700), st.sampled_from([128, 256, 512, 1024])
)
def test_gradients_are_cut_where_a_disk_can_be_read(lengths: list[int], start: int, alignment: int) -> None:
    whole = torch.arange(start, start + sum(lengths))
    offsets = [start + sum(lengths[:n]) for n in range(len(lengths))]
    tensors = [whole[o - start : o - start + n] for o, n in zip(offsets, lengths, strict=True)]
    pieces, places = _aligned_pieces(SimpleNamespace(numel_alignment=alignment), tensors, offsets)
    assert torch.equal(torch.cat(pieces), whole)
    for piece, place in zip(pieces, places, strict=True):
        assert len(piece) and int(piece[0]) == place
        assert len(piece) < alignment or (place % alignment == 0 and len(piece) % alignment == 0)


# -- buffers -----------------------------------------------------------------------------------------------------------

LAYER = {f"model.layers.{n}.{part}.weight": 4096 * 4096 for n in (0, 1) for part in "qkvogud"}
SIZES = {"model.embed_tokens.weight": 128_256 * 4096, "model.layers.0.norm.weight": 4096, **LAYER}
UNITS = Units.of_sizes(SIZES, "model.layers.")


def resolved(ranks: int, **section: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 4 * ranks,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/disk", **section}},
    }


def test_buffers_hold_every_parameter_of_a_layer() -> None:
    ds = resolved(2)
    follow_layers_(ds, UNITS)
    section = ds["zero_optimization"]["offload_param"]
    assert section["buffer_size"] == 128_256 * 4096 // 2 > 100_000_000, "more than DeepSpeed's default"
    assert section["buffer_count"] == 7 + 4 > BUFFERS
    ds = resolved(64)  # a layer's parameters are less than a megabyte on each rank, so they are not on the disk
    follow_layers_(ds, UNITS)
    section = ds["zero_optimization"]["offload_param"]
    assert section["buffer_size"] == BUFFER and section["buffer_count"] == BUFFERS


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"buffer_size": 1000}, "buffer_size=1000, but a part of the largest parameter has 262668288 elements; write"),
        ({"buffer_count": 5}, "buffer_count=5, but a layer has 7 parameters on the disk, all of which it needs"),
    ],
)
def test_buffers_that_would_not_do(section: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=f'^[^\n]*offload_param.{complaint}[^\n]* or more, or "auto"\\.$'):
        follow_layers_(resolved(2, **section), UNITS)
    follow_layers_(resolved(2, buffer_size=300_000_000, buffer_count=7), UNITS)


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    release_disks()


def swapping(folder: Path | str) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(folder)}}}


def test_a_folder_is_made_tried_and_kept_for_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "disk" / "me"
    take_disks(swapping(folder))
    take_disks(swapping(folder))  # the other section of the same run
    (file,) = folder.iterdir()
    release_disks()
    import fcntl

    with file.open("r+") as other:  # of another process
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use by another run on this machine; choose another nvme_path="):
            take_disks(swapping(folder))
    take_disks(swapping(folder))  # the other one has ended
    release_disks()
    monkeypatch.chdir(tmp_path)
    take_disks(swapping("relative"))
    assert (tmp_path / "relative").is_dir()


def test_no_folder_is_made_for_what_is_not_on_a_disk(tmp_path: Path) -> None:
    take_disks({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "nvme_path": "x"}}})
    take_disks({"zero_optimization": {"stage": 2}})
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (PermissionError(13, "Permission denied"), "cannot be used: Permission denied; choose another nvme_path="),
        (OSError(30, "Read-only file system"), "cannot be used: Read-only file system; choose"),
        (OSError(22, "Invalid argument"), r"Invalid argument \(DeepSpeed needs direct access, O_DIRECT\); choose"),
    ],
)
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, complaint: str
) -> None:
    def fail(*arguments: Any) -> int:
        raise error

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(ConfigError, match=complaint) as caught:
        take_disks(swapping(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"^nvme_path=[^\n]* cannot be used: [^\n]*; choose another nvme_path="):
            take_disks(swapping(path))
