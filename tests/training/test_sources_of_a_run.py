"""Loss, tokens and skipped samples by source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from distributed_helper import run_ranks, train_all

from zero_ds.config.schema import RunConfig, SourceConfig
from zero_ds.data.prepared import prepare
from zero_ds.data.sources import Records
from zero_ds.model.losses import sums_by_source
from zero_ds.training.monitor import read_metrics
from zero_ds.training.setup import load_model, make_loader


@pytest.mark.parametrize("packing", [False, True])
def test_loss_tokens_and_skipped_samples_by_source(
    run_config: Callable[..., RunConfig], data: Path, tmp_path: Path, packing: bool
) -> None:
    other = tmp_path / "other.json"
    records = [{"id": f"t{n}", "question": f"What is {n}?", "answer": "It is a number."} for n in range(6)]
    records[3]["image"] = "missing.png"
    other.write_text(json.dumps(records))
    section = {
        "sources": [{"path": str(data), "weight": 1}, {"path": str(other), "weight": 1}],
        "max_length": 512,
        "system_prompt": "",
        "bad_samples": "skip",
        "packing": packing,
    }
    config = run_config("pretrain", tmp_path / "run", data=section, max_steps=4)
    assert run_ranks(train_all, 1, [config]) == [["step-000004"]]
    found = read_metrics(tmp_path / "run")
    for record in found:
        names = ("data", "other")
        tokens = [record[f"tokens_by_source/{name}"] for name in names]
        losses = [record.get(f"loss_by_source/{name}", 0.0) for name in names]
        assert sum(tokens) == record["supervised_tokens"] and min(tokens) > 0
        mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
        assert mean == pytest.approx(record["loss"], rel=1e-5)
    assert sum(record["skipped_by_source/other"] for record in found) == found[-1]["skipped_samples"] > 0
    assert sum(record["skipped_by_source/data"] for record in found) == 0


def test_tokens_are_counted_for_the_source_of_their_sample(
    run_config: Callable[..., RunConfig], data: Path, tmp_path: Path
) -> None:
    """Packed and padded rows agree, and both with the labels of the samples one by one."""
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"question": f"What is {n}?", "answer": "It " + "is " * n} for n in range(1, 5)]))
    sources = [SourceConfig(path=str(data)), SourceConfig(path=str(other))]
    records = Records(sources)
    sums = []
    for packing in (False, True):
        section = {"sources": sources, "max_length": 512, "system_prompt": "", "packing": packing}
        config = run_config("pretrain", data=section, global_batch=len(records), micro_batch=4)
        loader = make_loader(config, load_model(config, {"zero_optimization": {}}), 1)
        total = torch.zeros(2, 2, dtype=torch.float64)
        for batch in next(loader.steps(0, 1)):
            total += sums_by_source(torch.ones(int((batch.labels[:, 1:] != -100).sum())), batch, 2)
        sums.append(total)
    expected = [0, 0]
    for index in range(len(records)):
        labels = loader.sample_encoder(records[index]).labels
        expected[records.source(index)] += sum(label != -100 for label in labels[1:])
    assert torch.equal(sums[0], sums[1]) and sums[0][:, 1].tolist() == expected


@pytest.mark.parametrize(
    ("samples", "batch"),
    [(8, 4), pytest.param(500, 100, marks=pytest.mark.slow(reason="nine runs of 500 samples; others have 8"))],
)
def test_the_same_samples_in_other_files_give_the_same_losses(
    run_config: Callable[..., RunConfig], tmp_path: Path, samples: int, batch: int
) -> None:
    """Files, archives, tables, a hub's layout, WebDataset shards, prepared tokens, and streams.

    A stream has an order of its own, so it is compared with files in that order.
    """
    found = layouts.write_layouts(tmp_path / "data", layouts.conversations(samples))
    files = Path(found["files"]["path"])
    by_id = {record["id"]: record for record in json.loads(files.read_text())}
    for name in ("hub", "shards"):
        found[f"streamed {name}"] = {**found[name], "stream": True}
        streamed = Records([SourceConfig.model_validate(found[f"streamed {name}"])])
        ordered = files.with_name(f"{name}.json")
        ordered.write_text(json.dumps([by_id[sample.id] for sample in streamed]))
        found[f"ordered {name}"] = {"path": str(ordered)}
    groups: list[tuple[str, ...]] = [("files", "tar", "parquet", "hub", "shards", "prepared")]
    groups += [(f"streamed {name}", f"ordered {name}") for name in ("hub", "shards")]

    def config(name: str) -> RunConfig:
        section: dict[str, Any] = {"sources": [found.get(name, found["files"])], "max_length": 512, "system_prompt": ""}
        changes: dict[str, Any] = {"global_batch": batch, "micro_batch": min(10, batch), "max_steps": samples // batch}
        if name == "prepared":
            section["prepared"] = str(tmp_path / "tokens")
        return run_config("pretrain", tmp_path / name, data=section, **changes)

    plain = config("files")
    loader = make_loader(plain, load_model(plain, {"zero_optimization": {}}), 1)
    prepare(loader.records, loader.sample_encoder, tmp_path / "tokens")
    names = [name for group in groups for name in group]
    assert run_ranks(train_all, 1, [config(name) for name in names]) == [[f"step-{samples // batch:06d}"] * len(names)]
    for group in groups:
        losses = [[record["loss"] for record in read_metrics(tmp_path / name)] for name in group]
        assert losses == [losses[0]] * len(group) and len(losses[0]) == samples // batch
