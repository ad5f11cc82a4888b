"""Numbers of the paper's models that come with the package are those that counting gives."""

from __future__ import annotations

import sys

from places import ROOT

from zero_ds.config.loading import recipe_names
from zero_ds.training.planning.model_size import shipped_numbers

sys.path[:0] = [str(ROOT / "tools")]

import plan_numbers  # noqa: E402


def test_the_numbers_that_come_with_the_package_are_counted_again() -> None:
    """If this fails, see what has changed in `zero-ds plan`, and run tools/plan_numbers.py."""
    shipped = shipped_numbers()
    found = plan_numbers.counted(["llama-3.1-70b/encoder", "llama-3.1-8b/distilled-pretrain"])
    assert len(found) >= 5
    assert {name: shipped.get(name) for name in found} == found


def test_every_model_of_the_paper_has_recipes() -> None:
    assert set(plan_numbers.MODELS) <= {name.split("/")[0] for name in recipe_names()}
