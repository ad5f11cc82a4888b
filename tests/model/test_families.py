"""Every registered family, and the multimodal class that one of them reads, is trained on a surrogate and grafted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from distributed_helper import run_ranks, train_all

from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN
from zero_ds.export import export_model
from zero_ds.grafting.load import load_graft
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.layer_plan import Replaced
from zero_ds.surrogate.build import build_surrogate


@pytest.fixture(scope="module")
def grafts(
    made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Trains the encoder stage with distillation on a surrogate of every family's tiny model; returns run and model."""
    root = tmp_path_factory.mktemp("families")
    configs, found = [], {}
    for name in (*FAMILIES, *tiny.VARIANTS):
        target = made(name, tied=True)
        build_surrogate(target, [Replaced(2, 4)], root / f"{name}-surrogate")
        changes = {"target": str(target), "surrogate": str(root / f"{name}-surrogate"), "max_steps": 2}
        data = {"sources": run_config("encoder").model_dump()["data"]["sources"], "max_length": 512}
        configs.append(run_config("encoder", root / name, **changes, data=data, distill={"logits": 1.0}))
        found[name] = (root / name, target)
    assert run_ranks(train_all, 1, configs) == [["step-000002"] * len(configs)]
    return found


@pytest.mark.parametrize("name", [*FAMILIES, *tiny.VARIANTS])
def test_every_family_trains_and_grafts(grafts: dict[str, tuple[Path, Path]], name: str) -> None:
    """Trained on the surrogate, the encoder changes the answer of the family's full model about an image."""
    run, target = grafts[name]
    trained, fresh = load_graft(run, target), load_graft(run, target)
    fresh.adapter[2].weight.data.zero_()  # type: ignore[index, union-attr, operator]
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * trained.tokens_per_image(), 9, 11]])
    with torch.no_grad():
        pixels = torch.rand(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        logits = [m.logits(m.hidden_states(ids, torch.ones_like(ids), pixels)) for m in (trained, fresh)]
    assert torch.isfinite(logits[0]).all() and (logits[0][:, -1] - logits[1][:, -1]).abs().max() > 1e-3


def test_a_decoder_out_of_a_multimodal_class_is_exported(grafts: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run, target = grafts["gemma3-multimodal"]
    proof = export_model(run, str(target), tmp_path / "llava")
    assert proof["largest_logit_difference"] <= 1e-5
