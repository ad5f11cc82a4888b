"""Buffers in float32 stay in float32: rotary frequencies lose their meaning in bf16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_helper import run_ranks
from test_engine import apart, engine_run

from zero_ds.config.schema import RunConfig
from zero_ds.training import stages
from zero_ds.training.deepspeed import ds_config
from zero_ds.training.engine import Engine


def buffers_around_the_engine(config: RunConfig) -> dict[str, tuple[str, str, bool]]:
    """Maps names of floating buffers to (dtype before, dtype after, values equal)."""
    from zero_ds.runtime import distributed
    from zero_ds.training.setup import load_model

    distributed.initialize()
    ds = ds_config(config, 1)
    model = load_model(config, ds)
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


def test_a_json_that_is_silent_adds_gradients_up_in_float32(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    config = run_config("encoder", zero=str(path), precision="bf16")
    assert ds_config(config, 1)["data_types"] == {"grad_accum_dtype": "fp32"}


def start_of(configs: list[RunConfig], world_size: int) -> list[dict[str, torch.Tensor]]:
    """Returns each run's trained parameters before its first step, by name."""
    from zero_ds.runtime import distributed
    from zero_ds.runtime.zero3 import gathered
    from zero_ds.training.checkpoint.manifest import describe_models
    from zero_ds.training.setup import load_initial_weights, load_model, make_loader

    distributed.initialize()
    starts = []
    for config in configs:
        model = load_model(config, ds_config(config, world_size))
        loader = make_loader(config, model)
        load_initial_weights(model, config, describe_models(config, model.plan), loader)
        start = {}
        for group in stages.freeze_(model, config).values():
            for name, parameter in group:
                with gathered([parameter]):
                    start[name] = parameter.detach().clone()
        starts.append(start)
    return starts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_zero_stage_starts_from_the_same_random_weights(
    run_config: Callable[..., RunConfig], precision: str
) -> None:
    options = {
        "lora": {"rank": 4, "alpha": 8, "layers": [1]},
        "adapter": {"boundary_tokens": True, "match_embeddings": True},
        "precision": precision,
        "global_batch": 4,
    }
    configs = [run_config("decoder", zero=zero, **options) for zero in ("zero0", "zero2", "zero3")]
    one, two = (run_ranks(start_of, ranks, configs, ranks) for ranks in (1, 2))
    reference = one[0][0]
    kinds = {str(tensor.dtype) for tensor in reference.values()}
    assert kinds == {"torch.float32" if precision == "fp32" else "torch.bfloat16"}
    assert {name.partition(".")[0] for name in reference} == {"encoder", "adapter", "boundary", "lora"}
    for start in [*one[0], *two[0], *two[1]]:
        assert start.keys() == reference.keys()
        for name, tensor in reference.items():
            assert torch.equal(start[name], tensor), name


def test_gradients_add_up_in_float32(run_config: Callable[..., RunConfig], data: Path) -> None:
    """The gradient of 16 times the same sample is that of one sample."""
    record = next(r for r in json.loads(data.read_text()) if "image" in r)
    image = data.parent / record["image"]
    copies = [{**record, "id": str(number), "image": image.name} for number in range(32)]
    path = image.parent / "the_same.json"
    path.write_text(json.dumps(copies))
    try:
        sources = {"sources": [{"path": str(path)}], "max_length": 512, "system_prompt": ""}
        names = ("zero2", "zero3", "zero2_offload", "zero3_offload")
        of = [
            run_config("pretrain", zero=name, data=sources, precision="bf16", global_batch=size)
            for name in names
            for size in (1, 16)
        ]
        [runs] = run_ranks(engine_run, 1, of)
    finally:
        path.unlink()
    for name, once, summed in zip(names, runs[::2], runs[1::2], strict=True):
        one, many = (run["steps"][0]["gradients"] for run in (once, summed))
        pairs = [(many[key].flatten().float(), one[key].flatten().float()) for key in one]
        assert apart(*(torch.cat(side) for side in zip(*pairs, strict=True))) < 1e-5, name
