"""Checks relations between FLOPs that hold with any counter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zero_ds.model.decoders import FAMILIES
from zero_ds.model.layer_plan import Replaced
from zero_ds.surrogate.build import build_surrogate
from zero_ds.training.planning.flops import encoder_step_ratio, step_flops


def test_flops_grow_by_the_same_amount_per_layer(made: Callable[..., Path]) -> None:
    folder = made("llama", tied=True)

    def flops(layers: int | None, **options: object) -> int:
        return step_flops(folder, length=16, supervised=4, layers=layers, **options)  # type: ignore[arg-type]

    assert flops(6) == flops(None), "the tiny model has six layers"
    assert flops(3) - flops(2) == flops(2) - flops(1) > 0
    forward = flops(2, backward=False)
    assert 1.9 * forward < flops(2) < 2.1 * forward, "backward to the input costs as much as forward"
    assert flops(2) < flops(2, trained=1) < flops(2, trained=2)
    assert step_flops(folder, length=16, supervised=4, batch=3) == 3 * flops(None)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3-multimodal"])
def test_every_family_is_counted(made: Callable[..., Path], tmp_path: Path, family: str) -> None:
    build_surrogate(made(family, tied=True), [Replaced(1, 4)], tmp_path / "small")
    assert 0.3 < encoder_step_ratio(tmp_path / "small", distilled=False) < 0.7, "three of six layers, and the head"


@pytest.mark.parametrize("translators", [1, 2])
def test_ratio_of_a_surrogate(made: Callable[..., Path], tmp_path: Path, translators: int) -> None:
    ratios = {}
    for first in (1, 3):
        out = tmp_path / str(first)
        build_surrogate(made("llama", tied=True), [Replaced(first, 4, translators if first == 1 else 1)], out)
        ratios[first] = [encoder_step_ratio(out, distilled=distilled) for distilled in (False, True)]
    assert 0 < ratios[1][0] < ratios[3][0] < 1, "the more layers are replaced, the cheaper the step"
    assert all(distilled > plain for plain, distilled in ratios.values())
