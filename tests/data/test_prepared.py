"""Prepared tokens: the same batches as on the fly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import layouts
import pytest
import tiny
import torch
import yaml
from distributed_helper import run_ranks, train_all
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import SourceConfig
from zero_ds.data import prepared
from zero_ds.data.conversations import ChatTemplate
from zero_ds.data.formats import DataError
from zero_ds.data.images import ImageProcessor
from zero_ds.data.loader import Loader
from zero_ds.data.prepared import Prepared, prepare
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.monitor import read_metrics

TEMPLATE = ChatTemplate(tiny.tokenizer())
ENCODER = SampleEncoder(
    TEMPLATE,
    "response",
    ImageProcessor(tiny.IMAGE_SIZE, [0.5] * 3, [0.5] * 3, grid=((1, 2), (2, 1))),
    tiny.TOKENS_PER_IMAGE,
    max_length=120,
)


@pytest.fixture
def records(data: Path, tmp_path: Path) -> Records:
    """The demo's samples, one that is too long, and one whose image is missing."""
    odd = tmp_path / "odd.json"
    long, missing = {"question": "word " * 200, "answer": "a"}, {"image": "no.png", "question": "q", "answer": "a"}
    odd.write_text(json.dumps([long, missing]))
    return Records([SourceConfig(path=str(data)), SourceConfig(path=str(odd))])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_tokenising_on_the_fly(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(prepared, "SHARD", 3)
    folder = tmp_path / "prepared"
    faults = 0
    for sample in records:
        try:
            ENCODER.tokens(sample)
        except DataError:
            faults += 1
    assert prepare(records, ENCODER, folder, workers) == faults >= 2
    for packing in (False, True):
        plain = Loader(records, ENCODER, 5, 2, 0, 1, pad_id=0, seed=0, packing=packing, skip_bad=True)
        tokens = replace(plain, prepared=Prepared(folder, records, ENCODER))
        for one, other in zip(plain.steps(0, 5), tokens.steps(0, 5), strict=True):
            for expected, found in zip(one, other, strict=True):
                assert (expected.ids, expected.skipped, expected.too_long) == (found.ids, found.skipped, found.too_long)
                assert all(torch.equal(tensor, found.tensors()[name]) for name, tensor in expected.tensors().items())


def test_an_interrupted_call_goes_on(records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "SHARD", 3)
    folder = tmp_path / "prepared"
    prepare(records, ENCODER, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    (folder / "prepared.json").unlink()
    (folder / "tokens-000001.arrow").unlink()
    with pytest.raises(ConfigError, match="is not complete; run zero-ds data prepare again"):
        Prepared(folder, records, ENCODER)
    prepare(records, ENCODER, folder)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    assert {name for name in before if before[name] != after[name]} == {"tokens-000001.arrow"}
    Prepared(folder, records, ENCODER)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_length": 100}, "max_length"),
        ({"supervise": "full"}, "supervise"),
        ({"system_prompt": "x"}, "system_prompt"),
    ],
)
def test_tokens_of_other_settings_are_refused(records: Records, tmp_path: Path, changes: Any, named: str) -> None:
    prepare(records, ENCODER, tmp_path / "prepared")
    with pytest.raises(ConfigError, match=rf"was written for another run \(it differs in {named}\)"):
        Prepared(tmp_path / "prepared", records, replace(ENCODER, **changes))
    with pytest.raises(ConfigError, match=f"holds data that differ in {named}"):
        prepare(records, replace(ENCODER, **changes), tmp_path / "prepared")


def test_another_order_is_refused(data: Path, tmp_path: Path) -> None:
    prepare(Records([SourceConfig(path=str(data))]), ENCODER, tmp_path / "prepared")
    with pytest.raises(ConfigError, match=r"differs in order"):
        Prepared(tmp_path / "prepared", Records([SourceConfig(path=str(data))], permute=1), ENCODER)


@pytest.mark.parametrize("stream", [False, True])
def test_sources_with_shares_and_streams(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Every epoch draws other samples, of which each was written once."""
    monkeypatch.setattr(prepared, "SHARD", 3)
    samples = layouts.conversations(12)
    layouts.write_tables(tmp_path / "tables", [samples[part::4] for part in range(4)])
    tables = SourceConfig(path=str(tmp_path / "tables"), stream=stream, weight=1)
    records = Records([SourceConfig(path=str(data), weight=2), tables], permute=3)
    folder = tmp_path / "prepared"
    prepare(records, ENCODER, folder, 2)
    assert len(list(folder.glob("tokens-*"))) == 7
    for packing in (False, True):
        plain = Loader(records, ENCODER, 5, 2, 0, 1, pad_id=0, seed=0, packing=packing)
        tokens = replace(plain, prepared=Prepared(folder, records, ENCODER))
        for one, other in zip(plain.steps(0, 9), tokens.steps(0, 9), strict=True):
            for expected, found in zip(one, other, strict=True):
                assert expected.ids == found.ids
                assert all(torch.equal(tensor, found.tensors()[name]) for name, tensor in expected.tensors().items())
    changed = [SourceConfig(path=str(data), weight=9), tables]
    Prepared(folder, Records(changed, permute=3), ENCODER)


def test_a_run_has_the_same_losses(run_config: Any, tmp_path: Path) -> None:
    configs = [run_config("pretrain", tmp_path / name, max_steps=3) for name in ("plain", "prepared")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(configs[0].model_dump(mode="json")))
    folder = tmp_path / "tokens"
    result = CliRunner().invoke(app, ["data", "prepare", str(recipe), "--out", str(folder), "--workers", "0"])
    assert result.exit_code == 0 and f"8 samples written to {folder}" in result.stdout, result.output
    content = configs[1].model_dump(mode="json")
    content["data"]["prepared"] = str(folder)
    configs[1] = type(configs[1]).model_validate(content)
    assert configs[1].fingerprint() == configs[0].fingerprint()
    assert run_ranks(train_all, 1, configs) == [["step-000003"] * 2]
    losses = [[record["loss"] for record in read_metrics(tmp_path / name)] for name in ("plain", "prepared")]
    assert losses[0] == losses[1]
