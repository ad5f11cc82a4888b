"""Low-rank adapters in PEFT's own format: PEFT computes what we do, and a run starts from what PEFT saved."""

from __future__ import annotations

import dataclasses
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
from zero_ds.config.schema import LoraConfig as Ours
from zero_ds.config.schema import RunConfig
from zero_ds.grafting.load import load_graft
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import CheckpointError
from zero_ds.training.checkpoint.peft_folder import KNOWN, load_peft_, other_base, write_peft_folder

IDS = torch.arange(5, 25).view(2, 10)
LORA = {"rank": 4, "alpha": 8, "modules": ["q_proj", "up_proj"], "layers": [1, 4]}


def said(model: VisionLanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden_states(IDS, torch.ones_like(IDS)))


def said_by_peft(target: Path, folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target), folder).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def made_by_peft(target: Path, folder: Path, **changes: Any) -> Path:
    """Writes adapters that PEFT itself made and saved, with an effect."""
    torch.manual_seed(1)
    plain = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 4]}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(target), LoraConfig(**{**plain, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def from_peft(made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by_peft(made("llama", tied=True), tmp_path_factory.mktemp("peft"))


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


def test_adapters_of_another_model_are_named(made: Callable[..., Path], from_peft: Path, tmp_path: Path) -> None:
    """Content decides, so a model may have moved; what is not here, and has no id of the hub, is not judged."""
    target, moved = made("llama", tied=True), tmp_path / "moved"
    hashed = DecoderFolder(target).hash()
    folder = tmp_path / "peft"
    shutil.copytree(from_peft, folder)
    shutil.copytree(target, moved)
    for base in (str(target), str(moved), str(tmp_path / "gone"), "owner/model", None, "", str(tmp_path)):
        _says(base_model_name_or_path=base)(folder)
        assert other_base(folder, str(target), hashed) is None, base
    for base, named in ((str(made("llama", tied=False)), str(target)), ("owner/other", "owner/model")):
        _says(base_model_name_or_path=base)(folder)
        sentence = other_base(folder, named, hashed)
        assert sentence and f"names {base} as the model of the adapters, and the run's target is {named}" in sentence
        assert "\n" not in sentence


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
    "rank as text": (_says(r="4"), LORA, "adapter_config.json cannot be read .*r='4'"),
    "rank without end": (_says(r=float("inf")), LORA, "adapter_config.json cannot be read .*r=inf"),
    "a rank that is none": (_says(r=True), {**LORA, "rank": 1}, "adapter_config.json cannot be read .*r=True"),
    "nothing but brackets": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), LORA, "cannot be read"),
    "a tensor less": (_without_a_tensor, LORA, "is only in the run"),
    "another rank inside": (_says(r=5), {**LORA, "rank": 5}, r"has shape \(4, 32\), but in the model it has \(5, 32\)"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), LORA, "adapter_model.safetensors cannot be"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_does_not_fit(case: str, from_peft: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    change, options, complaint = BAD[case]
    folder = tmp_path / "peft"
    shutil.copytree(from_peft, folder)
    change(folder)
    config = Ours.model_validate(options) if options else None
    model = build_model(ModelSpec(made("llama", tied=True), lora=config))
    with pytest.raises((ConfigError, CheckpointError), match=complaint) as caught:
        load_peft_(model, folder, config)
    assert "\n" not in str(caught.value)


# -- every option of PEFT ----------------------------------------------------------------------------------------------

ACCEPTED: dict[str, list[Any]] = {
    "auto_mapping": [{"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}],
    "base_model_name_or_path": ["somewhere/else"],
    "inference_mode": [True, False],
    "init_lora_weights": [True, False, "gaussian", "orthogonal"],
    "lora_dropout": [0.5],
    "megatron_core": ["elsewhere.core"],
    "peft_version": ["0.5.0"],
    "qalora_group_size": [32],
    "revision": ["main"],
    "task_type": ["CAUSAL_LM", None],
}
"""Values, by option, with which a folder is plain LoRA: PEFT computes what we do."""
REFUSED: dict[str, list[Any]] = {
    "alora_invocation_tokens": [[3, 4]],
    "alpha_pattern": [{"q_proj": 16}],
    "arrow_config": [{"top_k": 2}],
    "bias": ["all", "lora_only"],
    "corda_config": [{"corda_method": "ipm"}],
    "ensure_weight_tying": [True],
    "fan_in_fan_out": [True],
    "init_lora_weights": ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "new"],
    "kasa_config": [{"beta": 0.1}],
    "layer_replication": [[[0, 4], [2, 6]]],
    "loftq_config": [{"loftq_bits": 4}],
    "lora_bias": [True],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "megatron_config": [{"a": 1}],
    "modules_to_save": [["lm_head"]],
    "monteclora_config": [{"a": 1}],
    "peft_type": ["IA3", "LOHA", None],
    "rank_pattern": [{"q_proj": 2}],
    "task_type": ["SEQ_CLS"],
    "target_parameters": [["mlp.up_proj.weight"]],
    "trainable_token_indices": [[1, 2]],
    "use_bdlora": [{"a": 1}],
    "use_dora": [True],
    "use_qalora": [True],
    "use_rslora": [True],
    "velora_config": [{"a": 1}],
}
CHOOSING = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "eva_config",
)
"""Options that are compared in tests of their own."""


def test_no_option_of_peft_is_forgotten() -> None:
    options = {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config"}
    assert {*ACCEPTED, *REFUSED, *CHOOSING} == options
    assert options <= set(KNOWN)


@pytest.fixture(scope="module")
def ours(made: Callable[..., Path]) -> VisionLanguageModel:
    return build_model(ModelSpec(made("llama", tied=True), lora=Ours.model_validate(LORA))).eval()


@pytest.mark.parametrize("option", list(ACCEPTED))
def test_options_with_which_peft_computes_what_we_do(
    option: str, ours: VisionLanguageModel, from_peft: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    for number, value in enumerate(ACCEPTED[option]):
        folder = tmp_path / str(number)
        shutil.copytree(from_peft, folder)
        _says(**{option: value})(folder)
        load_peft_(ours, folder, Ours.model_validate(LORA))
        torch.testing.assert_close(said(ours), said_by_peft(made("llama", tied=True), folder), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", [*REFUSED, "an_option_of_tomorrow"])
def test_options_that_are_refused_by_name(
    option: str, ours: VisionLanguageModel, from_peft: Path, tmp_path: Path
) -> None:
    shutil.copytree(from_peft, tmp_path / "peft")
    for value in REFUSED.get(option, [True, None]):
        _says(**{option: value})(tmp_path / "peft")
        with pytest.raises(ConfigError, match=f"says {option}="):
            load_peft_(ours, tmp_path / "peft", Ours.model_validate(LORA))


MADE: dict[str, dict[str, Any]] = {
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
    "layer_replication": {"layer_replication": [[0, 4], [2, 6]], "layers_to_transform": None},
}


@pytest.mark.parametrize("words", list(MADE))
def test_relatives_of_lora_as_peft_saves_them(
    words: str, ours: VisionLanguageModel, made: Callable[..., Path], tmp_path: Path
) -> None:
    made_by_peft(made("llama", tied=True), tmp_path / "peft", **MADE[words])
    with pytest.raises(ConfigError, match=f"says {words}.*; only plain LoRA can be loaded into a run"):
        load_peft_(ours, tmp_path / "peft", Ours.model_validate(LORA))


CHOSEN: dict[str, dict[str, Any]] = {
    "exclude_modules": {"target_modules": ["q_proj", "up_proj", "o_proj"], "exclude_modules": ["o_proj"]},
    "layers_pattern": {"layers_pattern": "layers"},
    "a pattern": {"target_modules": r".*\.[14]\..*(q|up)_proj", "layers_to_transform": None},
}


@pytest.mark.parametrize("case", list(CHOSEN))
def test_ways_to_choose_the_same_modules(
    case: str, ours: VisionLanguageModel, made: Callable[..., Path], tmp_path: Path
) -> None:
    target = made("llama", tied=True)
    folder = made_by_peft(target, tmp_path / "peft", **CHOSEN[case])
    load_peft_(ours, folder, Ours.model_validate(LORA))
    torch.testing.assert_close(said(ours), said_by_peft(target, folder), atol=1e-5, rtol=1e-5)


# -- Gemma-3's multimodal class ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[1, 4], None])
def test_adapters_of_a_multimodal_class_are_those_of_its_text_tower(
    layers: list[int] | None,
    run_config: Callable[..., RunConfig],
    made: Callable[..., Path],
    data: Path,
    tmp_path: Path,
) -> None:
    """Its vision tower has modules and layers of the same names."""
    target = made("gemma3-multimodal", tied=True)
    config = run_config(
        "decoder",
        tmp_path / "run",
        target=str(target),
        surrogate=None,
        data={"sources": [{"path": str(data)}], "max_length": 512},
        lora={**LORA, "layers": layers},
        max_steps=1,
        optimizer={"learning_rate": 0.1, "warmup_ratio": 0.0},
    )
    assert run_ranks(train_all, 1, [config]) == [["step-000001"]]
    write_peft_folder(tmp_path / "run", tmp_path / "peft")
    graft = said(load_graft(tmp_path / "run", target))
    plain = said(build_model(ModelSpec(target)).eval())
    torch.testing.assert_close(said_by_peft(target, tmp_path / "peft"), graft, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(graft, plain, atol=1e-2), "they do something"

    again = build_model(ModelSpec(target, lora=config.lora)).eval()
    assert len(load_peft_(again, tmp_path / "peft", config.lora)) == 4 * len(layers or range(6))
    torch.testing.assert_close(said(again), graft, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"model folder .* does not exist; name the run's target with --target"):
        write_peft_folder(tmp_path / "run", tmp_path / "other", str(tmp_path / "elsewhere"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("tower", [r".*language_model.*", r".*"])
def test_what_peft_made_for_a_multimodal_class(tower: str, made: Callable[..., Path], tmp_path: Path) -> None:
    target = made("gemma3-multimodal", tied=True)
    chosen = {"target_modules": rf"{tower}layers\.\d+\..*q_proj", "layers_to_transform": None}
    folder = made_by_peft(target, tmp_path / "peft", **chosen)
    config = Ours.model_validate({"rank": 4, "alpha": 8, "modules": ["q_proj"]})
    model = build_model(ModelSpec(target, lora=config)).eval()
    if tower == ".*":
        with pytest.raises(
            ConfigError, match=r"adapts .*vision_tower.*q_proj.*, which is not in a layer of the decoder"
        ):
            load_peft_(model, folder, config)
        return
    load_peft_(model, folder, config)
    torch.testing.assert_close(said(model), said_by_peft(target, folder), atol=1e-5, rtol=1e-5)
