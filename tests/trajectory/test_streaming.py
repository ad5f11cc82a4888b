"""Checks that streaming layer by layer gives the same curves as the model in memory, in bounded memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.decoders.folder import DecoderFolder, family_of
from zero_ds.model.loading import load_tokenizer
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory import lens, streaming
from zero_ds.trajectory.lens import check_lens
from zero_ds.trajectory.metrics import METRICS
from zero_ds.trajectory.resident import measure_resident
from zero_ds.trajectory.streaming import measure_streamed
from zero_ds.trajectory.texts import TokenSample
from zero_ds.trajectory.transition import Floats


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def samples(count: int = 7) -> list[TokenSample]:
    rng = np.random.default_rng(0)
    lengths = [2, 3, *rng.integers(4, 40, size=count - 2).tolist()]
    return [TokenSample(f"s{i}", rng.integers(0, 250, size=n).tolist()) for i, n in enumerate(lengths)]


def resident(folder: Path, metric: str) -> Floats:
    decoder = DecoderFolder(folder).load(dtype=torch.float32).eval()
    check_lens(decoder, family_of(folder), samples()[-1])
    return measure_resident(decoder, family_of(folder), samples(), metric=METRICS[metric], batch_size=3)


def streamed(folder: Path, metric: str, scratch: Path, **options: Any) -> Floats:
    settings = {"batch_size": 3, "dtype": torch.float32, "device": torch.device("cpu"), **options}
    return measure_streamed(folder, samples(), metric=METRICS[metric], scratch=scratch, **settings)


CASES = [(name, tied) for name in (*FAMILIES, "gemma3-multimodal") for tied in (True, False)]


@pytest.mark.parametrize("metric", ["sequence", "vocabulary"])
@pytest.mark.parametrize(("name", "tied"), CASES)
def test_equals_the_model_in_memory(
    made: Callable[..., Path], tmp_path: Path, name: str, tied: bool, metric: str
) -> None:
    folder = made(name, tied=tied)
    expected = resident(folder, metric)
    np.testing.assert_allclose(streamed(folder, metric, tmp_path), expected, rtol=1e-4, atol=3e-7)
    assert (expected[2:, 0] > 3e-3).all(), "the comparison is about something"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metric", ["sequence", "vocabulary"])
def test_small_blocks_and_a_file_change_nothing(
    made: Callable[..., Path], tmp_path: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("gemma2", tied=True)
    expected = streamed(folder, metric, tmp_path)
    monkeypatch.setattr(streaming, "HEAD_BYTES", 7 * 4 * tiny.HIDDEN)
    monkeypatch.setattr(lens, "ROWS", 5)
    monkeypatch.setattr(lens, "SCORES", 15)
    monkeypatch.setattr(streaming, "POSITIONS", 11)
    monkeypatch.setattr(streaming, "MEMORY_BYTES", 0)
    np.testing.assert_allclose(streamed(folder, metric, tmp_path), expected, rtol=1e-4, atol=1e-6)
    assert not list(tmp_path.iterdir()), "the file of hidden states is removed"


def test_a_common_beginning_is_read_once(made: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    folder = made("gemma3", tied=True)
    common = [TokenSample(s.id, [5, 6, 7, 8, *s.input_ids]) for s in samples()]
    monkeypatch.setattr("test_streaming.samples", lambda: common)
    expected = resident(folder, "sequence")
    np.testing.assert_allclose(streamed(folder, "sequence", tmp_path), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", ["sequence", "vocabulary"])
def test_a_model_of_one_layer(made: Callable[..., Path], tmp_path: Path, metric: str) -> None:
    """It has no layer before the last, so nothing is compared."""
    folder = made("llama", tied=True, layers=1)
    expected = resident(folder, metric)
    found = streamed(folder, metric, tmp_path)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-7)


def test_batch_size_does_not_matter(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made("gemma3", tied=True)
    alone = streamed(folder, "sequence", tmp_path, batch_size=1)
    np.testing.assert_allclose(streamed(folder, "sequence", tmp_path, batch_size=100), alone, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_near_float32(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made("llama", tied=False)
    half = streamed(folder, "vocabulary", tmp_path, dtype=torch.bfloat16)
    np.testing.assert_allclose(half, streamed(folder, "vocabulary", tmp_path), rtol=0.2, atol=0.1)


def test_a_layer_at_a_time(made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the layers is read once for the sequence metric, and no two layers are in memory together."""
    folder = made("llama", tied=True)
    read: list[str] = []
    original = streaming.LayerFiles.read

    def watched(files: Any, name: str, rows: slice | None = None) -> torch.Tensor:
        read.append(name)
        return original(files, name, rows)

    monkeypatch.setattr(streaming.LayerFiles, "read", watched)
    streamed(folder, "sequence", tmp_path)
    layers = [int(name.split(".")[2]) for name in read if name.startswith("model.layers.")]
    assert layers == sorted(layers) and len(layers) == 9 * tiny.LAYERS


def test_damaged_weights(made: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(made("llama", tied=True), folder)
    tensors = load_file(folder / "model.safetensors")
    broken = {**tensors, "model.layers.3.mlp.up_proj.weight": tensors["model.layers.3.mlp.up_proj.weight"] * torch.nan}
    save_file(broken, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"sample s0 are not finite; its weights are damaged"):
        streamed(folder, "sequence", tmp_path)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lack model\.layers\.3\.mlp\.up_proj\.weight; fetch the model again"):
        streamed(folder, "sequence", tmp_path)
    beyond = {**broken, "model.embed_tokens.weight": broken["model.embed_tokens.weight"][:100].clone()}
    save_file(beyond, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight .* has shape \(100, 32\)"):
        streamed(folder, "sequence", tmp_path)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(4000)
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read .*; fetch the model again"):
        streamed(folder, "sequence", tmp_path)


def test_command(made: Callable[..., Path], tmp_path: Path) -> None:
    """The command's two ways give one result; --greedy needs the whole model and says so."""
    rows = [
        {
            "id": f"s{i}",
            "conversations": [
                {"from": "human", "value": f"what is {i}?"},
                {"from": "gpt", "value": "a red square. " * (i + 1)},
            ],
        }
        for i in range(9)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    common = ["trajectory", "--model", str(made("qwen3", tied=True)), "--data", str(tmp_path / "data.json")]
    common += ["--dtype", "float32"]
    curves = []
    for name, flags in (("whole", []), ("streamed", ["--stream-layers"])):
        result = CliRunner().invoke(app, [*common, "--out", str(tmp_path / name), *flags])
        assert result.exit_code == 0, result.output
        curves.append(json.loads((tmp_path / name / "trajectory.json").read_text())["curves"])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4, atol=1e-6)
    result = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "greedy"), "--greedy", "--stream-layers"])
    assert isinstance(result.exception, ConfigError) and "leave out --stream-layers" in str(result.exception)
    assert not (tmp_path / "greedy").exists()


def test_a_vocabulary_that_is_not_the_models(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(made("llama", tied=True), folder)
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["banana"], special_tokens=True)  # written by a template; typed by a user it would be plain text
    words.chat_template += "banana"
    words.save_pretrained(folder)
    (tmp_path / "data.json").write_text(json.dumps([tiny.record("x", [("a banana?", "yes")])]))
    for flags in ([], ["--stream-layers"]):
        arguments = [
            "trajectory",
            "--model",
            folder,
            "--data",
            tmp_path / "data.json",
            "--out",
            tmp_path / "out",
            *flags,
        ]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert isinstance(result.exception, ConfigError) and "do not belong together" in str(result.exception)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"the tokenizer in .* cannot be loaded .*; fetch the model again"):
        load_tokenizer(folder)
