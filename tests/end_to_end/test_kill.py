"""A run that is killed repeatedly ends bit for bit like an uninterrupted one; with other ranks or configs, to 1e-5."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import RankError, run_ranks, train_all
from safetensors.torch import load_file

from zero_ds.config.schema import RunConfig
from zero_ds.training.checkpoint.checkpoint import find_checkpoint

STEPS = 31
"""One more than a multiple of the steps between checkpoints, so that the last one makes a checkpoint of its own."""
MIDDLE = 15


def train_until_killed(config: RunConfig, step: int | None, after: float, write: int | None) -> list[str]:
    """Trains until all ranks are killed with SIGKILL; otherwise returns the result of `train_all`.

    They die `after` seconds after the start of step `step` of this attempt, or at write number `write` to the files of
    checkpoints.
    """
    from zero_ds.runtime import distributed
    from zero_ds.training.checkpoint import save
    from zero_ds.training.engine import Engine

    distributed.initialize()
    import torch.distributed as dist

    pids: list[int] = [0] * distributed.world_size()
    dist.all_gather_object(pids, os.getpid())

    def kill() -> None:
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
            os.kill(pid, signal.SIGKILL)

    if step is not None and distributed.is_rank_zero():
        step_of_engine, steps = Engine.step, 0

        def timed(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                threading.Timer(after, kill).start()
            return step_of_engine(*arguments)

        Engine.step = timed  # type: ignore[method-assign]
    if write is not None:
        put, writes = save.SafetensorsStream._put, 0
        write_whole = save.write_atomically

        def counted(self: Any, data: Any) -> None:
            nonlocal writes
            writes += 1
            if writes == write:
                self._file.write(bytes(data)[: len(data) // 2])  # half a tensor
                self._file.flush()
                kill()
            put(self, data)

        def moved(path: Path, text: str) -> None:
            nonlocal writes
            writes += path.name == "latest"
            if writes == write and path.name == "latest":
                kill()  # the checkpoint is complete, and `latest` does not name it yet
            write_whole(path, text)

        save.SafetensorsStream._put = counted  # type: ignore[method-assign]
        save.write_atomically = moved
    return train_all([config])


def curve(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "each step once, in order"
    return [line["loss"] for line in lines]


def held(run: Path, name: str = "weights.safetensors") -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run).folder / name)


@pytest.fixture(scope="module")
def config(run_config: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    def make(out: Path) -> RunConfig:
        return run_config(
            "pretrain",
            out,
            zero="zero3",
            global_batch=6,
            max_steps=STEPS,
            optimizer={"learning_rate": 1e-3},
            checkpoint={"every_steps": 3, "keep": 2},
        )

    return make


@pytest.fixture(scope="module")
def whole(config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Returns the uninterrupted run on two ranks, with all of its checkpoints, and the seconds of a step."""
    out = tmp_path_factory.mktemp("kill") / "whole"
    settings = config(out).model_copy(update={"checkpoint": config(out).checkpoint.model_copy(update={"keep": 99})})
    assert run_ranks(train_all, 2, [settings]) == [[f"step-{STEPS:06d}"]] * 2
    seconds = sum(json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines())
    return out, seconds / STEPS


@pytest.mark.parametrize(
    "kills",
    [
        4,
        pytest.param(
            10, marks=pytest.mark.slow(reason="the same proof for six more instants, each of which starts ranks")
        ),
    ],
)
def test_killed_at_several_instants_the_run_ends_as_if_nothing_had_happened(
    whole: tuple[Path, float], config: Callable[..., RunConfig], tmp_path: Path, kills: int
) -> None:
    """Half of the instants are in steps or between them, half in checkpoints, and one just before `latest` moves."""
    expected, seconds = whole
    run, chance = config(tmp_path / "run"), random.Random(7)
    # two headers, each tensor in one file and its three states in the other, and `latest`
    writes = len(held(expected)) * 4 + 3
    instants: list[tuple[int | None, float, int | None]] = [
        (chance.randint(1, 4), chance.uniform(0, 2 * seconds), None) for _ in range(kills // 2)
    ]
    instants += [(None, 0.0, chance.randint(1, 2 * writes)) for _ in range(kills // 2 - 1)] + [(None, 0.0, writes)]
    chance.shuffle(instants)
    for instant in instants:
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(train_until_killed, 2, run, *instant)
        if (Path(run.out) / "latest").is_file():
            checkpoint = find_checkpoint(run.out)
            assert checkpoint.weights(), "the newest checkpoint is whole"
    assert int((Path(run.out) / "latest").read_text()[5:]) < STEPS, "the last attempt has steps left to train"
    assert run_ranks(train_all, 2, [run]) == [[f"step-{STEPS:06d}"]] * 2
    assert curve(Path(run.out)) == curve(expected)
    for name in ("weights.safetensors", "resume/state.safetensors"):
        ours, theirs = held(Path(run.out), name), held(expected, name)
        assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in theirs), "bit for bit"
    left = [p.name for p in Path(run.out).iterdir() if p.name.startswith((".", "step-"))]
    assert sorted(left) == ["step-000030", "step-000031"], "no half-written checkpoint, and no more than `keep`"


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (3, {}),
        (2, {"zero": "zero2"}),
        (3, {"zero": "zero1", "micro_batch": 2, "activation_checkpointing": False}),
    ],
)
def test_a_run_continues_the_same_with_other_ranks_and_another_zero_config(
    whole: tuple[Path, float],
    config: Callable[..., RunConfig],
    tmp_path: Path,
    ranks: int,
    changes: dict[str, object],
) -> None:
    """2 -> 1 ranks, 2 -> 3 ranks, ZeRO-3 -> ZeRO-2, and all at once, after step 15."""
    expected, _ = whole
    shutil.copytree(expected, tmp_path / "run")
    for folder in (tmp_path / "run").glob("step-*"):
        if int(folder.name[5:]) > MIDDLE:
            shutil.rmtree(folder)
    (tmp_path / "run" / "latest").write_text(f"step-{MIDDLE:06d}\n")
    changed = config(tmp_path / "run").model_copy(update=changes)
    assert run_ranks(train_all, ranks, [changed]) == [[f"step-{STEPS:06d}"]] * ranks
    assert curve(tmp_path / "run") == pytest.approx(curve(expected), rel=1e-5)
    ours, theirs = held(tmp_path / "run"), held(expected)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.slow(reason="test_a_run_continues_the_same_with_other_ranks... shows it without a kill")
def test_more_ranks_take_over_from_one(
    config: Callable[..., RunConfig], whole: tuple[Path, float], tmp_path: Path
) -> None:
    """1 -> 2 ranks: begun on one rank, killed there, and finished on two."""
    run = config(tmp_path / "run")
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(train_until_killed, 1, run, None, 0.0, 3 * (len(held(whole[0])) * 4 + 3))  # in its third checkpoint
    assert (tmp_path / "run" / "latest").read_text() == "step-000006\n"
    assert run_ranks(train_all, 2, [run]) == [[f"step-{STEPS:06d}"]] * 2
    assert curve(tmp_path / "run") == pytest.approx(curve(whole[0]), rel=1e-5)
