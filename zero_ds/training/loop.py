"""The training loop: one pass of it is an optimizer step, recorded, previewed and saved when due."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zero_ds.data.batches import Batch
from zero_ds.data.loader import Loader
from zero_ds.model.losses import length_classes, with_token_weights
from zero_ds.runtime import distributed, lock
from zero_ds.training.checkpoint.interval import SaveClock
from zero_ds.training.checkpoint.manifest import Manifest
from zero_ds.training.checkpoint.save import Saving, begin_saving, end_without_folder
from zero_ds.training.checkpoint.shares import agree_on_shares
from zero_ds.training.engine import Engine, StepResult
from zero_ds.training.metrics import StepCounts
from zero_ds.training.monitor import Monitor
from zero_ds.training.planning.flops import peak_flops, step_cost
from zero_ds.training.preview import Preview
from zero_ds.training.profile import Profiler, phase
from zero_ds.training.resume import progress_after
from zero_ds.training.setup import Run
from zero_ds.training.skipped import SkippedSamples
from zero_ds.training.validation import Validation

logger = logging.getLogger(__name__)


def loop(run: Run, engine: Engine, loader: Loader, skipped: SkippedSamples, manifest: Manifest, total: int) -> Path:
    """Makes the steps that are left of `total`; returns the folder of the last checkpoint.

    A checkpoint is saved when it is due, after the last step, and when a signal asks the run to end.

    Raises:
        CheckpointError: one could not be saved, or another job has taken over the run folder.
        SystemExit: a signal was received; the run can be resumed.
    """
    config, first = run.config, run.resume.first_step
    cost = step_cost(engine.model)
    meter = Meter.of(engine)
    saver = Saver(run, engine, manifest, skipped)
    preview = Preview(config, loader)
    validation = Validation(config, loader, total, first)
    sources = loader.records.names()
    profiler = Profiler(config.profile, run.out)
    with (
        contextlib.closing(saver),
        contextlib.closing(Monitor(run.out, engine.engine.monitor, config.log_every, first, total)) as monitor,
        profiler,
    ):
        for step, batches, started, waited in timed_steps(loader, first, total):
            counts = StepCounts.of(batches, cost).over_ranks()
            counts.check_layout(step + 1)
            skipped.add_step(batches, counts)
            if config.dynamic_loss.order:
                batches = with_token_weights(batches, config.dynamic_loss)

            result = engine.step(batches, step, counts.supervised, counts.images)
            skips = skipped_by_source(batches, len(sources))
            sums = StepSums.over_ranks(result, skips, bool(run.stop.received), saver)

            scalars = meter.scalars(
                step, result, sums, counts, skipped, seconds=time.monotonic() - started, waited=waited
            )
            scalars |= sums.of_sources(sources)
            if monitor.shows(step + 1):
                scalars |= distributed.memory_gib()
            is_best = False
            if validation.due(step + 1):
                measured = validation.measure(engine.model)
                scalars |= measured
                is_best = validation.improves(measured) and config.checkpoint.best
            monitor.step(step + 1, (step + 1) * config.global_batch, scalars)
            if profiler.step():
                break

            if preview.due(step + 1):
                preview.show(step + 1, engine.model, monitor)

            saver.look_after(sums)
            ends = sums.stop or step + 1 == total
            if ends or sums.overdue or saver.due(step + 1) or is_best:
                saver.save(step + 1, wait=ends, lowest=validation.lowest if is_best else None)
            if sums.stop:
                sender = run.stop.received or "a signal to another rank"
                raise SystemExit(f"stopped by {sender} after step {step + 1}; run again to resume.")
    skipped.log_total()
    return saver.newest


def timed_steps(loader: Loader, first: int, total: int) -> Iterator[tuple[int, list[Batch], float, float]]:
    """Yields each step's number, its micro-batches, when the wait for them began, and its seconds."""
    batches = iter(loader.steps(first, total))
    for step in range(first, total):
        started = time.monotonic()
        with phase("data"):
            micro_batches = next(batches)
        yield step, micro_batches, started, time.monotonic() - started


@dataclass(frozen=True)
class StepSums:
    """Knowledge of all ranks about a step, summed up in one collective."""

    loss: float
    """Sum of all terms of the loss, divided by the number of supervised tokens of the global batch."""
    stop: bool
    """True if any rank was asked to end."""
    overdue: bool
    """True if rank 0 wants a checkpoint because the last one is too old."""
    writing: bool
    """True if any rank is still writing a checkpoint."""
    unwritten: bool
    """True if any rank could not write its part of a checkpoint."""
    by_length: list[float]
    """Sum of the next-token loss, then number of tokens, of each class of response lengths."""
    terms: dict[str, float]
    """Each term that the recipe adds to the loss, before it is weighted, divided by the same number."""
    by_source: list[float]
    """Sum of the next-token loss, then number of tokens, of each source."""
    skips: list[float]
    """Number of samples of each source that the step had to skip."""

    @classmethod
    def over_ranks(cls, result: StepResult, skips: list[int], stop: bool, saver: Saver) -> StepSums:
        """Sums up the ranks' knowledge. A collective.

        skips: this rank's skipped samples by source. stop: whether this rank was asked to end.

        Raises:
            TakenError: another job has taken over the run folder.
        """
        parts = [
            [result.share, stop, saver.overdue(), *saver.progress(), saver.has_lost_folder()],
            result.by_length.flatten().tolist(),
            [*result.terms.values()],
            result.by_source.flatten().tolist(),
            skips,
        ]
        sums = iter(distributed.sum_over_ranks(*(value for part in parts for value in part)))
        (loss, *flags), by_length, terms, by_source, of_skips = ([next(sums) for _ in part] for part in parts)
        named = dict(zip(result.terms, terms, strict=True))
        stops, late, writing, unwritten, taken = map(bool, flags)
        if taken:
            raise end_without_folder(saver.run.out)
        return cls(loss, stops, late, writing, unwritten, by_length, named, by_source, of_skips)

    def of_sources(self, names: list[str]) -> dict[str, float]:
        """Returns the scalars of each of several sources: loss, tokens with loss, and skipped samples of the step."""
        scalars: dict[str, float] = {}
        if len(names) < 2:
            return scalars
        pairs = zip(names, self.by_source[::2], self.by_source[1::2], self.skips, strict=True)
        for name, loss, tokens, skips in pairs:
            if tokens:
                scalars[f"loss_by_source/{name}"] = loss / tokens
            scalars[f"tokens_by_source/{name}"] = tokens
            scalars[f"skipped_by_source/{name}"] = skips
        return scalars


def skipped_by_source(batches: list[Batch], sources: int) -> list[int]:
    """Returns the number of samples of each source that a rank's micro-batches lack."""
    found = [number for batch in batches for number in batch.skipped_sources]
    return [found.count(number) for number in range(sources)]


@dataclass(frozen=True)
class Meter:
    """Turns the numbers of a step into scalars for metrics.jsonl and TensorBoard."""

    engine: Engine
    peak: float
    """FLOP/s that the devices of all ranks can reach together."""

    @classmethod
    def of(cls, engine: Engine) -> Meter:
        """Looks up, or measures, the peak of the devices."""
        parameter = next(iter(engine.named.values()))
        return cls(engine, peak_flops(engine.engine.device, parameter.dtype) * distributed.world_size())

    def scalars(
        self,
        step: int,
        result: StepResult,
        sums: StepSums,
        counts: StepCounts,
        skipped: SkippedSamples,
        *,
        seconds: float,
        waited: float,
    ) -> dict[str, float]:
        """Returns the scalars of a step that took `seconds`, of which it `waited` for data."""
        scalars = {
            "loss": sums.loss,
            **{f"loss/{name}": value for name, value in sums.terms.items()},
            **self.engine.learning_rates(step),
            "grad_norm": result.grad_norm,
            "seconds": seconds,
            "data_wait_seconds": waited,
            **counts.scalars(seconds),
            **skipped.scalars(),
            "samples_per_second": self.engine.config.global_batch / seconds,
            "mfu": counts.flops / seconds / self.peak,
            **self.engine.state.loss_scalars(),
        }
        for name, loss, tokens in zip(length_classes(), sums.by_length[::2], sums.by_length[1::2], strict=True):
            if tokens:
                scalars[f"loss_by_response_length/{name}"] = loss / tokens
        return scalars


class Saver:
    """Saves checkpoints, and knows when one is due."""

    def __init__(self, run: Run, engine: Engine, manifest: Manifest, skipped: SkippedSamples) -> None:
        """Finds out which ranks can write. A collective."""
        self.run, self.engine, self.manifest, self.skipped = run, engine, manifest, skipped
        self.settings = run.config.checkpoint
        self.newest = run.out
        """Folder of the newest checkpoint."""
        self._shares = agree_on_shares(run.out, engine.named, self.settings.writers)
        self._clock = SaveClock(60 * (self.settings.every_minutes or math.inf))
        self._pending: Saving | None = None

    def due(self, step: int) -> bool:
        """Returns whether `checkpoint.every_steps` asks for a checkpoint after this step, counted from 1."""
        every = self.settings.every_steps
        return every is not None and step % every == 0

    def overdue(self) -> bool:
        """Returns whether `checkpoint.every_minutes` have passed. Only rank 0's clock counts."""
        return distributed.is_rank_zero() and self._pending is None and self._clock.is_due()

    def progress(self) -> tuple[bool, bool]:
        """Returns whether this rank is writing beside training, and whether it could not write."""
        pending = self._pending
        return (False, False) if pending is None else (pending.is_writing, pending.has_failed)

    def has_lost_folder(self) -> bool:
        """Returns whether another job has taken over the run folder, as far as rank 0 has noticed."""
        return distributed.is_rank_zero() and lock.seen_lost(self.run.out) is not None

    def look_after(self, sums: StepSums) -> None:
        """Publishes a checkpoint that all ranks have written beside training. A collective.

        Raises:
            CheckpointError: a rank could not write.
        """
        if self._pending is not None and sums.unwritten:
            self._pending.stop_writing()
        if self._pending is not None and (sums.unwritten or not sums.writing):
            with self._clock.saving():
                self._publish()

    def save(self, step: int, wait: bool, lowest: float | None = None) -> None:
        """Saves a checkpoint after this step, after the one before is complete. A collective.

        wait: whether to return only when it is complete, as at the end of a run. lowest: the held-out loss, if it makes
        this checkpoint the best one.
        """
        progress = progress_after(step, self.skipped)
        if lowest is not None:
            progress["validation_loss"] = lowest
        with self._clock.saving(new=True):
            self._publish()
            self._pending = begin_saving(
                self.run.out,
                self.engine,
                self.manifest,
                progress,
                self._shares,
                asynchronous=self.settings.asynchronous,
            )
            if wait or not self._pending.begun_beside:
                self._publish()
        share = self._clock.share()
        if not wait and share is not None and distributed.is_rank_zero():
            logger.warning(
                "saving checkpoints took %.0f %% of the time so far; set a longer checkpoint.every_minutes or "
                "every_steps, or checkpoint.asynchronous=true if memory holds a copy",
                100 * share,
            )

    def close(self) -> None:
        """Gives up a checkpoint that is not complete, because the run ends by an error."""
        if self._pending is not None:
            self._pending.abandon()

    def _publish(self) -> None:
        """Publishes the checkpoint that is on its way, if there is one, as soon as all ranks have written it."""
        if self._pending is None:
            return
        self.newest = self._pending.publish(self.settings.keep)
        self._pending = None
        logger.info("saved checkpoint %s: training waited for %.1f s", self.newest, self._clock.seconds())
