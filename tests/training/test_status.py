"""`zero-ds status`: folders of runs in every state, half-written files, other machines' locks."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.runtime import failure
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.lock import FILE, FolderLock
from zero_ds.training.status import status, statuses


def make_run(folder: Path, steps: int = 0, total: int | None = 10, checkpoint: int | None = None) -> Path:
    """Makes the small files of a run that has recorded some of its steps."""
    folder.mkdir(parents=True)
    for name in ("config.yaml", "deepspeed.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    lines = []
    for step in range(1, steps + 1):
        record = {"step": step, "steps": total, "loss": 3.0 - step / 10, "seconds": 2.0}
        lines.append(json.dumps({key: value for key, value in record.items() if value is not None}))
    if steps:
        (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99, "lo']), encoding="utf-8")
    if checkpoint is not None:
        name = f"step-{checkpoint:06d}"
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text("{}", encoding="utf-8")
        (folder / "latest").write_text(name + "\n", encoding="utf-8")
    return folder


def test_states(tmp_path: Path) -> None:
    assert status(make_run(tmp_path / "new")).state == "not started"
    assert status(make_run(tmp_path / "stopped", 4, checkpoint=4)).state == "stopped"
    finished = status(make_run(tmp_path / "finished", 10, checkpoint=10))
    assert (finished.state, finished.seconds_left) == ("finished", None)
    failed = make_run(tmp_path / "failed", 7, checkpoint=5)
    failure.record(failed, "the disk is full")
    found = status(failed)
    assert (found.state, found.step, found.steps, found.reason) == ("failed", 7, 10, "the disk is full")
    assert found.checkpoint == "step-000005" and found.loss == pytest.approx(2.3)


def test_a_running_run_has_time_left(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 4)
    failure.record(run, "of an earlier attempt")
    with FolderLock(run):
        found = status(run)
    assert found.state == "running" and found.seconds_left == pytest.approx(12.0)
    assert status(run).state == "failed"


@pytest.mark.parametrize(("age", "state"), [(5.0, "running"), (3600.0, "stopped")])
def test_a_lock_of_another_machine(tmp_path: Path, age: float, state: str) -> None:
    run = make_run(tmp_path / "run", 4)
    (run / FILE).write_text(json.dumps({"id": "x", "host": "other", "machine": "other boot", "pid": 1}))
    os.utime(run / FILE, (time.time() - age,) * 2)
    assert status(run).state == state


def test_an_older_run_does_not_record_its_number_of_steps(tmp_path: Path) -> None:
    found = status(make_run(tmp_path / "old", 4, total=None, checkpoint=4))
    assert (found.state, found.steps, found.seconds_left) == ("stopped", None, None)


def test_all_runs_below_a_folder_are_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "model/pretrain", 10, checkpoint=10)
    make_run(tmp_path / "model/encoder", 3)
    failure.record(tmp_path / "model/encoder", "rank 1 ended without a word")
    lines = CliRunner().invoke(app, ["status", str(tmp_path)], catch_exceptions=False).output.splitlines()
    assert lines[1].split()[:4] == [str(tmp_path / "model/encoder"), "failed", "3/10", "2.7"]
    assert lines[2].strip() == "reason: rank 1 ended without a word"
    assert "finished" in lines[3] and "step-000010" in lines[3]
    one = CliRunner().invoke(app, ["status", "--json", str(tmp_path / "model/encoder")], catch_exceptions=False)
    assert json.loads(one.output)["state"] == "failed"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run is in"):
        statuses([tmp_path])
    with pytest.raises(ConfigError, match="not a folder"):
        statuses([tmp_path / "missing"])


def test_a_damaged_folder_is_listed_all_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 4)
    (run / "latest").write_text("../elsewhere", encoding="utf-8")
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe[1]\n{}\nnull\n")
    found = status(run)
    assert (found.state, found.checkpoint, found.step) == ("not started", None, 0)
