"""`zero-ds init`: recipes for a user's own model and data, which resolve and lead through the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.cli.options import complete_recipe
from zero_ds.cluster.route import Route
from zero_ds.config.loading import load_run
from zero_ds.config.starter import STAGES, Starter, write
from zero_ds.runtime.errors import ConfigError

MODEL = ("--target", "meta-llama/Llama-3.1-8B-Instruct", "--encoder", "openai/clip-vit-large-patch14-336")


@pytest.mark.parametrize("data", ["my data: #1.json", "010", "~/data.json", "дані.json"])
def test_recipes_resolve_to_what_was_given(tmp_path: Path, data: str) -> None:
    write(Starter("cats", "some/model", "some/encoder", data, images="im: ages", replace="17:30"), tmp_path / "cats")
    runs = {stage: load_run(str(tmp_path / f"cats/{stage}.yaml")) for stage in STAGES}
    for stage, run in runs.items():
        assert (run.stage, run.target, run.out) == (stage, "some/model", f"runs/cats/{stage}")
        assert run.encoder is not None and run.encoder.path == "some/encoder"
        assert [(one.path.endswith(data.lstrip("~")), one.root) for one in run.data.sources] == [(True, "im: ages")]
    assert runs["encoder"].surrogate == "runs/cats/T17-30" and runs["decoder"].surrogate is None
    assert runs["decoder"].init_from == ("runs/cats/pretrain", "runs/cats/encoder")
    assert runs["decoder"].encoder is not None and runs["decoder"].encoder.train_last_layers == 8


def test_small_data_get_small_batches() -> None:
    large = Starter("cats", "m", "e", "d.json")
    assert [large.global_batch(stage) for stage in STAGES] == [256, 128, 128]
    small = Starter("cats", "m", "e", "d.json", samples=1000, ranks=4)
    assert [small.global_batch(stage) for stage in STAGES] == [8, 8, 8]
    tiny = Starter("cats", "m", "e", "d.json", samples=3, ranks=4)
    assert tiny.global_batch("encoder") == 4


def test_the_pipeline_takes_the_folder(tmp_path: Path) -> None:
    write(Starter("cats", "some/model", "some/encoder", "data.json"), tmp_path / "cats")
    steps = Route(str(tmp_path / "cats"), tmp_path / "out").steps()
    assert [step.name for step in steps] == ["trajectory", "surrogate", *STAGES, "export"]
    assert "--from-trajectory" in steps[1].commands[0]
    assert steps[2].commands[0][:3] == ("bash", "launch/train.sh", str(tmp_path / "cats/pretrain.yaml"))
    assert f"init_from=[{tmp_path}/out/pretrain]" in steps[3].commands[0]


def test_a_folder_without_the_last_stage_is_refused(tmp_path: Path) -> None:
    write(Starter("cats", "some/model", "some/encoder", "data.json"), tmp_path / "cats")
    (tmp_path / "cats/decoder.yaml").unlink()
    with pytest.raises(ConfigError, match="no recipe `decoder`"):
        Route(str(tmp_path / "cats"), tmp_path / "out").steps()


def test_the_command_reads_the_data_and_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    samples = [{"id": str(n), "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
               for n in range(500)]  # fmt: skip
    Path("data.json").write_text(json.dumps(samples), encoding="utf-8")
    done = CliRunner().invoke(app, ["init", "cats", *MODEL, "--data", "data.json", "--gpus", "8"])
    assert done.exit_code == 0, done.output
    assert "500 samples" in done.output and "planned for 8 x A100" in done.output
    assert "zero-ds pipeline cats" in done.output
    run = load_run("cats/encoder.yaml")
    assert run.global_batch == 8 and run.zero in done.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cats", "--encoder", "e", "--data", "data.json", "--gpus", "1"], "--target is missing"),
        (["../cats", *MODEL, "--data", "data.json", "--gpus", "1", "--no-check"], "is not a name for a folder"),
        (["cats", *MODEL, "--data", "missing.json", "--gpus", "1"], "missing.json"),
        (["cats", *MODEL, "--data", "data.json", "--gpus", "1", "--replace", "9"], "9"),
        (["there", *MODEL, "--data", "data.json", "--gpus", "1"], "is there already"),
        (["cats", *MODEL, "--data", "data.json", "--gpus", "1", "--gpu", "abacus"], "abacus"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    sample = {"id": "0", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    Path("data.json").write_text(json.dumps([sample]), encoding="utf-8")
    done = CliRunner().invoke(app, ["init", *words])
    assert done.exit_code != 0 and isinstance(done.exception, ValueError) and sentence in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "there"]


def test_names_of_recipes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Starter("smol", "some/model", "some/encoder", "data.json"), tmp_path / "smol")
    assert complete_recipe("smollm2-135m/e") == ["smollm2-135m/encoder"]
    assert complete_recipe("smol/e") == ["smol/encoder.yaml"]
    assert "smol/" in complete_recipe("smo") and complete_recipe("no such") == []
