"""Assumptions about data that is not at hand: number and length of its samples. None of them was measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from zero_ds.config.schema import RunConfig, SourceConfig

IMAGE_SAMPLE_TOKENS = 250
"""Number of text tokens of a sample with an image, chat template included."""
IMAGE_SAMPLE_SUPERVISED = 100
"""Number of these tokens that carry loss."""
TEXT_SAMPLE_TOKENS = 600
"""Number of tokens of a text-only sample."""
TEXT_SAMPLE_SUPERVISED = 400
"""Number of these tokens that carry loss."""
DECODER_SHARE = 0.2
"""Share of the data for a decoder that starts from the grafted encoder: enough in the paper (Tables 8 and 9)."""


@dataclass(frozen=True)
class AverageSample:
    """A sample of a data set, on average."""

    text_tokens: float
    """Number of text tokens."""
    supervised: float
    """Number of these tokens that carry loss."""
    images: float
    """Number of images."""
    length: float = 0.0
    """Number of tokens, with those of the images."""

    def within(self, tokens_per_image: int, max_length: int) -> AverageSample:
        """Returns the sample with its length, cut to the longest that the run allows."""
        length = min(float(max_length), self.text_tokens + self.images * tokens_per_image)
        text_tokens = length - self.images * tokens_per_image
        return AverageSample(text_tokens, min(self.supervised, max(0.0, text_tokens)), self.images, length)


WITH_IMAGE = AverageSample(IMAGE_SAMPLE_TOKENS, IMAGE_SAMPLE_SUPERVISED, 1.0)
TEXT_ONLY = AverageSample(TEXT_SAMPLE_TOKENS, TEXT_SAMPLE_SUPERVISED, 0.0)

SIZES: dict[str, tuple[int, int]] = {"genqa_500k": (0, 500_000), "llava_v1_5_mix665k": (625_000, 40_000)}
"""Number of samples with and without an image, as the paper counts them, by the name of the file."""


@dataclass(frozen=True)
class DataOverrides:
    """Facts about the data from the user, which replace assumptions; None where the assumption stays."""

    samples: int | None = None
    """Number of samples, where it is not known."""
    tokens: int | None = None
    """Number of text tokens of every sample."""
    supervised: int | None = None
    """Number of these tokens that carry loss."""


@dataclass(frozen=True)
class DataSize:
    """Number of samples of a run in one epoch."""

    with_image: float
    text_only: float

    @property
    def samples(self) -> float:
        """Number of all samples."""
        return self.with_image + self.text_only

    def average(self, tokens_per_image: int, max_length: int, overrides: DataOverrides) -> AverageSample:
        """Returns the average over all samples."""
        total = AverageSample(0.0, 0.0, 0.0)
        for kind, count in ((WITH_IMAGE, self.with_image), (TEXT_ONLY, self.text_only)):
            share = count / self.samples if self.samples else 0.0
            text_tokens = kind.text_tokens if overrides.tokens is None else overrides.tokens
            supervised = kind.supervised if overrides.supervised is None else overrides.supervised
            one = AverageSample(text_tokens, min(text_tokens, supervised), kind.images)
            one = one.within(tokens_per_image, max_length)
            total = AverageSample(
                total.text_tokens + share * one.text_tokens,
                total.supervised + share * one.supervised,
                total.images + share * one.images,
                total.length + share * one.length,
            )
        return total


def data_size(
    config: RunConfig, vision: bool, samples: int | None = None, images_only: bool = False
) -> DataSize | None:
    """Returns the size of the run's data by the sizes that are known; None where that of a source is not.

    Args:
        vision: whether the run's model has a vision encoder.
        samples: number of samples in place of the known one.
        images_only: whether text-only sources are excluded.
    """
    found = [_source_size(source) for source in config.data.sources]
    if images_only:
        found = [size for size in found if size is None or size.with_image]
    known = [size for size in found if size is not None]
    with_image, text_only = sum(size.with_image for size in known), sum(size.text_only for size in known)
    if samples is not None:
        share = with_image / (sum(size.samples for size in known)) if known else float(vision)
        return DataSize(samples * share, samples * (1 - share))
    if not found or len(known) < len(found):
        return None
    return DataSize(with_image, text_only)


def _source_size(source: SourceConfig) -> DataSize | None:
    """Returns the size of a source with a known name; None for any other."""
    sizes = SIZES.get(Path(source.path).stem)
    if sizes is None:
        return None
    with_image, text_only = sizes
    if source.images_only:
        text_only = 0
    if source.limit is not None and source.limit < with_image + text_only:
        scale = source.limit / (with_image + text_only)
        return DataSize(with_image * scale, text_only * scale)
    return DataSize(with_image, text_only)


def steps_of(config: RunConfig, data: DataSize | None, share: float = 1.0) -> int | None:
    """Returns the number of optimizer steps of the run; None if it is not known.

    share: part of its data that the run sees.
    """
    if config.max_steps is not None:
        return max(1, round(config.max_steps * share))
    if data is None:
        return None
    return max(1, ceil(data.samples * config.epochs * share / config.global_batch))
