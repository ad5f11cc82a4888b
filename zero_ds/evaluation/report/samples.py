"""Sample answers for a report, with thumbnails of their images."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zero_ds.data.images import open_image
from zero_ds.data.sources import inside
from zero_ds.evaluation.heldout.results import Evaluation, ItemResult
from zero_ds.evaluation.report.charts import readable
from zero_ds.evaluation.report.inputs import ReportInputs

THUMBNAIL = 256
"""Longest side of a sample image in the report, in pixels."""


@dataclass(frozen=True)
class SampleReply:
    """One model's answer to a sample question."""

    model: str
    text: str
    verdict: str
    """`right`, `wrong`, or `1 of 2 words`."""
    css_class: str
    """`right`, `partly` or `wrong`."""


@dataclass(frozen=True)
class Sample:
    """A question of the evaluation with the models' answers."""

    image: str
    """Name of the thumbnail among the report's images."""
    thumbnail: bytes
    """PNG file."""
    question: str
    answer: str
    replies: tuple[SampleReply, ...]


def draw_samples(inputs: ReportInputs, evaluations: Mapping[str, Evaluation]) -> list[Sample]:
    """Draws records by seed from all records, regardless of the answers.

    Raises:
        DataError, ImageError: an image is outside the data's root or cannot be read.
    """
    answers = {name: {item.id: item for item in evaluations[name].of("own")} for name in inputs.evaluations}
    items = list(answers["grafted"].values())
    chosen = random.Random(inputs.sample_seed).sample(items, min(inputs.samples, len(items)))
    root = Path(evaluations["grafted"].setting.get("root", ".")).resolve()
    samples = []
    for number, item in enumerate(chosen):
        samples.append(
            Sample(
                image=f"sample-{number:02d}",
                thumbnail=_thumbnail(inside(root, item.image, item.id)),
                question=item.question,
                answer=item.answer,
                replies=tuple(_reply(readable(model), found[item.id]) for model, found in answers.items()),
            )
        )
    return samples


def _thumbnail(path: Path) -> bytes:
    """Returns a small PNG file. It is encoded again, so nothing of the original but its pixels enters the report."""
    image = open_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _reply(model: str, item: ItemResult) -> SampleReply:
    """Returns a model's answer, with the number of scored words that are right in it."""
    right, count = sum(word.free_correct for word in item.words), len(item.words)
    if right == count:
        css_class = "right"
    elif right and count > 1:
        css_class = "partly"
    else:
        css_class = "wrong"
    verdict = css_class if count == 1 else f"{right} of {count} words"
    return SampleReply(model, item.generated, verdict, css_class)
