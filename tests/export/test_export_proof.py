"""The proof of an export names the first difference, and a failed export leaves no files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_helper
import pytest
import torch
from safetensors.torch import load_file, save_file

import zero_ds.export as exporting
from zero_ds.config.schema import RunConfig
from zero_ds.export import export_model, proof
from zero_ds.export.llava import LlavaFormat
from zero_ds.export.source import open_source
from zero_ds.export.text import text_settings
from zero_ds.grafting.load import load_trained
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.runtime.errors import ConfigError

DAMAGED = "language_model.model.layers.3.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def run(
    made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = made("llama", tied=True)
    config = run_config("encoder", tmp_path_factory.mktemp("runs") / "encoder", decoder="target")
    return export_helper.write_run(config, target)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports a run and proves the export with all questions, in a separate process."""
    out = tmp_path_factory.mktemp("exported") / "llava"
    export_model(run, None, out)
    return out


def test_a_separate_process_answers(exported: Path) -> None:
    content = json.loads((exported / "proof.json").read_text())
    assert content["kind"] == "full" and content["loaded_by_transformers"] == "LlavaForConditionalGeneration"
    asked = [(line["question"], line["picture"]) for line in content["prompts"]]
    assert len(asked) == len(set(asked)) == 16 and sum(picture for _, picture in asked) == 8
    assert all(line["answers_equal"] and line["answer_tokens"] for line in content["prompts"])
    assert content["largest_logit_difference"] <= 1e-5 == content["tolerance"]
    assert {"zero_ds", "torch", "transformers"} <= set(content["versions"])
    assert [path.name for path in exported.parent.iterdir()] == ["llava"]


def damage(tensors: dict[str, torch.Tensor], how: str) -> None:
    if how == "one value":
        tensors[DAMAGED].view(-1)[17] += 1e-6
    elif how == "not a number":
        tensors[DAMAGED] *= float("nan")
    elif how == "shape":
        tensors[DAMAGED] = tensors[DAMAGED][:-1].clone()
    else:
        del tensors[DAMAGED]


@pytest.mark.parametrize("kind", proof.PROOFS)
@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("one value", f"differs from its source, first in the tensor {DAMAGED} .by "),
        ("not a number", f"differs from its source, first in the tensor {DAMAGED} .by nan"),
        ("shape", rf"first in the tensor {DAMAGED} .it (has shape|is F32) \(47, 32\)"),
        ("missing", f"the exported folder lacks {DAMAGED}"),
    ],
)
def test_the_first_tensor_that_differs_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, how: str, complaint: str
) -> None:
    """Damages the file between writing and proof, and a later tensor as well."""
    written = exporting.write_shards

    def damaging(tensors: Any, folder: Path, size: int) -> None:
        written(tensors, folder, size)
        stored = load_file(folder / "model.safetensors")
        damage(stored, how)
        later = "language_model.model.layers.5.mlp.up_proj.weight"
        if how != "missing":
            stored[later] = -stored[later]
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "write_shards", damaging)
    with pytest.raises(ConfigError, match=complaint):
        export_model(run, None, tmp_path / "deep" / "out", proof=kind)
    assert list((tmp_path / "deep").iterdir()) == []


def test_the_first_tensor_that_overflows_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written; the same weights fit into bfloat16."""
    folder = tmp_path / "target"
    shutil.copytree(open_source(run, None).decoder.path, folder)
    stored = load_file(folder / "model.safetensors")
    for name in ("model.layers.3.mlp.up_proj.weight", "model.layers.5.mlp.up_proj.weight"):
        stored[name][1, 2] = 1e5
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    source = dataclasses.replace(open_source(run, None, "float16"), decoder=DecoderFolder(folder))
    monkeypatch.setattr(exporting, "open_source", lambda *arguments, **options: source)
    with pytest.raises(ConfigError, match=f"{DAMAGED} has values beyond 65,504, the largest of float16; use --dtype"):
        export_model(run, None, tmp_path / "deep" / "out", dtype="float16", proof="tensors")
    assert not (tmp_path / "deep").exists()
    source.dtype = torch.bfloat16
    export_model(run, None, tmp_path / "deep" / "out", dtype="bfloat16", proof="tensors")


def test_a_tensor_too_many_is_named(exported: Path, run: Path, tmp_path: Path) -> None:
    stored = load_file(exported / "model.safetensors")
    save_file({**stored, "a.stranger": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"the exported folder has a\.stranger"):
        proof.compare_files(tmp_path, LlavaFormat().tensors(open_source(run, None)))


def test_a_folder_that_transformers_cannot_load(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error quotes the last line that the process wrote."""
    written = LlavaFormat.write_files

    def spoiled(layout: LlavaFormat, source: Any, texts: Any, folder: Path) -> None:
        written(layout, source, texts, folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(LlavaFormat, "write_files", spoiled)
    with pytest.raises(ConfigError, match=r"transformers alone could not load the exported folder: .*model"):
        export_model(run, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        ({"chat_template.jinja": ("captured in this image", "seen in that image")}, "its prompt has other tokens"),
        ({"processor_config.json": ("0.48145466", "0.5")}, "pixel values differ by"),
        ({"config.json": ('"vision_feature_layer": -1', '"vision_feature_layer": -2')}, "logits differ by"),
        ({"generation_config.json": ('"eos_token_id": [', '"eos_token_id": [STOP, ')}, "the greedy answers are not"),
    ],
)
def test_differences_outside_the_tensors_are_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: dict[str, tuple[str, str]], complaint: str
) -> None:
    export_helper.here(monkeypatch)
    source = open_source(run, None)
    model = load_trained(source.checkpoint.folder, source.decoder)
    image = proof.draw_image((32, 32), tmp_path / "image.png")
    stop = proof.ask_source(source, text_settings(source), model, image)[0].answer[0]
    written = LlavaFormat.write_files

    def spoiled(layout: LlavaFormat, source: Any, texts: Any, folder: Path) -> None:
        written(layout, source, texts, folder)
        for name, (before, after) in spoil.items():
            text = (folder / name).read_text()
            assert before in text
            (folder / name).write_text(text.replace(before, after.replace("STOP", str(stop))))

    monkeypatch.setattr(LlavaFormat, "write_files", spoiled)
    with pytest.raises(
        ConfigError, match=f"differs from its source on .*, although every tensor is the same: {complaint}"
    ):
        export_model(run, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def test_both_readers_read_a_checkpoint_the_same_way(run: Path, exported: Path) -> None:
    """Streaming the files and loading the model are two ways to the same tensors."""
    source = open_source(run, None)
    count = proof.compare_files(exported, LlavaFormat().tensors(source))
    model = load_trained(source.checkpoint.folder, source.decoder)
    loaded = LlavaFormat().loaded_tensors(source, model)
    assert count == proof.compare_loaded(exported, loaded) == len(load_file(exported / "model.safetensors"))


def test_a_batch_answers_like_single_prompts(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(run, None)
    model, words = load_trained(source.checkpoint.folder, source.decoder), text_settings(source)
    image = proof.draw_image((32, 32), tmp_path / "image.png")
    together = proof.ask_source(source, words, model, image)
    assert len({len(one.ids) for one in together}) > 2, "prompts of several lengths are padded"
    for question in proof.QUESTIONS:
        monkeypatch.setattr(proof, "QUESTIONS", (question,))
        for alone in proof.ask_source(source, words, model, image):
            same = next(one for one in together if (one.question, one.image) == (question, alone.image))
            assert (same.ids, same.answer) == (alone.ids, alone.answer)
            assert len(alone.logits) == proof.POSITIONS + len(alone.answer) - 1
            torch.testing.assert_close(same.logits, alone.logits, atol=1e-5, rtol=0)
