"""Decoders with code of their own: run only with the user's permission, and then like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import decoder_census
import pytest
import torch
import yaml
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.cluster.route import Route
from zero_ds.config.loading import load_run
from zero_ds.config.schema import RunConfig
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.runtime import trust
from zero_ds.runtime.errors import ConfigError

CODE = """
import os
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

with Path(os.environ["OWN_CODE_MARK"]).open("a") as mark:
    mark.write("ran")


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **keywords):
        output = super().forward(*arguments, **keywords)
        output.logits = output.logits * self.config.logit_scale
        return output
"""


@pytest.fixture(autouse=True)
def _no_permission(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    trust.allow_code(False)
    yield
    trust.allow_code(False)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File that exists once the code of the folder has run."""
    monkeypatch.setenv("OWN_CODE_MARK", str(tmp_path / "mark"))
    return tmp_path / "mark"


@pytest.fixture
def own(tmp_path: Path, mark: Path) -> Path:
    folder = tmp_path / f"own_{tmp_path.name}"
    decoder_census.write_model("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "logit_scale": 0.5, "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_model.py").write_text(CODE)
    return folder


def test_code_is_not_run_without_permission(own: Path, mark: Path) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: DecoderFolder(own).family,
        lambda: DecoderFolder(own).text_config(),
        lambda: DecoderFolder(own).tokenizer(),
        lambda: DecoderFolder(own).load(dtype=torch.float32),
    ]
    for attempt in attempts:
        with pytest.raises(
            ConfigError, match=r"needs code of its own, .*--trust-remote-code .*trust_remote_code: true"
        ):
            attempt()
    command = ["surrogate", "--target", str(own), "--replace", "2:4", "--out", str(own.parent / "cut")]
    assert "--trust-remote-code" in str(CliRunner().invoke(app, command).exception)
    assert not mark.exists()


def test_with_permission_it_is_a_decoder_like_any_other(
    own: Path, mark: Path, tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    """A surrogate takes the code along; a recipe permits it; the next command has no permission."""
    command = ["surrogate", "--target", str(own), "--replace", "2:4", "--out", str(tmp_path / "cut")]
    done = CliRunner().invoke(app, [*command, "--trust-remote-code"])
    assert done.exit_code == 0, done.output
    assert mark.exists() and (tmp_path / "cut" / "own_model.py").read_text() == CODE
    assert isinstance(CliRunner().invoke(app, command).exception, ConfigError)

    config = run_config("encoder", tmp_path / "run", target=str(own), surrogate=str(tmp_path / "cut"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**config.model_dump(mode="json", exclude_defaults=True)}))
    load_run(str(recipe))
    assert not trust.code_is_allowed()
    assert load_run(str(recipe), ["trust_remote_code=true"]).trust_remote_code and trust.code_is_allowed()

    assert config.encoder is not None
    model = build_model(ModelSpec(tmp_path / "cut", Path(config.encoder.path), config.encoder, config.adapter))
    assert model.family.score_factor == "logit_scale"  # found in what the code computes
    decoder_census.check_trajectory(own, tmp_path / "scratch")
    again = shutil.copytree(own, tmp_path / "own_again")
    decoder_census.check_surrogate(again, tmp_path / "cut-again")


def test_the_code_of_types_that_transformers_knows_is_not_run(own: Path, mark: Path) -> None:
    trust.allow_code(True)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert type(DecoderFolder(own).text_config()).__name__ == "LlamaConfig" and not mark.exists()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("someone/else--own_model.OwnConfig", "not in that folder"),
        ("missing.OwnConfig", "not in that folder"),
        ("own_model.Missing", "does not run here"),
    ],
)
def test_code_that_is_not_there(own: Path, module: str, reason: str) -> None:
    trust.allow_code(True)
    config = json.loads((own / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = module
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=reason):
        _ = DecoderFolder(own).family


def test_a_pipeline_says_at_once_that_its_export_will_fail(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the pipeline ends with an export"):
        Route("smollm2-135m", tmp_path, ("trust_remote_code=true",)).steps()


def test_an_export_cannot_take_the_code_along(own: Path, tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    import export_helper

    from zero_ds.export import export_model

    trust.allow_code(True)
    config = run_config("encoder", tmp_path / "run", target=str(own), decoder="target")
    run = export_helper.write_run(config, own)
    with pytest.raises(ConfigError, match=r"needs code of its own \(own_model\.py\), which no format can take along"):
        export_model(run, None, tmp_path / "export")
