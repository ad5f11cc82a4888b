"""A pipeline goes on where it stopped, refuses other settings, and leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed_helper import alive
from places import ROOT

from zero_ds.cluster import pipeline
from zero_ds.cluster.pipeline import Pipeline, Step, StepError
from zero_ds.runtime.errors import ConfigError


def step(name: str, code: str, *produces: Path) -> Step:
    return Step(name, ((sys.executable, "-c", code),), 1.0, produces)


def append(path: Path, word: str) -> str:
    return f"open({str(path)!r}, 'a').write({word!r})"


def test_finished_steps_are_skipped_and_a_failed_one_is_repeated(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    steps = [
        step("one", append(log, "1"), log),
        step("two", f"{append(log, '2')}; import sys; sys.exit(not __import__('os').path.exists({str(gate)!r}))"),
        step("three", append(log, "3")),
    ]
    with pytest.raises(StepError, match="step two failed"):
        Pipeline(tmp_path / "out", steps).run()
    assert log.read_text() == "12"
    gate.touch()
    Pipeline(tmp_path / "out", steps).run()
    assert log.read_text() == "1223"
    Pipeline(tmp_path / "out", steps).run()
    assert log.read_text() == "1223"


def test_a_lost_result_is_made_again(tmp_path: Path) -> None:
    result = tmp_path / "result"
    pipeline = Pipeline(tmp_path / "out", [step("one", append(result, "x"), result)])
    pipeline.run()
    result.unlink()
    pipeline.run()
    assert result.read_text() == "x"


def test_a_command_that_leaves_no_result_fails(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="without"):
        Pipeline(tmp_path / "out", [step("one", "pass", tmp_path / "never")]).run()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Pipeline(tmp_path, [step("one", "x = 1")]).run()
    with pytest.raises(ConfigError, match="other settings"):
        Pipeline(tmp_path, [step("one", "x = 2")]).run()
    before = step("before", append(tmp_path / "log", "x"))
    with pytest.raises(ConfigError, match="step one differs"):
        Pipeline(tmp_path, [before, step("one", "x = 2")]).run()
    assert not (tmp_path / "log").exists(), "before anything runs"


def test_when_one_of_two_fails_the_other_is_ended(tmp_path: Path) -> None:
    slow = (sys.executable, "-c", "import time; time.sleep(60)")
    fails = (sys.executable, "-c", "raise SystemExit(3)")
    started = time.monotonic()
    with pytest.raises(StepError, match="exit status"):
        Pipeline(tmp_path, [Step("both", (slow, fails), 1.0)]).run()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("name", "background"),
    [
        *((signal.SIGINT, background) for background in (False, True)),
        *((name, False) for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)),
    ],
)
def test_interrupting_ends_what_runs(tmp_path: Path, name: signal.Signals, background: bool) -> None:
    """Ctrl-C, a closed terminal, Slurm's signal before the time limit."""
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = (
        "import sys; from pathlib import Path; from zero_ds.cluster.pipeline import Pipeline, Step\n"
        f"Pipeline(Path({str(tmp_path / 'out')!r}), [Step('slow', ((sys.executable, '-c', {code!r}),), 1.0)]).run()"
    )
    if background:  # as a shell starts what runs in the background
        program = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{program}"
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(name)
    assert process.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_what_hides_in_a_session_of_its_own_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ranks do, below a launcher; both are deaf."""
    monkeypatch.setattr(pipeline, "PATIENCE", 0.5)
    pid = tmp_path / "pid"
    deaf = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    rank = f"{deaf}open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    launcher = f"import subprocess, sys; {deaf}subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    wait = f"import os, time\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.1)"
    fails = f"{wait}\ntime.sleep(0.5); raise SystemExit(3)"
    commands = ((sys.executable, "-c", launcher), (sys.executable, "-c", fails))
    with pytest.raises(StepError, match="exit status"):
        Pipeline(tmp_path / "out", [Step("both", commands, 1.0)]).run()
    deadline = time.monotonic() + 10
    while alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(int(pid.read_text()))


class Route:
    """`launch/pipeline.sh` on a tiny random model, one rank."""

    def __init__(self, out: Path, *settings: str) -> None:
        beside = Path(sys.executable).parent
        self.said = ""
        self.process = subprocess.Popen(
            [
                *(ROOT / "launch/pipeline.sh", "llama-3.1-70b", "--out", out),
                *("--replace", "1:2", "--samples", "2", "--ranks", "1", *settings),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PATH": f"{beside}:{os.environ['PATH']}", "TORCHDYNAMO_DISABLE": "1"},
        )

    def stop_after(self, words: str) -> int:
        """Asks the pipeline to stop, as Slurm does, when it has said this; its exit status."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if words in line:
                self.process.send_signal(signal.SIGUSR1)
                self.said += self.process.communicate(timeout=200)[0]
                return self.process.returncode
        raise AssertionError(f"the pipeline ended before it said '{words}':\n{self.said}")


def test_a_real_pipeline_goes_on_inside_of_the_stage_in_which_it_was_stopped(
    made: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """Trajectory and surrogate are not made again, pretraining resumes behind its last commit, and the next stage
    begins."""
    steps, out = 60, tmp_path / "out"
    settings = [
        f"target={made('llama', tied=True)}",
        f"encoder.path={made('clip')}",
        f"data.sources=[{{path: {data}}}]",
    ]
    settings += ["data.max_length=512", "data.system_prompt=", "data.workers=0", "global_batch=1", "precision=fp32"]
    settings += ["zero=zero1", f"max_steps={steps}", "checkpoint.every_steps=4", "preview.every_steps=null"]
    first = Route(out, *settings)
    assert first.stop_after("saved checkpoint ") != 0
    assert "stopped by SIGUSR1 after step" in first.said, first.said
    made_before = {name: (out / name).stat().st_mtime_ns for name in ("trajectory/trajectory.json", "T1-2/config.json")}
    finished = sorted(path.stem for path in (out / "steps").iterdir())
    assert finished == ["surrogate", "trajectory"], first.said

    second = Route(out, *settings)
    assert second.stop_after("[4/6] encoder") != 0
    for step in ("[1/6] trajectory: done before", "[2/6] surrogate: done before"):
        assert step in second.said, second.said
    assert "launch/train.sh llama-3.1-70b/pretrain" in second.said
    assert "zero_ds trajectory" not in second.said and "zero_ds surrogate" not in second.said, "no command of these"
    resumed = re.search(rf"resumed .* after step (\d+) of {steps}", second.said)
    assert resumed and f"stopped by SIGUSR1 after step {resumed[1]}" in first.said, second.said
    assert made_before == {name: (out / name).stat().st_mtime_ns for name in made_before}
    curve = [json.loads(line) for line in (out / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == list(range(1, steps + 1)), "each step once"
    assert sorted(path.stem for path in (out / "steps").iterdir()) == ["pretrain", *finished]


def test_the_time_left_follows_the_machine(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, [step("one", "import time; time.sleep(0.5)"), step("two", "pass")])
    assert pipeline.seconds_left(0) == 2.0
    pipeline.run()
    assert 0.3 < pipeline.seconds_left(1) < 1.5
