"""A rank that dies ends the job on all ranks, soon, with a non-zero status and its reason."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from distributed_helper import RankError, alive, run_ranks
from places import ROOT, SUPPORT

from zero_ds.config.schema import RunConfig
from zero_ds.runtime import failure

LIMIT = 60.0
"""Seconds from a rank's death to the end of the job."""


@pytest.fixture
def launch(run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a long run on two ranks with the real launcher; its data lie in tmp_path/data, which a test may spoil."""
    data = tiny.write_data(tmp_path / "data", pictures=40, texts=4)

    def start(**changes: object) -> subprocess.Popen[str]:
        sources = {"sources": [{"path": str(data)}], "max_length": 512, "system_prompt": ""}
        config = run_config("pretrain", tmp_path / "run", data=sources, max_steps=100_000, zero="zero3", **changes)
        (tmp_path / "run.yaml").write_text(config.dump())
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.Popen(
            [ROOT / "launch" / "train.sh", tmp_path / "run.yaml"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    return start


def wait_for(process: subprocess.Popen[str], line: str) -> str:
    """Reads until a line holds these words."""
    assert process.stdout is not None
    read = ""
    for text in process.stdout:
        read += text
        if line in text:
            return read
    raise AssertionError(f"the job ended before it said '{line}':\n{read}")


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id of a launched job."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return {}
    found = {each.pid: re.search(r"--local_rank=(\d+)", " ".join(each.cmdline())) for each in below}
    return {int(match[1]): pid for pid, match in found.items() if match}


def test_a_bad_sample_on_one_rank_ends_the_job_with_its_reason_last(
    launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = launch()
    wait_for(process, "step 10/")
    ranks = ranks_of(process)
    shutil.rmtree(tmp_path / "data" / "images")
    died = time.monotonic()
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0 and time.monotonic() - died < LIMIT
    last = said.strip().splitlines()[-1]
    assert re.fullmatch(r"zero-ds: the run failed: sample [\w-]+: there is no image .*\.png", last), said
    assert not any(map(alive, ranks.values())), "no rank is left"
    assert failure.read(tmp_path / "run") in last


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path, rank: int) -> None:
    process = launch()
    wait_for(process, "step 10/")
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[rank], signal.SIGKILL)
    died = time.monotonic()
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0 and time.monotonic() - died < LIMIT
    assert (
        "a rank ended without a word; was it killed, or did it run out of memory?" in said.strip().splitlines()[-1]
    ), said
    assert not any(map(alive, ranks.values()))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_ends_the_job_too(
    launch: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """A stopped process does not even react to being asked to end."""
    monkeypatch.setenv("ZERO_DS_SILENCE", "5")
    process = launch()
    wait_for(process, "step 10/")
    ranks = ranks_of(process)
    os.kill(ranks[rank], signal.SIGSTOP)
    stopped = time.monotonic()
    assert process.stdout is not None
    rest = process.stdout.read()
    assert process.wait() != 0 and time.monotonic() - stopped < LIMIT
    why = "rank 1 has given no sign of life for 5 s" if rank else "rank 0 has not answered for 5 s"
    assert rest.splitlines()[-1].startswith(f"zero-ds: the run failed: {why}")
    assert not any(alive(pid) for pid in ranks.values())


def test_a_signal_to_the_launcher_commits_and_the_job_resumes(
    launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = launch()
    wait_for(process, "step 10/")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    step = int((tmp_path / "run" / "latest").read_text().strip()[5:])
    assert step >= 10 and f"after step {step}; run again to resume" in said
    process = launch()
    wait_for(process, f"resumed {tmp_path / 'run'} after step {step}")
    ranks = ranks_of(process)
    for _ in range(2):  # asked twice, it does not wait for the step
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    process.communicate(timeout=10)
    assert ranks and not any(map(alive, ranks.values()))


# -- where no collective tells -----------------------------------------------------------------------------------------


def blocked(folder: Path, how: str) -> None:
    """Rank 1 is blocked outside of any collective; rank 0 fails, is killed, or stops to give signs of life."""
    from zero_ds.runtime import distributed

    failure.BEAT, failure.LEAVE = 0.2, 0.5
    failure.WATCH.silence = 4.0
    failure.WATCH.folder = folder
    distributed.initialize()
    if distributed.rank() == 1:
        print("ready", flush=True)
        time.sleep(600)
    distributed_ready = time.monotonic()
    while time.monotonic() - distributed_ready < 2:
        time.sleep(0.1)
    if how == "fails":
        failure.WATCH.fail("the disk is full")
        time.sleep(3)
        raise SystemExit(3)
    if how == "is silent":
        os.kill(os.getpid(), signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("fails", "rank 0 failed: the disk is full"),
        ("is killed", "rank 0 is gone: a rank ended without a word"),
        ("is silent", "rank 0 has not answered for 4 s"),
    ],
)
def test_a_blocked_rank_is_ended_by_its_watch(tmp_path: Path, how: str, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(blocked_to_the_end, 2, tmp_path, how, timeout=LIMIT)
    for pid in tmp_path.glob("*.pid"):  # the helper kills the ranks, not what they started
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
    assert time.monotonic() - started < LIMIT / 2
    assert f"zero-ds: rank 1 ends because {reason}" in (tmp_path / "1.said").read_text(), str(caught.value)


def blocked_to_the_end(folder: Path, how: str) -> None:
    """As `blocked`, in a process of its own each: the helper kills the others as soon as one of them has failed."""
    rank = os.environ["RANK"]
    with (folder / f"{rank}.said").open("w") as said:
        code = f"from pathlib import Path; import test_failure; test_failure.blocked(Path({str(folder)!r}), {how!r})"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{SUPPORT}:{Path(__file__).parent}"}
        process = subprocess.Popen([sys.executable, "-c", code], stdout=said, stderr=said, env=environment)
        (folder / f"{rank}.pid").write_text(str(process.pid))
        if rank == "1":
            raise SystemExit(process.wait())
        time.sleep(30)  # stays until rank 1 has ended


def test_a_rank_whose_watchers_die_first_is_missed_all_the_same() -> None:
    """Of four ranks, 1 and 2 stop to give signs of life together; 3 watches both, and so does 0."""
    with pytest.raises(RankError) as caught:
        run_ranks(silent, 4, (1, 2), timeout=LIMIT)
    assert re.search(r"rank [03] ends because rank [12] has given no sign of life for 4 s", str(caught.value))


def test_no_watching_thread_is_left_in_the_store_when_a_rank_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's end would find it there, and the process would end by SIGABRT behind a run that went well."""
    inside, left = threading.Event(), threading.Event()

    class Slow:
        def __init__(self, *_: object, **__: object) -> None: ...

        def set(self, *_: object) -> None:
            inside.set()
            time.sleep(0.5)
            left.set()

        def check(self, *_: object) -> bool:
            return False

    monkeypatch.setattr(torch.distributed, "TCPStore", Slow)
    monkeypatch.setattr(torch.distributed, "PrefixStore", Slow)
    monkeypatch.setattr(failure, "BEAT", 0.1)
    before = threading.active_count()
    watch = failure.Watch()
    watch.start(rank=1, world=2, host="nowhere", port=1)
    assert inside.wait(10) and not left.is_set()
    watch.stop()
    assert left.is_set() and threading.active_count() == before


def test_a_silent_rank_counts_as_dead(tmp_path: Path) -> None:
    """Rank 0's store answers while rank 1, its neighbour, gives no sign: the one that notices is rank 0."""
    with pytest.raises(RankError) as caught:
        run_ranks(silent, 2, (1,), timeout=LIMIT)
    assert "rank 1 has given no sign of life for 4 s" in str(caught.value)


def silent(ranks: tuple[int, ...]) -> None:
    from zero_ds.runtime import distributed

    failure.BEAT, failure.LEAVE = 0.2, 0.5
    failure.WATCH.silence = 4.0
    distributed.initialize()
    if distributed.rank() in ranks:
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def test_a_mistake_is_told_last_and_no_old_reason(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / failure.FILE).write_text("yesterday's\n")
    process = launch(global_batch=3)
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0 and "yesterday" not in said
    assert "is not a multiple of micro_batch=1 x 2 ranks" in said.strip().splitlines()[-1]


# -- the reason in the run folder --------------------------------------------------------------------------------------


def test_the_first_reason_stays_until_the_next_attempt(tmp_path: Path) -> None:
    watch = failure.Watch()
    watch.record("before there is a folder, nothing is written")
    assert failure.read(tmp_path) is None
    watch.folder = tmp_path
    watch.fail("first")
    watch.fail("second")
    assert failure.read(tmp_path) == "first"
    failure.clear(tmp_path)
    failure.clear(tmp_path)
    assert failure.read(tmp_path) is None


def test_why(run_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zero_ds.cli.main import main

    config = run_config("pretrain", tmp_path / "run", data={"sources": [{"path": "/nowhere.json"}]})
    (tmp_path / "run.yaml").write_text(config.dump())
    (tmp_path / "run").mkdir()
    for said in ("has not failed", "the disk is full"):
        with pytest.raises(SystemExit) as end:
            main(["why", str(tmp_path / "run.yaml")])
        assert end.value.code == 0 and said in capsys.readouterr().out
        (tmp_path / "run" / failure.FILE).write_text("the disk is full\n")
