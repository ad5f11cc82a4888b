"""The held-out loss: exact over ranks, without an effect on the training, and with the best checkpoint kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks, train_all
from places import GATHERED
from safetensors.torch import load_file
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import RunConfig, SourceConfig
from zero_ds.data.sources import Records
from zero_ds.grafting.load import load_trained
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.best import best_folder, restore_best, set_best
from zero_ds.training.monitor import read_metrics
from zero_ds.training.setup import make_loader
from zero_ds.training.validation import Validation, held_out

STEPS = 6
RATE = {"learning_rate": 30.0, "warmup_ratio": 0.0}
"""A rate so high that the held-out loss rises again, and the last checkpoint is not the best one."""


def settings(data: Path, **more: Any) -> dict[str, Any]:
    sources = [{"path": str(data), "limit": 7}]
    return {
        "data": {"sources": [{"path": str(data)}], "max_length": 512, "system_prompt": ""},
        "validation": {"sources": sources, "every_steps": 1},
        "checkpoint": {"keep": 1, "best": True},
        "optimizer": RATE,
        "max_steps": STEPS,
        "zero": GATHERED,
        **more,
    }


@pytest.fixture(scope="module")
def runs(
    run_config: Callable[..., RunConfig], trained: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Returns a folder with a run of two ranks under ZeRO-3 that measures the loss, and the same run without it."""
    root = tmp_path_factory.mktemp("measured")
    start = {"init_from": [str(trained / "pretrain")]}
    silent = {"validation": {}, "checkpoint": {}}
    configs = [
        run_config("encoder", root / "measured", **settings(data, **start)),
        run_config("encoder", root / "silent", **settings(data, **start, **silent)),
    ]
    assert run_ranks(train_all, 2, configs) == [[f"step-{STEPS:06d}"] * 2] * 2
    return root


def test_measuring_changes_nothing(runs: Path) -> None:
    one, other = (
        load_file(runs / name / f"step-{STEPS:06d}" / "weights.safetensors") for name in ("measured", "silent")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[record["loss"] for record in read_metrics(runs / name)] for name in ("measured", "silent")]
    assert losses[0] == losses[1]


def test_the_best_checkpoint_is_kept_and_named(runs: Path) -> None:
    records = read_metrics(runs / "measured")
    measured = [record["validation/loss"] for record in records]
    best = measured.index(min(measured)) + 1
    assert len(measured) == STEPS and best < STEPS, measured
    names = sorted(path.name for path in (runs / "measured").glob("step-*"))
    assert names == [f"step-{best:06d}", f"step-{STEPS:06d}"]
    found = best_folder(runs / "measured")
    assert found is not None and found.name == names[0] and restore_best(runs / "measured") == min(measured)
    assert (runs / "measured" / "best" / "manifest.json").is_file()
    assert not (runs / "silent" / "best").exists() and "validation/loss" not in read_metrics(runs / "silent")[0]


@pytest.mark.parametrize("name", ["best", "latest"])
def test_the_loss_is_that_of_the_checkpoint_on_one_rank(
    runs: Path, run_config: Callable[..., RunConfig], small: Path, data: Path, name: str
) -> None:
    """Two ranks measured it under ZeRO-3; one rank measures it here, and so does a sum over single samples."""
    folder = runs / "measured" / (name if name == "best" else f"step-{STEPS:06d}")
    step = json.loads((folder / "manifest.json").read_text())["step"]
    recorded = read_metrics(runs / "measured")[step - 1]
    config = run_config("encoder", runs / name, **settings(data, micro_batch=3, global_batch=3))
    model = load_trained(folder, small)
    loader = make_loader(config, model, 1)
    before = torch.get_rng_state()
    measured = Validation(config, loader, STEPS).measure(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert measured["validation/samples"] == recorded["validation/samples"] == 7
    assert measured["validation/tokens"] == recorded["validation/tokens"]
    assert measured["validation/loss"] == pytest.approx(recorded["validation/loss"], rel=1e-5)
    total, tokens = 0.0, 0
    model.eval()
    for sample in list(Records([SourceConfig(path=str(data))]))[:7]:
        encoded = loader.sample_encoder(sample)
        labels = torch.tensor([encoded.labels])
        pixels = loader.sample_encoder.pixels(sample) if sample.images else torch.zeros(1, 3, 32, 32)
        with torch.no_grad():
            outcome = model(torch.tensor([encoded.input_ids]), labels, torch.ones_like(labels), pixels)
        total, tokens = total + float(outcome.tokens.double().sum()), tokens + len(outcome.tokens)
    assert measured["validation/loss"] == pytest.approx(total / tokens, rel=1e-5)


def evaluated(folder: Path) -> tuple[float, float]:
    from zero_ds.evaluation.heldout.loss import heldout_loss

    found = heldout_loss(folder, batch=2, dtype=torch.float32)
    return found["loss"], found["tokens"]


def test_the_loss_is_that_of_eval(runs: Path, data: Path, tmp_path: Path) -> None:
    """On one rank and on two, with the run's own samples and with the same ones named."""
    recorded = read_metrics(runs / "measured")[-1]
    first = tmp_path / "first.json"
    first.write_text(json.dumps(json.loads(data.read_text())[:7]))
    for options in ([], ["--data", str(first), "--root", str(data.parent), "--batch", "3"]):
        out = tmp_path / "new" / "loss.json"
        command = ["eval", "loss", str(runs / "measured"), "--dtype", "float32", "--out", str(out), *options]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0 and " tokens of 7 samples" in result.stdout, result.output
        found = json.loads(out.read_text())
        assert found["tokens"] == recorded["validation/tokens"] and found["step"] == STEPS
        assert found["loss"] == pytest.approx(recorded["validation/loss"], rel=1e-5)
    best = best_folder(runs / "measured")
    assert best is not None
    lowest = read_metrics(runs / "measured")[int(best.name[5:]) - 1]
    for loss, tokens in run_ranks(evaluated, 2, runs / "measured" / "best"):
        assert tokens == lowest["validation/tokens"] and loss == pytest.approx(lowest["validation/loss"], rel=1e-5)
    with pytest.raises(ConfigError, match="silent holds out no samples; name some with --data"):
        evaluated(runs / "silent")


def test_curves_are_beside_those_of_training(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (runs / "measured" / "tensorboard").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("validation/loss")] == list(range(1, STEPS + 1))


# -- a held-out share --------------------------------------------------------------------------------------------------


def numbered(folder: Path, samples: int) -> Path:
    path = folder / "numbered.json"
    path.write_text(json.dumps([{"id": f"{n}", "question": "q", "answer": "a"} for n in range(samples)]))
    return path


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_share_is_held_out_at_even_distances(
    tmp_path: Path, run_config: Callable[..., RunConfig], shuffle: bool
) -> None:
    path = str(numbered(tmp_path, 100))
    config = run_config("encoder", data={"sources": [{"path": path}], "shuffle": shuffle}, validation={"share": 0.05})
    (rest,) = held_out(config)
    permute = config.seed if shuffle else None
    kept = {sample.id for sample in Records(config.data.sources, permute=permute, share=0.05)}
    out = [sample.id for sample in rest]
    assert len(out) == 5 and len(kept) == 95 and not kept & set(out)
    assert shuffle or out == ["19", "39", "59", "79", "99"]
    assert config.fingerprint() != run_config("encoder").fingerprint()


def test_a_share_of_nothing(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    path = str(numbered(tmp_path, 10))
    with pytest.raises(ConfigError, match=r"validation.share=0.05 of 10 samples is not one; raise it"):
        held_out(run_config("encoder", data={"sources": [{"path": path}]}, validation={"share": 0.05}))


@pytest.mark.parametrize("changes", [{"checkpoint": {"best": True}}, {"validation": {"every_steps": 2}}])
def test_settings_without_samples(run_config: Callable[..., RunConfig], changes: Any) -> None:
    with pytest.raises(ValueError, match=r"set validation.sources or validation.share"):
        run_config("encoder", **changes)


def test_old_runs_may_be_resumed_with_a_validation(run_config: Callable[..., RunConfig], data: Path) -> None:
    plain, watched = run_config("encoder"), run_config("encoder", validation={"sources": [{"path": str(data)}]})
    content = plain.model_dump(mode="json")
    del content["validation"], content["data"]["caption_prompt"]
    for key in ("subset", "split", "revision", "columns", "weight", "repeat", "count", "stream"):
        del content["data"]["sources"][0][key]
    from zero_ds.config.resume import fingerprint

    assert fingerprint(content) == plain.fingerprint() == watched.fingerprint()


def test_a_link_that_is_missing_or_leads_nowhere(tmp_path: Path) -> None:
    """The state after a kill between the saving of a checkpoint and the link to it."""
    assert best_folder(tmp_path) is None and restore_best(tmp_path) is None
    for step, loss in ((1, 3.0), (2, 2.0), (3, None), (4, float("nan"))):
        folder = tmp_path / f"step-{step:06d}"
        (folder / "resume").mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        progress = {} if loss is None else {"validation_loss": loss}
        (folder / "resume" / "progress.json").write_text(json.dumps(progress))
    set_best(tmp_path / "step-000009")
    assert best_folder(tmp_path) is None
    assert restore_best(tmp_path) == 2.0 and best_folder(tmp_path) == tmp_path / "step-000002"
    assert restore_best(tmp_path, 1) == 3.0 and best_folder(tmp_path) == tmp_path / "step-000001"


def test_checkpoints_that_will_be_replaced_are_not_the_best(
    run_config: Callable[..., RunConfig], data: Path, tmp_path: Path
) -> None:
    """After a kill between the best checkpoint and `latest`, that step is made and saved again, and is the best."""
    saving = {"keep": 9, "best": True, "every_steps": 1}
    gentle = {"optimizer": {"learning_rate": 1e-3}, "max_steps": 2, "zero": "zero2"}
    config = run_config("pretrain", tmp_path / "run", **settings(data, checkpoint=saving, **gentle))
    assert run_ranks(train_all, 1, [config]) == [["step-000002"]]
    best, lowest = best_folder(tmp_path / "run"), restore_best(tmp_path / "run")
    assert best is not None and best.name == "step-000002" and lowest is not None
    (tmp_path / "run" / "latest").write_text("step-000001\n")
    assert run_ranks(train_all, 1, [config]) == [["step-000002"]]
    again = best_folder(tmp_path / "run")
    assert again is not None and again.name == "step-000002" and restore_best(tmp_path / "run") == lowest


def test_a_run_that_holds_out_a_share(run_config: Callable[..., RunConfig], data: Path, tmp_path: Path) -> None:
    """Without `every_steps` the loss is measured after the last step; the samples differ from those of the training."""
    section = {"sources": [{"path": str(data)}], "max_length": 512, "system_prompt": ""}
    config = run_config(
        "pretrain", tmp_path / "run", data=section, validation={"share": 0.25}, max_steps=None, epochs=1, global_batch=2
    )
    assert run_ranks(train_all, 1, [config]) == [["step-000003"]]
    records = read_metrics(tmp_path / "run")
    assert [record.get("validation/samples") for record in records] == [None, None, 2]
    assert records[-1]["validation/loss"] > 0 and records[-1]["validation/skipped_samples"] == 0
