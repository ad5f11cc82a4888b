"""A DeepSpeed JSON has known keys with known values only; everything else is refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.deepspeed import ds_config
from zero_ds.training.deepspeed_keys import DECIDED, FILLED, KEYS, REFUSED, read_json

BATCHES: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
HALF = {"fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "min_loss_scale": 1}}
LLAVA: dict[str, dict[str, Any]] = {
    "zero2": {
        **BATCHES,
        **HALF,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
        },
    },
    "zero3": {
        **BATCHES,
        **HALF,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    },
}
"""The settings of LLaVA's scripts/zero2.json and zero3.json."""


def nested(key: str, value: Any) -> dict[str, Any]:
    """Returns a JSON with one entry."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def leaves(content: Any) -> Iterator[Any]:
    """Yields all values of a JSON."""
    if isinstance(content, dict):
        for value in content.values():
            yield from leaves(value)
    else:
        yield content


@pytest.mark.parametrize("key", list(KEYS))
def test_values_that_were_tried_are_read_and_no_others(key: str) -> None:
    rule = KEYS[key]
    for value in rule.tried:
        (read,) = leaves(read_json(nested(key, value), "mine.json"))
        assert read == value
    assert len({json.dumps(value) for value in (*rule.tried, *rule.refused)}) > 1 or rule.why
    for value in (*rule.refused, [{}], {"a": 1}):
        with pytest.raises(ConfigError, match=r"mine\.json") as caught:
            read_json(nested(key, value), "mine.json")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", list(KEYS))
def test_auto_is_deepspeeds_default(key: str) -> None:
    if key in DECIDED:
        with pytest.raises(ConfigError, match="='auto'; choose"):
            read_json(nested(key, "auto"), "mine.json")
        return
    assert list(leaves(read_json(nested(key, "auto"), "mine.json"))) == (["auto"] if key in FILLED else [])


@pytest.mark.parametrize("key", list(REFUSED))
def test_documented_keys_that_cannot_be_used_say_why(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_json(nested(key, {"type": "AdamW"}), "mine.json")
    assert str(caught.value).endswith(f"{key.partition('.')[2] or key} {REFUSED[key]}.")


@pytest.fixture
def resolve(run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`resolve({...}, ranks=2, precision="bf16")`: what DeepSpeed gets from a JSON."""

    def make(content: dict[str, Any] | str, ranks: int = 2, **changes: Any) -> dict[str, Any]:
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return ds_config(run_config("encoder", tmp_path / "run", zero=str(path), **changes), ranks)

    return make


def stage(number: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number, **more}}


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({**stage(2), "wandb": {"enabled": True}}, {}, "needs the package wandb, which is not installed"),
    ({**stage(2), "comet": {"enabled": True}}, {}, "needs the package comet_ml, which is not installed"),
    (
        {**stage(0), "data_types": {"grad_accum_dtype": "fp32"}},
        {"precision": "bf16"},
        "ZeRO stage 0 accumulates in the precision of the run, bf16",
    ),
    ({**stage(1), "data_types": {"grad_accum_dtype": "fp32"}}, {"precision": "bf16"}, "ZeRO stage 1 accumulates in"),
    ({**stage(3), "data_types": {"grad_accum_dtype": "bf16"}}, {}, "would round the gradients of a run in fp32"),
    ({**stage(2), "communication_data_type": "bf16"}, {}, "would round the gradients of a run in fp32"),
    ({**stage(2), "communication_data_type": "fp64"}, {}, "communication_data_type='fp64'; choose fp32, bf16 or fp16"),
    (stage(2, compute_grad_norm=False), {}, "only true works here, because clipping and the log need the norm"),
    (stage(3, offload_optimizer={"device": "cpu", "ratio": 0.3}), {}, "offload_optimizer.ratio=0.3; only 1.0 works"),
    ({**stage(2), "bf16": {"bf16_master_weights_and_grads": True}}, {"precision": "bf16"}, "only false works here"),
    (stage(1, legacy_stage1=True), {}, "legacy_stage1=True; only false works here, because DeepSpeed has removed it"),
    (stage(3, stage3_module_granularity_threshold=5), {}, "stage3_module_granularity_threshold=5; only 0 works here"),
    (stage(3, module_granularity_threshold=5), {}, "stage3_module_granularity_threshold=5; only 0 works here"),
    (stage(2, overlap_comm="false"), {}, "overlap_comm='false'; write true or false, without quotes"),
    (
        stage(2, reduce_bucket_size="5e8"),
        {},
        "reduce_bucket_size='5e8'; write a whole number from 1 on, without quotes",
    ),
    (stage(2, reduce_bucket_size=1.5), {}, "reduce_bucket_size=1.5; write a whole number"),
    (stage(2, reduce_bucket_size=True), {}, "reduce_bucket_size=True; write a whole number"),
    ({**stage(2), "prescale_gradients": "false"}, {}, "prescale_gradients='false'; write true or false"),
    ({**stage(2), "steps_per_print": 0}, {}, "steps_per_print=0; write a whole number from 1 on"),
    ({**stage(2), "fp16": {"loss_scale": float("inf")}}, {}, "loss_scale=inf; write a number from 0 to"),
    (stage(True), {}, "stage=True; choose 0, 1, 2 or 3"),
    (stage(2, offload_optimizer="cpu"), {}, "offload_optimizer='cpu' must be an object of settings"),
    (stage(2, cpu_offload=True), {}, 'cpu_offload is old; write "offload_optimizer": {"device": "cpu"}'),
    (
        {**stage(2, offload_optimizer={"device": "cpu"}), "zero_force_ds_cpu_optimizer": True},
        {},
        "needs DeepSpeed's own optimizer",
    ),
    (stage(3, prefetch_bucket_size=5, stage3_prefetch_bucket_size=6), {}, "are the same key; keep one of them"),
    ({**stage(2), "optimizer": {"type": "AdamW"}}, {}, "optimizer follows from the recipe: remove it, and set"),
    ({**stage(2), "comet": {"api_key": "x"}}, {}, "api_key is a secret"),
    (
        {"zero_optimization.stage": 3},
        {},
        'unknown key \'zero_optimization.stage\'; write {"zero_optimization": {"stage"',
    ),
    ({**stage(2), "bf16.enabled": True}, {}, 'write {"bf16": {"enabled": ...}}'),
    (stage(3, **{"offload_param.device": "cpu"}), {}, 'write {"offload_param": {"device": ...}}'),
    ({"zero_optimization.offload_param": {"device": "cpu"}}, {}, "unknown key 'zero_optimization.offload_param'"),
    (stage("auto"), {}, "stage='auto'; choose 0, 1, 2 or 3"),
    (stage(None), {}, "stage=None; choose 0, 1, 2 or 3"),
    (stage(3, offload_param={"device": "auto"}), {}, "device='auto'; choose none, cpu or nvme"),
    (stage(2, offload_optimizer={"pin_memory": True}), {}, "offload_optimizer names no device, and DeepSpeed would"),
    (stage(3, offload_param={"buffer_count": 5}), {}, "offload_param names no device, and DeepSpeed would offload"),
    ({**stage(2), "aio": {"block_size": -512}}, {}, "block_size=-512; write a multiple of 512"),
    ({**stage(2), "aio": {"block_size": "1MB"}}, {}, "block_size='1MB'; write a multiple of 512"),
    ({**stage(2), "aio": {"block_size": 0}}, {}, "block_size=0; write a multiple of 512"),
    ({**stage(2), "aio": {"queue_depth": 0}}, {}, "queue_depth=0; write a whole number from 1"),
    ({**stage(2), "aio": {"block_size": 2**40}}, {}, "as a disk reads and writes, up to 1073741824"),
    ({**stage(2), "aio": {"queue_depth": 65536}}, {}, "queue_depth=65536; write a whole number from 1 to 1024"),
    ({**stage(2), "aio": {"intra_op_parallelism": 10**6}}, {}, "a whole number from 1 to 1000, without quotes"),
    ({**stage(2), "aio": {"queue_depth": "8"}}, {}, "queue_depth='8'; write a whole number from 1"),
    ({**stage(2), "aio": {"intra_op_parallelism": -1}}, {}, "intra_op_parallelism=-1; write a whole number from 1"),
    ({**stage(2), "aio": {"single_submit": "false"}}, {}, "single_submit='false'; write true or false"),
    ({**stage(2), "aio": {"use_gds": True}}, {}, "use_gds=True; only false works here"),
    (
        stage(3, offload_param={"device": "nvme", "buffer_size": 0}),
        {},
        "offload_param.buffer_size=0; write a whole number from 1",
    ),
    (stage(3, offload_param={"device": "nvme", "nvme_path": 5}), {}, "nvme_path=5; write the path of a"),
    (
        stage(3, offload_optimizer={"device": "nvme", "nvme_path": "~nobody_here/x"}),
        {},
        "~nobody_here is not the home folder of a user here",
    ),
    (
        stage(3, offload_optimizer={"device": "nvme", "buffer_count": 3}),
        {},
        "offload_optimizer.buffer_count=3; write a whole number from 4",
    ),
    ({**stage(1), "gradient_predivide_factor": 0}, {}, "gradient_predivide_factor=0; write a number above 0"),
    (
        {**stage(2), "fp16": {"initial_scale_power": 5000}},
        {},
        "initial_scale_power=5000; write a whole number from 0 to 32",
    ),
    ({**stage(2), "fp16": {"loss_scale": 1e300}}, {}, "loss_scale=1e+300; write a number from 0 to 4294967296"),
    ({**stage(2), "train_batch_size": 10**400}, {}, "write a whole number from 1 on"),
    ({**stage(2), "aio": {"block_size": 1000}}, {}, "block_size=1000; write a multiple of 512"),
    (
        {**stage(2), "csv_monitor": {"enabled": True, "output_path": "~nobody_here/x"}},
        {},
        "~nobody_here is not the home folder of a user here",
    ),
]


@pytest.mark.parametrize(("content", "changes", "complaint"), WRONG)
def test_what_would_fail_after_loading(
    resolve: Callable[..., Any], content: dict[str, Any], changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(content, **changes)
    assert complaint in str(caught.value) and "mine.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(LLAVA))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_llavas_own_files_leave_nothing_open(resolve: Callable[..., Any], name: str, precision: str) -> None:
    ds = resolve(LLAVA[name], precision=precision)
    assert "auto" not in list(leaves(ds))
    assert ds["zero_optimization"]["sub_group_size"] == 10**9
    assert not {"reduce_bucket_size", "stage3_param_persistence_threshold"} & set(ds["zero_optimization"])
    assert ds["fp16"]["enabled"] is (precision == "fp16")


@pytest.mark.parametrize("name", list(LLAVA))
def test_doctor_takes_the_precision_of_llavas_own_files(name: str, tmp_path: Path) -> None:
    from zero_ds.cluster.doctor import precision_of

    path = tmp_path / "mine.json"
    path.write_text(json.dumps(LLAVA[name]))
    assert precision_of(str(path)) == "fp32"
    path.write_text(json.dumps({**LLAVA[name], "fp16": {"enabled": True}}))
    assert precision_of(str(path)) == "fp16"


def test_keys_have_one_name_numbers_one_type_and_no_section_means_no_offload(resolve: Callable[..., Any]) -> None:
    ds = resolve(
        stage(3, param_persistence_threshold=1e4, reduce_bucket_size=5e8, offload_param=None, offload_optimizer={})
    )
    zero = ds["zero_optimization"]
    assert zero == {"stage": 3, "stage3_param_persistence_threshold": 10_000, "reduce_bucket_size": 500_000_000}
    assert all(type(value) is int for value in zero.values())
    assert resolve({**stage(2), "steps_per_print": "auto"})["steps_per_print"] == 1_000_000_000
    off = resolve(stage(0, offload_optimizer={"device": "none", "nvme_path": "auto"}))
    assert off["zero_optimization"] == {"stage": 0}


def test_home_in_paths_of_the_json(
    resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ds = resolve({**stage(2), "csv_monitor": {"enabled": True, "output_path": "~/csv"}})
    assert ds["csv_monitor"]["output_path"] == str(tmp_path / "csv")


def test_a_byte_order_mark_is_no_part_of_the_json(resolve: Callable[..., Any]) -> None:
    assert resolve("\ufeff" + json.dumps(stage(1)))["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "// a comment\n{}", '{"a": 1,}'])
def test_what_is_no_json_is_refused_in_one_sentence(resolve: Callable[..., Any], text: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.json cannot be read: [^\n]*\.$"):
        resolve(text)


def test_parameters_on_a_disk_do_not_wait_for_their_next_use(
    resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each would keep a buffer, and DeepSpeed fails in the second step when there is none left."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: True)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    disk = {"offload_param": {"device": "nvme"}}
    for given in ({}, {"stage3_max_reuse_distance": "auto"}, {"max_reuse_distance": 0}):
        ds = resolve(stage(3, **disk, **given), nvme_path=str(tmp_path))
        assert ds["zero_optimization"]["stage3_max_reuse_distance"] == 0
    with pytest.raises(ConfigError, match='stage3_max_reuse_distance=5 with parameters on a disk; write 0 or "auto"'):
        resolve(stage(3, **disk, stage3_max_reuse_distance=5), nvme_path=str(tmp_path))


def test_pipelines_to_a_disk_have_buffers_for_all_that_is_under_way(
    resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: True)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    for pipelines, least in (((), 4), (("read",), 8), (("write",), 8), (("read", "write"), 12)):
        section = {"device": "nvme", "nvme_path": str(tmp_path), **{f"pipeline_{name}": True for name in pipelines}}
        ds = resolve(stage(3, offload_optimizer=section))
        assert ds["zero_optimization"]["offload_optimizer"]["buffer_count"] == least
        if pipelines:
            with pytest.raises(ConfigError, match=f"buffer_count={least - 1} with pipeline_.*; write {least} or more"):
                resolve(stage(3, offload_optimizer={**section, "buffer_count": least - 1}))


@pytest.mark.parametrize(("library", "ninja"), [(False, True), (True, False)])
def test_a_disk_needs_what_compiles_async_io(
    resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: bool, ninja: bool
) -> None:
    """DeepSpeed looks for libaio, and finds out about ninja when the models are loaded."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: library)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: ninja)
    with pytest.raises(ConfigError, match="install a C\\+\\+ compiler, ninja and libaio"):
        resolve(stage(3, offload_optimizer={"device": "nvme"}), nvme_path=str(tmp_path))
