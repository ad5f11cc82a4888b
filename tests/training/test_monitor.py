"""Records of a run: scalars as TensorBoard's own reader finds them, answers with images, FLOPs."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_helper import run_ranks, train_all
from places import GATHERED
from safetensors.torch import load_file

from zero_ds.config.schema import RunConfig
from zero_ds.model import losses
from zero_ds.training.metrics import StepCounts
from zero_ds.training.monitor import read_metrics
from zero_ds.training.planning.flops import peak_flops, step_cost
from zero_ds.training.profile import ELEMENTWISE, PHASES, kind_of, read_profile

STEPS = 4


@pytest.fixture(scope="module")
def runs(run_config: Callable[..., RunConfig], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a run of two ranks under ZeRO-3 that previews answers, and the same run without answers."""
    root = tmp_path_factory.mktemp("watched")
    options = {"zero": GATHERED, "max_steps": STEPS, "log_every": 2, "losses": {"squared_logits": 1e-3}}
    options["init_from"] = [str(trained / "pretrain")]
    configs = [
        run_config(
            "encoder",
            root / "looking",
            preview={"every_steps": 2, "samples": 3, "tokens": 5},
            profile={"steps": 2, "skip": 1},
            **options,
        ),
        run_config("encoder", root / "not looking", **options),
        run_config("encoder", root / "profiled", profile={"steps": 1, "skip": 1, "stop": True}, **options),
    ]
    assert run_ranks(train_with_a_term, 2, configs) == [[f"step-{STEPS:06d}"] * 2 + ["profiled"]] * 2
    return root


def train_with_a_term(configs: list[RunConfig]) -> list[str]:
    """Trains runs that add a term to the loss."""
    losses.TERMS["squared_logits"] = lambda predictions: predictions.logits.float().square().sum()
    return train_all(configs)


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Maps name and step to value, as TensorBoard's own reader finds them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (run / "tensorboard").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_every_scalar_is_in_the_event_files(runs: Path) -> None:
    found = scalars(runs / "looking")
    always = ["loss", "learning_rate/encoder", "learning_rate/adapter", "grad_norm", "tokens_per_second", "mfu"]
    always += ["loss/squared_logits"]
    always += ["samples_per_second", "padding_share", "supervised_tokens", "data_wait_seconds", "seconds"]
    for name in always:
        assert sorted(found[f"train/{name}"]) == list(range(1, STEPS + 1)), name
    assert sorted(found["train/memory_gib/host"]) == [1, 2, 4], "where a line is shown"
    by_length = [name for name in found if name.startswith("train/loss_by_response_length/")]
    assert by_length
    records = [json.loads(line) for line in (runs / "looking" / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for name, value in record.items():
            if name not in ("step", "steps", "samples"):
                assert found[f"train/{name}"][record["step"]] == pytest.approx(value, rel=1e-6), name
        assert 0 < record["mfu"] < 1.5 and 0 <= record["padding_share"] < 1 and record["supervised_tokens"] > 0
        means = [record[name.removeprefix("train/")] for name in by_length if name.removeprefix("train/") in record]
        assert min(means) <= record["loss"] * 1.5 and all(math.isfinite(mean) for mean in means)


def test_answers_with_their_images(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = [json.loads(line) for line in (runs / "looking" / "answers.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2] * 3 + [4] * 3
    for record in records:
        assert record["question"] and record["expected"] and Path(record["picture"]).is_file()
    assert records[0]["answer"] != "" or records[1]["answer"] != "", "it says something"
    (folder,) = {path.parent for path in (runs / "looking" / "tensorboard").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    images = events.Images("answers")
    assert [image.step for image in images] == [2, 4] and images[0].width > 300


def test_looking_changes_nothing(runs: Path) -> None:
    """This holds under ZeRO-3 as well, whose gathers follow the order of the modules."""
    one, other = (
        load_file(runs / name / f"step-{STEPS:06d}" / "weights.safetensors") for name in ("looking", "not looking")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_answer_is_what_greedy_decoding_gives(
    runs: Path, run_config: Callable[..., RunConfig], small: Path, made: Callable[..., Path]
) -> None:
    """The run's last answers equal those of the evaluation's decoding, which has a cache, with the saved weights."""
    from zero_ds.data.sources import Records
    from zero_ds.grafting.generate import Answerer
    from zero_ds.grafting.load import load_trained
    from zero_ds.model.build import sample_encoder

    last = [json.loads(line) for line in (runs / "looking" / "answers.jsonl").read_text().splitlines()][-3:]
    config = run_config("encoder")
    # under the surrogate are the translators that `pretrain` trained, which the run started from
    model = load_trained(runs / "looking", small)
    encoder = sample_encoder(model, small, made("clip"), config.data, supervise="special_tokens")
    answerer = Answerer(model, encoder, max_new_tokens=5)
    samples = {sample.id: sample for sample in Records(config.data.sources)}
    for record in last:
        sample = samples[record["sample"]]
        asked = sample.turns[: next(i for i, turn in enumerate(sample.turns) if turn.role == "assistant")]
        assert answerer.reply(asked, sample.images).strip() == record["answer"]


# -- FLOPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [(), ("adapter",), ("encoder", "adapter"), ("encoder", "adapter", "decoder")])
def test_flops_of_a_step_are_those_that_pytorch_counts(
    made: Callable[..., Path], run_config: Callable[..., RunConfig], trains: tuple[str, ...]
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from zero_ds.training.setup import load_model, make_loader

    config = run_config("decoder", micro_batch=1, attention="eager")
    model = load_model(config, {"zero_optimization": {}})
    loader = make_loader(config, model, 1)
    model.requires_grad_(False)
    for part in trains:
        for _, parameter in model.parameters_of(part):
            parameter.requires_grad_(True)
    cost = step_cost(model)
    counted = 0
    for batch in next(loader.steps(0, 1)):
        counter = FlopCounterMode(display=False)
        with counter:
            total = model(**batch.inputs()).total
            if total.requires_grad:
                total.backward()
        ours = StepCounts.of([batch], cost).flops
        if "image" in batch.ids[0]:  # the blank image of a text batch does not count as work
            assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)
            counted += 1
    assert counted == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_unknown_peak_is_measured_quickly(dtype: torch.dtype) -> None:
    """This includes half precision, which few CPUs multiply natively: there a product of size 1024 takes seconds."""
    started = time.process_time()
    assert 1e8 < peak_flops(torch.device("cpu"), dtype) < 1e15
    assert time.process_time() - started < 5


def test_a_line_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n7')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_profile_says_where_the_time_of_a_step_goes(runs: Path) -> None:
    profile = read_profile(runs / "looking")
    assert profile.steps == 2 and profile.device == "cpu"
    assert set(profile.phases) == {*PHASES, "other"}
    assert all(profile.phases[name] > 0 for name in PHASES)
    assert sum(profile.phases.values()) == pytest.approx(profile.seconds, rel=1e-6)
    assert {"matrix products", "attention", "communication", "optimizer"} <= set(profile.kinds)
    assert "matrix products" in profile.table() and "backward" in profile.table()
    trace = json.loads(gzip.decompress((runs / "looking" / "profile" / "trace.json.gz").read_bytes()))
    assert {"zero_ds::forward", "zero_ds::update"} <= {event["name"] for event in trace["traceEvents"]}


def test_profile_may_end_the_run_without_a_checkpoint(runs: Path) -> None:
    assert read_profile(runs / "profiled").steps == 1
    assert len(read_metrics(runs / "profiled")) == 2
    assert not list((runs / "profiled").glob("step-*"))
    assert not (runs / "not looking" / "profile").exists()


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("nccl:_all_gather_base", "communication"),
        ("aten::_fused_adamw_", "optimizer"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_tn", "matrix products"),
        ("aten::copy_", "copies"),
        ("cudaStreamSynchronize", "waiting for the device"),
        ("aten::mul", ELEMENTWISE),
        ("aten::native_layer_norm", ELEMENTWISE),
    ],
)
def test_kinds_of_operations(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind
