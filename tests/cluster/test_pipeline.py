"""A pipeline continues where it stopped, refuses other settings, and leaves no process running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed_helper import alive
from pace import scaled
from places import ROOT

from zero_ds.cluster import output, pipeline, story
from zero_ds.cluster.pipeline import Pipeline, Step, StepError
from zero_ds.runtime.errors import ConfigError


def step(name: str, code: str, *produces: Path) -> Step:
    return Step(name, ((sys.executable, "-c", code),), 1.0, produces)


def append(path: Path, word: str) -> str:
    return f"open({str(path)!r}, 'a').write({word!r})"


def telling(pid: Path) -> str:
    """Returns code of a process that writes its id into a file in one piece."""
    return f"import os, time; open('{pid}-', 'w').write(str(os.getpid())); os.rename('{pid}-', '{pid}')"


WAIT = "import os, time\nwhile not os.path.exists({path!r}): time.sleep(0.1)"
"""Code that waits for a file."""


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


def old_record(folder: Path, name: str, commands: list[list[str]]) -> None:
    """Writes the record of a finished step as versions before `python -m zero_ds.cli` wrote it."""
    (folder / "steps").mkdir(parents=True)
    record = {"seconds": 12.5, "fingerprint": json.dumps(commands)}
    (folder / "steps" / f"{name}.json").write_text(json.dumps(record) + "\n")


@pytest.mark.parametrize("module", ["zero_ds", "zero_ds.cli"])
def test_records_of_other_interpreters_and_older_versions_count(tmp_path: Path, module: str) -> None:
    """The interpreter's path and the module's name are not part of the settings of a run."""
    words = ("surrogate", "--target", "a folder", "--replace", "1:2")
    step = Step("surrogate", (pipeline.zero_ds_command(*words),), 3.0)
    old_record(tmp_path, "surrogate", [["/another/bin/python3", "-m", module, *words]])
    runner = Pipeline(tmp_path, [step])
    assert runner.seconds() == {"surrogate": 12.5}
    runner.run()  # would fail if it ran the command
    assert runner.seconds() == {"surrogate": 12.5}
    other = Step("surrogate", (pipeline.zero_ds_command(*words[:-1], "1:3"),), 3.0)
    with pytest.raises(ConfigError, match="step surrogate differs"):
        Pipeline(tmp_path, [other]).run()


def test_commands_of_other_programs_are_compared_as_they_are(tmp_path: Path) -> None:
    old_record(tmp_path, "train", [["bash", "launch/train.sh", "smollm2-135m/encoder", "seed=0"]])
    runner = Pipeline(tmp_path, [])
    same = Step("train", (("bash", "launch/train.sh", "smollm2-135m/encoder", "seed=0"),), 1.0)
    assert runner.record(same) is not None
    for command in (
        ("sh", "launch/train.sh", "smollm2-135m/encoder", "seed=0"),
        ("python", "-m", "zero_ds.train", "smollm2-135m/encoder", "seed=0"),
    ):
        with pytest.raises(ConfigError, match="other settings"):
            runner.record(Step("train", (command,), 1.0))


@pytest.mark.parametrize("fingerprint", ["not JSON", "{}", None])
def test_an_unreadable_fingerprint_is_not_taken_for_the_same_settings(tmp_path: Path, fingerprint: str | None) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps/one.json").write_text(json.dumps({"seconds": 1.0, "fingerprint": fingerprint}))
    with pytest.raises(ConfigError, match="other settings"):
        Pipeline(tmp_path, []).record(step("one", "x = 1"))


def test_when_one_of_two_fails_the_other_is_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    slow = (sys.executable, "-c", f"{telling(pid)}; time.sleep(600)")
    fails = (sys.executable, "-c", f"{WAIT.format(path=str(pid))}\nraise SystemExit(3)")
    with pytest.raises(StepError, match="exit status"):
        Pipeline(tmp_path, [Step("both", (slow, fails), 1.0)]).run()
    assert not alive(int(pid.read_text()))


@pytest.mark.parametrize(
    ("name", "background"),
    [
        *((signal.SIGINT, background) for background in (False, True)),
        *((name, False) for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)),
    ],
)
def test_interrupting_ends_what_runs(tmp_path: Path, name: signal.Signals, background: bool) -> None:
    """The signals are those of Ctrl-C, of a closed terminal, and of Slurm before its time limit."""
    pid = tmp_path / "pid"
    code = f"{telling(pid)}; time.sleep(600)"
    program = (
        "import sys; from pathlib import Path; from zero_ds.cluster.pipeline import Pipeline, Step\n"
        f"Pipeline(Path({str(tmp_path / 'out')!r}), [Step('slow', ((sys.executable, '-c', {code!r}),), 1.0)]).run()"
    )
    if background:  # as a shell starts what runs in the background
        program = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{program}"
    process = subprocess.Popen([sys.executable, "-c", program])
    while not pid.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(name)
    assert process.wait(scaled(120)) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_signal_while_a_command_is_polled_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Popen holds a lock at that moment, and an exception there would make it wait for itself."""
    pid, polled = tmp_path / "pid", subprocess.Popen.poll

    class Lock:
        """Popen's lock, with a signal sent just after it was taken without blocking."""

        def __init__(self) -> None:
            self.inner = threading.Lock()

        def acquire(self, blocking: bool = True) -> bool:
            taken = self.inner.acquire(blocking)
            if not blocking and pid.exists() and not sent:
                sent.append(True)
                os.kill(os.getpid(), signal.SIGTERM)
            return taken

        def release(self) -> None:
            self.inner.release()

        def __enter__(self) -> None:
            assert self.inner.acquire(timeout=scaled(60)), "the lock is never given back"

        def __exit__(self, *_: object) -> None:
            self.inner.release()

    def poll(self: subprocess.Popen[bytes]) -> int | None:
        if not isinstance(self._waitpid_lock, Lock):
            self._waitpid_lock = Lock()
        return polled(self)

    sent: list[bool] = []
    monkeypatch.setattr(subprocess.Popen, "poll", poll)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(tmp_path / "out", [step("slow", f"{telling(pid)}; time.sleep(600)")]).run()
    assert sent and not alive(int(pid.read_text()))


def test_a_process_in_a_session_of_its_own_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitates a rank under a launcher; both ignore SIGTERM."""
    monkeypatch.setattr(pipeline, "PATIENCE", 0.5)
    pid = tmp_path / "pid"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    rank = f"{deaf}{telling(pid)}; time.sleep(600)"
    launcher = f"import subprocess, sys; {deaf}subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    fails = f"{WAIT.format(path=str(pid))}\nraise SystemExit(3)"
    commands = ((sys.executable, "-c", launcher), (sys.executable, "-c", fails))
    with pytest.raises(StepError, match="exit status"):
        Pipeline(tmp_path / "out", [Step("both", commands, 1.0)]).run()
    deadline = time.monotonic() + scaled(60)
    while alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(int(pid.read_text()))


class Route:
    """`launch/pipeline.sh` on a tiny random model, one rank."""

    def __init__(self, out: Path, *settings: str) -> None:
        programs = Path(sys.executable).parent
        self.said = ""
        self.process = subprocess.Popen(
            [
                *(ROOT / "launch/pipeline.sh", "llama-3.1-70b", "--out", out),
                *("--replace", "1:2", "--samples", "2", "--ranks", "1", "--verbose", *settings),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "TORCHDYNAMO_DISABLE": "1",
                "ZERO_DS_STOP_PATIENCE": str(scaled(60)),  # saving a checkpoint on a busy machine
            },
        )

    def stop_after(self, words: str) -> int:
        """Asks the pipeline to stop, as Slurm does, once it has printed `words`; returns its exit status."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if words in line:
                self.process.send_signal(signal.SIGUSR1)
                self.said += self.process.communicate(timeout=scaled(300))[0]
                return self.process.returncode
        raise AssertionError(f"the pipeline ended before it said '{words}':\n{self.said}")


def test_a_real_pipeline_continues_within_the_stage_in_which_it_was_stopped(
    made: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """Trajectory and surrogate are not made again, pretraining resumes after its last checkpoint, and the next
    stage begins."""
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
    taken = pipeline.seconds()["one"]
    assert taken >= 0.5 and pipeline.seconds_left(1) == pytest.approx(taken)


def test_output_goes_to_a_file_and_progress_to_the_console(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of progress is shown at once, then every PAUSE seconds; noise is not."""
    monkeypatch.setattr(output, "PAUSE", 0.0)
    line = "04:27:59 [rank 0] step 3/9  0:02 < 0:04 left  loss 1.5  learning_rate 0.1"
    code = f"import time; print('noise', flush=True); print({line!r}, flush=True); time.sleep(0.6)"
    told = Step("one", ((sys.executable, "-c", code),), 1.0, purpose="does it", outcome=lambda: "it is done")
    Pipeline(tmp_path, [told]).run()
    shown = capfd.readouterr().out
    assert "step 3 of 9, 0:04 left, loss 1.5" in shown and "it is done; 0:0" in shown and "noise" not in shown
    assert "noise\n" in (tmp_path / "logs/one.log").read_text()
    Pipeline(tmp_path / "verbose", [told], verbose=True).run()
    assert "noise" in capfd.readouterr().out and not (tmp_path / "verbose/logs").exists()


@pytest.mark.parametrize("said", ["zero-ds: the disk is full.", "Traceback\nKeyError: 'x'"])
def test_a_failure_is_shown_with_its_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str], said: str) -> None:
    code = f"import sys; print({said!r}, file=sys.stderr); sys.exit(3)"
    with pytest.raises(StepError, match=r"one\.log") as failed:
        Pipeline(tmp_path, [step("one", code)]).run()
    shown = capfd.readouterr().err
    assert ("the disk is full;" in str(failed.value)) if "disk" in said else ("KeyError: 'x'" in shown)


def test_the_reason_is_that_of_this_attempt(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="the first reason"):
        Pipeline(tmp_path, [step("one", "import sys; sys.exit('zero-ds: the first reason')")]).run()
    with pytest.raises(StepError) as failed:
        Pipeline(tmp_path, [step("one", "import sys; sys.exit(3)")]).run()
    assert "first reason" not in str(failed.value)


def test_results_are_told_in_a_line(tmp_path: Path) -> None:
    def write(name: str, content: object) -> None:
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")

    write("trajectory.json", {"layers": 30, "transition": {"layer": 19}, "proposed": {"name": "T(19,28)"}})
    assert story.outcome_of_trajectory(tmp_path).startswith("language converges from layer 19 of 30 on")
    write(
        "surrogate.json",
        {
            "plan": {"depth": 30, "replaced": [[24, 28, 1]]},
            "kept_parameters": 120354624,
            "target_parameters": 134515008,
        },
    )
    assert "26 of 30 layers, 120 of 135 million parameters" in story.outcome_of_surrogate(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 10 - n}) + "\n" for n in range(1, 5))
    )
    assert story.outcome_of_training(tmp_path) == "4 steps; loss 9.00 at first, 6.00 at last"
    words = [{"free_correct": True}, {"free_correct": False}]
    write("e.json", {"items": [{"condition": "own", "words": words}, {"condition": "shuffled", "words": words[1:]}]})
    found = story.outcome_of_evaluation({"grafted": tmp_path / "e.json"})
    assert found == "grafted 50 % of words right (0 % with another image)"
    write("proof.json", {"tensors_equal": 7, "loaded_by_transformers": "Llava"})
    assert "all 7 tensors" in story.outcome_of_export(tmp_path)
    for name in ("trajectory.json", "proof.json"):
        (tmp_path / name).write_text("[]")
    assert story.told(lambda: story.outcome_of_trajectory(tmp_path)) == ""
