"""Problems that users report with other trainers and that other tests do not cover; docs/training.md lists them."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import RankError, run_ranks, train_all
from pace import scaled

from zero_ds.config.schema import RunConfig
from zero_ds.training import stages
from zero_ds.training.options.recompute import recompute_
from zero_ds.training.setup import load_model, make_loader


@pytest.mark.parametrize("stage", ["encoder", "decoder"])
def test_frozen_layers_are_checkpointed_like_trained_ones(run_config: Callable[..., RunConfig], stage: str) -> None:
    """Activation checkpointing reduces the bytes kept for the backward pass, for a frozen decoder as well."""
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        config = run_config(stage, micro_batch=4)
        model = load_model(config, {"zero_optimization": {}})
        loader = make_loader(config, model, 1)
        stages.freeze_(model, config)
        recompute_(model, range(6) if recompute else ())
        model.train()
        (batch,) = next(loader.steps(0, 1))
        seen: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: torch.Tensor, seen: dict[int, int] = seen, weights: set[int] = weights) -> torch.Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in weights:
                seen[place] = tensor.untyped_storage().nbytes()
            return tensor

        images = model.image_features(batch.pixel_values).detach()  # activations of the vision encoder are not counted
        model.image_features = lambda pixels, images=images: images.requires_grad_()  # type: ignore[method-assign]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = model(**batch.inputs()).total
        kept[recompute] = sum(seen.values())
        total.backward()
    assert kept[True] < 0.4 * kept[False], f"{kept[True] / kept[False]:.2f} of the bytes kept without it"


def trained_with_a_cut(config: RunConfig, part: str) -> str:
    """Trains while no gradient reaches `part`; returns the result of `train_all`."""
    from zero_ds.model.vlm import VisionLanguageModel
    from zero_ds.training import engine

    engine.PATIENCE = min(3, engine.PATIENCE)
    if part == "encoder":

        def cut(self: VisionLanguageModel, pixels: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                patches = self.encoder_family.features(self.encoder, pixels, -1, False)  # type: ignore[union-attr, arg-type]
            return self.adapter(patches)  # type: ignore[misc]

        VisionLanguageModel.image_features = cut  # type: ignore[method-assign]
    return train_all([config])[0]


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_a_part_without_gradient_is_noticed(
    run_config: Callable[..., RunConfig], trained: Path, tmp_path: Path, zero: str
) -> None:
    config = run_config("encoder", tmp_path / zero, zero=zero, init_from=[str(trained / "pretrain")])
    for said in run_ranks(trained_with_a_cut, 2, config, "encoder"):
        assert "the encoder had no gradient in 3 steps, so it does not train" in said
    whole = config.model_copy(update={"out": str(tmp_path / "whole")})
    assert run_ranks(trained_with_a_cut, 2, whole, "nothing") == ["step-000006"] * 2


def loaded_wrongly(config: RunConfig) -> str:
    """Loads a model while one tensor stays random, as has happened in libraries under ZeRO-3; returns the error."""
    from zero_ds.model.decoders.folder import DecoderFolder
    from zero_ds.runtime import distributed
    from zero_ds.runtime.errors import ConfigError
    from zero_ds.runtime.zero3 import gathered
    from zero_ds.training.deepspeed import ds_config

    distributed.initialize()
    load = DecoderFolder.load

    def spoiled(*arguments: Any, **options: Any) -> Any:
        decoder = load(*arguments, **options)
        weight = decoder.model.layers[3].mlp.up_proj.weight  # type: ignore[union-attr, index]
        with gathered([weight], modifier_rank=0), torch.no_grad():
            weight.normal_()
        return decoder

    DecoderFolder.load = spoiled  # type: ignore[method-assign]
    try:
        load_model(config, ds_config(config, distributed.world_size()))
    except ConfigError as error:
        return str(error)
    distributed.barrier()
    return "no error"


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_weight_that_was_not_loaded_is_named(run_config: Callable[..., RunConfig], zero: str) -> None:
    for said in run_ranks(loaded_wrongly, 2, run_config("decoder", zero=zero)):
        assert "layers.3.mlp.up_proj.weight was not loaded as it is stored in" in said


def slow_first(limit: float) -> tuple[float, float]:
    """Lets rank 0 work longer than a collective may take; returns when its work ended and when this rank continued."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from zero_ds.runtime import distributed

    distributed.initialize()
    distributed.barrier()
    _set_pg_timeout(timedelta(seconds=limit))
    ended = 0.0
    with distributed.rank_zero_first():
        if distributed.is_rank_zero():
            time.sleep(3 * limit)
            ended = time.monotonic()
    went_on = time.monotonic()
    _set_pg_timeout(distributed.TIMEOUT)
    distributed.barrier()
    return ended, went_on


def test_long_work_of_rank_zero_does_not_time_out() -> None:
    limit = scaled(1)
    (ended, _), (_, went_on) = run_ranks(slow_first, 2, limit)
    assert 0 < ended < went_on
    with pytest.raises(RankError, match=r"rank 1 ended with exit code(.|\n)*[Tt]imed out"):
        run_ranks(slow_barrier, 2, limit)  # the limit is in force: a collective that waits for rank 0 fails


def slow_barrier(limit: float) -> None:
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from zero_ds.runtime import distributed

    distributed.initialize()
    distributed.barrier()
    _set_pg_timeout(timedelta(seconds=limit))
    if distributed.is_rank_zero():
        time.sleep(600)
    distributed.barrier()


def peak_of_loading(first: Path, folder: Path) -> float:
    """Loads a small decoder, then another, both partitioned; returns the GiB that the second adds to peak memory."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from zero_ds.model.decoders.folder import DecoderFolder
    from zero_ds.runtime import distributed

    distributed.initialize()
    ds = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    alive = HfDeepSpeedConfig(ds)
    DecoderFolder(first).load(dtype=torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    DecoderFolder(folder).load(dtype=torch.float32)
    assert alive
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def test_only_the_first_rank_reads_the_whole_model(made: Callable[..., Path], tmp_path: Path) -> None:
    """Loads 512 MiB of weights on two ranks, each of which keeps half.

    Measured: a peak of 1.0 times the weights on a rank that does not read, and 2.0 on the first rank, which does.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size / 2**30
    assert size > 0.4
    # the lower of two: buffers that the allocator keeps raise some measurements by up to half the size of the weights
    tries = [run_ranks(peak_of_loading, 2, made("llama", tied=True), tmp_path / "model") for _ in range(2)]
    first, second = min(tries, key=lambda peaks: peaks[1])
    assert second < 1.4 * size, f"{second:.2f} of {size:.2f} GiB on the second rank, {first:.2f} on the first"


def test_flash_attention_that_is_not_installed(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    from zero_ds.runtime.errors import ConfigError

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flash_attn" else find(name))
    with pytest.raises(ConfigError, match=r"needs flash-attn, which is not installed; .*else attention=sdpa"):
        load_model(run_config("decoder", attention="flash_attention_2"), {"zero_optimization": {}})


def nan_gradient(config: RunConfig) -> str:
    """Trains with a finite loss whose gradient is NaN in the third step; returns how the run ended."""
    from zero_ds.training.engine import Engine

    step_of_engine = Engine.step

    def spoiled(self: Engine, batches: Any, number: int, *counts: Any) -> Any:
        if number == 2:
            parameter = next(iter(self.named.values()))
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        return step_of_engine(self, batches, number, *counts)

    Engine.step = spoiled  # type: ignore[method-assign]
    return train_all([config])[0]


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_a_gradient_that_is_not_finite_does_not_reach_a_checkpoint(
    run_config: Callable[..., RunConfig], tmp_path: Path, zero: str
) -> None:
    from zero_ds.training.checkpoint.checkpoint import find_checkpoint

    config = run_config("pretrain", tmp_path, zero=zero, checkpoint={"every_steps": 1, "keep": 1})
    for said in run_ranks(nan_gradient, 2, config):
        assert "the gradient of step 3 is not finite" in said
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.step == 2 and all(torch.isfinite(tensor).all() for tensor in checkpoint.weights().values())


def text_first(config: RunConfig) -> str:
    from zero_ds.training import engine

    engine.PATIENCE = 2
    return trained_with_a_cut(config, "nothing")


def test_text_before_the_first_image_does_not_stop_a_run(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    import json

    import tiny

    records = json.loads(tiny.write_data(tmp_path, images=8, texts=8).read_text())
    (tmp_path / "sorted.json").write_text(json.dumps(sorted(records, key=lambda record: "image" in record)))
    data = {"sources": [{"path": str(tmp_path / "sorted.json")}], "max_length": 512, "system_prompt": ""}
    config = run_config("pretrain", tmp_path / "run", data=data, global_batch=2)
    assert run_ranks(text_first, 1, config) == ["step-000006"]
