"""Runs one part of gpu.sh: steps of a recipe with random weights of the real shapes on one GPU, ours or the peer's.

    python tools/bench/gpu.py --recipe llama-3.1-8b/encoder --zero zero2 --out part.json

It reads only config.json files; those of the paper's models come with zero_ds. The samples are random: an image and
text of log-normal length, a third of it with loss. The peer is Llava with the full model, masked labels, padded batches
and logits at every position, under the same DeepSpeed JSON; `--peer` measures it. Without a GPU everything runs on the
CPU, which is enough for a trial with small shapes.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import report
import typer

from zero_ds.data.conversations import IMAGE_TOKEN

PADDING = 0


def fill_(model: Any, device: Any) -> None:
    """Gives a module of meta tensors memory on the device and random weights, and recomputes its computed buffers."""
    import torch

    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)  # norms; a bias of one does not change the measured time
            else:
                parameter.normal_(std=0.02, generator=generator)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "inv_freq"):
                with torch.device(device):
                    setattr(module, name, type(child)(child.config))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name == "position_ids":
                module.register_buffer(name, torch.arange(buffer.numel(), device=device).view(buffer.shape), False)


def samples(count: int, image_tokens: int, vocabulary: int, size: int, limit: int) -> list[Any]:
    """Returns random samples of the kind that a SampleEncoder makes, of at most `limit` positions each."""
    import torch

    from zero_ds.data.samples import EncodedSample

    rng = random.Random(0)
    drawn = []
    for number in range(count):
        length = max(16, min(limit - image_tokens, int(rng.lognormvariate(5.3, 0.6))))
        supervised = max(1, length // 3)
        text = [rng.randrange(1, vocabulary) for _ in range(length)]
        blind = [-100] * (image_tokens + length - supervised)
        drawn.append(
            EncodedSample(
                input_ids=[IMAGE_TOKEN] * image_tokens + text,
                labels=blind + text[-supervised:],
                responses=[-1] * len(blind) + [0] * supervised,
                pixels=torch.zeros(1, 3, size, size),
                id=str(number),
            )
        )
    return drawn


def micro_batches(drawn: list[Any], rows: int, packed: bool, limit: int, size: int) -> list[Any]:
    """Returns the samples in micro-batches of `rows` rows, packed or padded."""
    from zero_ds.data.batches import collate, collate_rows, pack_rows

    if not packed:
        return [collate(drawn[start : start + rows], PADDING, size) for start in range(0, len(drawn), rows)]
    plan = pack_rows([len(sample.input_ids) for sample in drawn], limit, rows)
    filled = [[drawn[number] for number in row] for row in plan]
    return [collate_rows(filled[start : start + rows], PADDING, size) for start in range(0, len(filled), rows)]


def ours(config: Any, ds: dict[str, Any], batches: list[Any], model: Any, device: Any) -> Iterator[None]:
    """Makes steps with this package's engine; yields before each."""
    from zero_ds.model.losses import count_supervised
    from zero_ds.training import stages
    from zero_ds.training.engine import Engine
    from zero_ds.training.options import liger as kernels
    from zero_ds.training.options.recompute import checkpoint_activations_

    fill_(model, device)
    groups = stages.freeze_(model, config)
    if config.kernels == "liger":
        kernels.fuse_(model.decoder)
    checkpoint_activations_(model, config, ds)
    model.train()
    engine = Engine(config, model, groups, 1000, ds)
    engine.accumulation = len(batches)
    supervised = sum(count_supervised(batch.labels) for batch in batches)
    step = 0
    while True:
        yield
        engine.step(batches, step, supervised)
        step += 1


def peer(config: Any, ds: dict[str, Any], batches: list[Any], model: Any, device: Any) -> Iterator[None]:
    """Makes steps of Llava under DeepSpeed as Trainer does; yields before each. model: ours, which has the shapes."""
    import deepspeed
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from zero_ds.model.decoders.folder import DecoderFolder
    from zero_ds.training import stages
    from zero_ds.training.planning.model_config import find_config

    # the full model, even if ours has a surrogate
    text = DecoderFolder(find_config(config.target).folder).text_config()
    image_token = text.vocab_size - 1
    settings = LlavaConfig(
        vision_config=model.encoder_family.vision_config(model.encoder).to_dict(),
        text_config=text.to_dict(),
        image_token_index=image_token,
        vision_feature_layer=config.encoder.feature_layer,
    )
    with torch.device("meta"):
        build: Any = LlavaForConditionalGeneration._from_config
        whole = build(settings, dtype=model_dtype(config), attn_implementation="sdpa")
    fill_(whole, device)
    trained = stages.trained_parts(config)
    parts = {"encoder": "vision_tower", "adapter": "multi_modal_projector", "decoder": "language_model"}
    names = [parts[part] for part in trained if part in parts]
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    if config.activation_checkpointing is not False:  # like Trainer: all layers or none
        whole.gradient_checkpointing_enable({"use_reentrant": False})
    whole.train()
    learning = [p for p in whole.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)  # like Trainer
    engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=ds)
    while True:
        yield
        for number, batch in enumerate(batches):
            engine.set_gradient_accumulation_boundary(number + 1 == len(batches))
            ids = batch.input_ids.to(device)
            output = engine(
                input_ids=ids.masked_fill(ids == IMAGE_TOKEN, image_token),
                attention_mask=batch.attention_mask.to(device),
                labels=batch.labels.to(device),
                pixel_values=batch.pixel_values.to(device, model_dtype(config)),
            )
            engine.backward(output.loss)
            engine.step()


def model_dtype(config: Any) -> Any:
    """Returns the dtype in which the run computes."""
    from zero_ds.training.deepspeed import resolve_precision

    return resolve_precision(config)


def timed_steps(stepping: Iterator[None], device: Any, steps: int, warm_up: int, deadline: float) -> Iterator[float]:
    """Yields the seconds of each of `steps` steps, after `warm_up` others; no step begins after the deadline.

    deadline: a time of time.monotonic.
    """
    import torch

    next(stepping)
    for number in range(warm_up + steps):
        if time.monotonic() > deadline:
            return
        started = time.perf_counter()
        next(stepping)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= warm_up:
            yield time.perf_counter() - started


def main(
    recipe: Annotated[str, typer.Option(help="Recipe such as llama-3.1-8b/encoder.")],
    setting: Annotated[list[str] | None, typer.Option(help="key=value of the recipe.")] = None,
    replace: Annotated[str | None, typer.Option(help="Layers that one translator replaces, first:last.")] = None,
    zero: Annotated[str, typer.Option(help="DeepSpeed config.")] = "zero2",
    peers: Annotated[bool, typer.Option("--peer", help="Measure the peer instead of ours.")] = False,
    rows: Annotated[int, typer.Option(help="Rows of a micro-batch.")] = 4,
    batch: Annotated[int, typer.Option(help="Samples of a step.")] = 32,
    packed: Annotated[bool, typer.Option(help="Put several samples into a row (ours only).")] = True,
    steps: int = 8,
    warm_up: int = 2,
    minutes: Annotated[float, typer.Option(help="No step begins after this many minutes.")] = 8.0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure one part."""
    import torch

    from zero_ds.config.loading import load_run
    from zero_ds.runtime import distributed
    from zero_ds.training.deepspeed import ds_config
    from zero_ds.training.metrics import StepCounts
    from zero_ds.training.options import compilation
    from zero_ds.training.options import liger as kernels
    from zero_ds.training.planning.architecture import architecture
    from zero_ds.training.planning.flops import peak_flops, step_cost

    deadline = time.monotonic() + 60 * minutes
    config = load_run(recipe, [*(setting or []), f"zero={zero}", f"global_batch={batch}", f"micro_batch={rows}"])
    compilation.check(config)
    kernels.check(config)
    distributed.initialize()
    device = distributed.device()
    model = architecture(config, dtype=model_dtype(config), replace=[replace] if replace else None).model
    model.decoder.set_attn_implementation(config.attention)
    model.encoder.set_attn_implementation("sdpa")
    cost = step_cost(model)
    size, limit = model.encoder_family.vision_config(model.encoder).image_size, config.data.max_length
    vocabulary = model.decoder.config.vocab_size - 1
    drawn = samples(batch, model.tokens_per_image(), vocabulary, size, limit)
    batches = micro_batches(drawn, rows, packed and not peers, limit, size)
    counts = StepCounts.of(batches, cost)
    ds = ds_config(config, 1)
    ds["tensorboard"]["enabled"] = False
    ds["gradient_accumulation_steps"] = len(batches)
    ds["train_batch_size"] = ds["train_micro_batch_size_per_gpu"] * len(batches)
    found: dict[str, Any] = {"recipe": recipe, "who": "peer" if peers else "ours", "zero": zero, "settings": setting}
    seconds: list[float] = []
    try:
        stepping = (peer if peers else ours)(config, ds, batches, model, device)
        for value in timed_steps(stepping, device, steps, warm_up, deadline):
            seconds.append(value)  # one by one, so that those before an error are kept
    except torch.cuda.OutOfMemoryError as error:
        found["does_not_fit"] = str(error).splitlines()[0]
    if seconds:
        middle = report.median(seconds)
        found |= {
            "seconds": seconds,
            "tokens_per_second": counts.tokens / middle,
            "supervised_per_second": counts.supervised / middle,
            "samples_per_second": batch / middle,
            "mfu": None if peers else counts.flops / middle / peak_flops(device, model_dtype(config)),
            "positions_used": counts.tokens / counts.positions,
        }
    memory = torch.cuda.max_memory_allocated() / report.GIB if device.type == "cuda" else report.resident()
    found["peak_gib"] = memory
    print(report.table(["figure", "value"], [[k, v] for k, v in found.items() if k != "seconds"]))
    report.write(out, found, limits=False)
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
