"""Answers of the model to a few samples while it trains: greedily, every n steps, to see it learn.

Every rank answers the same samples with the same number of forward passes, so that under ZeRO-3 no rank waits for
another. Keys and values are not cached: the answers are short, and the engine's parameters stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from zero_ds.config.schema import RunConfig
from zero_ds.data.batches import collate
from zero_ds.data.formats import DataError
from zero_ds.data.images import image_name, open_image
from zero_ds.data.loader import Loader
from zero_ds.data.samples import EncodedSample
from zero_ds.data.sources import Sample
from zero_ds.data.stored import ImageFile
from zero_ds.data.tokens import ConversationError
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime import distributed
from zero_ds.training.monitor import Monitor

SEARCHED = 1000
"""Number of samples among which those with an image are looked for."""


@dataclass(frozen=True)
class Answer:
    """The model's answer to the first question of a training sample."""

    sample: str
    """Id of the sample."""
    image: ImageFile | None
    """Its first image."""
    question: str
    answer: str
    """Answer of the model."""
    expected: str
    """Answer in the data."""

    def record(self) -> dict[str, Any]:
        """Returns the entries of a line in answers.jsonl."""
        return {
            "sample": self.sample,
            "picture": None if self.image is None else image_name(self.image),
            "question": self.question,
            "answer": self.answer,
            "expected": self.expected,
        }


class Preview:
    """The samples that a run previews, encoded once."""

    def __init__(self, config: RunConfig, loader: Loader) -> None:
        self.config = config.preview
        self.encoder = loader.sample_encoder
        self.pad_id = loader.pad_id
        self.samples: list[tuple[Sample, EncodedSample]] = []
        if self.config.every_steps is not None:
            self._choose(loader)

    def _choose(self, loader: Loader) -> None:
        """Chooses the first samples with an image, or the first of all if none has one."""
        numbers = list(range(min(SEARCHED, len(loader.records))))
        with_images = [i for i in numbers if loader.records.images(i)] if self.encoder.processor else []
        for number in with_images or numbers:
            if len(self.samples) == self.config.samples:
                return
            try:
                sample = loader.records[number]
                turns = self.encoder.turns(sample)
                asked = turns[: next(i for i, turn in enumerate(turns) if turn.role == "assistant")]
                prompt = self.encoder.encode(asked, generate=True, image_tokens=self.encoder.image_tokens(sample))
                pixels = self.encoder.pixels(sample, prompt.images)
            except (ConversationError, DataError):
                continue  # training reports the error when it comes to this sample
            if len(prompt.input_ids) + self.config.tokens <= self.encoder.max_length:
                encoded = EncodedSample(sample.id, prompt.input_ids, prompt.labels, prompt.responses, pixels)
                self.samples.append((sample, encoded))

    def due(self, step: int) -> bool:
        """Returns whether a preview is due after this step, counted from 1; the same on every rank."""
        return bool(self.samples) and step % (self.config.every_steps or 1) == 0

    def show(self, step: int, model: VisionLanguageModel, monitor: Monitor) -> None:
        """Lets the model answer the samples and records the answers. A collective under ZeRO-3."""
        model.eval()
        try:
            answers = self.answers(model)
        finally:
            model.train()
        monitor.answers(step, [answer.record() for answer in answers], lambda: sheet(answers))

    def answers(self, model: VisionLanguageModel) -> list[Answer]:
        """Returns greedy answers of at most `preview.tokens` tokens. A collective under ZeRO-3."""
        answers = []
        for (sample, _), tokens in zip(self.samples, self._generate(model), strict=True):
            answers.append(
                Answer(
                    sample=sample.id,
                    image=sample.images[0] if sample.images else None,
                    question=next(turn.text for turn in sample.turns if turn.role == "user"),
                    answer=self.encoder.template.spoken(tokens),
                    expected=next(turn.text for turn in sample.turns if turn.role == "assistant"),
                )
            )
        return answers

    @torch.no_grad()
    def _generate(self, model: VisionLanguageModel) -> list[list[int]]:
        """Returns the `preview.tokens` tokens that the model says to each sample, also those after an end of turn."""
        texts = [list(encoded.input_ids) for _, encoded in self.samples]
        starts = [len(text) for text in texts]
        device = distributed.device()
        for _ in range(self.config.tokens):  # no early end: every rank makes the same number of passes
            rows = []
            for (_, encoded), text in zip(self.samples, texts, strict=True):
                blank = [-1] * len(text)
                rows.append(replace(encoded, input_ids=text, labels=blank, responses=blank))
            size = self.encoder.processor.size if self.encoder.processor else None
            batch = collate(rows, self.pad_id, size)
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs().items() if name != "labels"}
            hidden = model.hidden_states(**inputs)
            ends = torch.tensor([len(text) - 1 for text in texts], device=hidden.device)
            chosen = model.logits(hidden[torch.arange(len(texts), device=hidden.device), ends]).argmax(-1)
            for text, token in zip(texts, chosen.tolist(), strict=True):
                text.append(token)
        return [text[start:] for text, start in zip(texts, starts, strict=True)]


def sheet(answers: list[Answer]) -> Any:
    """Draws a matplotlib figure: each image above its question, the model's answer, and the answer in the data."""
    import textwrap

    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(answers), 4.2), layout="constrained")
    for number, answer in enumerate(answers):
        axes = figure.add_subplot(1, len(answers), number + 1)
        axes.axis("off")
        if answer.image is not None:
            axes.imshow(open_image(answer.image))
        question = answer.question.replace("<image>", "").strip()
        lines = []
        for entry in (f"Q: {question}", f"A: {answer.answer}", f"data: {answer.expected}"):
            lines += textwrap.wrap(entry[:300], 38)
        text = "\n".join(lines).replace("$", r"\$")
        axes.text(0, -0.04, text, transform=axes.transAxes, va="top", ha="left", fontsize=8, family="monospace")
    return figure
