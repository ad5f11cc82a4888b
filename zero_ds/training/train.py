"""The training loop: `zero-ds train RECIPE [key=value ...]` or `deepspeed --module zero_ds.train RECIPE ...`."""

from __future__ import annotations

import gc
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from zero_ds.config.batches import check_batches
from zero_ds.config.schema import RunConfig
from zero_ds.data.batches import Batch
from zero_ds.data.formats import DataError
from zero_ds.data.loader import Loader
from zero_ds.data.sources import Records
from zero_ds.model.decoders.folder import relied_on
from zero_ds.model.losses import length_classes, with_token_weights
from zero_ds.runtime import distributed, failure
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.zero3 import parameter_shape
from zero_ds.training import stages
from zero_ds.training.checkpoint import checkpoint
from zero_ds.training.checkpoint.peft_folder import weights_hash
from zero_ds.training.deepspeed import ds_config
from zero_ds.training.engine import Engine
from zero_ds.training.metrics import StepCounts
from zero_ds.training.monitor import Monitor
from zero_ds.training.options import compilation
from zero_ds.training.options import liger as kernels
from zero_ds.training.options.int8 import quantize_
from zero_ds.training.options.recompute import checkpoint_activations_
from zero_ds.training.planning.flops import StepCost, peak_flops
from zero_ds.training.preview import Preview
from zero_ds.training.setup import build, checkpoint_to_resume, make_folder, plan_of, seed_everything, start_

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> Path:
    """Runs, or resumes, the run that `config` describes; returns the folder of its last commit.

    Raises:
        ConfigError, CheckpointError, DataError: what a user can mend, in one sentence.
        FloatingPointError: a loss that is not finite; nothing was updated by it.
    """
    distributed.initialize()
    make_folder(Path(config.out))
    if distributed.is_rank_zero():
        failure.clear(Path(config.out))
    distributed.barrier()
    failure.WATCH.folder = Path(config.out)
    stop = distributed.StopSignal()
    stages.stage_of(config)
    world_size = distributed.world_size()
    check_batches(config, world_size)
    ds = ds_config(config, world_size)
    compilation.check(config)
    kernels.check(config)
    out = Path(config.out)
    resumed = checkpoint_to_resume(out, config)
    seed_everything(config.seed)

    model, loader, hashes = build(config, ds, world_size)
    gc.freeze()  # what is there by now stays; DeepSpeed looks for garbage more than once while it sets up
    left_out = LeftOut(config.data.max_bad_samples)
    left_out.at_reading(loader.records)
    total = config.max_steps or max(1, math.ceil(len(loader.records) * config.epochs / config.global_batch))
    if resumed and resumed.step >= total:
        logger.info("%s is complete: step %d of %d", out, resumed.step, total)
        return resumed.folder
    start_(model, config, hashes, loader)
    hashes["starts"] = [weights_hash(Path(folder)) for folder in config.starts]
    relies_on = relied_on(local_folder(stages.decoder_folder(config)))
    manifest = {**checkpoint.manifest_of(config), **hashes, "plan": plan_of(model), "relies_on": relies_on}
    if resumed:
        checkpoint.check_manifest(resumed, {"plan": plan_of(model), **hashes})
        checkpoint.load_weights_(model.named_targets(), resumed, skip=lambda name: False)

    groups = stages.freeze_(model, config)
    sizes = {part: sum(parameter_shape(p).numel() for _, p in group) for part, group in groups.items()}
    logger.info("stage %s trains %s", config.stage, ", ".join(f"{part} ({n:,})" for part, n in sizes.items()))
    if config.frozen_weights == "int8" and not quantize_(model):
        raise ConfigError("frozen_weights=int8 needs frozen decoder layers, and all of them train; set it to native.")
    if config.kernels == "liger":
        kernels.fuse_(model.decoder)
    checkpoint_activations_(model, config, ds)
    model.train()
    engine = Engine(config, model, groups, total, ds)
    first = 0
    if resumed:
        progress = checkpoint.restore_(engine, resumed)
        first = progress["step"]
        engine.engine.global_samples = first * config.global_batch  # what DeepSpeed's own curves count
        left_out.skipped, left_out.too_long = progress.get("skipped", 0), progress.get("too_long", 0)
        logger.info("resumed %s after step %d of %d", out, first, total)
    elif config.continue_from:
        parts = checkpoint.carry_over_(engine, checkpoint.find_checkpoint(config.continue_from))
        logger.info("the optimizer goes on for %s", ", ".join(parts) or "nothing")
    if distributed.is_rank_zero():
        write_atomically(out / "config.yaml", config.dump())
        write_atomically(out / "deepspeed.json", json.dumps(ds, indent=2, default=str) + "\n")
    monitor = Monitor(out, engine.engine.monitor, config.log_every, first, total)
    try:
        return loop(config, engine, loader, monitor, Preview(config, loader), stop, manifest, first, total, left_out)
    finally:
        monitor.close()


class LeftOut:
    """Samples that a run went without, counted over all ranks; kept in its commits."""

    SHOWN = 20
    """Of so many samples each rank says what was wrong."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = self.too_long = 0
        self.unread = 0
        """Records left out when the files were read; not kept in commits, for a resumed run reads them again."""
        self._said = 0

    def at_reading(self, records: Records) -> None:
        """Counts the records that could not be used when the files were read.

        Raises:
            DataError: they are more than the limit; on every rank alike.
        """
        for sentences, count in records.complaints():
            for sentence in sentences[: max(0, self.SHOWN - self._said)]:
                if distributed.is_rank_zero():
                    logger.warning("left out: %s", sentence)
                self._said += 1
            self.unread += count
        self._check()

    def add(self, batches: list[Batch], counts: StepCounts) -> None:
        """Counts those of a step.

        Raises:
            DataError: more than the limit could not be used; on every rank alike.
        """
        for sentence in [sentence for batch in batches for sentence in (*batch.skipped, *batch.too_long)]:
            if self._said < self.SHOWN:
                logger.warning("left out: %s", sentence)
            self._said += 1
        self.skipped += int(counts.skipped)
        self.too_long += int(counts.too_long)
        self._check()

    def _check(self) -> None:
        if self.skipped + self.unread > self.limit:
            raise DataError(
                f"{self.skipped + self.unread} samples could not be used, more than data.max_bad_samples={self.limit}; "
                "see what the log says of them, and mend the data"
            )

    def scalars(self) -> dict[str, float]:
        return {"skipped_samples": self.skipped + self.unread, "too_long_samples": self.too_long}


def loop(
    config: RunConfig,
    engine: Engine,
    loader: Loader,
    monitor: Monitor,
    preview: Preview,
    stop: distributed.StopSignal,
    manifest: dict[str, Any],
    first: int,
    total: int,
    left_out: LeftOut,
) -> Path:
    """Steps first + 1 .. total, with a commit now and then, at the end, and when a signal asks for one."""
    out = Path(config.out)
    saved_at = time.monotonic()
    folder = out
    cost = StepCost.of(engine.model)
    peak = peak_flops(engine.engine.device, next(iter(engine.named.values())).dtype)
    batches = iter(loader.steps(first, total))
    for step in range(first, total):
        started = time.monotonic()
        micro = next(batches)
        waited = time.monotonic() - started
        counts = StepCounts.of(micro, cost).over_ranks()
        counts.check_layout(step + 1)
        left_out.add(micro, counts)
        if config.dynamic_loss.order:
            micro = with_token_weights(micro, config.dynamic_loss)
        result = engine.step(micro, step, counts.supervised, counts.images)
        minutes = (time.monotonic() - saved_at) / 60
        loss, signals, late, *by_length = distributed.sum_over_ranks(
            result.share,
            bool(stop.received),
            distributed.is_rank_zero() and minutes > (config.checkpoint.every_minutes or math.inf),
            *result.by_length.flatten().tolist(),
        )
        seconds = time.monotonic() - started
        scalars = {
            "loss": loss,
            **{f"learning_rate/{part}": rate * engine.factor(step) for part, rate in engine.rates.items()},
            "grad_norm": result.grad_norm,
            "seconds": seconds,
            "data_wait_seconds": waited,
            **counts.scalars(seconds),
            **left_out.scalars(),
            "samples_per_second": config.global_batch / seconds,
            "mfu": counts.flops / seconds / (peak * distributed.world_size()),
            **engine.state.loss_scalars(),
        }
        for name, total_loss, tokens in zip(length_classes(), by_length[::2], by_length[1::2], strict=True):
            if tokens:
                scalars[f"loss_by_response_length/{name}"] = total_loss / tokens
        if monitor.shows(step + 1):
            scalars |= distributed.memory_gib()
        monitor.step(step + 1, (step + 1) * config.global_batch, scalars)
        if preview.due(step + 1):
            preview.show(step + 1, engine.model, monitor)
        every = config.checkpoint.every_steps
        if signals or late or step + 1 == total or (every and (step + 1) % every == 0):
            progress = {"step": step + 1, "skipped": left_out.skipped, "too_long": left_out.too_long}
            folder = checkpoint.save(out, engine, manifest, progress, config.checkpoint.keep)
            saved_at = time.monotonic()
            logger.info("committed %s", folder)
        if signals:
            raise SystemExit(
                f"stopped by {stop.received or 'a signal to another rank'} after step {step + 1}; run again to resume."
            )
    skipped = left_out.skipped + left_out.unread
    if skipped or left_out.too_long:
        logger.info("left out: %d samples that could not be used, %d too long", skipped, left_out.too_long)
    return folder
