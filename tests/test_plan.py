"""`zero-ds plan`: its bytes against those that DeepSpeed's engines hold, its FLOPs against PyTorch's count, its words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks
from held_memory import held

from zero_ds import stages
from zero_ds.config import RunConfig
from zero_ds.deepspeed_config import ds_config
from zero_ds.engine import Engine

GATHERED = str(Path(__file__).parent / "zero3_gathered.json")


def measured(configs: list[RunConfig]) -> list[dict[str, int]]:
    """What a rank holds in the second step of each run, before the update."""
    from zero_ds import distributed

    distributed.initialize()
    return [_measured(config) for config in configs]


def _measured(config: RunConfig) -> dict[str, int]:
    import gc

    from zero_ds import distributed
    from zero_ds.prepare import build, seed_everything

    seed_everything(config.seed)
    world_size = distributed.world_size()
    ds = ds_config(config, world_size)
    model, loader, _ = build(config, ds, world_size)
    groups = stages.freeze_(model, config)
    model.train()
    engine = Engine(config, model, groups, 2, ds)
    seen: list[dict[str, int]] = []
    update = engine.engine.step

    def step() -> None:
        if engine.engine.is_gradient_accumulation_boundary():
            seen.append(held(engine))
        update()

    engine.engine.step = step
    for number, micro in enumerate(loader.steps(0, 2)):
        engine.step(micro, number, 10)
    del engine, model, groups, loader
    gc.collect()
    return seen[1]
