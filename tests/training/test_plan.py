"""Checks the plan's bytes against those that DeepSpeed's engines hold, its FLOPs against PyTorch's, and its
messages."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks
from places import GATHERED, PAIRS, ROOT
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.loading import load_run
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.deepspeed import ds_config_names
from zero_ds.training.options.recompute import recompute_
from zero_ds.training.planning import architecture as architecture_module
from zero_ds.training.planning import recipe
from zero_ds.training.planning.activations import activation_bytes
from zero_ds.training.planning.architecture import architecture
from zero_ds.training.planning.cluster import Cluster
from zero_ds.training.planning.flops import step_cost
from zero_ds.training.planning.json_output import as_json
from zero_ds.training.planning.plan import RecipePlan, plan
from zero_ds.training.planning.recipe import RunPlan, plan_run
from zero_ds.training.planning.route import fitted, shard_groups
from zero_ds.training.planning.tables import image_table, route_table

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tools" / "bench")]

"""ZeRO-3 that keeps nothing whole; the same with hpZ in groups of two."""
CAUSES = ("frozen", "trained", "gradients", "optimizer")


def test_a_language_model_alone_is_planned() -> None:
    """Its stage has no vision encoder, so it belongs to no route, and every sample is text."""
    overrides = ["encoder=null", "init_from=[]", "data.sources=[{name: genqa-500k}]"]
    found = plan("llama-3.2-3b/decoder", overrides, Cluster(8))
    assert found.routes == [] and found.run.size.groups.keys() == {"decoder"} and found.run.sample.images == 0
    assert found.run.steps == 3907
    assert "because a language model trains alone" in route_table(found)


def test_steps_are_planned_by_the_number_of_image_tokens(run_config: Callable[..., RunConfig]) -> None:
    """Of a model that makes a token of each patch, and of one that merges them; both say the same of each other."""
    large = plan_run(load_run("llama-3.1-70b/encoder"), Cluster(128))
    assert [(one.factor, one.image_tokens) for one in large.merging] == [(1, 576), (2, 144), (3, 64)]
    computing = [one.step.computing for one in large.merging]
    assert computing[0] > 2 * computing[1] > 2 * computing[2] and large.merging[0].step == large.fitting[0].step
    rows = [line.split() for line in image_table(large).splitlines()[2:]]
    assert [row[:2] for row in rows] == [["1", "(this"], ["2", "144"], ["3", "64"]] and rows[0][2] == "run)"
    few, many = (plan_run(run_config("encoder", adapter={"kind": kind}), Cluster(2)) for kind in ("pooling", "mlp"))
    assert (few.size.image_tokens, few.size.patches, many.size.image_tokens, many.size.patches) == (1, 4, 4, None)
    assert [(one.factor, one.image_tokens) for one in few.merging] == [(1, 4), (2, 1)]
    for one in few.merging:
        (same,) = (other for other in many.merging if other.factor == one.factor)
        assert same.step.flops == pytest.approx(one.step.flops)
    assert few.merging[1].step.seconds == few.fitting[0].step.seconds


# -- memory ------------------------------------------------------------------------------------------------------------

CASES = [
    ("decoder", zero, "bf16", 2)
    for zero in ("zero0", "zero2", "zero3_resident", "zero3_offload", "zero3_offload_params")
]
CASES += [("decoder", "zero1", "bf16", 4), ("decoder", "zero2_offload", "bf16", 4)]
CASES += [("pretrain", "zero1", "bf16", 2), ("pretrain", GATHERED, "bf16", 2), ("pretrain", GATHERED, "fp32", 2)]
CASES += [("pretrain", PAIRS, "bf16", 2)]
"""Stage, DeepSpeed config, precision, and global batch: of 4, two ranks add up two micro-batches each."""


def measured(configs: list[RunConfig]) -> list[dict[str, int]]:
    """Returns the bytes that a rank holds in the first steps of each run, by cause."""
    from held_memory import measure

    from zero_ds.runtime import distributed

    distributed.initialize()
    return [measure(config) for config in configs]


def case(run_config: Callable[..., RunConfig], stage: str, zero: str, precision: str, batch: int) -> RunConfig:
    return run_config(stage, zero=zero, precision=precision, global_batch=batch)


@pytest.fixture(scope="module")
def held(run_config: Callable[..., RunConfig]) -> dict[tuple[Any, ...], list[dict[str, int]]]:
    """Returns the bytes that each of two ranks holds, by case. The ranks start once for all cases."""
    ranks = run_ranks(measured, 2, [case(run_config, *one) for one in CASES], timeout=500)
    return {one: [rank[number] for rank in ranks] for number, one in enumerate(CASES)}


@pytest.mark.parametrize("one", CASES, ids=lambda one: f"{one[0]} {Path(one[1]).stem} {one[2]} {one[3]}")
def test_a_rank_holds_what_was_planned(
    held: dict[Any, Any], run_config: Callable[..., RunConfig], one: tuple[Any, ...]
) -> None:
    """Bytes of real tensors, each storage once: parameters, gradients and optimizer within 10 %."""
    plan = plan_run(case(run_config, *one), Cluster(2))
    (option,) = (option for option in plan.options if option.zero == Path(one[1]).stem)
    most = {cause: max(rank[cause] for rank in held[one]) for cause in CAUSES}  # ranks' shares differ by a parameter
    parameters = option.memory.total("frozen") + option.memory.total("trained")
    assert parameters == pytest.approx(most["frozen"] + most["trained"], rel=0.1)
    for cause in ("gradients", "optimizer"):
        assert option.memory.total(cause) == pytest.approx(most[cause], rel=0.1) and most[cause] > 0, cause


def whole_gradients(config: RunConfig) -> int:
    """Returns the largest number of gradient elements that are whole at a time, in two steps under ZeRO-3."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from held_memory import measure

    from zero_ds.runtime import distributed

    seen = []
    inner = Stage3.reduce_independent_p_g_buckets_and_remove_grads

    def noting(self: Any, parameter: Any) -> None:
        gradients = [p.grad for group in self.fp16_groups for p in group if p.grad is not None]
        seen.append(sum(gradient.numel() for gradient in gradients))
        inner(self, parameter)

    Stage3.reduce_independent_p_g_buckets_and_remove_grads = noting
    distributed.initialize()
    measure(config)
    return max(seen)


def test_a_gradient_larger_than_the_bucket_is_held_whole_next_to_it(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    ds = json.loads(Path(GATHERED).read_text())
    ds["zero_optimization"]["reduce_bucket_size"] = bucket = 1000
    own = tmp_path / "small.json"
    own.write_text(json.dumps(ds))
    config = run_config("decoder", zero=str(own))
    plan = plan_run(config, Cluster(1))
    (option,) = (option for option in plan.options if option.zero == "small")
    planned = option.memory.by_cause["gpu"]["buckets"] / 4 - 2 * bucket
    assert planned == max(plan.size.trained) > bucket
    (seen,) = run_ranks(whole_gradients, 1, config)
    assert planned <= seen < planned * 2, "and what came just before it, whose reduction is under way"


def test_every_config_is_planned_and_the_more_is_sharded_the_less_is_needed(
    run_config: Callable[..., RunConfig],
) -> None:
    config = run_config("decoder", precision="bf16", global_batch=64, target="SmolLM2-135M-Instruct")
    plan = plan_run(config, Cluster(16))
    assert {option.zero for option in plan.options} == set(ds_config_names())
    states = {o.zero: sum(o.memory.by_cause["gpu"].get(cause, 0.0) for cause in CAUSES) for o in plan.options}
    assert states["zero0"] > states["zero1"] > states["zero2"] > states["zero2_offload"]
    assert states["zero3_resident"] > states["zero3"] > states["zero3_offload"] > states["zero3_offload_params"]
    host = {o.zero: o.memory.by_cause["host"].get("optimizer", 0.0) for o in plan.options}
    assert {zero for zero, size in host.items() if size} == {"zero2_offload", "zero3_offload", "zero3_offload_params"}
    (nvme,) = (o for o in plan.options if o.zero == "zero3_nvme")
    assert nvme.memory.by_cause["disk"]["optimizer"] == host["zero3_offload"]


@pytest.mark.parametrize("stage", ["pretrain", "encoder", "decoder"])
@pytest.mark.parametrize("recomputed", [0, 1, 2, -1, None])
def test_what_passes_keep_is_what_autograd_saves(
    run_config: Callable[..., RunConfig], stage: str, recomputed: int | None
) -> None:
    """Compares the plan's meta tensors with a real model in training, whose saved tensors the same hooks count.

    The first layers are recomputed: none, some, all but one, all.
    """
    from zero_ds.training.setup import load_model, make_loader
    from zero_ds.training.stages import freeze_

    config = run_config(stage, attention="eager", global_batch=1)
    model = load_model(config, {"zero_optimization": {}})
    loader = make_loader(config, model, 1)
    freeze_(model, config)
    model.train()
    batch = next(batch for (batch,) in loader.steps(0, 4) if "image" in batch.ids[0])
    length, labels = batch.input_ids.shape[1], int((batch.labels != -100).sum())
    parts = architecture(config, dtype=torch.float32)
    of_one = activation_bytes(parts.model, length=length, supervised=labels, images=1, attention="eager")
    layers = of_one.recomputable[:recomputed]
    recompute_(model, layers)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if (key := tensor.untyped_storage().data_ptr()) not in own:
            saved[key] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch.inputs())
    again = [of_one.layers[number] for number in layers]
    later = sum(of_one.layers) - sum(again)
    most = max(0.0, max(again, default=0.0) - later)  # activations of the largest, if more than those of the later ones
    assert of_one.recomputing(len(layers)) == pytest.approx(sum(saved.values()) + most, rel=0.05)


# -- FLOPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "encoder", "decoder"])
def test_flops_of_the_135m_shape_are_those_that_pytorch_counts(stage: str) -> None:
    config = RunConfig(
        stage=stage,
        target="SmolLM2-135M-Instruct",
        surrogate="T20-28",
        encoder={"path": "clip-vit-large-patch14-336", "train_last_layers": 8 if stage == "encoder" else None},
        out="",
    )
    model = architecture(config).model
    cost = step_cost(model)
    words, labels = 200, 60
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter:
        features = model.image_features(torch.empty(1, 3, 336, 336, dtype=torch.bfloat16))
        mask = torch.ones(1, words + features.shape[1], dtype=torch.long)
        embedded = model.decoder.get_input_embeddings()(torch.zeros(1, words, dtype=torch.long))  # type: ignore[operator]
        hidden = model.family.hidden_states(model.decoder, torch.cat([features, embedded], dim=1), mask)
        model.logits(hidden[:, :labels]).sum().backward()
    length = words + model.tokens_per_image()
    ours = cost.flops(length, length**2, labels, 1, model.tokens_per_image())
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


# -- speed -------------------------------------------------------------------------------------------------------------


def test_collectives_by_hand() -> None:
    cluster = Cluster(128, 8, inside=240, between=40)
    assert cluster.collective(24e9, 1) == 0
    assert cluster.collective(24e9, 8) == pytest.approx(24 * 7 / 8 / 240), "a node"
    assert cluster.collective(24e9, 16) == pytest.approx(24 / 2 / 40), "half of it comes from the other node"
    assert cluster.collective(24e9, 128) == pytest.approx(24 * 15 / 16 / 40)
    # 16-way shards of 24 GB: a node holds half, and sums it with seven others
    assert cluster.between_replicas(24e9, 16) == pytest.approx(2 * 12 * 7 / 8 / 40)
    assert cluster.between_replicas(24e9, 128) == 0


def test_time_falls_with_what_is_given_and_micro_batches_grow_with_memory(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("decoder", precision="bf16", global_batch=2048, target="SmolLM2-135M-Instruct")

    def seconds(**changes: Any) -> float:
        return plan_run(config, replace(Cluster(16), **changes)).fitting[0].step.seconds

    usual = seconds()
    assert seconds(mfu=0.2) > usual > seconds(mfu=0.8)
    assert seconds(inside=1.0, between=1.0) > usual
    batches = [
        {o.zero: o.micro_batch for o in plan_run(config, Cluster(16, memory_gib=size)).options if o.fits}
        for size in (10.0, 80.0)
    ]
    assert set(batches[0]) <= set(batches[1]) and all(batches[1][zero] >= n for zero, n in batches[0].items())
    assert any(batches[1][zero] > n for zero, n in batches[0].items())


# -- the paper's largest model -----------------------------------------------------------------------------------------


def test_70b_on_128_gpus(tmp_path: Path) -> None:
    """A.4 and Table 9: 16-way shards are the smallest that fit, and the surrogate's route saves nearly half."""
    out = tmp_path / "plan.json"
    command = ["plan", "llama-3.1-70b/decoder", "--gpus", "128", "--gpu-memory", "80", "--out", str(out)]
    command += ["activation_checkpointing=true"]  # as in the paper's runs
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    plan = json.loads(out.read_text(encoding="utf-8"))
    assert plan["parameters"]["trained"]["decoder"] == 70_553_706_496, "as published"
    fits = {group["ranks"]: group["fits"] for group in plan["groups"]}
    assert fits == {1: False, 8: False, 16: True, 32: True, 64: True, 128: True}
    assert "The smallest groups that fit: 16 ranks." in result.output
    assert {zero for zero, option in plan["options"].items() if option["fits"]} == {
        *("zero3", "zero3_hpz", "zero3_offload", "zero3_offload_params", "zero3_nvme")
    }
    assert plan["fastest"] == "zero3_hpz"
    largest, bucket = 128_256 * 8_192, 50_000_000
    buckets = {zero: plan["options"][zero]["bytes"]["gpu"]["buckets"] for zero in ("zero2", "zero3")}
    assert buckets["zero3"] == 2 * (2 * bucket + largest), "the embeddings' gradient is whole until it is reduced"
    assert buckets["zero2"] == 2 * (2 * 500_000_000 + largest)
    routes = plan["routes"]
    for key in ("hours", "hours_in_groups_fitted"):
        ours, baseline = (sum(leg[key] for leg in routes[name].values()) for name in ("surrogate", "baseline"))
        assert 0.35 < 1 - ours / baseline < 0.55
    decoder = routes["baseline"]["baseline-decoder"]
    assert decoder["hours_in_groups_fitted"] == pytest.approx(4883 * 20.5 / 3600, rel=1e-3), "that number is fitted"
    assert "this one number is fitted" in " ".join(result.output.split())
    assert "comes with zero-ds, since the model is not at hand" in result.output
    assert "T(40,78), 42 of 80 layers" not in result.output, "this recipe trains the full model"
    offline = plan["offline_translators"]
    layer, head, target = 855_638_016, 128_256 * 8_192, 80 * 855_638_016
    assert offline["target_hours"] == pytest.approx(2 * target * 5e6 / (312e12 * 0.4) / 3600, rel=0.01)
    late = (2 + 2 + 2) * layer + (2 + 2) * layer + (2 + 2 + 2) * head
    assert offline["train_hours"] == pytest.approx(late * 5e6 * 4 / (312e12 * 0.4) / 3600, rel=0.01)
    assert offline["disk_gb"] == pytest.approx(4 * 8192 * 2 * 5e6 / 1e9, rel=0.01)
    assert offline["stage_gpu_hours"] > 100 * (offline["target_hours"] + offline["train_hours"])
    assert "zero-ds translate" in result.output
    peaks = {group["ranks"]: group["peak"] / 2**30 for group in plan["groups"]}
    assert [round(peaks[ranks]) for ranks in (1, 8, 16)] == [1059, 143, 77], "docs/planning.md"
    assert CliRunner().invoke(app, command[:-1]).exit_code == 0
    auto = json.loads(out.read_text(encoding="utf-8"))
    assert auto["groups"] == plan["groups"], "these are the paper's, whatever DeepSpeed runs recompute"
    layers = {zero: option["layers_recomputed"] for zero, option in auto["options"].items() if option["fits"]}
    assert 0 == layers["zero3_offload"] < layers["zero3"] < layers["zero3_hpz"] < 80
    for name, legs in auto["routes"].items():
        for leg, found in legs.items():
            assert found["hours"] <= plan["routes"][name][leg]["hours"]
            assert found["hours_in_groups_fitted"] == plan["routes"][name][leg]["hours_in_groups_fitted"]
    assert auto["routes"]["surrogate"]["encoder"]["hours"] < 0.7 * plan["routes"]["surrogate"]["encoder"]["hours"]


def test_fitting_ends_where_no_rate_helps() -> None:
    plan = plan_run(load_run("llama-3.2-3b/decoder"), Cluster(16))
    assert fitted(plan, plan.cluster, seconds=1e-3, ranks=8) is None
    found = fitted(plan, plan.cluster, seconds=30.0, ranks=16)
    assert found is not None and shard_groups(plan, found, 16).step.seconds == pytest.approx(30.0, rel=1e-3)


# -- mistakes of users -------------------------------------------------------------------------------------------------


def sentence(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["llama-3.1-70b/decodr"], "unknown recipe 'llama-3.1-70b/decodr'; did you mean"),
        (["llama-3.2-3b/pretrain", "--gpus", "0"], "--gpus 0 is not a size; give more than 0."),
        (
            ["llama-3.2-3b/pretrain", "--gpus", "12"],
            "12 GPUs are not a whole number of nodes of 8; set --gpus-per-node.",
        ),
        (["llama-3.2-3b/pretrain", "--gpus", "24"], "global_batch=256 is not a multiple of 24 GPUs"),
        (["llama-3.2-3b/pretrain", "--gpu-memory", "0"], "--gpu-memory 0 is not a size"),
        (["llama-3.2-3b/pretrain", "--gpu", "A1000"], "--gpu A1000 is not known; did you mean 'A100'"),
        (["llama-3.2-3b/pretrain", "--gpu", "-5"], "--gpu -5 is not a peak"),
        (["llama-3.2-3b/pretrain", "--bandwidth", "240"], "--bandwidth 240 cannot be read; write INSIDE/BETWEEN"),
        (["llama-3.2-3b/pretrain", "--bandwidth", "240/0"], "--bandwidth 240/0 must be two rates above 0"),
        (["llama-3.2-3b/pretrain", "--mfu", "40"], "--mfu 40 is not a share"),
        (["llama-3.2-3b/pretrain", "--reserve", "90"], "--reserve 90 is not a part of 80 GiB"),
        (["llama-3.2-3b/pretrain", "--decoder-share", "0"], "--decoder-share 0 is not a share"),
        (["llama-3.2-3b/pretrain", "--price", "0"], "--price 0 is not a price; give more than 0 for an hour of a GPU."),
        (["llama-3.2-3b/pretrain", "--translator", "dense"], "--translator dense and --translator-width N belong"),
        (["llama-3.2-3b/pretrain", "--translator", "thin"], "--translator thin is not known; choose copy or dense."),
        (
            ["llama-3.2-3b/pretrain", "--translator", "dense", "--translator-width", "64"],
            "has no experts that a dense translator could replace; keep --translator copy.",
        ),
        (
            ["gpt-oss-120b/pretrain", "--translator", "dense", "--translator-width", "64"],
            "GptOss has no dense layers at [18]; keep --translator copy.",
        ),
        (["llama-3.2-3b/pretrain", "--replace", "16:40"], "layers 16:40 are not inside the model's layers 0:27"),
        (["llama-3.2-3b/pretrain", "--out", "/nowhere/plan.json"], "--out /nowhere/plan.json cannot be written"),
        (["llama-3.2-3b/pretrain", "target=./runs/none"], "./runs/none holds no config.json; give a folder"),
        (["llama-3.2-3b/pretrain", "target=SmolLM2-135M-Instruct", "surrogate=runs/x"], "say how it will be cut with"),
        (
            ["llama-3.1-8b/decoder", "--gpu-memory", "5"],
            "no config of ds_configs/ fits 8 GPUs of 5 GiB; the smallest, ",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments: list[str], says: str) -> None:
    said = sentence(*arguments)
    assert says in said and "\n" not in said


def test_planning_from_python_refuses_what_the_command_refuses() -> None:
    with pytest.raises(ConfigError, match="--decoder-share 2 is not a share"):
        plan("llama-3.2-3b/pretrain", None, Cluster(8), decoder_share=2.0)
    with pytest.raises(ConfigError, match="--mfu 4 is not a share"):
        plan("llama-3.2-3b/pretrain", None, Cluster(8, mfu=4.0))


def test_the_json_file_states_the_decoder_share_that_was_planned_with(run_config: Callable[..., RunConfig]) -> None:
    plan = RecipePlan("tiny/decoder", plan_run(run_config("decoder"), Cluster(2)), [], decoder_share=0.5)
    content = json.loads(json.dumps(as_json(plan)))
    assert any("trains its decoder on 50 % of the data" in sentence for sentence in content["assumptions"])


def test_the_surrogate_may_be_there_or_not(run_config: Callable[..., RunConfig], small: Path) -> None:
    config = run_config("encoder")
    assert "from " + str(small) in " ".join(architecture(config).size.sources)
    planned = architecture(config.model_copy(update={"surrogate": "runs/none"}), replace=["1:4"])
    assert planned.model.plan is not None and planned.model.plan.surrogate_depth == 3
    named = architecture(load_run("llama-3.2-3b/early-t1-11-encoder"))
    assert str(named.model.plan) == "T(1,11)" and any("not built yet" in sentence for sentence in named.size.sources)
    paper = architecture(load_run("llama-3.2-3b/encoder", ["surrogate=runs/mine"]))
    assert str(paper.model.plan) == "T(16,26)" and any("the paper's" in sentence for sentence in paper.size.sources)


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("llama-3.2-3b", 3_212_749_824), ("llama-3.1-8b", 8_030_261_248)],
)
def test_shipped_architectures_have_as_many_parameters_as_published(recipe: str, parameters: int) -> None:
    parts = architecture(load_run(f"{recipe}/decoder"))
    assert sum(p.numel() for p in parts.model.decoder.parameters()) == parameters
    assert parts.model.encoder is not None
    assert sum(p.numel() for p in parts.model.encoder.parameters()) == 303_507_456, "CLIP's vision tower"


BESIDE_THE_PAPER = {  # parameters, and in billions those published: all, and those that compute a token
    "qwen3-8b": (8_190_735_360, 8.2, None),
    "mistral-small": (23_572_403_200, 24, None),
    "qwen3-32b": (32_762_123_264, 32.8, None),
    "llama-3.3-70b": (70_553_706_496, 70.6, None),
    "gpt-oss-120b": (116_829_156_672, 117, 5.1),
    "qwen3-235b-a22b": (235_093_634_560, 235, 22),
}


@pytest.mark.parametrize("recipe", BESIDE_THE_PAPER)
def test_shipped_architectures_beside_the_papers_have_as_many_parameters(recipe: str) -> None:
    """Published numbers are rounded, some to two digits, so they are met to 2 %; the FLOPs follow active parameters."""
    parameters, published, active = BESIDE_THE_PAPER[recipe]
    model = architecture(load_run(f"{recipe}/encoder")).model
    parts = architecture(load_run(f"{recipe}/baseline-adapter"))
    whole: Any = parts.model
    assert sum(p.numel() for p in whole.decoder.parameters()) == parameters
    assert parameters == pytest.approx(published * 1e9, rel=0.02)
    found = parts.size.decoder
    assert found.parameters == parameters and (found.active is None) == (active is None)
    computing = parts.size.cost.decoder.forward_token / 2 + whole.decoder.get_output_embeddings().weight.numel()
    if found.active is not None and active is not None:
        assert found.active == pytest.approx(active * 1e9, rel=0.02)
        assert computing == pytest.approx(found.active, rel=0.002), "norms and biases are not counted"
    else:
        table = whole.decoder.get_input_embeddings().weight.numel()
        assert computing == pytest.approx(parameters - table, rel=0.002)
    assert model.tokens_per_image() == 576
    assert model.encoder is not None
    assert sum(p.numel() for p in model.encoder.parameters()) == 413_018_352, "SigLIP's vision tower without its head"
    assert model.plan is not None and str(model.plan).startswith("T(")


def planned_text(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_dense_translators_are_planned_before_they_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a layer with 128 experts trains 2.5 B parameters; a dense one as many as a token passes, 0.22 B."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "plan.json"
    command = ["qwen3-235b-a22b/pretrain", "--gpus", "128", "--out", str(out)]
    copied = planned_text(*command)
    assert "surrogate T(47,92), 49 of 94 layers: by the name of" in copied
    assert "decoder 123.1 B parameters, of which 11.54 B compute a token" in copied
    trained = json.loads(out.read_text())["parameters"]
    assert trained["trained"]["translator"] == 2_487_755_008 and trained["active"] == pytest.approx(11.5e9, rel=0.01)
    dense = planned_text(*command, "--translator", "dense", "--translator-width", "12288")
    assert "49 of 94 layers, translators with dense networks of 12288 units: by the name of" in dense
    width = json.loads(out.read_text())["parameters"]["trained"]["translator"]
    attention, norms = 2 * 4096 * 8192 + 2 * 4096 * 512 + 2 * 128, 2 * 4096
    assert width == attention + norms + 3 * 4096 * 12288


def test_the_price_of_both_routes(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    text = planned_text("llama-3.1-70b/decoder", "--gpus", "128", "--price", "2.5", "--out", str(out))
    plan = json.loads(out.read_text())
    ours, full = ([leg["hours"] for leg in plan["routes"][name].values()] for name in ("surrogate", "baseline"))
    saved = 128 * (sum(full) - sum(ours))
    assert f"saves {saved / 128:.1f} hours, {saved:,.0f} GPU-hours, and saves {2.5 * saved:,.0f} at 2.5" in text
    decoder = plan["routes"]["baseline"]["baseline-decoder"]
    assert decoder["cost"] == pytest.approx(128 * 2.5 * decoder["hours"])
    assert "GPU-hours." in planned_text("llama-3.1-70b/decoder", "--gpus", "128"), "without a price, hours alone"


def test_published_step_times() -> None:
    """The planner's errors are those that docs/planning.md states."""
    import compare_published

    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for row in compare_published.rows():
        assert f"| {row.what} |" in page
        stated = page.split(f"| {row.what} |")[1].split("|")
        assert float(stated[1]) == pytest.approx(row.planned, rel=0.02)
        assert float(stated[2].strip(" %")) == pytest.approx(100 * row.error, abs=2)


def test_kept_numbers_are_used_for_the_same_model_only(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged file or a folder that cannot be written costs time only, and a changed config.json is noticed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = tmp_path / "target"
    shutil.copytree(run_config("decoder").target, target)
    config = run_config("decoder", target=str(target), surrogate=None)
    folder = tmp_path / "cache" / "zero_ds" / "plans"

    def planned() -> RunPlan:
        recipe._numbers.cache_clear()
        return plan_run(config, Cluster(2))

    first = planned()
    (kept,) = folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(architecture_module, "architecture", None)
        again = planned()
    assert (again.size, again.activations, again.options) == (first.size, first.activations, first.options)
    kept.write_text(kept.read_text()[:-20])
    assert planned().size == first.size and len(list(folder.iterdir())) == 1

    content = json.loads((target / "config.json").read_text())
    content["intermediate_size"] *= 2
    (target / "config.json").write_text(json.dumps(content))
    assert sum(planned().size.frozen) + sum(planned().size.trained) > sum(first.size.frozen) + sum(first.size.trained)
    assert len(list(folder.iterdir())) == 2

    monkeypatch.setenv("XDG_CACHE_HOME", str(target / "config.json"))
    assert planned().options


# -- against a finished run --------------------------------------------------------------------------------------------


def test_a_finished_run_is_compared_with_its_plan(trained: Path, tmp_path: Path) -> None:
    """The checkpoint has the planned size; a folder without a run is refused in one sentence.

    The last line of metrics.jsonl may be cut off, by a kill or because it is being written.
    """
    import re
    import shutil

    import compare_plan
    import typer

    tool = typer.Typer()
    tool.command()(compare_plan.main)
    run = tmp_path / "run"
    shutil.copytree(trained / "encoder", run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    result = CliRunner().invoke(tool, [str(run), "--gpus", "1"], catch_exceptions=False)
    numbers = {
        line.split("  ")[0]: re.findall(r"[\d.]+", line.split("  ", 1)[-1]) for line in result.stdout.splitlines()
    }
    for name in ("seconds of a step", "MFU", "memory_gib/host, peak"):
        assert len(numbers[name]) == 3, "planned, measured, difference"
    planned, measured = (float(value) for value in numbers["checkpoint, optimizer, MiB"][:2])
    assert measured > 0.1 and measured == pytest.approx(planned, rel=0.15), "and the file's header"
    refused = CliRunner().invoke(tool, [str(trained)])
    assert str(refused.exception) == f"{trained} is not a run, because it has no config.yaml; name the folder of a run."
