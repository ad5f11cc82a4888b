"""What is kept in float32 stays there: rotary frequencies lose their meaning in bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from distributed_helper import run_ranks

from zero_ds import stages
from zero_ds.config import RunConfig
from zero_ds.deepspeed_config import ds_config
from zero_ds.engine import Engine


def buffers_around_the_engine(config: RunConfig) -> dict[str, tuple[str, str, bool]]:
    """Name -> (dtype before, dtype after, values equal) of the model's floating buffers."""
    from zero_ds import distributed
    from zero_ds.prepare import build

    distributed.initialize()
    ds = ds_config(config, 1)
    model, _, _ = build(config, ds, 1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    Engine(config, model, stages.freeze_(model, config), 1, ds)
    after = dict(model.named_buffers())
    return {
        name: (str(buffer.dtype), str(after[name].dtype), torch.equal(buffer.double(), after[name].double()))
        for name, buffer in before.items()
    }


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_buffers_keep_their_precision(run_config: Callable[..., RunConfig], zero: str) -> None:
    config = run_config("encoder", zero=zero, precision="bf16")
    [buffers] = run_ranks(buffers_around_the_engine, 1, config)
    frequencies = [value for name, value in buffers.items() if name.endswith("inv_freq")]
    assert frequencies, "the decoder has rotary frequencies"
    assert all(before == after == "torch.float32" and equal for before, after, equal in frequencies), buffers
