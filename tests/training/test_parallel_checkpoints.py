"""Checkpoints of several writers: the same bytes for any number of ranks, beside training or not, killed or not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import RankError, run_ranks, train_all
from hypothesis import given
from hypothesis import strategies as st

from zero_ds.config.schema import RunConfig
from zero_ds.training.checkpoint.checkpoint import CheckpointError, find_checkpoint
from zero_ds.training.checkpoint.consolidate import consolidate_checkpoint
from zero_ds.training.checkpoint.interval import SaveClock
from zero_ds.training.checkpoint.shares import Shares, file_names, split

# -- who writes what ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 5))
def test_shares_are_stretches_of_which_the_largest_is_as_small_as_can_be(sizes: list[int], count: int) -> None:
    named = {str(number): size for number, size in enumerate(sizes)}
    found = split(named, count)
    assert [name for names in found for name in names] == list(named) and all(found)
    assert len(found) <= count

    def least(start: int, count: int) -> int:
        """The largest stretch of the best cut of what begins at `start`, by trying all of them."""
        if count == 1:
            return sum(sizes[start:])
        stops = range(start, len(sizes) + 1)
        return min(max(sum(sizes[start:stop]), least(stop, count - 1)) for stop in stops)

    assert max(sum(named[name] for name in names) for names in found) == least(0, count)


def test_writers_without_a_share_do_not_write() -> None:
    assert Shares.of({"a": 1, "b": 9}, [0, 4, 8]) == Shares((0, 4), (("a",), ("b",)))
    assert file_names("weights", 1) == ["weights.safetensors"]
    assert file_names("state", 2) == ["state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors"]


# -- when --------------------------------------------------------------------------------------------------------------


def test_saving_counts_in_the_interval_and_is_not_due_again_at_once() -> None:
    time = 0.0
    clock = SaveClock(30, now=lambda: time)
    time = 31.0
    assert clock.is_due()
    with clock.saving(new=True):
        time += 2
        assert clock.seconds() == 2
    time = 60.0
    assert not clock.is_due() and clock.share() is None
    time = 61.5
    assert clock.is_due(), "30 s after the last save began"
    with clock.saving(new=True):
        time += 41  # longer than the interval
    assert not clock.is_due() and clock.share() == pytest.approx(43 / 102.5)
    time += 40
    assert not clock.is_due() and clock.share() is None, "said once"
    time += 2
    assert clock.is_due(), "training went on for as long as the save took"


def test_what_comes_after_the_copy_belongs_to_the_same_save() -> None:
    time = 0.0
    clock = SaveClock(30, now=lambda: time)
    for new, seconds in ((True, 3), (False, 2)):
        with clock.saving(new):
            time += seconds
        time += 10
    assert clock.seconds() == 5
    time = 29.0
    assert not clock.is_due()
    time = 31.0
    assert clock.is_due()


# -- one state, saved by one, two and three ranks ----------------------------------------------------------------------


@contextlib.contextmanager
def slow_disk_on(rank: int, finished: Path) -> Any:
    """Lets a rank's disk be slow; the others begin no collective before it has written, because that has a time limit.

    finished: file that the rank makes once it has written.
    """
    from zero_ds.runtime import distributed
    from zero_ds.training.checkpoint import save

    finish, largest = save._Writer.finish, distributed.max_over_ranks

    def slowly(self: Any) -> Any:
        if distributed.rank() == rank:
            time.sleep(0.3)
            finished.touch()
        return finish(self)

    def checked(*values: float) -> list[float]:
        assert finished.exists(), "a rank waits in a collective while another one writes"
        return largest(*values)

    save._Writer.finish, distributed.max_over_ranks = slowly, checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        save._Writer.finish, distributed.max_over_ranks = finish, largest  # type: ignore[method-assign]


def save_again(configs: list[RunConfig], start: str) -> list[list[str]]:
    """Restores a checkpoint under each configuration and saves it; returns the names of the files."""
    from zero_ds.runtime import distributed
    from zero_ds.training import stages
    from zero_ds.training.checkpoint.load import load_weights_, restore_
    from zero_ds.training.checkpoint.save import begin_saving
    from zero_ds.training.checkpoint.shares import agree_on_shares
    from zero_ds.training.deepspeed import ds_config
    from zero_ds.training.engine import Engine
    from zero_ds.training.setup import load_model

    distributed.initialize()
    found, checkpoint = [], find_checkpoint(start)
    for config in configs:
        run = Path(config.out)
        ds = ds_config(config, distributed.world_size())
        model = load_model(config, ds)
        load_weights_(model.named_targets(), checkpoint, skip=lambda name: False)
        engine = Engine(config, model, stages.freeze_(model, config), 2, ds)
        progress = restore_(engine, checkpoint)
        shares = agree_on_shares(run, engine.named, config.checkpoint.writers)
        manifest: Any = {k: v for k, v in checkpoint.manifest.items() if not k.startswith("weights")}
        saving = begin_saving(run, engine, manifest, progress, shares, asynchronous=config.checkpoint.asynchronous)
        if saving.begun_beside:  # training goes on
            for parameter in engine.named.values():
                _, count = engine.state.span(parameter)
                engine.state.set_held(parameter, "exp_avg", torch.full((count,), 7.0)) if engine.stage else None
        with contextlib.nullcontext() if saving.begun_beside else slow_disk_on(1, run / "written"):
            folder = saving.publish(keep=9)
        found.append(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    return found


def elsewhere(configs: list[RunConfig], other: str) -> list[tuple[int, ...]]:
    """Returns the writers if the ranks after the first two have a disk of their own, and if all share one."""
    from zero_ds.runtime import distributed
    from zero_ds.training.checkpoint.shares import agree_on_shares

    distributed.initialize()
    named = {str(n): torch.nn.Parameter(torch.zeros(8)) for n in range(9)}
    shared = Path(configs[0].out)
    own = Path(other) if distributed.rank() >= 2 else shared
    return [agree_on_shares(run, named, 9).writers for run in (own, shared)]


def hopes(errors: list[list[int]], folder: str) -> list[bool]:
    """Returns whether the next attempt may succeed, where the first ranks fail with these errors."""
    from zero_ds.runtime import distributed
    from zero_ds.training.checkpoint.save import Saving

    saving = Saving.__new__(Saving)
    saving.run, saving.step, saving._writer, saving._temporary = Path(folder), 1, None, Path(folder) / "none"
    found = []
    for numbers in errors:
        mine = dict(enumerate(numbers)).get(distributed.rank(), 0)
        try:
            saving._stop_all_on_error(OSError(mine, os.strerror(mine)) if mine else None)
        except CheckpointError as error:
            found.append(error.may_pass)
    return found


FAULTS = {(errno.EIO,): True, (0, errno.ENOSPC): False, (errno.EIO, errno.ENOSPC): False, (errno.EIO,) * 2: True}
"""Errors of the first ranks -> whether the next attempt may succeed."""


def everything(
    configs: list[RunConfig], start: str, other: str
) -> tuple[list[list[str]], list[tuple[int, ...]], list[bool]]:
    return save_again(configs, start), elsewhere(configs, other), hopes([list(numbers) for numbers in FAULTS], other)


@pytest.fixture(scope="module")
def one(run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of one rank, with checkpoints of one file each."""
    out = tmp_path_factory.mktemp("one") / "run"
    assert run_ranks(train_all, 1, [run_config("pretrain", out, max_steps=2, precision="bf16")]) == [["step-000002"]]
    return out


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_checkpoint_is_the_same_however_many_ranks_save_it(
    ranks: int, one: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    cases = [("zero0", True), ("zero2", False), ("zero3", False), ("zero3", True)]
    configs = []
    for number, (zero, asynchronous) in enumerate(cases):
        out = tmp_path / str(number)
        out.mkdir()
        options = {"writers": ranks, "asynchronous": asynchronous}
        configs.append(run_config("pretrain", out, zero=zero, precision="bf16", global_batch=6, checkpoint=options))
    (tmp_path / "other").mkdir()
    ended = run_ranks(everything, ranks, configs, str(one), str(tmp_path / "other"))
    files = {"manifest.json", "resume/progress.json"}
    files |= set(file_names("weights", ranks)) | {f"resume/{name}" for name in file_names("state", ranks)}
    for found, writers, hope in ended:
        assert found == [sorted(files)] * len(cases)
        assert writers == [tuple(range(min(ranks, 2))), tuple(range(ranks))], (
            "who does not share the disk does not write"
        )
        assert hope == list(FAULTS.values()), "a full disk of one rank stays full, whatever else fails"
    expected = find_checkpoint(one)
    for number in range(len(cases)):
        saved = find_checkpoint(tmp_path / str(number))
        saved.check_weights()
        assert saved.weights_sha256 == expected.weights_sha256, "it does not depend on the number of files"
        again = find_checkpoint(
            consolidate_checkpoint(saved.folder, tmp_path / f"{number} consolidated", with_state=True)
        )
        for name in ("weights.safetensors", "resume/state.safetensors"):
            assert (again.folder / name).read_bytes() == (expected.folder / name).read_bytes(), (cases[number], name)
        assert again.manifest["weights_files"] == expected.manifest["weights_files"]
        assert again.progress() == expected.progress()
        assert [path.name for path in (tmp_path / str(number)).iterdir() if path.name.startswith(".")] == []
    shutil.rmtree(tmp_path / "1 consolidated")
    (saved.folder / file_names("weights", ranks)[1]).unlink()
    with pytest.raises(CheckpointError, match=r"weights-00002-of-0000\d\.safetensors cannot be read"):
        saved.check_weights()
    lost = consolidate_checkpoint(saved.folder, tmp_path / "1 consolidated")
    assert (lost / "weights.safetensors").read_bytes() == (expected.folder / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    "listed", [[], {}, "x", {"../weights.safetensors": "0"}, {"weights-00001-of-00002.safetensors": "0"}]
)
def test_a_manifest_cannot_lead_elsewhere(one: Path, tmp_path: Path, listed: Any) -> None:
    shutil.copytree(one, tmp_path / "run")
    path = tmp_path / "run" / "step-000002" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights_files": listed}))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: its weights_files are .*; use another"):
        find_checkpoint(tmp_path / "run").weights()


# -- whole runs --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_full_on(rank: int, file: int) -> Any:
    """Lets a rank's disk be full from its `file`-th file on."""
    from zero_ds.runtime import distributed, safetensors

    put, opened, files = safetensors.SafetensorsStream._put, safetensors.SafetensorsStream.__init__, 0

    def counting(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal files
        files += 1
        opened(self, *arguments, **options)

    def full(self: Any, data: Any) -> None:
        if files >= file and distributed.rank() == rank and getattr(self, "_next", 0) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, data)

    safetensors.SafetensorsStream.__init__ = counting  # type: ignore[method-assign]
    safetensors.SafetensorsStream._put = full  # type: ignore[method-assign]
    try:
        yield
    finally:
        safetensors.SafetensorsStream.__init__ = opened  # type: ignore[method-assign]
        safetensors.SafetensorsStream._put = put  # type: ignore[method-assign]


def train_and_fail(whole: list[RunConfig], failing: list[RunConfig]) -> list[str]:
    ends = train_all(whole)
    for config in failing:
        with disk_full_on(1, 3):
            ends += train_all([config])
    return ends


def test_runs_that_save_beside_training_and_runs_whose_disks_fill_up(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def config(name: str, writers: int, asynchronous: bool) -> RunConfig:
        options = {"every_steps": 1, "keep": 9, "writers": writers, "asynchronous": asynchronous}
        return run_config("pretrain", tmp_path / name, zero="zero3", max_steps=4, checkpoint=options)

    whole = [config("usual", 1, False), config("waiting", 2, False), config("beside", 2, True)]
    failing = [config("full", 2, False), config("full beside", 2, True)]
    first, second = run_ranks(train_and_fail, 2, whole, failing)
    assert first[:3] == second[:3] == ["step-000004"] * 3
    usual = tmp_path / "usual"
    for step in (1, 2, 3, 4):
        expected = find_checkpoint(usual / f"step-{step:06d}")
        for name in ("waiting", "beside"):
            found = find_checkpoint(tmp_path / name / f"step-{step:06d}")
            assert len(found.weights_files()) == len(found.state_files()) == 2
            assert found.weights_sha256 == expected.weights_sha256
            out = consolidate_checkpoint(found.folder, tmp_path / f"{name} {step}", with_state=True)
            for file in ("weights.safetensors", "resume/state.safetensors"):
                assert (out / file).read_bytes() == (expected.folder / file).read_bytes()
    for run, of_first, of_second in zip(("full", "full beside"), first[3:], second[3:], strict=True):
        assert of_first == "CheckpointError: step 2 could not be saved by rank 1."
        assert "step 2 could not be saved" in of_second and "No space left on device; earlier" in of_second
        assert sorted(path.name for path in (tmp_path / run).iterdir() if "step" in path.name) == ["step-000001"]
        assert (tmp_path / run / "latest").read_text() == "step-000001\n"
        assert "No space left on device" in (tmp_path / run / "failure.txt").read_text()
        find_checkpoint(tmp_path / run).check_weights()


def train_until_interrupted(config: RunConfig, method: str) -> str:
    """Trains; a second signal arrives while the second checkpoint is being saved."""
    from zero_ds.training.checkpoint import save
    from zero_ds.training.train import train

    usual, calls = getattr(save.Saving, method), iter(range(10**6))

    def interrupted(self: Any, *arguments: Any) -> Any:
        if next(calls):
            raise KeyboardInterrupt
        return usual(self, *arguments)

    setattr(save.Saving, method, interrupted)
    try:
        return train(config).name
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        setattr(save.Saving, method, usual)


def interrupt_all(cases: list[tuple[RunConfig, str]]) -> list[str]:
    return [train_until_interrupted(*case) for case in cases]


def test_a_save_that_is_interrupted_leaves_nothing(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    cases = []
    for number, (method, beside) in enumerate([("_sealed", True), ("_sealed", False), ("_refuse_difference", True)]):
        options = {"every_steps": 1, "asynchronous": beside}
        cases.append((run_config("pretrain", tmp_path / str(number), max_steps=4, checkpoint=options), method))
    assert run_ranks(interrupt_all, 1, cases) == [["interrupted"] * len(cases)]
    for run in tmp_path.iterdir():
        assert [path.name for path in run.iterdir() if "step" in path.name] == ["step-000001"]
        assert (run / "latest").read_text() == "step-000001\n"


def train_until_killed(config: RunConfig, rank: int, write: int) -> list[str]:
    """Trains; one rank kills itself in the middle of write number `write` to its files."""
    from zero_ds.runtime import distributed, safetensors

    put, writes = safetensors.SafetensorsStream._put, 0

    def counted(self: Any, data: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == write and distributed.rank() == rank:
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, data)

    safetensors.SafetensorsStream._put = counted  # type: ignore[method-assign]
    return train_all([config])


@pytest.mark.parametrize(("rank", "asynchronous"), [(0, True), (1, False)])
def test_a_rank_that_dies_while_it_writes_leaves_the_checkpoint_before(
    run_config: Callable[..., RunConfig], tmp_path: Path, rank: int, asynchronous: bool
) -> None:
    run = tmp_path / "run"
    options = {"every_steps": 1, "keep": 9, "writers": 2, "asynchronous": asynchronous}
    config = run_config("pretrain", run, max_steps=4, checkpoint=options)
    with pytest.raises(RankError, match=r"rank \d ended with exit code"):  # on a busy machine both have ended
        run_ranks(train_until_killed, 2, config, rank, 70)
    steps = sorted(path.name for path in run.iterdir() if path.name.startswith("step-"))
    assert steps, "at least one checkpoint was complete"
    for name in steps:
        found = find_checkpoint(run / name)
        found.check_weights()
        assert len(found.state_files()) == 2
    assert (run / "latest").read_text() == f"{steps[-1]}\n" and steps[-1] != "step-000004"
    assert rank or [path.name for path in run.glob(".step-*.tmp")], "half-written; a rank 0 that lives removes it"
    assert run_ranks(train_all, 2, [config]) == [["step-000004"]] * 2
    assert not list(run.glob(".step-*.tmp"))
