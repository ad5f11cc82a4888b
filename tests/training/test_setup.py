"""Decisions about a run before its model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from zero_ds.config.schema import RunConfig
from zero_ds.training import setup


@pytest.mark.parametrize("shuffle", [False, True])
def test_shuffled_data_follow_the_seed(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: bool
) -> None:
    path = tmp_path / "grouped.json"
    path.write_text(json.dumps([tiny.record(f"{n:02}", [("q?", "a.")]) for n in range(40)]))
    tokenizer = SimpleNamespace(pad_token_id=0)
    encoder = SimpleNamespace(template=SimpleNamespace(tokenizer=tokenizer))
    monkeypatch.setattr(setup, "sample_encoder", lambda *arguments, **options: encoder)
    folders: Any = SimpleNamespace(decoder=SimpleNamespace(path=tmp_path), encoder=None)

    def order(seed: int) -> list[str]:
        data = {"sources": [{"path": str(path), "limit": 20}], "shuffle": shuffle}
        config = run_config("pretrain", data=data, seed=seed)
        return [record.id for record in setup.make_loader(config, None, 1, folders).records]  # type: ignore[arg-type]

    assert order(1) == order(1) and len(set(order(1))) == 20
    assert (order(1) == [f"{n:02}" for n in range(20)]) is not shuffle
    assert (order(1) == order(2)) is not shuffle
