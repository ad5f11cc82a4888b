"""Low-rank adapters in PEFT's own format: PEFT computes what we do, and a run starts from what PEFT saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks, train_all
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import RunConfig
from zero_ds.grafting.load import load_graft
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import CheckpointError
from zero_ds.training.checkpoint.peft_folder import load_peft_, write_peft_folder

IDS = torch.arange(5, 25).view(2, 10)
LORA = {"rank": 4, "alpha": 8, "modules": ["q_proj", "up_proj"], "layers": [1, 4]}


def said(model: VisionLanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden_states(IDS, torch.ones_like(IDS)))


def said_by_peft(target: Path, folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target), folder).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def from_peft(made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of adapters that PEFT itself made and saved, with weights that have an effect."""
    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 4])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(made("llama", tied=True)), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(
    run_config: Callable[..., RunConfig], trained: Path, from_peft: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two ranks of ZeRO-3 that start from PEFT's folder: one hardly moves, one trains."""
    root = tmp_path_factory.mktemp("runs")
    options = {"lora": LORA, "init_from": [str(trained / "encoder"), str(from_peft)], "max_steps": 1, "zero": "zero3"}
    configs = [
        run_config("decoder", root / name, **options, optimizer={"learning_rate": rate})
        for name, rate in (("still", 1e-12), ("moved", 1e-2))
    ]
    assert run_ranks(train_all, 2, configs) == [["step-000001"] * 2] * 2
    return root


def test_a_run_starts_from_what_peft_saved(runs: Path, from_peft: Path, made: Callable[..., Path]) -> None:
    target = made("llama", tied=True)
    theirs = said_by_peft(target, from_peft)
    torch.testing.assert_close(said(load_graft(runs / "still", target)), theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(theirs, said(build_model(ModelSpec(target)).eval()), atol=1e-2), "they do something"


def test_peft_loads_what_a_run_trained(runs: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """The command writes them; the logits of the target with these adapters are those of the graft on text."""
    target = made("llama", tied=True)
    done = CliRunner().invoke(
        app,
        ["export-lora", "--weights", str(runs / "moved"), "--out", str(tmp_path / "peft")],
        catch_exceptions=False,
    )
    assert done.exit_code == 0 and "rank 4, alpha 8" in done.output
    assert {path.name for path in (tmp_path / "peft").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    ours = said(load_graft(runs / "moved", target))
    torch.testing.assert_close(said_by_peft(target, tmp_path / "peft"), ours, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, said(load_graft(runs / "still", target)), atol=1e-3), "it was trained"
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(target) and sorted(settings["layers_to_transform"]) == [1, 4]

    from zero_ds.config.schema import LoraConfig as Ours

    again = build_model(ModelSpec(target, lora=Ours.model_validate(LORA))).eval()
    assert len(load_peft_(again, tmp_path / "peft", Ours.model_validate(LORA))) == 8
    torch.testing.assert_close(said(again), ours, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="already exists"):
        write_peft_folder(runs / "moved", tmp_path / "peft")


def test_a_run_without_lora_has_none_to_write(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no low-rank adapters"):
        write_peft_folder(trained / "encoder", tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def _says(**settings: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return write


def _without_a_tensor(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any] | None, str]] = {
    "no lora": (lambda f: None, None, "holds adapters of rank 4 and alpha 8, the run has no lora"),
    "alpha": (lambda f: None, {**LORA, "alpha": 9}, r"the run has lora\.rank=4 lora\.alpha=9"),
    "modules": (
        lambda f: None,
        {**LORA, "modules": ["q_proj"]},
        r"up_proj.* is only in that folder; set lora",
    ),
    "layers": (lambda f: None, {**LORA, "layers": [1, 3, 4]}, r"layers\.3.* is only in the run"),
    "rslora": (_says(use_rslora=True), LORA, "says use_rslora=True; only plain LoRA"),
    "another kind": (_says(peft_type="IA3"), LORA, "says peft_type='IA3'"),
    "no rank": (_says(r=None), LORA, "adapter_config.json cannot be read"),
    "a tensor less": (_without_a_tensor, LORA, "is only in the run"),
    "another rank inside": (_says(r=5), {**LORA, "rank": 5}, r"has shape \(4, 32\), but in the model it has \(5, 32\)"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), LORA, "adapter_model.safetensors cannot be"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_does_not_fit(case: str, from_peft: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    from zero_ds.config.schema import LoraConfig as Ours

    change, options, complaint = BAD[case]
    folder = tmp_path / "peft"
    shutil.copytree(from_peft, folder)
    change(folder)
    config = Ours.model_validate(options) if options else None
    model = build_model(ModelSpec(made("llama", tied=True), lora=config))
    with pytest.raises((ConfigError, CheckpointError), match=complaint) as caught:
        load_peft_(model, folder, config)
    assert "\n" not in str(caught.value)
