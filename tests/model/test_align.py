"""Appendix A.8: an encoder trained with a small model of another width, bridged to the large one by a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_helper
import pytest
import torch
from distributed_helper import run_ranks, train_all

from zero_ds.config.schema import RunConfig
from zero_ds.export import export_model
from zero_ds.grafting.load import load_graft
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages
from zero_ds.training.checkpoint.checkpoint import find_checkpoint

WIDTH = 24


@pytest.fixture(scope="module")
def configs(
    made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, RunConfig]:
    """Trains adapter and encoder against the small model, then the aligner and the large model itself."""
    root = tmp_path_factory.mktemp("aligned")
    small: dict[str, Any] = {"target": str(made("llama", tied=True, hidden=WIDTH)), "decoder": "target", "max_steps": 2}
    wide: dict[str, Any] = {"adapter": {"width": WIDTH}, "max_steps": 3}
    encoder, align = str(root / "encoder"), str(root / "align")
    return {
        "pretrain": run_config("pretrain", root / "pretrain", **small),
        "encoder": run_config("encoder", root / "encoder", **small, init_from=[str(root / "pretrain")]),
        "align": run_config("align", root / "align", **wide, init_from=[encoder]),
        "align3": run_config("align", root / "align3", **wide, init_from=[encoder], zero="zero3"),
        "decoder": run_config("decoder", root / "decoder", **wide, init_from=[encoder, align]),
    }


@pytest.fixture(scope="module")
def runs(configs: dict[str, RunConfig]) -> dict[str, Path]:
    ends = run_ranks(train_all, 2, list(configs.values()))
    assert ends == [["step-000002", "step-000002", "step-000003", "step-000003", "step-000003"]] * 2
    return {name: Path(config.out) for name, config in configs.items()}


def test_only_the_aligner_trains(runs: dict[str, Path]) -> None:
    weights = {name: find_checkpoint(run).weights() for name, run in runs.items()}
    assert {name: tuple(t.shape) for name, t in weights["align"].items()} == {
        "aligner.weight": (32, WIDTH),
        "aligner.bias": (32,),
    }
    for name, tensor in weights["align"].items():
        torch.testing.assert_close(weights["align3"][name], tensor, atol=1e-5, rtol=1e-4)
    assert {"encoder", "adapter", "aligner", "decoder"} == {name.split(".")[0] for name in weights["decoder"]}
    moved = weights["decoder"]["aligner.weight"] - weights["align"]["aligner.weight"]
    assert moved.abs().max() > 1e-3, "the decoder stage goes on with the trained aligner"
    assert moved.abs().max() < 0.2


def test_graft_and_export(
    runs: dict[str, Path], made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export folds adapter and aligner into Llava's two layers, and its proof compares the logits."""
    export_helper.here(monkeypatch)
    large = made("llama", tied=True)
    model = load_graft(runs["align"], large)
    trained = find_checkpoint(runs["encoder"]).weights()
    assert model.aligner is not None and torch.equal(model.adapter[2].weight, trained["adapter.2.weight"])  # type: ignore[index]
    for form in ("llava", "remote-code"):
        proof = export_model(runs["align"], str(large), tmp_path / form, form=form)
        assert proof["largest_logit_difference"] <= 1e-5


def test_without_an_aligner_the_widths_do_not_fit(runs: dict[str, Path], made: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="hidden size is 32, trained with 24"):
        load_graft(runs["encoder"], made("llama", tied=True))


def test_the_stage_needs_the_width(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"stage align needs adapter\.width"):
        stages.stage_of(run_config("align"))
    ends = run_ranks(train_all, 1, [run_config("align", adapter={"width": WIDTH}, max_steps=1)])
    assert "does not train the adapter, and init_from brings none" in ends[0][0]
    ends = run_ranks(train_all, 1, [run_config("encoder", adapter={"width": WIDTH}, max_steps=1)])
    assert "does not train the aligner, and init_from brings none" in ends[0][0]
    assert stages.trained_parts(run_config("decoder")) == ("encoder", "adapter", "decoder")
