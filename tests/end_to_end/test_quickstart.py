"""The quickstart's plan: public commands whose runs resolve, before anything is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zero_ds.cli.demo import LLM
from zero_ds.cluster.pipeline import Step
from zero_ds.cluster.quickstart import Quickstart
from zero_ds.config.loading import load_run
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.stages import decoder_kind, stage_of


def planned(out: Path, *overrides: str) -> list[Step]:
    run = Quickstart(out, Path("runs/demo"), str(LLM), seed=3, overrides=overrides)
    return [*run.main_steps(), *run.control_steps(), run.report_step(controls=True)]


def trained(steps: list[Step]) -> dict[str, RunConfig]:
    runs = {}
    for step in steps:
        for command in step.commands:
            if command[:2] == ("bash", "launch/train.sh"):
                runs[step.name] = load_run(command[2], list(command[3:]))
    return runs


def test_every_training_run_of_the_plan_resolves(tmp_path: Path) -> None:
    steps = planned(tmp_path)
    assert len({step.name for step in steps}) == len(steps)
    runs = trained(steps)
    for name, run in runs.items():
        assert stage_of(run) and run.seed == 3, name
        assert Path(run.out).is_relative_to(tmp_path)
    assert [run.max_steps for name, run in runs.items() if name == "encoder"] == [
        load_run("smollm2-135m/encoder").max_steps
    ]
    against_target = {name for name, run in runs.items() if decoder_kind(run) == "target"}
    assert against_target == {"full-cost", "full-adapter", "full-encoder", "warm-start", "cold-start"}
    assert not any(runs[name].distill.active for name in against_target), "there is no translator to distil"


def test_without_the_demo_it_says_how_to_make_it(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from zero_ds.cli.main import app

    words = ["quickstart", "--demo", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ConfigError) and "zero-ds demo --out" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_runs_before_it(tmp_path: Path) -> None:
    seen: set[str] = set()
    for name, run in trained(planned(tmp_path)).items():
        assert set(run.init_from) <= seen, f"{name} starts from a run that does not exist yet"
        seen.add(run.out)


def test_overrides_reach_every_training_run(tmp_path: Path) -> None:
    runs = trained(planned(tmp_path, "zero=zero2", "precision=fp32", "max_steps=4"))
    assert {(run.zero, run.precision, run.max_steps) for run in runs.values()} == {("zero2", "fp32", 4)}
    scaled = Quickstart(tmp_path, Path("runs/demo"), str(LLM), scale=10.0)
    encoder = trained(scaled.main_steps())["encoder"]
    assert encoder.max_steps == 10 * (load_run("smollm2-135m/encoder").max_steps or 0)


def test_a_wrong_override_ends_it_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'zeros'.*did you mean 'zero'"):
        planned(tmp_path, "zeros=zero2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("replace", "message"),
    [("1-2", "'1-2' is not a layer range"), ("1:40", r"layers 1:40 are not inside the model's layers")],
)
def test_a_wrong_range_ends_it_before_anything_runs(
    made: Callable[..., Path], tmp_path: Path, replace: str, message: str
) -> None:
    run = Quickstart(tmp_path, Path("runs/demo"), str(made("llama", tied=True)), replace)
    with pytest.raises(ConfigError, match=message):
        run.main_steps()
    assert not list(tmp_path.iterdir())
