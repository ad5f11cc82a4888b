"""The parts of gpu.sh, one process each. A part writes its findings line by line into a JSON lines file.

    python tools/bench/gpu_parts.py encoder-8b --seconds 90 --out encoder-8b.jsonl

A part is a generator of rows. Its first row that fails, or the first error, ends it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast

import gpu_models
import report
import typer

from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN
from zero_ds.runtime.environment import has_cuda
from zero_ds.runtime.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One answer of a part."""

    check: str
    """Subject of the check or measurement."""
    answer: str
    """Finding as text."""
    ok: bool | None = True
    """True if that is as it should be; None if it could not be checked here."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Numbers behind the answer, for gpu.json."""


@dataclass(frozen=True)
class Work:
    """Circumstances of a part."""

    deadline: float
    """Time of time.monotonic after which nothing else begins."""
    small: Path | None = None
    """Folder of small models, which replace the real shapes; None: the real shapes."""
    settings: tuple[str, ...] = ()
    """Further settings of measured recipes, key=value."""
    configs: tuple[str, ...] = ()
    """DeepSpeed configs to try; empty: all of them."""

    def late(self) -> bool:
        """Returns whether nothing else may begin."""
        return time.monotonic() > self.deadline

    def models(self, folder: Path) -> Path:
        """Returns a folder of small models, which is written where there is none."""
        if self.small is not None:
            return self.small
        gpu_models.write_small(folder)
        return folder


Part = Callable[[Work], Iterator[Row]]


# -- collectives -------------------------------------------------------------------------------------------------------


def collectives(work: Work) -> Iterator[Row]:
    """Makes the collectives that training uses, with one rank, and compares their results."""
    import torch
    import torch.distributed as dist

    from zero_ds.runtime import distributed

    distributed.initialize()
    device, count = distributed.device(), distributed.world_size()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    backend = dist.get_backend()
    version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else ""
    yield Row("device", f"{name}, torch {torch.__version__}, {backend} {version}".strip())
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.int64):
        value = torch.arange(8, device=device).to(dtype)
        summed, gathered, scattered = value.clone(), value.new_zeros(8 * count), value.new_zeros(8 // count)
        dist.all_reduce(summed)
        dist.all_gather_into_tensor(gathered, value)
        dist.reduce_scatter_tensor(scattered, value)
        dist.broadcast(value, 0)
        dist.barrier()
        first = distributed.rank() * len(scattered)
        right = (
            torch.equal(summed, value * count)
            and torch.equal(gathered, value.repeat(count))
            and torch.equal(scattered, (value * count)[first : first + len(scattered)])
        )
        kind = str(dtype).removeprefix("torch.")
        yield Row(f"{backend}, {count} rank, {kind}", "all collectives right" if right else "wrong sums", right)
    yield _exchanged(backend, device, count)


def _exchanged(backend: str, device: Any, count: int) -> Row:
    """Exchanges parts of different sizes as a checkpoint does, where a rank may send and get nothing.

    Some bit patterns are not numbers, and have to stay as they are.
    """
    import torch
    import torch.distributed as dist

    bits = torch.tensor([0x7FC00001, 0x7F800001, 1, -1, 0], dtype=torch.int32, device=device)
    right = True
    for sizes in ([len(bits)] * count, [0] * count):
        sent = torch.cat([bits[:size] for size in sizes]).view(torch.float32)
        got = torch.empty(sum(sizes), device=device)
        dist.all_to_all_single(got.view(torch.int32), sent.view(torch.int32), sizes, sizes)
        right = right and torch.equal(got.view(torch.int32), sent.view(torch.int32))
    answer = "the same bits arrive" if right else "OTHER bits arrive"
    return Row(f"{backend}, {count} rank, exchange of a checkpoint", answer, right)


# -- DeepSpeed configs -------------------------------------------------------------------------------------------------


def configs(work: Work) -> Iterator[Row]:
    """Trains three steps under every file of ds_configs/, and its last step again from the checkpoint before it."""
    from zero_ds.training.deepspeed import ds_config_names

    with tempfile.TemporaryDirectory() as name:
        models = work.models(Path(name) / "models")
        for zero in work.configs or ds_config_names():
            if work.late():
                yield Row(zero, "skipped: the part's time is over", None)
                continue
            config = gpu_models.small_run(
                models,
                zero=zero,
                nvme_path=str(Path(name) / "nvme"),
                deterministic=True,
                checkpoint={"every_steps": 2, "keep": 3},
                out=str(Path(name) / zero),
            )
            (Path(name) / "nvme").mkdir(exist_ok=True)
            try:
                yield _three_steps(config)
            except ConfigError as error:
                if zero != "zero3_nvme":  # which needs a compiler and libaio
                    raise
                yield Row(zero, f"skipped: {error}", None)


def _three_steps(config: RunConfig) -> Row:
    from zero_ds.training.train import train

    out = Path(config.out)
    last = train(config)
    losses, end = _losses(out), _contents(last)
    shutil.move(last, out.with_name(f"{out.name}-end"))
    (out / "latest").write_text("step-000002", encoding="utf-8")
    train(config)
    same = _contents(last) == end and bool(end) and _losses(out)[-1] == losses[-1]
    falls = all(a > b for a, b in itertools.pairwise(losses))  # also False for a loss of nan
    curve = ", ".join(f"{loss:.3f}" for loss in losses)
    answer = f"loss {curve}" if falls else f"loss {curve}, which does not fall"
    answer += "; resumed to the same bits" if same else "; resumed to OTHER bits"
    return Row(config.zero, answer, falls and same and len(losses) == 3, {"losses": losses})


def _losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _contents(checkpoint: Path) -> dict[str, str]:
    """Returns the hash of every tensor file of a checkpoint by its path in it."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- kernels -----------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "attention=eager": {"attention": "eager"},
    "attention=sdpa": {},
    "attention=flash_attention_2": {"attention": "flash_attention_2"},
    "attention=flash_attention_3": {"attention": "flash_attention_3"},
    "kernels=liger": {"kernels": "liger"},
    "frozen_weights=int8": {"frozen_weights": "int8", "stage": "encoder"},
    "compile=true": {"compile": True},
}
"""Settings of each way to compute the same gradients; the one that takes longest is last."""
ROUNDING = 2.0
"""Largest error of a way's gradient, as a multiple of that of eager attention in the same precision."""


def kernels(work: Work) -> Iterator[Row]:
    """Compares loss and gradient of every attention, kernel and option with eager attention in float32.

    A padded batch and a packed one are compared. 8-bit weights are compared with the same rounded weights in float32.
    """
    from zero_ds.training.options.apply import check_options

    with tempfile.TemporaryDirectory() as name:
        models = work.models(Path(name))
        allowed: dict[bool, float] = {}
        for way, settings in WAYS.items():
            config = gpu_models.small_run(models, **{"decoder": "target", "precision": "bf16", **settings})
            if work.late():
                yield Row(way, "skipped: the part's time is over", None)
                continue
            try:
                check_options(config)
                errors = _errors(config)
            except (ConfigError, ImportError, OSError) as error:  # the last two: a kernel that the hub would bring
                yield Row(way, f"skipped: {' '.join(str(error).split())[:200]}", None)
                continue
            if not allowed:  # the first way is the measure of the others
                allowed = {packed: max(ROUNDING * error, 1e-4) for packed, error in errors.items()}
            right = all(error <= allowed[packed] for packed, error in errors.items())
            answer = f"gradient differs by {errors[False]:.2g} (padded), {errors[True]:.2g} (packed)"
            yield Row(way, answer, right, {"padded": errors[False], "packed": errors[True]})


def _errors(config: RunConfig) -> dict[bool, float]:
    """Returns the relative difference of a run's gradient from that in float32 with eager attention.

    By whether the batch is packed.
    """
    from zero_ds.training.options import compilation, int8, liger

    model, exact = _random_model(config), _random_model(config.model_copy(update={"attention": "eager"}))
    if config.frozen_weights == "int8":
        int8.apply_(model)
        int8.apply_(exact)
    if config.kernels == "liger":
        liger.fuse_(model.decoder)
    if config.compile:
        compilation.compile_(model.family.layers(model.decoder))
    exact.float()
    errors = {}
    for packed in (False, True):
        batch = _batch(model, packed)
        found, wanted = _gradient(model, batch), _gradient(exact, batch)
        errors[packed] = float((found - wanted).norm() / wanted.norm())
    return errors


def _random_model(config: RunConfig) -> Any:
    """Returns a run's model with random weights on the device, always the same."""
    from zero_ds.runtime import distributed
    from zero_ds.training.deepspeed import resolve_precision
    from zero_ds.training.planning.architecture import architecture

    model: Any = architecture(_whole_weights(config), dtype=resolve_precision(config)).model
    # large enough weights that attention is far from an average
    gpu_models.fill_(model, distributed.device(), std=0.1)
    model.decoder.set_attn_implementation(config.attention)
    return model


def _batch(model: Any, packed: bool) -> Any:
    """Returns a batch of four samples of different lengths, in four padded rows or two packed ones."""
    limit, size = 512, model.encoder_family.vision_config(model.encoder).image_size
    drawn = gpu_models.samples(4, model.tokens_per_image(), model.decoder.config.vocab_size - 1, size, limit // 2)
    (batch,) = gpu_models.micro_batches(drawn, 2 if packed else 4, packed, limit, size)
    return batch


def _whole_weights(config: RunConfig) -> RunConfig:
    """Returns a run whose weights are not in 8 bits yet, so that they can be drawn at random."""
    return config.model_copy(update={"frozen_weights": "native"})


def _gradient(model: Any, batch: Any) -> Any:
    """Returns the gradient of a batch's mean loss in float32, flattened."""
    import torch

    from zero_ds.runtime import distributed
    from zero_ds.training.engine import Engine

    place = cast(Any, SimpleNamespace(engine=SimpleNamespace(device=distributed.device()), model=model))
    model.zero_grad(set_to_none=True)
    outcome = model(**Engine._inputs(place, batch))
    (outcome.total / len(outcome.tokens)).backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


# -- steps of real shapes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A run with random weights of its real shapes and random samples."""

    config: RunConfig
    model: Any
    """The run's model, on meta tensors until `ours` fills it."""
    size: Any
    """Its `ModelSize`."""
    ds: dict[str, Any]
    """Resolved DeepSpeed configuration."""
    batches: list[Any]
    """Micro-batches of a step."""
    device: Any

    @classmethod
    def of(cls, work: Work, stage: str, size: str, *, packed: bool = True) -> Bench:
        """Builds the run on meta tensors, and draws its samples."""
        from zero_ds.runtime import distributed
        from zero_ds.training.deepspeed import ds_config, resolve_precision
        from zero_ds.training.gathering import follow_layers_
        from zero_ds.training.options.apply import check_options
        from zero_ds.training.planning.architecture import architecture

        config, replace = gpu_models.run_of(stage, size, work.small, list(work.settings))
        check_options(config)
        distributed.initialize()
        built = architecture(config, dtype=resolve_precision(config), replace=replace)
        model: Any = built.model
        if config.frozen_weights == "int8":
            model = architecture(_whole_weights(config), dtype=resolve_precision(config), replace=replace).model
        model.decoder.set_attn_implementation(config.attention)
        model.encoder.set_attn_implementation("sdpa")
        pixels, limit = model.encoder_family.vision_config(model.encoder).image_size, config.data.max_length
        vocabulary = model.decoder.config.vocab_size - 1
        drawn = gpu_models.samples(config.global_batch, model.tokens_per_image(), vocabulary, pixels, limit)
        batches = gpu_models.micro_batches(drawn, config.micro_batch, packed, limit, pixels)
        ds = ds_config(config, 1)
        follow_layers_(ds, built.size.units)
        ds["tensorboard"]["enabled"] = False
        ds["gradient_accumulation_steps"] = len(batches)
        ds["train_batch_size"] = ds["train_micro_batch_size_per_gpu"] * len(batches)
        return cls(config, model, built.size, ds, batches, distributed.device())

    def engine(self) -> Any:
        """Fills the model and wraps it, with the options of its configuration."""
        from zero_ds.training import stages
        from zero_ds.training.engine import Engine
        from zero_ds.training.options.apply import apply_options_

        gpu_models.fill_(self.model, self.device)
        groups = stages.freeze_(self.model, self.config)
        apply_options_(self.model, self.config, self.ds)
        self.model.train()
        engine = Engine(self.config, self.model, groups, 1000, self.ds)
        engine.accumulation = len(self.batches)
        return engine

    def peak_gib(self) -> float:
        """Returns the largest memory of this process so far: of the GPU, or resident."""
        import torch

        return torch.cuda.max_memory_allocated() / report.GIB if self.device.type == "cuda" else report.resident()


def ours(bench: Bench) -> Iterator[float]:
    """Makes steps with this package's engine; yields before the first one, and after each its loss."""
    from zero_ds.model.losses import count_supervised

    engine = bench.engine()
    supervised = sum(count_supervised(batch.labels) for batch in bench.batches)
    step, loss = 0, 0.0
    while True:
        yield loss
        loss = engine.step(bench.batches, step, supervised).share
        step += 1


def timed(
    stepping: Iterator[float], work: Work, synchronize: Callable[[], None], steps: int, warm_up: int
) -> Iterator[tuple[float, float]]:
    """Yields seconds and loss of each of `steps` steps, after `warm_up` others; none begins after the deadline."""
    next(stepping)
    for number in range(warm_up + steps):
        if work.late():
            return
        started = time.perf_counter()
        loss = next(stepping)
        synchronize()
        if number >= warm_up:
            yield time.perf_counter() - started, loss


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(work: Work, stage: str, size: str, steps: int = 5, warm_up: int = 2) -> Iterator[Row]:
    """Measures steps of ours."""
    import torch

    from zero_ds.training.deepspeed import resolve_precision
    from zero_ds.training.metrics import StepCounts
    from zero_ds.training.planning.flops import peak_flops, step_cost

    bench = Bench.of(work, stage, size)
    counts = StepCounts.of(bench.batches, step_cost(bench.model))
    peak = peak_flops(bench.device, resolve_precision(bench.config))
    found: list[tuple[float, float]] = []
    try:
        for pair in timed(ours(bench), work, _synchronize, steps, warm_up):
            found.append(pair)  # one by one, so that those before an error are kept
    except torch.cuda.OutOfMemoryError as error:
        yield Row("ours", f"does not fit: {str(error).splitlines()[0]}", False)
        return
    if not found:
        yield Row("ours", "no step was made in the part's time", False)
        return
    seconds = report.median([second for second, _ in found])
    figures = {
        "seconds": [second for second, _ in found],
        "tokens_per_second": counts.tokens / seconds,
        "samples_per_second": bench.config.global_batch / seconds,
        "supervised_per_second": counts.supervised / seconds,
        "mfu": counts.flops / seconds / peak,
        "positions_used": counts.tokens / counts.positions,
        "peak_gib": bench.peak_gib(),
    }
    finite = all(loss == loss and abs(loss) < float("inf") for _, loss in found)
    yield Row("ours", _speed(figures) + ("" if finite else "; loss is not finite"), finite, figures)


def _speed(figures: dict[str, Any]) -> str:
    mfu = f", MFU {figures['mfu']:.3f}" if figures.get("mfu") else ""
    return (
        f"{report.median(figures['seconds']):.3g} s a step, {figures['tokens_per_second']:,.0f} tokens/s, "
        f"{figures['samples_per_second']:.3g} samples/s{mfu}, peak {figures['peak_gib']:.1f} GiB"
    )


BESIDES = 12
"""GiB that a step of Llava's encoder stage needs at least besides the weights, of a 70B decoder."""


def measure_peer(work: Work, stage: str, size: str, steps: int = 5, warm_up: int = 2) -> Iterator[Row]:
    """Measures steps of transformers' Trainer on Llava with the full model, on the same samples, padded."""
    import gc

    import torch

    from zero_ds.training.planning.model_config import find_config

    bench = Bench.of(work, stage, size, packed=False)
    weights = find_config(bench.config.target).folder
    room = torch.cuda.get_device_properties(0).total_memory if bench.device.type == "cuda" else float("inf")
    need = _full_bytes(weights)
    if need + BESIDES * report.GIB > room:
        answer = (
            f"does not fit: the full model's weights take {need / report.GIB:.0f} of {room / report.GIB:.0f} GiB, and "
            f"activations, gradients and buckets at least {BESIDES}"
        )
        yield Row("Trainer", answer, None)
        return
    for recomputes in (False, True):
        try:
            yield from _steps_of_trainer(bench, work, weights, recomputes, steps, warm_up)
            return
        except torch.cuda.OutOfMemoryError:
            yield Row("Trainer, all activations kept", "does not fit", None)
        gc.collect()
        torch.cuda.empty_cache()


def _full_bytes(folder: Path) -> float:
    """Returns the bytes of a decoder's weights in bf16, by its config.json."""
    import torch
    from transformers import AutoModelForCausalLM

    from zero_ds.model.decoders.folder import DecoderFolder

    with torch.device("meta"):
        decoder = cast(Any, AutoModelForCausalLM).from_config(DecoderFolder(folder).text_config())
    return 2.0 * sum(p.numel() for p in decoder.parameters())


class _OverError(Exception):
    """Ends Trainer."""


def _steps_of_trainer(
    bench: Bench, work: Work, weights: Path, recomputes: bool, steps: int, warm_up: int
) -> Iterator[Row]:
    import trainers

    times: list[float] = []

    def after_step(_: Any) -> None:
        _synchronize()
        times.append(time.perf_counter())
        if len(times) > warm_up + steps or work.late():
            raise _OverError

    with tempfile.TemporaryDirectory() as name:
        zero = Path(name) / "zero.json"
        zero.write_text(json.dumps(_plain(bench)), encoding="utf-8")
        options = trainers.LlavaOptions(
            model="",
            data="",
            zero=str(zero),
            micro_batch=bench.config.micro_batch,
            accumulation=len(bench.batches),
            precision="bf16" if "bfloat16" in str(next(bench.model.parameters()).dtype) else "fp32",
            out=name,
            checkpointing=recomputes,
        )
        image_token = bench.model.decoder.config.vocab_size - 1
        rows = [one for batch in bench.batches for one in _rows(batch, image_token)]
        with contextlib.suppress(_OverError):
            load = partial(_llava, bench, weights, image_token)
            trainers.run_trainer(options, load, rows, lambda: _stacked, after_step)
    seconds = [later - earlier for earlier, later in itertools.pairwise(times[warm_up:])]
    if not seconds:
        yield Row("Trainer", "no step was made in the part's time", False)
        return
    middle = report.median(seconds)
    tokens = float(sum(batch.lengths.sum() for batch in bench.batches))
    figures = {
        "seconds": seconds,
        "tokens_per_second": tokens / middle,
        "samples_per_second": bench.config.global_batch / middle,
        "peak_gib": bench.peak_gib(),
        "recomputes": recomputes,
    }
    kept = "all layers recomputed" if recomputes else "all activations kept"
    yield Row(f"Trainer, {kept}", _speed(figures), True, figures)


def _plain(bench: Bench) -> dict[str, Any]:
    """Returns the DeepSpeed JSON as it is in the repository, which Trainer fills in by itself."""
    from zero_ds.training.deepspeed import DS_CONFIG_ROOT

    content: dict[str, Any] = json.loads((DS_CONFIG_ROOT / f"{bench.config.zero}.json").read_text(encoding="utf-8"))
    return content


def _rows(batch: Any, image_token: int) -> list[dict[str, Any]]:
    """Returns the samples of a padded batch as inputs of Llava, one dictionary each."""
    ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE_TOKEN, image_token)
    return [
        {"input_ids": ids[n], "attention_mask": batch.attention_mask[n], "labels": batch.labels[n], "pixel_values": p}
        for n, p in enumerate(batch.pixel_values)
    ]


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Collates rows, padded on the right to the longest of them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    padding = {"input_ids": gpu_models.PADDING, "attention_mask": 0, "labels": -100}
    batch = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }
    return {**batch, "pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def _llava(bench: Bench, weights: Path, image_token: int) -> Any:
    """Returns a Llava of the run's shapes with the full decoder and random weights, the run's parts marked to train."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from zero_ds.model.decoders.folder import DecoderFolder
    from zero_ds.training import stages

    assert bench.config.encoder is not None
    settings = LlavaConfig(
        vision_config=bench.model.encoder_family.vision_config(bench.model.encoder).to_dict(),
        text_config=DecoderFolder(weights).text_config().to_dict(),  # the full one, even if ours has a surrogate
        image_token_index=image_token,
        vision_feature_layer=bench.config.encoder.feature_layer,
    )
    dtype = next(bench.model.parameters()).dtype
    with torch.device("meta"):
        build: Any = LlavaForConditionalGeneration._from_config
        whole = build(settings, dtype=dtype, attn_implementation="sdpa")
    gpu_models.fill_(whole, bench.device)
    parts = {"encoder": "vision_tower", "adapter": "multi_modal_projector", "decoder": "language_model"}
    names = [parts[part] for part in stages.trained_parts(bench.config) if part in parts]
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    whole.config.use_cache = False
    return whole


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(work: Work) -> Iterator[Row]:
    """Compares the memory of a step of Llama-3B's decoder stage, by cause and at its peak, with the plan."""
    from held_memory import CAUSES, watched

    from zero_ds.training.options.recompute import recomputed_layers
    from zero_ds.training.planning.activations import longest_sample_bytes
    from zero_ds.training.planning.memory import memory as planned_memory

    bench = Bench.of(work, "decoder", "3b")
    config = bench.config
    activations = longest_sample_bytes(bench.model, config).times(config.micro_batch)
    whole = planned_memory(bench.size, bench.ds, 1, activations, accumulation=len(bench.batches))
    engine = bench.engine()
    seen = watched(engine, False)
    for number in range(2):
        engine.step(bench.batches, number, 1000.0)
    count, _ = recomputed_layers(bench.model)
    plan = whole.keeping(activations.recomputing(count))
    for cause in CAUSES:
        planned, found = plan.total(cause), float(seen[cause])
        right = abs(planned - found) <= 0.1 * max(planned, found)
        answer = f"{found / report.GIB:.3g} GiB, planned {planned / report.GIB:.3g}"
        yield Row(cause, answer, right, {"bytes": found, "planned": planned})
    peak, planned = bench.peak_gib(), plan.peak["gpu"] / report.GIB
    on_gpu = bench.device.type == "cuda"
    answer = f"{peak:.3g} GiB, planned {planned:.3g} for the longest samples, {count} layers recomputed"
    yield Row("peak", answer, peak <= 1.05 * planned + 1 if on_gpu else None, {"gib": peak, "planned": planned})


# -- the worker --------------------------------------------------------------------------------------------------------


def part_named(name: str) -> Part | None:
    """Returns the part of this name; None if there is none. STAGE-SIZE measures ours, peer-STAGE-SIZE Trainer."""
    fixed: dict[str, Part] = {"nccl": collectives, "configs": configs, "kernels": kernels, "memory": memory}
    if name in fixed:
        return fixed[name]
    stage, _, size = name.removeprefix("peer-").rpartition("-")
    if stage not in ("encoder", "pretrain", "decoder") or size not in gpu_models.SHAPES:
        return None
    return partial(measure_peer if name.startswith("peer-") else measure, stage=stage, size=size)


def _no_gpu(_: Work) -> Iterator[Row]:
    yield Row("device", "no GPU can be used here; add --small for a trial with tiny models", False)


def write_rows(part: Part, work: Work, out: Path) -> bool:
    """Writes the rows of a part as they come, up to the first one that fails; returns whether none did."""
    with out.open("w", encoding="utf-8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()

        try:
            for row in part(work):
                write(row)
                if row.ok is False:
                    return False
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            write(Row("error", f"{type(error).__name__}: {reason}", False))
            raise
    return True


def main(
    part: Annotated[str, typer.Argument(help="Name of the part.")],
    out: Annotated[Path, typer.Option(help="JSON lines file to write.")],
    seconds: Annotated[float, typer.Option(help="Time after which nothing else begins.")] = 600.0,
    small: Annotated[Path | None, typer.Option(help="New folder for small models in place of the real shapes.")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="key=value of measured recipes; repeatable.")] = None,
) -> None:
    """Run one part in this process."""
    deadline = time.monotonic() + seconds
    found = part_named(part)
    if found is None:
        raise typer.BadParameter(f"unknown part {part}")
    os.environ.setdefault("OMP_NUM_THREADS", "8")
    if small is not None and not small.exists():
        gpu_models.write_small(small)
    if small is None and not has_cuda():
        found = _no_gpu
    right = write_rows(found, Work(deadline, small, tuple(setting or [])), out)
    sys.stdout.flush()
    os._exit(0 if right else 1)  # process groups have nothing left to clean up


if __name__ == "__main__":
    typer.run(main)
