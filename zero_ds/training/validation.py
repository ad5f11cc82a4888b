"""The held-out loss: the mean next-token loss over samples that the run does not train on.

It is the sum over the supervised tokens of all ranks divided by their number, so it does not depend on how the samples
are split. Nothing of the training changes: neither its order, nor its weights, nor the state of a random generator.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zero_ds.config.schema import RunConfig
from zero_ds.data.batches import Batch
from zero_ds.data.loader import Loader
from zero_ds.data.once import Once
from zero_ds.data.sources import Records
from zero_ds.model.losses import next_token_losses, supervised_rows
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.best import restore_best

logger = logging.getLogger(__name__)

PREFIX = "validation/"
"""Beginning of the names of these scalars, in metrics.jsonl and in TensorBoard."""


class Validation:
    """The held-out samples of a run, and the lowest loss on them so far."""

    def __init__(self, config: RunConfig, loader: Loader, total: int, first: int = 0) -> None:
        """Opens the held-out samples. A collective.

        total: number of the run's last step. first: number of steps made before.

        Raises:
            ConfigError: `validation.share` is so small that no sample is held out, or the ranks see different samples.
            DataError: a data file that cannot be used.
        """
        self.config = config.validation
        self.total = total
        self.parts = [Once(loader, records, self.config.limit) for records in held_out(config)]
        content = hashlib.sha256("".join(part.records.content() for part in self.parts).encode())
        if not distributed.same_on_all_ranks(int.from_bytes(content.digest()[:8], "big")):
            raise ConfigError("the ranks see different held-out samples; give every machine the same files.")
        self.lowest = self._lowest_so_far(config, first) if self.parts else math.inf
        if self.parts:
            samples = sum(len(part.indices()) for part in self.parts)
            logger.info("the loss is measured on %d held-out samples", samples)

    @staticmethod
    def _lowest_so_far(config: RunConfig, first: int) -> float:
        """Returns the loss of the best checkpoint up to step `first` in the run folder, as rank 0 reads it."""
        found = restore_best(Path(config.out), first) if distributed.is_rank_zero() else None
        (lowest,) = distributed.max_over_ranks(-math.inf if found is None else found)
        return math.inf if lowest == -math.inf else lowest

    def due(self, step: int) -> bool:
        """Returns whether a measurement is due after this step, counted from 1; the same on every rank."""
        every = self.config.every_steps
        return bool(self.parts) and (step == self.total or (every is not None and step % every == 0))

    def measure(self, model: VisionLanguageModel) -> dict[str, float]:
        """Returns loss, tokens and samples as scalars. A collective.

        Raises:
            DataError: a sample that cannot be used, unless the run skips such samples.
        """
        return {f"{PREFIX}{name}": value for name, value in mean_loss(model, self.parts).items()}

    def improves(self, scalars: dict[str, float]) -> bool:
        """Returns whether the loss is the lowest so far, and remembers it."""
        loss = scalars[f"{PREFIX}loss"]
        if not loss < self.lowest:
            return False
        self.lowest = loss
        return True


def mean_loss(model: VisionLanguageModel, parts: Sequence[Once]) -> dict[str, float]:
    """Returns the mean next-token loss on samples, with numbers of tokens and samples, and seconds. A collective.

    Raises:
        DataError: a sample that cannot be used, unless the run skips such samples.
    """
    started = time.monotonic()
    was_training = model.training
    model.eval()
    try:
        loss, tokens, samples, skipped = _sums(model, parts)
    finally:
        model.train(was_training)
    loss, tokens, samples, skipped = distributed.sum_over_ranks(loss, tokens, samples, skipped)
    return {
        "loss": loss / max(1.0, tokens),
        "tokens": tokens,
        "samples": samples,
        "skipped_samples": skipped,
        "seconds": time.monotonic() - started,
    }


def _sums(model: VisionLanguageModel, parts: Sequence[Once]) -> tuple[float, float, float, float]:
    """Returns the rank's sum of the loss, and its numbers of tokens, samples and skipped samples."""
    loss = torch.zeros((), dtype=torch.float64, device=distributed.device())
    tokens = samples = skipped = 0
    for part in parts:
        for batch in part.batches():
            losses = token_losses(model, batch)
            loss += losses.double().sum()
            tokens += len(losses)
            samples += len(batch.ids)
            skipped += len(batch.skipped) + len(batch.too_long)
    return float(loss), float(tokens), float(samples), float(skipped)


@torch.no_grad()
def token_losses(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """Returns the next-token loss of each supervised token of a batch: (n,), float32.

    The model's parts are called one by one, as for answers, so that under ZeRO-3 the engine's own forward passes keep
    their order.
    """
    device = distributed.device()
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.inputs().items()}
    labels = inputs.pop("labels")
    rows = tuple(index.to(device) for index in supervised_rows(batch.labels))
    hidden = model.hidden_states(**inputs)
    return next_token_losses(model.logits(hidden[rows]), labels, rows)


def held_out(config: RunConfig) -> list[Records]:
    """Opens the samples of `validation.sources`, and those of `validation.share`. A collective.

    Raises:
        ConfigError, DataError: as `Validation`.
    """
    options: dict[str, Any] = {
        "skip_bad": config.data.bad_samples == "skip",
        "caption_prompt": config.data.caption_prompt,
    }
    found = []
    with distributed.rank_zero_first():
        if config.validation.sources:
            found.append(Records(config.validation.sources, **options))
        if config.validation.share:
            permute = config.seed if config.data.shuffle else None
            records = Records(config.data.sources, permute=permute, share=config.validation.share, **options)
            rest = records.held_out()
            if rest is None:
                raise ConfigError(
                    f"validation.share={config.validation.share:g} of {len(records)} samples is not one; raise it."
                )
            found.append(rest)
    return found
