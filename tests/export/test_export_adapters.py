"""Every kind of adapter is exported and proves itself: as Llava where that can express it, else with its own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_helper
import pytest
import torch
from safetensors.torch import load_file

from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN
from zero_ds.export import export_model
from zero_ds.grafting.load import load_graft
from zero_ds.grafting.named_model import find_model, load_model
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.released import to_released

SIZE = 48
"""Pixels of an image with 3 x 3 patches."""


@pytest.fixture
def run(made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a finished run with an adapter of some kind."""

    def make(target: Path | None = None, patch_norm: bool = False, **adapter: Any) -> Path:
        target = target or made("llama", tied=True)
        config = run_config(
            "decoder" if adapter.get("width") else "encoder",  # the former trains aligners as well
            tmp_path / "run",
            decoder="target",
            target=str(target),
            data={"max_length": 512},
            encoder={"path": str(made("clip", size=SIZE)), "patch_norm": patch_norm},
            adapter=adapter,
        )
        return export_helper.write_run(config, target)

    return make


def logits(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * model.tokens_per_image(), 9, 11]])
    with torch.no_grad():
        return model.logits(model.hidden_states(ids, torch.ones_like(ids), pixels))


@pytest.mark.parametrize("kind", ["pixel_shuffle", "pooling"])
def test_fewer_image_tokens(
    run: Callable[..., Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of the export merges as training does; Llava cannot. One proof runs in a process of its own."""
    if kind == "pooling":
        export_helper.here(monkeypatch)
    folder = run(kind=kind, boundary_tokens=kind == "pooling", patch_norm=kind == "pooling")
    with pytest.raises(ConfigError, match=f"of every patch; .* adapter.kind={kind}; use --format remote-code"):
        export_model(folder, None, tmp_path / "llava", form="llava")
    proof = export_model(folder, None, tmp_path / "out")
    assert proof["format"] == "remote-code" and proof["largest_logit_difference"] <= 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["adapter_kind"], config["adapter_factor"]) == (kind, 2)
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor["tokens_per_view"] == (6 if kind == "pooling" else 4)
    if kind == "pooling":
        with pytest.raises(ConfigError, match=r"adapter\.kind=pooling, for which the released layout has no place"):
            to_released(folder, tmp_path / "released.pth")


@pytest.mark.parametrize("width", [None, 24, 40])
def test_one_linear_layer_is_a_llava(
    run: Callable[..., Path],
    made: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    width: int | None,
) -> None:
    """Its second layer is the identity, and an aligner of any width is multiplied in. Its answers here are the same."""
    export_helper.here(monkeypatch)
    folder = run(kind="linear", width=width)
    proof = export_model(folder, None, tmp_path / "out")
    assert proof["format"] == "llava" and proof["largest_logit_difference"] <= 1e-5
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["multi_modal_projector.linear_2.weight"], torch.eye(32))
    pixels = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    opened = load_model(find_model(str(tmp_path / "out"))).model
    torch.testing.assert_close(
        logits(opened, pixels), logits(load_graft(folder, made("llama", tied=True)), pixels), atol=1e-5, rtol=1e-5
    )
    if width is None:
        proof = export_model(folder, None, tmp_path / "remote", form="remote-code")
        assert proof["largest_logit_difference"] <= 1e-5
