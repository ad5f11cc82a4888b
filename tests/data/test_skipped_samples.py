"""With `bad_samples=skip`, a run skips samples that cannot be used, counts them, and ends if there are too many."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed_helper import run_ranks, train_all

from zero_ds.config.schema import RunConfig
from zero_ds.training.checkpoint.checkpoint import Progress
from zero_ds.training.skipped import SkippedSamples


@pytest.fixture
def spoiled(data: Path, tmp_path: Path) -> Path:
    """Returns a file of eight samples. Two have broken images, and one has no answer within the limit."""
    shutil.copytree(data.parent / "images", tmp_path / "images")
    records = json.loads(data.read_text())
    with_image = [record for record in records if "image" in record]
    for record in with_image[:2]:
        (tmp_path / record["image"]).write_bytes(b"not an image")
    with_image[2]["conversations"][0]["value"] += " more" * 900
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def scalars(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_skips_samples_that_cannot_be_used(
    run_config: Callable[..., RunConfig], spoiled: Path, tmp_path: Path
) -> None:
    def config(name: str, **more: Any) -> RunConfig:
        settings = {"sources": [{"path": str(spoiled)}], "max_length": 512, "system_prompt": "", "bad_samples": "skip"}
        changes = {"data": {**settings, **more}, "checkpoint": {"every_steps": 3}, "max_steps": 6}
        return run_config("encoder", tmp_path / name, zero="zero3", **changes)

    whole = config("whole")
    assert run_ranks(train_all, 2, [whole]) == [["step-000006"]] * 2
    # an epoch is two steps, with two broken images and one long sample
    assert scalars(tmp_path / "whole", "skipped_samples")[1::2] == [2, 4, 6]
    assert scalars(tmp_path / "whole", "too_long_samples")[1::2] == [1, 2, 3]
    # another number of ranks sees the same samples, and a resumed run continues the counts
    shutil.copytree(tmp_path / "whole", tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone" / "step-000006")
    (tmp_path / "alone" / "latest").write_text("step-000003\n")
    assert run_ranks(train_all, 1, [config("alone")]) == [["step-000006"]]
    for name in ("skipped_samples", "too_long_samples"):
        assert scalars(tmp_path / "alone", name) == scalars(tmp_path / "whole", name)
    pairs = zip(scalars(tmp_path / "alone", "loss"), scalars(tmp_path / "whole", "loss"), strict=True)
    assert all(one == pytest.approx(two, rel=1e-5) for one, two in pairs)

    endings = run_ranks(train_all, 2, [config("few", max_bad_samples=3)])
    sentence = "4 samples could not be used, more than data.max_bad_samples=3; see the log for the reasons"
    assert endings == [[f"DataError: {sentence}, and fix the data"]] * 2
    assert (tmp_path / "few" / "latest").read_text() == "step-000003\n", "the last checkpoint is kept"
    refused = run_ranks(train_all, 1, [config("none", bad_samples="error")])
    assert refused[0][0].startswith("DataError: sample image-") and "cannot be read" in refused[0][0]
    # a run that skipped samples may be told to end at them, and then to skip them again
    (tmp_path / "alone" / "latest").write_text("step-000003\n")
    shutil.rmtree(tmp_path / "alone" / "step-000006")
    refused = run_ranks(train_all, 1, [config("alone", bad_samples="error")])
    assert refused[0][0].startswith("DataError: sample image-")
    assert run_ranks(train_all, 1, [config("alone")]) == [["step-000006"]]
    assert scalars(tmp_path / "alone", "skipped_samples") == scalars(tmp_path / "whole", "skipped_samples")


def test_samples_skipped_when_files_are_read_count_as_well(
    run_config: Callable[..., RunConfig], data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data.parent / "images", tmp_path / "images")
    wrong = [{"id": f"wrong-{n}", "conversations": [{"from": "robot", "value": "?"}]} for n in range(3)]
    (tmp_path / "data.json").write_text(json.dumps([*json.loads(data.read_text()), *wrong]))

    def config(name: str, limit: int) -> RunConfig:
        settings = {"sources": [{"path": str(tmp_path / "data.json")}], "max_length": 512, "system_prompt": ""}
        more = {"bad_samples": "skip", "max_bad_samples": limit}
        checkpoint = {"every_steps": 1, "keep": 9}
        return run_config("encoder", tmp_path / name, data={**settings, **more}, checkpoint=checkpoint, max_steps=2)

    few, enough = run_ranks(train_all, 1, [config("few", 2), config("run", 3)])[0]
    assert few.startswith("DataError: 3 samples could not be used, more than data.max_bad_samples=2")
    assert enough == "step-000002" and scalars(tmp_path / "run", "skipped_samples") == [3, 3]
    shutil.rmtree(tmp_path / "run" / "step-000002")
    (tmp_path / "run" / "latest").write_text("step-000001\n")
    assert run_ranks(train_all, 1, [config("run", 3)]) == [["step-000002"]]
    assert scalars(tmp_path / "run", "skipped_samples") == [3, 3], (
        "read again by the resumed run, but not counted twice"
    )


def test_a_count_is_stored_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new count is one attribute and its name in STORED; checkpoints that lack it count from 0."""
    counts = SkippedSamples(limit=10)
    counts.unusable, counts.too_long = 3, 4
    progress: Progress = {"step": 7}
    counts.save(progress)
    assert progress == {"step": 7, "skipped": 3, "too_long": 4}
    monkeypatch.setitem(SkippedSamples.STORED, "unreadable", "unreadable")
    again = SkippedSamples(limit=10)
    again.restore(progress)
    assert (again.unusable, again.too_long, again.unreadable) == (3, 4, 0)
    again.unreadable = 2
    again.save(progress)
    assert progress == {"step": 7, "skipped": 3, "too_long": 4, "unreadable": 2}
