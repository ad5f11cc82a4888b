"""What a plan assumes of data that is not at hand: how many samples, and how long they are. None of it was measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from zero_ds.config.schema import RunConfig, SourceConfig

WITH_PICTURE_WORDS, WITH_PICTURE_ANSWERS = 250, 100
"""Text tokens of a sample with a picture, chat template included, and how many of them carry loss."""
TEXT_WORDS, TEXT_ANSWERS = 600, 400
"""The same of a text sample."""


@dataclass(frozen=True)
class Sample:
    """A sample of a data set, on average."""

    words: float
    """Text tokens."""
    supervised: float
    pictures: float
    length: float = 0.0
    """Tokens, with those of its pictures."""

    def within(self, tokens_per_image: int, max_length: int) -> Sample:
        """With its length filled in; what is longer than a run allows is cut."""
        length = min(float(max_length), self.words + self.pictures * tokens_per_image)
        words = length - self.pictures * tokens_per_image
        return Sample(words, min(self.supervised, max(0.0, words)), self.pictures, length)


WITH_PICTURE = Sample(WITH_PICTURE_WORDS, WITH_PICTURE_ANSWERS, 1.0)
TEXT = Sample(TEXT_WORDS, TEXT_ANSWERS, 0.0)

SIZES: dict[str, tuple[int, int]] = {"genqa_500k": (0, 500_000), "llava_v1_5_mix665k": (625_000, 40_000)}
"""Samples with and without a picture, as the paper counts them, by the name of the file."""


@dataclass(frozen=True)
class Data:
    """All samples of a run in one epoch."""

    with_picture: float
    text: float

    @property
    def samples(self) -> float:
        return self.with_picture + self.text

    def sample(self, tokens_per_image: int, max_length: int, words: int | None, supervised: int | None) -> Sample:
        """The average over all of them; words, supervised: text tokens of every sample, in place of what is assumed."""
        kinds = [(WITH_PICTURE, self.with_picture), (TEXT, self.text)]
        total = Sample(0.0, 0.0, 0.0)
        for kind, count in kinds:
            share = count / self.samples if self.samples else 0.0
            text = kind.words if words is None else words
            one = Sample(text, min(text, kind.supervised if supervised is None else supervised), kind.pictures)
            one = one.within(tokens_per_image, max_length)
            total = Sample(
                total.words + share * one.words,
                total.supervised + share * one.supervised,
                total.pictures + share * one.pictures,
                total.length + share * one.length,
            )
        return total


def data_of(config: RunConfig, vision: bool, samples: int | None = None, only_pictures: bool = False) -> Data | None:
    """The run's data by the sizes that are known; None where a source's size is not.

    samples: their number in place of what is known; only_pictures: leave out sources of text alone.
    """
    found = [_source(source) for source in config.data.sources]
    if only_pictures:
        found = [data for data in found if data is None or data.with_picture]
    if samples is not None:
        known = [data for data in found if data is not None]
        share = sum(d.with_picture for d in known) / sum(d.samples for d in known) if known else float(vision)
        return Data(samples * share, samples * (1 - share))
    if not found or any(data is None for data in found):
        return None
    return Data(sum(d.with_picture for d in found if d), sum(d.text for d in found if d))


def _source(source: SourceConfig) -> Data | None:
    sizes = SIZES.get(Path(source.path).stem)
    if sizes is None:
        return None
    pictures, text = sizes[0], 0 if source.images_only else sizes[1]
    if source.limit is not None and source.limit < pictures + text:
        scale = source.limit / (pictures + text)
        return Data(pictures * scale, text * scale)
    return Data(pictures, text)


def steps_of(config: RunConfig, data: Data | None, share: float = 1.0) -> int | None:
    """Optimizer steps of the run; share: the part of its data that it sees."""
    if config.max_steps is not None:
        return max(1, round(config.max_steps * share))
    if data is None:
        return None
    return max(1, ceil(data.samples * config.epochs * share / config.global_batch))
