"""Exports of every family, in every format that can express it, after every kind of training; also wrong input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_helper
import pytest
import tiny
import torch
from distributed_helper import run_ranks, train_all
from places import ROOT
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN
from zero_ds.export import export_model, shard_bytes
from zero_ds.export.tensors import merged, read
from zero_ds.grafting.compatibility import run_config as config_of
from zero_ds.grafting.named_model import find_model, load_model
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.layer_plan import Replaced
from zero_ds.runtime import safetensors as shards
from zero_ds.runtime.errors import ConfigError
from zero_ds.surrogate.build import build_surrogate
from zero_ds.training.checkpoint.checkpoint import CheckpointError, find_checkpoint
from zero_ds.training.checkpoint.load import load_weights_

EXTRAS: dict[str, Any] = {"adapter": {"boundary_tokens": True}}
GRID = [(1, 2), (2, 1)]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    export_helper.here(monkeypatch)


@pytest.fixture
def run(made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Path]:
    """Returns a function: `run("encoder", family="qwen2")` writes a finished run on a tiny model or on `decoder`."""

    def make(stage: str, family: str = "llama", tied: bool = True, decoder: Path | None = None, **more: Any) -> Path:
        target = made(family, tied=tied)
        if "patch_norm" in more:
            more["encoder"] = {"path": str(made("clip")), "patch_norm": more.pop("patch_norm")}
        settings = {"decoder": "target", "target": str(target), "data": {"max_length": 512}, **more}
        if decoder is not None:
            settings |= {"decoder": "surrogate", "surrogate": str(decoder)}
        number = len(list(tmp_path.glob("run-*")))
        return export_helper.write_run(run_config(stage, tmp_path / f"run-{number}", **settings), decoder or target)

    return make


def said(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * model.tokens_per_image(), 9, 11, 60]])
    with torch.no_grad():
        return model.logits(model.hidden_states(ids, torch.ones_like(ids), pixels()))


def pixels() -> torch.Tensor:
    return torch.rand(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def exported_says(folder: Path) -> torch.Tensor:
    """Returns the logits of transformers' own class for the same prompt."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    token = model.config.image_token_id
    ids = torch.tensor([[5, *[token] * tiny.TOKENS_PER_IMAGE, 9, 11, 60]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels()).logits


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("run-"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, *tiny.VARIANTS])
def test_every_family(
    run: Callable[..., Path], made: Callable[..., Path], tmp_path: Path, family: str, tied: bool
) -> None:
    """Logits, answers and every tensor are the source's, of which encoder, adapter and decoder were trained."""
    form = "remote-code" if family == "gemma2" or not tied else "llava"
    more = {} if form == "llava" else {**EXTRAS, "patch_norm": True}
    run_folder = run("decoder", family, tied, **more)
    proof = export_model(run_folder, None, tmp_path / "out", form=form)
    assert proof["largest_logit_difference"] <= 1e-5 and len(proof["prompts"]) == 4
    assert {line["picture"] for line in proof["prompts"]} == {True, False}
    assert proof == json.loads((tmp_path / "out" / "proof.json").read_text())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert proof["tensors_equal"] == len(stored)
    heads = [name for name in stored if name.endswith("lm_head.weight")]
    assert len(heads) == (0 if tied else 1), "tied embeddings stay tied, untied ones untied"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True) if more else None
    if model is not None:
        same = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert same == tied
    assert folders(tmp_path) == ["out"]


def test_a_tokenizer_that_adds_a_token(run: Callable[..., Path], made: Callable[..., Path], tmp_path: Path) -> None:
    """Llama-3's and Gemma's add a first token that the template also writes. Gemma's end token does not end a turn."""
    target = tmp_path / "run-target"
    shutil.copytree(made("llama", tied=True), target)
    words = AutoTokenizer.from_pretrained(target)
    begin, closing = words.bos_token, words.eos_token
    words.eos_token = words.pad_token
    special = [(begin, words.bos_token_id)]
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=special
    )
    words.chat_template = words.chat_template.replace("<|im_end|>", "<|im_end|>' + eos_token + '")
    words.save_pretrained(target)
    export_model(run("encoder", target=str(target)), None, tmp_path / "out")
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("a").input_ids == [words.bos_token_id, *read("a").input_ids] and read.eos_token == closing
    ours = load_model(find_model(str(tmp_path / "out"), None)).encoder.template.tokenizer
    assert ours("a").input_ids == words("a").input_ids, "text suites see the tokens of the target"
    asked = [{"role": "user", "content": "a"}]
    assert read.apply_chat_template(asked) == words.apply_chat_template(asked), "the template writes the same end"


def test_a_language_model_trained_alone(
    run_config: Callable[..., RunConfig], data: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    """Stage decoder without an encoder: training on text, its checkpoint, a resume to the same bits, the export."""
    texts = [record for record in json.loads(data.read_text()) if "image" not in record]
    (tmp_path / "run-texts.json").write_text(json.dumps(texts))

    def config(name: str, **more: Any) -> RunConfig:
        of_text = {
            "sources": [{"path": str(tmp_path / "run-texts.json")}],
            "max_length": 512,
            "system_prompt": "Short.",
        }
        settings = {"encoder": None, "surrogate": None, "data": of_text, "global_batch": 2, "max_steps": 3, **more}
        return run_config("decoder", tmp_path / name, **settings)

    two, one = (
        config("run-a", checkpoint={"every_steps": 2, "keep": 3}),
        config("run-lora", lora={"rank": 2}, max_steps=1),
    )
    assert run_ranks(train_all, 1, [two, one])[0] == ["step-000003", "step-000001"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run-a/metrics.jsonl").read_text().splitlines()]
    assert losses[2] < losses[0]
    end = (tmp_path / "run-a/step-000003/weights.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run-a/step-000003")
    (tmp_path / "run-a/latest").write_text("step-000002")
    assert run_ranks(train_all, 1, [two]) == [["step-000003"]]
    assert (tmp_path / "run-a/step-000003/weights.safetensors").read_bytes() == end
    weights = load_file(tmp_path / "run-a/step-000003/weights.safetensors")
    assert all(name.startswith("decoder.") for name in weights)

    proof = export_model(tmp_path / "run-a", None, tmp_path / "out")
    assert proof["format"] == "causal-lm" and proof["loaded_by_transformers"] == "LlamaForCausalLM"
    assert {line["picture"] for line in proof["prompts"]} == {False} and proof["largest_logit_difference"] <= 1e-5
    stored = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(weights[f"decoder.{name}"], tensor) for name, tensor in stored.items())
    card = (tmp_path / "out/README.md").read_text()
    assert "text-generation" in card and "trained on text in the stage `decoder`" in card and "image" not in card
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = words.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "system\nShort.<|im_end|>" in asked
    assert find_model(str(tmp_path / "out"), None).sees is False
    assert export_model(tmp_path / "run-lora", None, tmp_path / "merged")["format"] == "causal-lm"
    with pytest.raises(ConfigError, match="has no vision encoder; use --format causal-lm"):
        export_model(tmp_path / "run-a", None, tmp_path / "none", form="llava")


def test_a_surrogate_trained_on_text(run: Callable[..., Path], small: Path, tmp_path: Path) -> None:
    """A run of stage translator is exported on its surrogate; its full model has no place for the translators."""
    folder = run("translator", decoder=small, encoder=None)
    with pytest.raises(
        ConfigError, match="has no place for its translators; name a run of an encoder stage, or the run"
    ):
        export_model(folder, None, tmp_path / "none")
    proof = export_model(folder, str(small), tmp_path / "out")
    weights = load_file(folder / "step-000001/weights.safetensors")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert proof["format"] == "causal-lm" and proof["tensors_equal"] == len(stored)
    trained = [name for name, tensor in stored.items() if any(torch.equal(tensor, other) for other in weights.values())]
    assert len(trained) == len(weights)
    with pytest.raises(ConfigError, match="this run has a vision encoder; use --format llava"):
        export_model(run("encoder"), None, tmp_path / "none", form="causal-lm")


@pytest.mark.parametrize("form", ["llava", "remote-code"])
def test_a_surrogate_with_its_translators(
    run: Callable[..., Path], made: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    target = made("qwen3", tied=True)
    build_surrogate(target, [Replaced(1, 2), Replaced(3, 4)], tmp_path / "run-surrogate")
    run_folder = run("pretrain-early", "qwen3", decoder=tmp_path / "run-surrogate")
    proof = export_model(run_folder, str(tmp_path / "run-surrogate"), tmp_path / "surrogate", form=form)
    assert proof["largest_logit_difference"] <= 1e-5
    with pytest.raises(ConfigError, match="the source of the kept layers"):  # because this run has trained them
        export_model(run_folder, str(target), tmp_path / "graft", form=form)
    plain = run("pretrain", "qwen3", decoder=tmp_path / "run-surrogate")
    export_model(plain, str(target), tmp_path / "graft", form=form)
    two = [json.loads((tmp_path / name / "config.json").read_text())["text_config"] for name in ("surrogate", "graft")]
    assert [config["num_hidden_layers"] for config in two] == [4, 6]
    stored = load_file(tmp_path / "surrogate" / "model.safetensors")
    name = next(name for name in stored if "layers.1.mlp.up_proj" in name)
    trained = load_file(run_folder / "step-000001" / "weights.safetensors")
    assert torch.equal(stored[name], trained["translator.0.mlp.up_proj.weight"])


def test_the_runs_that_a_run_started_from(run: Callable[..., Path], tmp_path: Path) -> None:
    """Weights that the last run did not train come from the run before it; the last run's replace all others."""
    first = run("encoder")
    second = run("adapter", init_from=[str(first)])
    export_model(second, None, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    before, after = (load_file(one / "step-000001" / "weights.safetensors") for one in (first, second))
    name = "encoder.layers.0.mlp.fc1.weight"
    assert f"encoder.{name}" in before and f"encoder.{name}" not in after
    assert torch.equal(stored[f"vision_tower.vision_model.{name}"], before[f"encoder.{name}"])
    assert torch.equal(stored["multi_modal_projector.linear_1.weight"], after["adapter.0.weight"])
    assert not torch.equal(before["adapter.0.weight"], after["adapter.0.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_lora_merged_is_lora_applied(
    run: Callable[..., Path], made: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    target = made("llama", tied=tied)
    run_folder = run(
        "decoder", tied=tied, lora={"rank": 3, "alpha": 7, "modules": ["q_proj", "down_proj"], "layers": [0, 4]}
    )
    export_model(run_folder, None, tmp_path / "out")
    config = config_of(find_checkpoint(run_folder))
    assert config.encoder is not None
    unmerged = build_model(ModelSpec(target, made("clip"), config.encoder, config.adapter, lora=config.lora)).eval()
    load_weights_(unmerged.named_targets(), find_checkpoint(run_folder), skip=lambda name: False)
    torch.testing.assert_close(exported_says(tmp_path / "out"), said(unmerged), atol=1e-5, rtol=0)
    plain = load_file(target / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    moved = {n for n, tensor in plain.items() if not torch.equal(stored[f"language_model.{n}"], tensor)}
    assert moved == {f"model.layers.{i}.{m}.weight" for i in (0, 4) for m in ("self_attn.q_proj", "mlp.down_proj")}


def test_lora_in_blocks_is_lora_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    base, down, up = torch.randn(70, 50), torch.randn(4, 50), torch.randn(70, 4)
    save_file({"base": base, "down": down, "up": up}, tmp_path / "x.safetensors")
    spans = shards.spans(tmp_path / "x.safetensors")
    monkeypatch.setattr("zero_ds.export.tensors.BLOCK", 1000)
    tensor = merged(spans["base"], spans["down"], spans["up"], 2.0, torch.float32)
    shards.write_shards([("w", tensor)], tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors")["w"], base + 2 * up @ down, atol=1e-5, rtol=0)
    assert torch.equal(read(spans["base"]), base)


@pytest.mark.parametrize(("dtype", "form"), [("bfloat16", "llava"), ("float16", "remote-code")])
def test_dtypes_and_shards(run: Callable[..., Path], tmp_path: Path, dtype: str, form: str) -> None:
    run_folder = run("decoder", tied=False, lora={"rank": 4, "modules": ["q_proj", "up_proj"]})
    proof = export_model(run_folder, None, tmp_path / "out", form=form, dtype=dtype, shard_bytes=20_000)
    assert proof["dtype"] == dtype and proof["largest_logit_difference"] <= 1e-2
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 40_000 for file in files)
    for file in files:
        assert {tensor.dtype for tensor in load_file(file).values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_files_are_compared_where_nothing_is_loaded(run: Callable[..., Path], tmp_path: Path) -> None:
    run_folder = run("decoder", lora={"rank": 2}, adapter={"width": 24})
    result = CliRunner().invoke(
        app, ["export", str(run_folder), "--out", str(tmp_path / "out"), "--proof", "tensors", "--dtype", "bfloat16"]
    )
    assert result.exit_code == 0, result.output
    assert "NOT loaded" in result.output and "NOT loaded" in (tmp_path / "out" / "README.md").read_text()
    proof = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert proof["loaded_by_transformers"] is False and "prompts" not in proof
    assert proof["tensors_equal"] == len(load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (EXTRAS, "Llava has no image-boundary embeddings and no norm on patch tokens"),
        (
            {"stage": "decoder", "adapter": {"width": 40}},
            r"no room for an adapter that is wider \(40 units\) than its decoder \(32\)",
        ),
        ({"patch_norm": True}, "Llava has no image-boundary embeddings and no norm on patch tokens"),
        ({"data": {"image_grid": GRID}}, r"this run was trained with data\.image_grid"),
        ({"family": "gemma2"}, "Llava has no soft-capping of scores, which gemma2 needs"),
    ],
)
def test_what_llava_cannot_express(run: Callable[..., Path], tmp_path: Path, more: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint + ".*; use --format remote-code"):
        export_model(run(**{"stage": "encoder", **more}), None, tmp_path / "out", form="llava")
    assert folders(tmp_path) == []


@pytest.mark.parametrize(
    ("more", "form"), [({}, "llava"), (EXTRAS, "remote-code"), ({"adapter": {"width": 40}}, "remote-code")]
)
def test_the_format_follows_from_the_model(run: Callable[..., Path], tmp_path: Path, more: Any, form: str) -> None:
    result = CliRunner().invoke(
        app, ["export", str(run("decoder", **more)), "--out", str(tmp_path / "out"), "--proof", "tensors"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["format"] == form


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(run: Callable[..., Path]) -> Path:
    return run("encoder")


def refused(complaint: str, *arguments: object, command: str = "export") -> None:
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert isinstance(result.exception, ConfigError | CheckpointError), result.exception
    assert re.search(complaint, str(result.exception)), str(result.exception)
    assert "\n" not in str(result.exception)


def test_settings_that_are_not_known(run_folder: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    refused("--dtype int8 is not known; choose float32, bfloat16, float16 or auto", run_folder, *out, "--dtype", "int8")
    refused("--format lava is not known; did you mean 'llava'", run_folder, *out, "--format", "lava")
    refused("--proof none is not known; choose full or tensors", run_folder, *out, "--proof", "none")
    refused(
        "--shard-size many is not a file size of at least 1MB; write for example 2GB",
        run_folder,
        *out,
        "--shard-size",
        "many",
    )
    refused("name one run", *out)
    refused("name one run", run_folder, *out, "--weights", run_folder)
    refused("evaluation .* does not exist", run_folder, *out, "--evaluation", tmp_path / "none.json")
    refused("model folder .* does not exist", run_folder, *out, "--target", tmp_path / "none")
    assert folders(tmp_path) == []
    assert [shard_bytes(text) for text in ("2GB", "1.5MiB", "3 gb")] == [2 * 10**9, 3 << 19, 3 * 10**9]


def test_runs_that_are_not_whole(run_folder: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    half = tmp_path / "run-half"
    (half / ".step-000001.tmp").mkdir(parents=True)
    refused("run-half holds no checkpoint .*; did the run finish", half, *out)
    manifest = run_folder / "step-000001" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: value for key, value in content.items() if key != "config"}))
    refused("manifest of .*: Input should be a valid dictionary", run_folder, *out)
    refused("manifest of .*: Input should be a valid dictionary", "--weights", run_folder, *out, command="export-lora")
    (tmp_path / "run-template").write_bytes(b"\xff")
    content["config"]["data"]["chat_template"] = str(tmp_path / "run-template")
    manifest.write_text(json.dumps(content))
    refused(r"data\.chat_template=.* cannot be read: it is not UTF-8 text", run_folder, *out)
    weights = run_folder / "step-000001" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("weights.safetensors is damaged: its content has changed since it was saved", run_folder, *out)
    weights.unlink()
    refused("weights.safetensors cannot be read: No such file", run_folder, *out)
    os.mkfifo(weights)
    refused("weights.safetensors cannot be read: it is not a regular file", run_folder, *out)
    graft = ("--weights", run_folder, "--target", content["config"]["target"])
    refused("weights.safetensors is missing or damaged; use another checkpoint", *graft, command="graft")
    assert folders(tmp_path) == []


def test_decoders_that_do_not_fit(run_folder: Path, made: Callable[..., Path], small: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    other = made("llama", tied=True, seed=7)
    refused("cannot be exported on .*: target's config and weights is", run_folder, *out, "--target", other)
    refused("family is qwen2, trained with llama", run_folder, *out, "--target", made("qwen2", tied=True))
    shutil.copytree(small, tmp_path / "run-small")
    info = json.loads((small / "surrogate.json").read_text())
    (tmp_path / "run-small" / "surrogate.json").write_text(json.dumps({**info, "target_hash": "2-other"}))
    refused("its target_hash is", run_folder, *out, "--target", tmp_path / "run-small")
    shutil.copytree(made("llama", tied=True), tmp_path / "run-target")
    for content in ('{"eos_token_id": "x"}', '{"eos_token_id": [2, null]}', "[]"):
        (tmp_path / "run-target" / "generation_config.json").write_text(content)
        refused("generation_config.json is damaged; fetch", run_folder, *out, "--target", tmp_path / "run-target")
    assert folders(tmp_path) == []


def test_a_shard_is_missing(run: Callable[..., Path], made: Callable[..., Path], tmp_path: Path) -> None:
    target = tmp_path / "run-target"
    shutil.copytree(made("llama", tied=True), target)
    decoder = DecoderFolder(target).spans
    (target / "model.safetensors").rename(tmp_path / "run-single.safetensors")
    moved = {name: replace(span, file=tmp_path / "run-single.safetensors") for name, span in decoder.items()}
    shards.write_shards(list(moved.items()), target, 30_000)
    run_folder = run("encoder", target=str(target))
    export_model(run_folder, None, tmp_path / "out", proof="tensors")
    shutil.rmtree(tmp_path / "out")
    next(iter(sorted(target.glob("model-*")))).unlink()
    refused("shard .*model-00001-of-.* is missing; fetch the model again", run_folder, "--out", tmp_path / "out")
    assert folders(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_existing_out_is_not_touched(run_folder: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        out = out / "precious"
    out.write_text("precious")
    refused("already exists; choose another --out or remove it", run_folder, "--out", tmp_path / "out")
    assert out.read_text() == "precious"


def test_a_full_disk(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zero_ds.runtime.safetensors.os.write", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(run_folder, None, tmp_path / "deep" / "out", dtype="bfloat16")
    assert folders(tmp_path / "deep") == []
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused("does not have the .* MB free that out needs", run_folder, "--out", tmp_path / "deep" / "out")
    assert folders(tmp_path / "deep") == []


def test_vocabulary_without_a_spare_token(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from zero_ds.export import text
    from zero_ds.model.decoders.base import Family

    monkeypatch.setattr(text, "PLACEHOLDER", "<nowhere>")
    family = Family(name="llama", model_types=("llama",), image_tokens=("<|nothing|>",))
    with pytest.raises(ConfigError, match=r"none of the llama family's spare tokens \(<\|nothing\|>\); name one in"):
        text.find_image_token(family, AutoTokenizer.from_pretrained(made("llama", tied=True)))


def test_the_tool_is_the_command(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "convert_to_hf.py"
    done = subprocess.run([sys.executable, str(tool), "--out", str(tmp_path / "x")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "zero-ds: name one run: zero-ds export RUN --out FOLDER.\n")
