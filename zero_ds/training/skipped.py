"""Counts the samples that a run skips, and ends the run when they exceed a limit."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, cast

from zero_ds.data.batches import Batch
from zero_ds.data.formats import DataError
from zero_ds.data.sources import Records
from zero_ds.runtime import distributed
from zero_ds.training.checkpoint.checkpoint import Progress
from zero_ds.training.metrics import StepCounts

logger = logging.getLogger(__name__)


class SkippedSamples:
    """Counts of skipped samples over all ranks. A checkpoint stores them, so a resumed run continues from there.

    Raises (in `add_records` and `add_step`, on every rank at the same point):
        DataError: more than `limit` samples could not be used.
    """

    LOGGED = 20
    """Each rank logs the reason for at most this many skipped samples."""

    STORED: ClassVar[dict[str, str]] = {"unusable": "skipped", "too_long": "too_long"}
    """Counts that a checkpoint stores, with the names that they have in progress.json (`Progress`)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.unusable = 0
        """Number of samples in past steps that could not be used."""
        self.too_long = 0
        """Number of samples in past steps without an answer within `data.max_length`. The limit does not count them."""
        self.unreadable = 0
        """Number of records that could not be used when files were read. A resumed run reads and counts them again."""
        self._logged = 0

    @property
    def total(self) -> int:
        """Number of samples that count against the limit."""
        return self.unusable + self.unreadable

    def add_records(self, records: Records) -> None:
        """Counts the records that could not be used when the files were read."""
        for reasons, count in records.complaints():
            for reason in reasons[: max(0, self.LOGGED - self._logged)]:
                if distributed.is_rank_zero():
                    logger.warning("skipped: %s", reason)
                self._logged += 1
            self.unreadable += count
        self._check()

    def add_step(self, batches: list[Batch], counts: StepCounts) -> None:
        """Counts the samples that a step had to skip.

        batches: this rank's micro-batches; the reasons that they contain are logged. counts: sums over all ranks.
        """
        for batch in batches:
            for reason in (*batch.skipped, *batch.too_long):
                if self._logged < self.LOGGED:
                    logger.warning("skipped: %s", reason)
                self._logged += 1
        self.unusable += int(counts.skipped)
        self.too_long += int(counts.too_long)
        self._check()

    def _check(self) -> None:
        if self.total > self.limit:
            raise DataError(
                f"{self.total} samples could not be used, more than data.max_bad_samples={self.limit}; see the log for "
                "the reasons, and fix the data"
            )

    def save(self, progress: Progress) -> None:
        """Writes the counts into a checkpoint's progress."""
        cast(dict[str, Any], progress).update({name: getattr(self, count) for count, name in self.STORED.items()})

    def restore(self, progress: Progress) -> None:
        """Reads the counts from a checkpoint's progress."""
        stored = cast(dict[str, Any], progress)
        for count, name in self.STORED.items():
            setattr(self, count, stored.get(name, 0))

    def scalars(self) -> dict[str, float]:
        """Returns the counts for metrics.jsonl and TensorBoard."""
        return {"skipped_samples": self.total, "too_long_samples": self.too_long}

    def log_total(self) -> None:
        """Logs the number of skipped samples, if there are any."""
        if self.total or self.too_long:
            logger.info("skipped: %d samples that could not be used, %d that were too long", self.total, self.too_long)
