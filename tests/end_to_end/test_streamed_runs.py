"""A run on streamed shards that is killed goes on at the sample: each comes once an epoch, on any number of ranks."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from distributed_helper import RankError, run_ranks
from safetensors.torch import load_file
from test_kill import train_until_killed

from zero_ds.config.schema import RunConfig
from zero_ds.training.checkpoint.checkpoint import find_checkpoint
from zero_ds.training.monitor import read_metrics

STEPS, BATCH = 16, 6
SAMPLES = 44
"""24 in four Parquet shards and 12 in three tar shards, which are streamed, and 8 in a file: two epochs and a part."""


def train_with_notes(config: RunConfig, notes: Path, *instant: Any) -> list[str]:
    """Trains as `train_until_killed`; each rank notes the ids of every step in a file of its own."""
    from zero_ds.runtime import distributed
    from zero_ds.training.engine import Engine

    notes.mkdir(parents=True, exist_ok=True)
    step_of_engine = Engine.step

    def noted(self: Any, batches: Any, step: int, *others: Any) -> Any:
        ids = [name for batch in batches for name in batch.ids]
        with (notes / f"{distributed.rank()}.jsonl").open("a") as file:
            file.write(json.dumps([step, ids]) + "\n")
        return step_of_engine(self, batches, step, *others)

    Engine.step = noted  # type: ignore[method-assign, assignment]
    return train_until_killed(config, *instant)


def seen(notes: Path) -> dict[int, list[str]]:
    """Returns the ids of each step of an attempt that all ranks noted, in the order of the run."""
    files = sorted(notes.glob("*.jsonl"))
    steps: dict[int, list[list[str]]] = defaultdict(list)
    for file in files:
        for line in file.read_text().splitlines():
            step, ids = json.loads(line)
            steps[step].append(ids)
    whole = {step: of_ranks for step, of_ranks in steps.items() if len(of_ranks) == len(files)}
    return {step: [name for ids in of_ranks for name in ids] for step, of_ranks in whole.items()}


@pytest.fixture(scope="module")
def config(
    run_config: Callable[..., RunConfig], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    folder = tmp_path_factory.mktemp("shards")
    samples = layouts.conversations(36)
    layouts.write_tables(folder / "tables", [samples[part:24:4] for part in range(4)])
    layouts.write_tars(folder / "tars", [samples[24 + part :: 3] for part in range(3)])
    sources: list[dict[str, Any]] = [{"path": str(folder / name), "stream": True} for name in ("tables", "tars")]

    def make(out: Path, steps: int = STEPS) -> RunConfig:
        section = {"sources": [*sources, {"path": str(data)}], "max_length": 512, "system_prompt": "", "shuffle": True}
        return run_config(
            "pretrain",
            out,
            data={**section, "workers": 0},  # ranks of tests are daemons, which have no children
            global_batch=BATCH,
            max_steps=steps,
            optimizer={"learning_rate": 1e-3},
            checkpoint={"every_steps": 2, "keep": 2},
        )

    return make


NEVER = (None, 0.0, None)


@pytest.fixture(scope="module")
def whole(config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`whole(ranks, steps)`: an uninterrupted run, with notes on its samples."""

    def make(ranks: int, steps: int = STEPS) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        run_ranks(train_with_notes, ranks, config(folder / "run", steps), folder / "notes", *NEVER)
        return folder

    return make


def losses(folder: Path) -> list[float]:
    records = read_metrics(folder / "run")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1)), "each step once, in order"
    return [record["loss"] for record in records]


def check_epochs(steps: dict[int, list[str]]) -> None:
    names = [name for step in range(len(steps)) for name in steps[step]]
    assert len(names) == len(steps) * BATCH > 2 * SAMPLES
    for epoch in range(len(names) // SAMPLES):
        assert len(set(names[epoch * SAMPLES : (epoch + 1) * SAMPLES])) == SAMPLES, "every sample exactly once"
    assert names[:SAMPLES] != names[SAMPLES : 2 * SAMPLES]


@pytest.mark.parametrize(
    ("ranks", "kills", "steps"),
    [
        (1, 2, STEPS),
        pytest.param(2, 10, 60, marks=pytest.mark.slow(reason="ten kills of two ranks; one rank is killed twice")),
    ],
)
def test_a_streaming_run_that_is_killed_goes_on_at_the_sample(
    whole: Callable[..., Path], config: Callable[..., RunConfig], tmp_path: Path, ranks: int, kills: int, steps: int
) -> None:
    expected, chance = whole(ranks, steps), random.Random(3)
    check_epochs(seen(expected / "notes"))
    seconds = sum(record["seconds"] for record in read_metrics(expected / "run")) / steps
    run = config(tmp_path / "run", steps)
    attempts = 0
    for attempts in range(kills):
        # few steps an attempt, so that all of them find some left to train
        instant = (chance.randint(1, steps // (kills + 1) - 2), chance.uniform(0, seconds), None)
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(train_with_notes, ranks, run, tmp_path / f"notes-{attempts}", *instant)
    run_ranks(train_with_notes, ranks, run, tmp_path / f"notes-{attempts + 1}", *NEVER)
    last: dict[int, list[str]] = {}
    for number in range(kills + 1):
        last |= seen(tmp_path / f"notes-{number}")
    assert last == seen(expected / "notes"), "steps that were made again held the same samples"
    check_epochs(last)
    assert losses(tmp_path) == losses(expected), "bit for bit"
    ours, theirs = (load_file(find_checkpoint(f / "run").folder / "weights.safetensors") for f in (tmp_path, expected))
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow(reason="groups of one, two and three ranks; tests/data/test_streams.py has the order of each")
def test_a_streaming_run_goes_on_with_other_ranks(
    whole: Callable[..., Path], config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    expected = whole(2)
    run = config(tmp_path / "run")
    steps: dict[int, list[str]] = {}
    for number, (ranks, instant) in enumerate([(2, (5, 0.0, None)), (3, (6, 0.0, None)), (1, NEVER)]):
        notes = tmp_path / f"notes-{number}"
        if instant == NEVER:
            run_ranks(train_with_notes, ranks, run, notes, *instant)
        else:
            with pytest.raises(RankError, match="exit code -9"):
                run_ranks(train_with_notes, ranks, run, notes, *instant)
        steps |= seen(notes)
    assert steps == seen(expected / "notes")
    check_epochs(steps)
    assert losses(tmp_path) == pytest.approx(losses(expected), rel=1e-5)
