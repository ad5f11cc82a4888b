"""The report of `zero-ds surrogate --report`, against a second way of counting and the definition of the divergence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from distributed_helper import run_ranks, train_all
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import RunConfig
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.layer_plan import Replaced
from zero_ds.runtime.errors import ConfigError
from zero_ds.surrogate.build import build_surrogate
from zero_ds.surrogate.report import audit, check_weights, divergence
from zero_ds.trajectory.texts import TokenSample


def samples() -> list[TokenSample]:
    rng = np.random.default_rng(3)
    return [TokenSample(str(i), rng.integers(0, 250, size=n).tolist()) for i, n in enumerate((2, 9, 30, 4, 17))]


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["surrogate", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize("family", ["llama", "gemma3-multimodal"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_counts_and_hashes(made: Callable[..., Path], tmp_path: Path, family: str, tied: bool) -> None:
    target = made(family, tied=tied)
    build_surrogate(target, [Replaced(1, 2), Replaced(3, 4)], tmp_path / "small")
    content = audit(tmp_path / "small", target)
    small, whole = (DecoderFolder(folder).load(dtype=torch.float32) for folder in (tmp_path / "small", target))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (small, whole)]
    layer = sum(p.numel() for p in small.model.layers[1].parameters())  # type: ignore[union-attr, index, operator]
    assert content["parameters"] == {"kept": sizes[0], "target": sizes[1], "trained": 2 * layer, "dropped": 4 * layer}
    assert content["bytes"] == {"kept": 4 * sizes[0], "target": 4 * sizes[1]}
    assert content["layers"] == {"surrogate": 4, "target": 6} and content["plan"] == "T(1,2)+T(3,4)"
    assert content["same"] == {"tokenizer": True, "template": True, "embeddings": True}
    plain, always, rarely = content["step_flops_ratio"].values()
    assert 0.5 < plain < 1 < always
    assert rarely == pytest.approx(plain + (always - plain) / 4)


def test_a_changed_vocabulary_is_seen(made: Callable[..., Path], tmp_path: Path) -> None:
    target = made("llama", tied=True)
    build_surrogate(target, [Replaced(2, 4)], tmp_path / "small")
    (tmp_path / "small/tokenizer.json").write_text((tmp_path / "small/tokenizer.json").read_text() + " ")
    assert audit(tmp_path / "small", target)["same"] == {"tokenizer": False, "template": True, "embeddings": True}
    with pytest.raises(ConfigError, match="was cut from another model"):
        audit(tmp_path / "small", made("llama", tied=False))


def test_divergence_is_the_definition(made: Callable[..., Path], tmp_path: Path) -> None:
    target = made("gemma2", tied=True)
    build_surrogate(target, [Replaced(2, 4)], tmp_path / "small")
    found = divergence(tmp_path / "small", target, samples(), batch_size=2)
    kl: list[torch.Tensor] = []
    same: list[torch.Tensor] = []
    models = [DecoderFolder(folder).load(dtype=torch.float32).eval() for folder in (target, tmp_path / "small")]
    for sample in samples():
        with torch.no_grad():
            p, q = (model(torch.tensor([sample.input_ids])).logits[0, :-1].softmax(-1) for model in models)
        kl.append((p * (p / q).log()).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    assert found.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5)
    assert found.agreement == pytest.approx(float(torch.cat(same).float().mean()))
    assert (found.tokens, found.samples) == (57, 5) and found.low < found.kl < found.high
    nothing = divergence(target, target, samples())
    assert nothing.kl == pytest.approx(0, abs=1e-6) and nothing.agreement == 1


def test_command_with_trained_translators(small: Path, run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A translator stage that trains on the target's own predictions brings the surrogate nearer to the target."""
    shutil.copytree(small, tmp_path / "small")
    answer = {"from": "gpt", "value": "yes, a red square."}
    rows = [{"id": str(i), "conversations": [{"from": "human", "value": f"is {i} red?"}, answer]} for i in range(12)]
    text = tmp_path / "text.json"
    text.write_text(json.dumps(rows))
    run = tmp_path / "run"
    config = run_config(
        "translator",
        run,
        distill={"logits": 1.0, "next_token": 0.0},
        optimizer={"learning_rate": 1e-3},
        data={"sources": [{"path": str(text)}], "system_prompt": ""},
        max_steps=20,
    )
    assert run_ranks(train_all, 1, [config]) == [["step-000020"]]
    result = command("--out", tmp_path / "small", "--report", "--kl", text, "--weights", run)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "small/report.json").read_text())
    before, after = content["divergence"]
    assert before["weights"] is None and after["weights"] == str(run)
    assert after["kl"] < before["kl"]
    assert "as cut" in result.output and "GB" in result.output and "embeddings  as the target's" in result.output


def test_weights_of_another_surrogate(made: Callable[..., Path], trained: Path, tmp_path: Path) -> None:
    build_surrogate(made("llama", tied=True), [Replaced(2, 4)], tmp_path / "other")
    with pytest.raises(ConfigError, match="does not fit: its plan is"):
        check_weights(trained / "pretrain", tmp_path / "other")


def test_predictions_that_are_not_finite(made: Callable[..., Path], tmp_path: Path) -> None:
    target = made("llama", tied=True)
    build_surrogate(target, [Replaced(2, 4)], tmp_path / "small")
    tensors = load_file(tmp_path / "small/model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= torch.nan
    save_file(tensors, tmp_path / "small/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="are not finite; the weights are damaged"):
        divergence(tmp_path / "small", target, samples())


def test_a_target_that_has_moved(made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("llama", tied=True), tmp_path / "old")
    build_surrogate(tmp_path / "old", [Replaced(2, 4)], tmp_path / "small")
    (tmp_path / "old").rename(tmp_path / "new")
    assert audit(tmp_path / "small", tmp_path / "new")["target"] == str(tmp_path / "new")


def test_bad_input(made: Callable[..., Path], tmp_path: Path, trained: Path) -> None:
    target = made("llama", tied=True)
    out = tmp_path / "small"
    (tmp_path / "text.json").write_text(json.dumps([tiny.record("p", [("what?", "red")], "a.png")]))
    for arguments, complaint in (
        (["--report"], "say what to replace"),
        (["--replace", "2:4"], "say which model to cut"),
        (["--target", target, "--replace", "2:4", "--kl", "text.json"], "add --report"),
        (["--target", target, "--replace", "2:4", "--report", "--weights", trained], "add --kl"),
        (["--target", target, "--replace", "2:4", "--report", "--kl", tmp_path / "none.json"], "none.json"),
        (["--target", target, "--replace", "2:4", "--report", "--kl", tmp_path / "text.json"], "no usable text sample"),
    ):
        result = command("--out", out, *arguments)
        assert isinstance(result.exception, ValueError) and complaint in str(result.exception), result.output
        assert not out.exists(), "errors in the text are found before the surrogate is cut"
