"""The checkpoint from which a run goes on is the same one on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zero_ds.config.schema import RunConfig
from zero_ds.training import resume


def test_ranks_compare_the_content_of_the_checkpoint(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disks that machines do not share may hold runs of one configuration that were trained apart."""
    config = run_config("pretrain", tmp_path)
    folder = tmp_path / "step-000002"
    folder.mkdir()
    described = {"fingerprint": config.fingerprint(), "config": config.model_dump(mode="json"), "step": 2}
    (folder / "manifest.json").write_text(json.dumps({**described, "weights_sha256": "abc"}))
    (tmp_path / "latest").write_text("step-000002\n")
    compared: list[Any] = []
    monkeypatch.setattr(resume, "require_agreement", lambda entries, remedy: compared.append((entries, remedy)))
    found = resume.checkpoint_to_resume(tmp_path, config)
    assert found is not None and found.step == 2
    ((entries, remedy),) = compared
    assert list(entries.values()) == ["abc"] and remedy == "out= must be a folder that all machines share."
