"""When a rank dies, the job ends on all ranks soon, with a non-zero status and the reason."""

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
from pace import scaled
from places import ROOT

from zero_ds.config.schema import RunConfig
from zero_ds.runtime import failure

LIMIT = 120.0
"""Most seconds of pace 1 from a rank's death to the end of the job. Without a watch the job would hang for half an
hour, the time limit of collectives, or for ever."""
SILENCE = round(scaled(4))
"""Seconds without a sign of life after which a rank counts as dead here."""


@pytest.fixture
def launch(run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Returns a function that starts a long run on two ranks with the real launcher, on data in tmp_path/data."""
    data = tiny.write_data(tmp_path / "data", images=40, texts=4)

    def start(**changes: object) -> subprocess.Popen[str]:
        sources = {"sources": [{"path": str(data)}], "max_length": 512, "system_prompt": ""}
        config = run_config("pretrain", tmp_path / "run", data=sources, max_steps=100_000, zero="zero3", **changes)
        (tmp_path / "run.yaml").write_text(config.dump())
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.Popen(
            [ROOT / "launch" / "train.sh", tmp_path / "run.yaml", "--ranks", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    return start


def wait_for(process: subprocess.Popen[str], line: str) -> str:
    """Reads output until a line contains `line`; returns the output so far."""
    assert process.stdout is not None
    read = ""
    for text in process.stdout:
        read += text
        if line in text:
            return read
    raise AssertionError(f"the job ended before it said '{line}':\n{read}")


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Returns the process id of each rank of a launched job."""
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
    said, _ = process.communicate(timeout=scaled(LIMIT))
    assert process.returncode != 0
    last = said.strip().splitlines()[-1]
    assert re.fullmatch(r"zero-ds: the run failed: sample [\w-]+: image .*\.png does not exist", last), said
    assert not any(map(alive, ranks.values())), "no rank is left"
    assert failure.read(tmp_path / "run") in last


same_as_rank_1 = pytest.mark.slow(
    reason="same as for rank 1; test_a_blocked_rank_is_ended_by_its_watch covers what each rank notices"
)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=same_as_rank_1), 1])
def test_a_killed_rank_ends_the_job(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path, rank: int) -> None:
    process = launch()
    wait_for(process, "step 10/")
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[rank], signal.SIGKILL)
    said, _ = process.communicate(timeout=scaled(LIMIT))
    assert process.returncode != 0
    assert (
        "a rank ended without a word; was it killed, or did it run out of memory?" in said.strip().splitlines()[-1]
    ), said
    assert not any(map(alive, ranks.values()))


@pytest.mark.slow(
    reason="one more launch per rank; by default test_a_silent_rank_counts_as_dead stops a rank without a launcher,"
    " and test_nodes.py stops all processes of one machine of a launched job"
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_ends_the_job_too(
    launch: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """A stopped process does not even react to SIGTERM."""
    silence = SILENCE + 1
    monkeypatch.setenv("ZERO_DS_SILENCE", str(silence))
    process = launch()
    wait_for(process, "step 10/")
    ranks = ranks_of(process)
    os.kill(ranks[rank], signal.SIGSTOP)
    rest, _ = process.communicate(timeout=scaled(LIMIT))
    assert process.returncode != 0
    why = f"rank 1 has given no sign of life for {silence} s" if rank else f"rank 0 has not answered for {silence} s"
    assert rest.splitlines()[-1].startswith(f"zero-ds: the run failed: {why}")
    assert not any(alive(pid) for pid in ranks.values())


def test_a_signal_to_the_launcher_saves_a_checkpoint_and_the_job_resumes(
    launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = launch()
    wait_for(process, "step 10/")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=scaled(LIMIT))
    assert process.returncode != 0
    step = int((tmp_path / "run" / "latest").read_text().strip()[5:])
    assert step >= 10 and f"after step {step}; run again to resume" in said
    process = launch()
    wait_for(process, f"resumed {tmp_path / 'run'} after step {step}")
    ranks = ranks_of(process)
    process.send_signal(signal.SIGINT)
    wait_for(process, "the ranks write a checkpoint and stop after this step")
    process.send_signal(signal.SIGINT)  # a second signal ends the job without waiting for the step
    process.communicate(timeout=scaled(LIMIT))
    assert ranks and not any(map(alive, ranks.values()))


# -- outside of collectives -----------------------------------------------------------------------------------------


def join(dying: tuple[int, ...]) -> bool:
    """Joins the group with short intervals; returns whether this rank is one of `dying`.

    Such a rank first waits for two signs of life of every other rank, so that these have seen it alive.
    """
    from zero_ds.runtime import distributed

    failure.BEAT, failure.LEAVE = 0.2, 0.5
    failure.WATCH.silence = float(SILENCE)
    distributed.initialize()
    if distributed.rank() not in dying:
        return False
    store, ranks = failure.WATCH._store, range(distributed.world_size())
    assert store is not None
    while not all(store.check([f"beat/{rank}"]) for rank in ranks):
        time.sleep(0.05)
    begun = {rank: int(store.get(f"beat/{rank}")) for rank in ranks if rank not in dying}
    while any(int(store.get(f"beat/{rank}")) < beats + 2 for rank, beats in begun.items()):
        time.sleep(0.05)
    return True


def blocked(folder: Path, how: str) -> None:
    """Blocks rank 1 outside of collectives, while rank 0 fails, is killed, or stops giving signs of life."""
    failure.WATCH.folder = folder
    if not join((0,)):
        time.sleep(600)
    if how == "fails":
        failure.WATCH.fail("the disk is full")
        time.sleep(600)  # the end of rank 1 ends the test
    if how == "is silent":
        os.kill(os.getpid(), signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("fails", "rank 0 failed: the disk is full"),
        ("is killed", "rank 0 is gone: a rank ended without a word"),
        ("is silent", f"rank 0 has not answered for {SILENCE} s"),
    ],
    ids=["fails", "is killed", "is silent"],
)
def test_a_blocked_rank_is_ended_by_its_watch(tmp_path: Path, how: str, reason: str) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(blocked_to_the_end, 2, tmp_path, how, timeout=LIMIT)
    for pid in tmp_path.glob("*.pid"):  # the helper kills ranks, but not their children
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
    assert "rank 1 ended with exit code 1" in str(caught.value)
    assert f"zero-ds: rank 1 ends because {reason}" in (tmp_path / "1.said").read_text(), str(caught.value)


def blocked_to_the_end(folder: Path, how: str) -> None:
    """Runs `blocked` in a child process of each rank, because the helper kills all ranks as soon as one has failed."""
    rank = os.environ["RANK"]
    pid = os.fork()
    if pid == 0:
        said = os.open(folder / f"{rank}.said", os.O_CREAT | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        try:
            blocked(folder, how)
        finally:
            os._exit(9)
    (folder / f"{rank}.pid").write_text(str(pid))
    if rank == "1":
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    time.sleep(600)  # stays until rank 1 has ended


def test_a_rank_whose_watchers_die_first_is_missed_all_the_same() -> None:
    """Ranks 1 and 2 of four stop giving signs of life at the same time; ranks 3 and 0 watch both."""
    with pytest.raises(RankError) as caught:
        run_ranks(silent, 4, (1, 2), timeout=LIMIT)
    assert re.search(rf"rank [03] ends because rank [12] has given no sign of life for {SILENCE} s", str(caught.value))


def test_no_watching_thread_is_left_in_the_store_when_a_rank_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a thread were in the store when Python ends, a successful run would end with SIGABRT."""
    inside, stopping, left = threading.Event(), threading.Event(), threading.Event()

    class Slow:
        def __init__(self, *_: object, **__: object) -> None: ...

        def set(self, *_: object) -> None:
            inside.set()
            stopping.wait(scaled(60))
            time.sleep(0.5)  # now `stop` waits
            left.set()

        def check(self, *_: object) -> bool:
            return False

    monkeypatch.setattr(torch.distributed, "TCPStore", Slow)
    monkeypatch.setattr(torch.distributed, "PrefixStore", Slow)
    monkeypatch.setattr(failure, "BEAT", 0.1)
    before = threading.active_count()
    watch = failure.Watch()
    watch.start(rank=1, world=2, host="nowhere", port=1)
    assert inside.wait(scaled(60)) and not left.is_set()
    stopping.set()
    watch.stop()
    assert left.is_set() and threading.active_count() == before


def test_a_silent_rank_counts_as_dead(tmp_path: Path) -> None:
    """The store of rank 0 answers while its neighbour, rank 1, gives no sign of life; rank 0 notices that."""
    with pytest.raises(RankError) as caught:
        run_ranks(silent, 2, (1,), timeout=LIMIT)
    assert f"rank 1 has given no sign of life for {SILENCE} s" in str(caught.value)


def silent(ranks: tuple[int, ...]) -> None:
    if join(ranks):
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def stops_all(pids: list[int], beats: Path) -> None:
    """Suspends processes for twice the time after which a silent rank counts as dead, and wakes them."""
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(2 * SILENCE)
    beats.touch()


def suspended(woken: Path) -> str:
    """Joins, is suspended with the other rank from outside, and stays for as long again."""
    import torch.distributed as dist

    failure.BEAT, failure.LEAVE = 0.2, 0.5
    failure.WATCH.silence = float(SILENCE)
    from zero_ds.runtime import distributed

    distributed.initialize()
    pids: list[int] = [0] * distributed.world_size()
    dist.all_gather_object(pids, os.getpid())
    time.sleep(1.0)  # each has heard the other
    if distributed.is_rank_zero() and os.fork() == 0:
        os.setsid()
        stops_all(pids, woken)
        os._exit(0)
    while not woken.exists():
        time.sleep(0.05)
    time.sleep(SILENCE)
    distributed.barrier()
    return "goes on"


def test_a_job_that_is_suspended_and_woken_goes_on(tmp_path: Path) -> None:
    """Slurm suspends all processes of a job in this way; while they all sleep, silence is not a failure."""
    assert run_ranks(suspended, 2, tmp_path / "woken", timeout=LIMIT) == ["goes on", "goes on"]


def test_time_asleep_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(failure.time, "monotonic", lambda: now[0])
    awake = failure.AwakeTime()
    for pause in (failure.BEAT, failure.BEAT, 3600.0, failure.BEAT):
        now[0] += pause
        passed = awake.seconds()
        assert awake.was_suspended() == (pause == 3600.0)
    assert passed == 3 * failure.BEAT + 2 * failure.BEAT


def test_a_mistake_is_told_last_and_no_old_reason(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / failure.FILE).write_text("yesterday's\n")
    process = launch(global_batch=3)
    said, _ = process.communicate(timeout=scaled(LIMIT))
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


FULL_DISK = """
import sys
from pathlib import Path
from zero_ds.runtime import failure
disk = Path(sys.argv[1])
failure.keep_room(disk)
with open(disk / "checkpoint", "wb", buffering=0) as file:
    try:
        while True:
            file.write(b"x" * 4096)
    except OSError as error:
        assert error.errno == 28
for reason in ("No space left on device: metrics.jsonl; free some space and run again.", "a later one"):
    failure.record(disk, reason, final=True)
print(failure.read(disk), failure.is_final(disk), sorted(path.name for path in disk.iterdir()))
"""


def test_the_reason_finds_room_on_a_full_disk(tmp_path: Path) -> None:
    namespace = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=64k none "$1" && shift && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*namespace, tmp_path, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    disk = tmp_path / "disk"
    disk.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*namespace, disk, sys.executable, script, disk], capture_output=True, text=True, env=environment
    )
    assert done.stdout == (
        "No space left on device: metrics.jsonl; free some space and run again. True "
        "['checkpoint', 'failure.txt', 'failures']\n"
    ), done.stderr


def test_a_reason_is_one_line_that_fits(tmp_path: Path) -> None:
    failure.record(tmp_path, "CUDA error: out of memory\n  kernel errors\tmight be " + "x" * 10_000)
    assert (tmp_path / failure.FILE).read_text().count("\n") == 1
    read = failure.read(tmp_path)
    assert read is not None and read.startswith("CUDA error: out of memory kernel errors might be xxx")
    assert len(read) < failure.ROOM


def test_earlier_reasons_stay_on_record(tmp_path: Path) -> None:
    for reason in ("first", "second", "third"):
        failure.clear(tmp_path)
        failure.record(tmp_path, reason)
    assert failure.read(tmp_path) == "third"
    assert [line.split(" ", 1)[1] for line in failure.earlier(tmp_path)] == ["second", "first"]
    failure.clear(tmp_path)
    (tmp_path / failure.EARLIER / "0001.txt").unlink()
    failure.record(tmp_path, "fourth")
    failure.clear(tmp_path)
    assert [line.split(" ", 1)[1] for line in failure.earlier(tmp_path)] == ["fourth", "third", "second"]


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
    failure.clear(tmp_path / "run")
    failure.record(tmp_path / "run", "a rank was lost")
    with pytest.raises(SystemExit):
        main(["why", str(tmp_path / "run.yaml")])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "a rank was lost" and second.startswith("earlier: ") and second.endswith(" the disk is full")
