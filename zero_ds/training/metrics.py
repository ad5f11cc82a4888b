"""Counts the tokens, images, FLOPs and skipped samples of a training step."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import reduce

from zero_ds.data.batches import Batch
from zero_ds.data.formats import DataError
from zero_ds.data.samples import image_positions
from zero_ds.model.losses import count_supervised
from zero_ds.runtime import distributed
from zero_ds.training.planning.flops import StepCost


@dataclass(frozen=True)
class StepCounts:
    """Counts of one step: of this rank's micro-batches, or of the global batch after `over_ranks`."""

    supervised: float = 0.0
    """Number of tokens with loss."""
    tokens: float = 0.0
    """Number of tokens without padding."""
    positions: float = 0.0
    """Number of positions of the batches, padding included."""
    images: float = 0.0
    """Number of images, without the blank ones of text batches."""
    flops: float = 0.0
    """FLOPs that the method needs for these samples (`StepCost.flops`)."""
    skipped: float = 0.0
    """Number of samples that could not be used."""
    too_long: float = 0.0
    """Number of samples of which no answer fits."""
    layout: float = 0.0
    """Checksum of the layout of the step's rows (`batches.plan_number`), summed over ranks."""
    layout_squared: float = 0.0
    """Square of every rank's checksum, summed over ranks."""

    @classmethod
    def of(cls, batches: list[Batch], cost: StepCost) -> StepCounts:
        """Counts the micro-batches of a step on this rank."""
        counts = reduce(StepCounts.__add__, [cls._of_batch(batch, cost) for batch in batches], cls())
        layout = float(batches[0].get("plan", len(batches)))
        return replace(counts, layout=layout, layout_squared=layout**2)

    @classmethod
    def _of_batch(cls, batch: Batch, cost: StepCost) -> StepCounts:
        lengths = batch["lengths"].double()
        tokens, pairs = float(lengths.sum()), float((lengths**2).sum())
        supervised = count_supervised(batch["labels"])
        images = image_tokens = 0
        if "pixel_values" in batch:
            image_tokens = int(image_positions(batch["input_ids"]).sum())
            images = len(batch["pixel_values"]) if image_tokens else 0  # else the blank image of a text batch
        return cls(
            supervised=supervised,
            tokens=tokens,
            positions=batch["attention_mask"].numel(),
            images=images,
            flops=cost.flops(tokens, pairs, supervised, images, image_tokens),
            skipped=len(batch["skipped"]),
            too_long=len(batch["too_long"]),
        )

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def over_ranks(self) -> StepCounts:
        """Returns the counts of the global batch. A collective."""
        return StepCounts(*distributed.sum_over_ranks(*astuple(self)))

    def check_layout(self, step: int) -> None:
        """Checks on the sums over ranks that all ranks have laid out the same rows for this step.

        n numbers are equal if n times the sum of their squares is the square of their sum.

        Raises:
            DataError: ranks have other rows, or other numbers of passes, and would wait for each other; on every rank.
        """
        if distributed.world_size() * int(self.layout_squared) != int(self.layout) ** 2:
            raise DataError(
                f"the ranks plan step {step} unlike each other, as if one of them had read other data; look for "
                "skipped samples in the log, and run again from the last checkpoint"
            )

    def scalars(self, seconds: float) -> dict[str, float]:
        """Returns the values that the monitor shows for a step that took `seconds`."""
        return {
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens": self.supervised,
            "padding_share": 1 - self.tokens / self.positions,
        }
