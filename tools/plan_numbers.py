"""Counts the models of the paper's recipes again and writes their numbers, which come with the package.

    python tools/plan_numbers.py

`zero-ds plan` reads them instead of building these models, for which it would have to load torch and transformers. Run
this when a test says that the numbers have changed, and look at what changed in `zero-ds plan` before committing.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from zero_ds.config.loading import recipe_names  # noqa: E402
from zero_ds.training.planning import model_size, recipe  # noqa: E402
from zero_ds.training.planning.cluster import Cluster, bandwidths, find_gpu  # noqa: E402
from zero_ds.training.planning.plan import plan  # noqa: E402

MODELS = ("llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b")
"""Models of the paper."""


def counted(names: Sequence[str]) -> dict[str, Any]:
    """Counts all models that the plans of some recipes need; returns their numbers by the hash of their facts."""
    found: dict[str, Any] = {}

    def count_and_note(facts: Sequence[str], count: Callable[[], model_size.Numbers]) -> model_size.Numbers:
        numbers = count()
        found[model_size.facts_hash(facts)] = model_size.as_values(numbers)
        return numbers

    kept, recipe.cached_numbers = recipe.cached_numbers, count_and_note
    recipe._numbers.cache_clear()
    try:
        gpu, peak, link = find_gpu("A100")
        inside, between = bandwidths(None, link)
        for name in names:
            plan(name, None, Cluster(128, 8, 80.0, gpu, peak, 0.4, inside, between, 3.0, 1000.0))
    finally:
        recipe.cached_numbers = kept
        recipe._numbers.cache_clear()
    return found


def main() -> None:
    names = [name for name in recipe_names() if name.split("/")[0] in MODELS]
    found = dict(sorted(counted(names).items()))
    text = json.dumps(found, separators=(",", ":"))
    model_size.SHIPPED_NUMBERS.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(found)} models of {len(names)} recipes: {model_size.SHIPPED_NUMBERS.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
