"""Collectives of runtime/distributed.py, on two ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from distributed_helper import run_ranks

from zero_ds.runtime import distributed

MARKS = [(0, 0), (5, 5), (2**64 - 1, 2**64 - 1), (4, 5), (0, 1), (2**40, 2**40 + 1), (1 << 16, 1), (1, 2**63)]


def compare(marks: list[tuple[int, int]]) -> list[bool]:
    distributed.initialize()
    found = [distributed.same_on_all_ranks(pair[distributed.rank()]) for pair in marks]
    sums, same = distributed.sum_and_compare((1.5, distributed.rank()), mark=7)
    assert (sums, same) == ([3.0, 1.0], True)
    return found


def test_ranks_see_whether_they_agree() -> None:
    assert run_ranks(compare, 2, MARKS) == [[left == right for left, right in MARKS]] * 2


def join_with_a_gpu_in_the_machine() -> tuple[str, str]:
    """Joins as a rank that was told to compute on the CPU, on a machine where torch sees a GPU."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.cuda.is_available = lambda: True
    distributed.initialize()
    distributed.barrier()
    return torch.distributed.get_backend(), str(distributed.device())


def test_cpu_ranks_on_a_machine_with_a_gpu() -> None:
    assert run_ranks(join_with_a_gpu_in_the_machine, 2) == [("gloo", "cpu")] * 2


def take_a_turn(busy: str) -> list[str]:
    """Holds a file that no other rank may hold at the same time; returns the files of the ranks before."""
    distributed.initialize()
    with distributed.one_rank_at_a_time():
        path = Path(busy)
        with path.open("x"):
            time.sleep(0.3)
        seen = sorted(other.name for other in path.parent.glob("done-*"))
        (path.parent / f"done-{distributed.rank()}").touch()
        path.unlink()
    after = sorted(other.name for other in path.parent.glob("done-*"))
    distributed.barrier()
    return [*seen, "|", *after]


def test_ranks_of_a_machine_take_turns(tmp_path: Path) -> None:
    """They go on together: the turns of eight ranks that read a large model take longer than a collective waits."""
    done = ["done-0", "done-1", "done-2"]
    found = run_ranks(take_a_turn, 3, str(tmp_path / "busy"))
    assert found == [[*done[:before], "|", *done] for before in range(3)]


def test_a_single_process_agrees_with_itself() -> None:
    assert distributed.same_on_all_ranks(2**63)
    assert distributed.sum_and_compare((1.0, 2.0), mark=3) == ([1.0, 2.0], True)
    with pytest.raises(AssertionError, match="does not fit into 64 bits"):
        distributed.same_on_all_ranks(-1)
