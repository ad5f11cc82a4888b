"""A run continued by another stage: parts that trained before keep their optimizer state, new ones begin at zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks, train_all, whole_state
from safetensors.torch import load_file

from zero_ds.config.schema import RunConfig


def begun(config: RunConfig) -> dict[str, Any]:
    """Returns the optimizer's state before the first step, as a rank reads it, and the step counts."""
    from zero_ds.training import train
    from zero_ds.training.setup import Run

    seen: dict[str, Any] = {}

    def loop(run: Run, engine: Any, *rest: Any) -> Path:
        for name, parameter in engine.named.items():
            for key in ("master", "exp_avg", "exp_avg_sq"):
                seen[f"{key}/{name}"] = whole_state(engine, parameter, key)
        seen["steps"] = engine.state.steps()
        return run.out

    train.loop = loop  # type: ignore[assignment]
    train.train(config)
    return seen


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_unfreezing_the_decoder_keeps_the_state_of_the_encoder(
    run_config: Callable[..., RunConfig], trained: Path, tmp_path: Path, zero: str
) -> None:
    """`trained` ran on one rank with ZeRO-2; here two ranks continue with the full decoder."""
    config = run_config("decoder", tmp_path / "on", continue_from=str(trained / "encoder"), zero=zero)
    before = load_file(trained / "encoder" / "step-000002" / "resume" / "state.safetensors")
    for seen in run_ranks(begun, 2, config):
        assert seen["steps"] == {"encoder": 2, "adapter": 2, "decoder": 0}
        for name, tensor in before.items():
            assert torch.equal(seen[name].view_as(tensor), tensor), name
        new = [name for name in seen if "/decoder." in name and not name.startswith("master/")]
        assert new and not any(seen[name].any() for name in new)


def test_what_cannot_be_continued(
    run_config: Callable[..., RunConfig], trained: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    """A run that trained one encoder layer cannot continue with all of them, but another can start from its weights."""
    last = run_config(
        "encoder", tmp_path / "last", encoder={"path": str(made("clip")), "train_last_layers": 1}, max_steps=1
    )
    configs = [
        last,
        run_config("decoder", tmp_path / "all", continue_from=str(tmp_path / "last")),
        run_config("decoder", tmp_path / "none", continue_from=str(tmp_path / "nowhere")),
        run_config("decoder", tmp_path / "started", init_from=[str(tmp_path / "last")], max_steps=1),
    ]
    ((first, whole, missing, started),) = run_ranks(train_all, 1, configs)
    assert first == started == "step-000001"
    assert "trained only some of the encoder" in whole and "use init_from" in whole
    assert "continue_from names" in missing and "does not exist" in missing


def test_grafting_reads_what_a_continued_run_started_from(
    run_config: Callable[..., RunConfig], trained: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    from zero_ds.grafting.load import load_graft

    config = run_config("adapter", tmp_path / "adapter", decoder="target", continue_from=str(trained / "encoder"))
    assert run_ranks(train_all, 1, [config]) == [["step-000006"]]
    model = load_graft(tmp_path / "adapter", made("llama", tied=True))
    weights = load_file(trained / "encoder" / "step-000002" / "weights.safetensors")
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    named = model.named_targets()
    assert encoder and all(torch.equal(named[name], tensor) for name, tensor in encoder.items())
