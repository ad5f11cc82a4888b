"""DeepSpeed JSONs with the keys and values of other projects' files: they train as they are, or one sentence says why
not before anything is loaded.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed_helper import run_ranks, train_all

from zero_ds.cluster.doctor import precision_of
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.deepspeed import ds_config

SIZES: dict[str, Any] = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    "gradient_clipping": "auto",
}
AUTO = {"enabled": "auto"}
SCALE = {**AUTO, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
HALF: dict[str, Any] = {"bf16": AUTO, "fp16": {**SCALE, "initial_scale_power": 16}}
CPU = {"device": "cpu", "pin_memory": True}
BUCKETS = {"allgather_partitions": True, "reduce_scatter": True, "contiguous_gradients": True}
GATHERED = {
    **dict.fromkeys(
        ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
    ),
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
ADAM = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}


def factory(zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    """LLaMA-Factory's examples/deepspeed."""
    return {**SIZES, **HALF, "zero_allow_untested_optimizer": True, "zero_optimization": zero, **more}


def factory_2(stage: int = 2, **more: Any) -> dict[str, Any]:
    sizes = {"allgather_bucket_size": 5e8, "reduce_bucket_size": 5e8, "round_robin_gradients": True}
    return {"stage": stage, **BUCKETS, **sizes, "overlap_comm": False, **more}


def axolotl(zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Axolotl's deepspeed_configs."""
    half = {"bf16": AUTO, "fp16": {**SCALE, "auto_cast": False, "initial_scale_power": 32}}
    return {**SIZES, **half, "wall_clock_breakdown": False, "zero_optimization": zero, **more}


def short_names(**more: Any) -> dict[str, Any]:
    """The names that DeepSpeed has for some keys of stage 3 in addition to those with `stage3_`."""
    gathered = {"max_live_parameters": 0, "max_reuse_distance": 0, "gather_16bit_weights_on_model_save": True}
    sizes = dict.fromkeys(("reduce_bucket_size", "prefetch_bucket_size", "param_persistence_threshold"), "auto")
    return {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 0,
        **gathered,
        **sizes,
    } | more


def swift(zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    """ms-swift's ds_config."""
    rest = {"steps_per_print": 2000, "wall_clock_breakdown": False}
    return {**SIZES, **HALF, **rest, "zero_optimization": zero, **more}


def swift_2(stage: int, **more: Any) -> dict[str, Any]:
    sizes = {"allgather_bucket_size": 2e8, "reduce_bucket_size": 2e8, "overlap_comm": True}
    return {"stage": stage, "offload_optimizer": {**CPU, "device": "none"}, **BUCKETS, **sizes, **more}


SWIFT_3 = {"stage": 3, **GATHERED, "overlap_comm": True}
NONE = {**CPU, "device": "none"}
WARMUP = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}}

ACCEPTED: dict[str, tuple[dict[str, Any], str]] = {
    "LLaMA-Factory, stage 0": (factory(factory_2(0)), "fp32"),
    "LLaMA-Factory, stage 2": (factory(factory_2()), "fp32"),
    "LLaMA-Factory, stage 2, offload": (factory(factory_2(offload_optimizer=CPU)), "fp32"),
    "LLaMA-Factory, stage 3": (factory({"stage": 3, **GATHERED, "overlap_comm": False}), "bf16"),
    "LLaMA-Factory, stage 3, offload": (
        factory({"stage": 3, **GATHERED, "overlap_comm": False, "offload_optimizer": CPU, "offload_param": CPU}),
        "fp32",
    ),
    "Axolotl, stage 1": (axolotl({"stage": 1, "overlap_comm": True}), "bf16"),
    "Axolotl, stage 2": (
        axolotl(
            {
                "stage": 2,
                "offload_optimizer": {"device": "cpu"},
                "contiguous_gradients": True,
                "overlap_comm": True,
            }
        ),
        "fp32",
    ),
    "Axolotl, stage 3": (
        axolotl(
            {
                **SWIFT_3,
                "sub_group_size": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
            }
        ),
        "fp32",
    ),
    "Axolotl, stage 3 in bf16": ({**SIZES, "bf16": {"enabled": True}, "zero_optimization": short_names()}, "bf16"),
    "Axolotl, stage 3 in bf16, offload": (
        {
            **SIZES,
            "bf16": {"enabled": True},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": short_names(offload_optimizer=CPU, offload_param=CPU),
        },
        "bf16",
    ),
    "ms-swift, stage 1": (swift(swift_2(1)), "fp32"),
    "ms-swift, stage 2": (swift(swift_2(2)), "bf16"),
    "ms-swift, stage 3": (swift({**SWIFT_3, "offload_optimizer": NONE, "offload_param": NONE}), "fp32"),
    "ms-swift, stage 3, parameters": (swift({**SWIFT_3, "offload_optimizer": NONE, "offload_param": CPU}), "fp32"),
    "LLaVA, stage 2": (
        {**SIZES, "bf16": AUTO, "fp16": SCALE, "zero_optimization": {**BUCKETS, "stage": 2, "sub_group_size": 1e9}},
        "fp32",
    ),
    "LLaVA, stage 3": ({**SIZES, "bf16": AUTO, "fp16": SCALE, "zero_optimization": SWIFT_3}, "bf16"),
}
"""JSONs, each with a precision of the run that fits."""

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "LLaMA-Factory, autotp": (
        factory(factory_2(), tensor_parallel={"autotp_size": 2}),
        "fp32",
        "tensor_parallel is not supported here; remove it",
    ),
    "LLaMA-Factory, with a note": (
        factory(factory_2(), _comment="see the tutorial"),
        "fp32",
        "unknown key '_comment'",
    ),
    "LLaMA-Factory, sections that DeepSpeed does not read": (
        factory(factory_2(), comms_config={"verbose": False}),
        "fp32",
        "unknown key 'comms_config'; did you mean 'comms_logger'",
    ),
    "LLaMA-Factory, fp8": (factory({"stage": 3, **GATHERED}, fp8=SCALE), "fp32", "unknown key 'fp8'"),
    "Axolotl, an older stage 1": (
        axolotl({"stage": 1, "overlap_comm": True}, optimizer=ADAM),
        "fp32",
        "optimizer follows from the recipe: remove it, and set optimizer.learning_rate",
    ),
    "Axolotl, torch.compile": (
        axolotl({"stage": 1, "overlap_comm": True}, compile={"disable": False, "backend": "inductor"}),
        "fp32",
        "compile follows from the recipe: remove it, and set compile in the recipe",
    ),
    "Axolotl, stage 3 in bf16, and a run in fp32": (
        {**SIZES, "bf16": {"enabled": True}, "zero_optimization": short_names()},
        "fp32",
        'says bf16.enabled=True, but the recipe\'s precision is float32; write "auto" in the JSON or set precision',
    ),
    "ms-swift, an older stage 2": (
        swift(swift_2(2), optimizer=ADAM, scheduler=WARMUP),
        "fp32",
        "optimizer follows from the recipe: remove it",
    ),
    "ms-swift, autotp": (
        swift(swift_2(2), tensor_parallel={"autotp_size": 1}),
        "fp32",
        "tensor_parallel is not supported here; remove it",
    ),
    "LLaVA, stage 3, offload": (
        {
            **SIZES,
            **HALF,
            "bf16": {"enabled": True},
            "optimizer": ADAM,
            "scheduler": {**WARMUP, "type": "WarmupLR"},
            "steps_per_print": 1e5,
            "zero_optimization": {**SWIFT_3, "offload_optimizer": CPU, "offload_param": CPU},
        },
        "bf16",
        "optimizer follows from the recipe: remove it",
    ),
}
"""JSONs, each with the precision of a run and the sentence about it."""


def written(content: dict[str, Any], folder: Path) -> str:
    path = folder / "theirs.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("name", list(ACCEPTED))
def test_theirs_are_accepted(run_config: Callable[..., RunConfig], tmp_path: Path, name: str) -> None:
    content, precision = ACCEPTED[name]
    before = copy.deepcopy(content)
    config = run_config("encoder", tmp_path / "run", zero=written(content, tmp_path), precision=precision)
    for ranks in (1, 2, 4):
        ds = ds_config(config, ranks)
        assert ds["zero_optimization"]["stage"] == content["zero_optimization"]["stage"]
        assert '"auto"' not in json.dumps(ds)
    assert content == before
    stated = content["bf16"]["enabled"] is True
    assert precision_of(config.zero) == ("bf16" if stated else "fp32"), "the doctor's test takes it as well"


@pytest.mark.parametrize("name", list(REFUSED))
def test_theirs_are_refused_in_one_sentence(run_config: Callable[..., RunConfig], tmp_path: Path, name: str) -> None:
    content, precision, complaint = REFUSED[name]
    config = run_config("encoder", tmp_path / "run", zero=written(content, tmp_path), precision=precision)
    with pytest.raises(ConfigError) as caught:
        ds_config(config, 2)
    assert complaint in str(caught.value) and "theirs.json" in str(caught.value) and "\n" not in str(caught.value)


SOME = ("LLaMA-Factory, stage 2", "Axolotl, stage 3 in bf16, offload")


@pytest.mark.parametrize(
    "names",
    [
        SOME,
        pytest.param(
            tuple(name for name in ACCEPTED if name not in SOME),
            marks=pytest.mark.slow(reason="14 more runs of three steps"),
        ),
    ],
    ids=["some", "all others"],
)
def test_theirs_train(run_config: Callable[..., RunConfig], tmp_path: Path, names: tuple[str, ...]) -> None:
    """Three steps have the losses of the same run under our own zero2, which another precision changes by 2 %."""
    configs = [run_config("encoder", tmp_path / "ours", max_steps=3)]
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        folder.mkdir()
        content, precision = ACCEPTED[name]
        zero = written(content, folder)
        changes = {"zero": zero, "precision": precision, "activation_checkpointing": "auto"}  # asks the planner
        configs.append(run_config("encoder", folder / "run", max_steps=3, **changes))
    assert run_ranks(train_all, 2, configs) == [["step-000003"] * len(configs)] * 2
    ours, *theirs = [losses(Path(config.out)) for config in configs]
    for name, found in zip(names, theirs, strict=True):
        assert found == pytest.approx(ours, rel=1e-5 if ACCEPTED[name][1] == "fp32" else 0.02), name


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
