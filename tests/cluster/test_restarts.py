"""Restarts after some failures and not after others, and the steps of a pipeline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_helper import alive
from pace import scaled
from places import ROOT
from typer.testing import CliRunner

from zero_ds.cli import main as cli
from zero_ds.cluster import launcher
from zero_ds.cluster.pipeline import Step
from zero_ds.cluster.route import Route, training_runs
from zero_ds.runtime import failure, lock
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.failure import Watch
from zero_ds.training.options import fallback

FAKE = """
import sys
from pathlib import Path
out, log, plan = Path({out!r}), Path({log!r}), {plan!r}
number = len(log.read_text()) if log.exists() else 0
log.write_text("x" * (number + 1))
status, reason = plan[min(number, len(plan) - 1)]
out.mkdir(exist_ok=True)
if reason:
    (out / "failure.txt").write_text(reason)
sys.exit(status)
"""
"""Replaces DeepSpeed's launcher: ends with the status, and leaves the reason, that the plan has for an attempt."""
KILLED = "a rank ended without a word"
WRONG = f"the rate is negative\n{failure.FINAL}\n"


@pytest.mark.parametrize("restarts", ["-1", "-100"])
def test_fewer_restarts_than_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], restarts: str
) -> None:
    """Such a number was never reached, so that a run that could not succeed was restarted without end."""
    words = ["--max-restarts", restarts, "smollm2-135m/encoder", f"out={tmp_path / 'run'}", "--", "false"]
    assert launcher.main(words) == 2
    assert f"--max-restarts {restarts}: write how often to restart at most, 0 or more." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("attempts", "restarts", "made", "status"),
    [
        ([(247, KILLED), (1, KILLED), (0, "")], 3, 3, 0),
        ([(247, KILLED)], 2, 3, 247),
        ([(247, KILLED)], 0, 1, 247),
        ([(2, WRONG)], 3, 1, 2),
        ([(247, KILLED), (2, WRONG)], 3, 2, 2),
        ([(2, "")], 3, 1, 2),
        ([(1, "")], 3, 1, 1),
        ([(247, ""), (0, "")], 3, 2, 0),
        ([(1, "OutOfMemoryError: 20 of 80 GiB"), (1, "OutOfMemoryError: 21 of 80 GiB")], 3, 2, 1),
        ([(1, "OutOfMemoryError: 20 of 80 GiB"), (247, KILLED), (1, "OutOfMemoryError: 20 of 80 GiB")], 3, 4, 1),
        ([(247, "rank 1 has given no sign of life for 30 s")], 3, 4, 247),
    ],
    ids=[
        "mended",
        "too often",
        "not asked for",
        "a mistake",
        "then a mistake",
        "refused",
        "stopped",
        "killed",
        "the same twice",
        "the same later",
        "lost",
    ],
)
def test_what_is_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    attempts: list[tuple[int, str]],
    restarts: int,
    made: int,
    status: int,
) -> None:
    monkeypatch.setattr(launcher, "PAUSE", 0.0)
    out, log, program = tmp_path / "run", tmp_path / "log", tmp_path / "fake.py"
    program.write_text(FAKE.format(out=str(out), log=str(log), plan=attempts))
    command = [sys.executable, str(program), "--hostfile", "/dev/null", "--module", "zero_ds.train"]
    words = ["--max-restarts", str(restarts), "smollm2-135m/encoder", f"out={out}", "--", *command]
    assert launcher.main(words) == status
    assert len(log.read_text()) == made
    said = capsys.readouterr().err
    assert said.count("from the last checkpoint") == made - 1
    assert failure.FINAL not in said
    if status and attempts[-1][1]:
        assert attempts[-1][1].splitlines()[0] in said.strip().splitlines()[-1]
        assert failure.read(out) == attempts[-1][1].splitlines()[0], "the reason of the last attempt"
    before = [attempts[min(number, len(attempts) - 1)][1] for number in range(made - 1)]
    recorded = [line.split(" ", 1)[1] for line in failure.earlier(out)[::-1]]
    assert len(recorded) == made - 1, "every reason is recorded"
    for line, reason in zip(recorded, before, strict=True):
        assert (reason.splitlines()[0] if reason else failure.UNKNOWN) in line


def test_a_run_without_memory_starts_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without --max-restarts, because the next attempt recomputes more."""
    monkeypatch.setattr(launcher, "PAUSE", 0.0)
    out, log, program = tmp_path / "run", tmp_path / "log", tmp_path / "fake.py"
    fake = FAKE.format(out=str(out), log=str(log), plan=[(1, "memory ran out")])
    program.write_text(fake.replace("if reason:", f"(out / {fallback.FILE!r}).write_text('the same')\nif reason:"))
    command = [sys.executable, str(program), "--hostfile", "/dev/null", "--module", "zero_ds.train"]
    assert launcher.main(["smollm2-135m/encoder", f"out={out}", "--", *command]) == 1
    assert len(log.read_text()) == 2
    assert capsys.readouterr().err.count("starts again from its last checkpoint, and recomputes more") == 1


def test_a_mistake_is_marked_as_one_for_the_launcher(tmp_path: Path) -> None:
    watch = Watch()
    watch.folder = tmp_path
    watch.fail("first", final=True)
    assert failure.read(tmp_path) == "first" and failure.is_final(tmp_path)
    failure.clear(tmp_path)
    watch.fail("CUDA error: an illegal memory access was encountered")
    assert failure.read(tmp_path) == "CUDA error: an illegal memory access was encountered"
    assert not failure.is_final(tmp_path)


def test_a_folder_in_use_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other job keeps its reason of failure: its launcher would end its ranks if it found another one."""
    monkeypatch.setattr(lock, "GOING", 0.0)
    command = [sys.executable, "-c", "raise SystemExit('started')", "--hostfile", "/dev/null", "--module", "x"]
    (tmp_path / failure.FILE).write_text("of the other job\n")
    with lock.FolderLock(tmp_path):
        assert launcher.main(["smollm2-135m/encoder", f"out={tmp_path}", "--", *command]) == 2
    assert f"zero-ds: {tmp_path} is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert failure.read(tmp_path) == "of the other job"


def test_a_job_that_has_lost_its_folder_leaves_no_reason_there(tmp_path: Path) -> None:
    """Two jobs that are started again and again on one folder would otherwise end each other for ever."""
    other = lock.FolderLock(tmp_path)
    other.take()
    content = other.path.read_text()
    other.release()
    taken = f"import pathlib; pathlib.Path({str(other.path)!r}).write_text({content!r}); raise SystemExit(247)"
    command = [sys.executable, "-c", taken, "--hostfile", "/dev/null", "--module", "x"]
    assert launcher.main(["smollm2-135m/encoder", f"out={tmp_path}", "--", *command]) == 247
    assert failure.read(tmp_path) is None
    watch = Watch()
    watch.folder, watch.holder = tmp_path, "the lock before"
    watch.record("a rank of the job before has ended")
    assert failure.read(tmp_path) is None
    watch.holder = lock.holder(tmp_path)
    watch.record("a rank of this job has ended")
    assert failure.read(tmp_path) == "a rank of this job has ended"


def test_what_a_killed_launcher_left_is_ended_before_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "PAUSE", 0.0)
    pids = tmp_path / "pids"
    rank = f"import os, time; open({str(pids)!r}, 'a').write(str(os.getpid()) + chr(10)); time.sleep(600)"
    program = tmp_path / "fake.py"
    program.write_text(
        "import os, signal, subprocess, sys, time\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}, '--local_rank=0'])\n"
        f"while not os.path.exists({str(pids)!r}) or str(rank.pid) not in open({str(pids)!r}).read().split():\n"
        "    time.sleep(0.1)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, str(program), "--hostfile", "/dev/null", "--module", "zero_ds.train"]
    words = ["--max-restarts", "1", "smollm2-135m/encoder", f"out={tmp_path / 'run'}", "--", *command]
    assert launcher.main(words) == 128 + signal.SIGKILL
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    deadline = time.monotonic() + scaled(60)  # killed, but not waited for
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, started)), "a rank has outlived its launcher"


def test_a_launcher_that_was_killed_and_returns_0_has_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As DeepSpeed's does. A rank 0 that was still there has left its lock; one that had finished would not have."""
    monkeypatch.setattr(launcher, "PAUSE", 0.0)
    out, program = tmp_path / "run", tmp_path / "fake.py"
    out.mkdir()
    program.write_text(
        "from pathlib import Path\n"
        f"held, tried = Path({str(out / lock.FILE)!r}), Path({str(tmp_path / 'tried')!r})\n"
        "held.unlink() if tried.exists() else held.write_text('{}')\n"
        "tried.touch()\n"
    )
    command = [sys.executable, str(program), "--hostfile", "/dev/null", "--module", "zero_ds.train"]
    words = ["--max-restarts", "3", "smollm2-135m/encoder", f"out={out}", "--", *command]
    assert launcher.main(words) == 0
    assert capsys.readouterr().err.count("from the last checkpoint") == 1
    assert [line.split(" ", 1)[1] for line in failure.earlier(out)] == [failure.LAUNCHER_GONE]


def test_a_stop_before_the_ranks_are_there_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while the command starts."""
    started = subprocess.Popen

    def popen(*words: object, **options: object) -> subprocess.Popen[bytes]:
        os.kill(os.getpid(), signal.SIGTERM)
        return started(*words, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(subprocess, "Popen", popen)
    command = [sys.executable, "-c", "import time; time.sleep(600)", "--hostfile", "/dev/null", "--module", "x"]
    words = ["--max-restarts", "3", "smollm2-135m/encoder", f"out={tmp_path / 'run'}", "--", *command]
    assert launcher.main(words) == 128 + signal.SIGTERM, "it did not sleep to its end"


def test_a_stop_between_two_attempts_ends_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say = launcher.say
    monkeypatch.setattr(
        launcher, "say", lambda text: os.kill(os.getpid(), signal.SIGUSR1) if "restart" in text else say(text)
    )
    command = [sys.executable, "-c", "raise SystemExit(247)", "--hostfile", "/dev/null", "--module", "x"]
    words = ["--max-restarts", "3", "smollm2-135m/encoder", f"out={tmp_path / 'run'}", "--", *command]
    before = signal.getsignal(signal.SIGUSR1)
    assert launcher.main(words) == 128 + signal.SIGINT
    assert "stopped before the ranks were started" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_hostfile_with_this_machine_alone_needs_no_ssh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed would ask ssh for this machine's address, and take a fixed port."""
    shim = tmp_path / "bin" / "deepspeed"
    shim.parent.mkdir()
    shim.write_text('#!/bin/sh\necho "called: $*"\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(shim.parent), prepend=":")
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    command = ["deepspeed", "--hostfile", str(hosts), "--module", "zero_ds.train", "smollm2-135m/encoder"]
    assert launcher.main(["smollm2-135m/encoder", f"out={tmp_path / 'run'}", "--", *command]) == 0
    called = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("called: "))
    assert "--no_ssh_check --master_addr 127.0.0.1 --master_port " in called
    assert called.endswith("--module zero_ds.train smollm2-135m/encoder")


# -- the steps of a pipeline -------------------------------------------------------------------------------------------


def test_stages_come_after_those_that_they_start_from() -> None:
    assert list(training_runs("smollm2-135m")) == ["translator", "pretrain", "encoder", "decoder"]
    assert list(training_runs("llama-3.1-70b")) == ["pretrain", "encoder", "decoder"]
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3\.1-8b'"):
        training_runs("llama-3.1-8")


def steps_of(
    model: str, out: Path, overrides: tuple[str, ...] = (), options: tuple[str, ...] = (), replace: str | None = None
) -> list[Step]:
    return Route(model, out, overrides, options, replace).steps()


def test_the_paper_s_route_for_8b() -> None:
    out = Path("runs/x")
    steps = steps_of("llama-3.1-8b", out, ("zero=zero2",), ("--hostfile", "hosts", "--max-restarts", "3"))
    assert [step.name for step in steps] == ["trajectory", "surrogate", "pretrain", "encoder", "decoder", "export"]
    commands = {step.name: step.commands[0] for step in steps}
    surrogate = " ".join(commands["surrogate"])
    assert "--replace 17:30 --out runs/x/T17-30" in surrogate
    assert commands["encoder"][1:] == (
        *("launch/train.sh", "llama-3.1-8b/encoder", "out=runs/x/encoder", "init_from=[runs/x/pretrain]"),
        *("zero=zero2", "surrogate=runs/x/T17-30", "--hostfile", "hosts", "--max-restarts", "3"),
    )
    assert "init_from=[runs/x/pretrain, runs/x/encoder]" in commands["decoder"]
    assert not any("surrogate=" in word for word in commands["decoder"])
    assert commands["export"][-2:] == ("--dtype", "bfloat16")
    proposed = {step.name: step for step in steps_of("llama-3.1-8b", out, replace="trajectory")}
    assert " ".join(proposed["surrogate"].commands[0]).endswith(
        "--from-trajectory runs/x/trajectory --out runs/x/surrogate"
    )
    assert "--replace 16:29 --out runs/x/T16-29" in " ".join(
        steps_of("llama-3.1-8b", out, replace="16:29")[1].commands[0]
    )
    elsewhere = steps_of("llama-3.1-8b", out, ("zero=zero2",), ("--hostfile", "others"))
    assert [step.fingerprint() for step in steps] == [step.fingerprint() for step in elsewhere], "machines may change"
    other = steps_of("llama-3.1-8b", out, ("zero=zero3",))
    assert other[2].fingerprint() != steps[2].fingerprint()
    assert steps[3].patience and not other[3].patience, "a checkpoint over many machines takes its time"


def test_what_would_fail_hours_later_ends_a_pipeline_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(cli.app, ["pipeline", "llama-3.1-8b", "--out", str(tmp_path / "out"), *words])
        assert not (tmp_path / "out").exists()
        return str(done.exception)

    monkeypatch.chdir(tmp_path)
    assert "go to the folder of the project first" in run()
    monkeypatch.chdir(ROOT)
    assert "hosts cannot be read" in run("--hostfile", str(tmp_path / "hosts"))


@pytest.mark.parametrize("setting", ["out=x", "surrogate=x", "init_from=[]", "continue_from=x"])
def test_what_the_pipeline_sets_itself_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"the pipeline sets .* itself; choose the folder"):
        steps_of("llama-3.1-8b", Path("x"), (setting,))
