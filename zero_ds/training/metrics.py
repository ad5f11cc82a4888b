"""Counts the tokens, images, FLOPs and skipped samples of a training step."""

from __future__ import annotations

from dataclasses import dataclass

from zero_ds.data.batches import Batch
from zero_ds.data.formats import DataError
from zero_ds.data.samples import image_positions
from zero_ds.model.losses import count_supervised
from zero_ds.runtime import distributed
from zero_ds.training.planning.model_size import StepCost


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
    """Number of samples without an answer within the length limit."""
    layout: int = 0
    """Checksum of the layout of this rank's rows in the step (`Batch.layout`), or its number of passes."""
    same_layout: bool = True
    """Whether the layout is the same on all ranks."""

    @classmethod
    def of(cls, batches: list[Batch], cost: StepCost) -> StepCounts:
        """Counts the micro-batches of a step on this rank."""
        counts = [cls._of_batch(batch, cost) for batch in batches]
        layout = batches[0].layout
        return cls(
            supervised=sum(one.supervised for one in counts),
            tokens=sum(one.tokens for one in counts),
            positions=sum(one.positions for one in counts),
            images=sum(one.images for one in counts),
            flops=sum(one.flops for one in counts),
            skipped=sum(one.skipped for one in counts),
            too_long=sum(one.too_long for one in counts),
            layout=len(batches) if layout is None else layout,
        )

    @classmethod
    def _of_batch(cls, batch: Batch, cost: StepCost) -> StepCounts:
        lengths = batch.lengths.double()
        tokens, pairs = float(lengths.sum()), float((lengths**2).sum())
        supervised = count_supervised(batch.labels)
        images = image_tokens = 0
        if batch.pixel_values is not None:
            image_tokens = int(image_positions(batch.input_ids).sum())
            images = len(batch.pixel_values) if image_tokens else 0  # else the blank image of a text batch
        return cls(
            supervised=supervised,
            tokens=tokens,
            positions=batch.attention_mask.numel(),
            images=images,
            flops=cost.flops(tokens, pairs, supervised, images, image_tokens),
            skipped=len(batch.skipped),
            too_long=len(batch.too_long),
        )

    def over_ranks(self) -> StepCounts:
        """Returns the counts of the global batch. A collective."""
        values = (
            self.supervised,
            self.tokens,
            self.positions,
            self.images,
            self.flops,
            self.skipped,
            self.too_long,
        )
        sums, same_layout = distributed.sum_and_compare(values, mark=self.layout)
        supervised, tokens, positions, images, flops, skipped, too_long = sums
        return StepCounts(
            supervised, tokens, positions, images, flops, skipped, too_long, layout=self.layout, same_layout=same_layout
        )

    def check_layout(self, step: int) -> None:
        """Refuses a step if the ranks disagree on its batches; called on the counts of the global batch.

        Raises:
            DataError: the ranks differ in rows or in the number of passes, and would wait for each other.
                Raised on every rank.
        """
        if not self.same_layout:
            raise DataError(
                f"the ranks planned step {step} differently, as if one of them had read other data; look for "
                "skipped samples in the log, and run again from the last checkpoint"
            )

    def scalars(self, seconds: float) -> dict[str, float]:
        """Returns the values that the monitor shows for a step that took `seconds`."""
        return {
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens": self.supervised,
            "padding_share": 1 - self.tokens / self.positions,
        }
