"""What the model answers while it trains: a few samples, greedily, every n steps, as one looks at a growing plant.

Every rank answers the same samples with the same number of forward passes, so that under ZeRO-3 none waits for another.
There is no cache of keys and values: the answers are short, and the engine's parameters stay as they are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from zero_ds.config.schema import RunConfig
from zero_ds.data.batches import collate
from zero_ds.data.conversations import ConversationError
from zero_ds.data.formats import DataError
from zero_ds.data.images import open_image
from zero_ds.data.loader import Loader
from zero_ds.data.samples import EncodedSample
from zero_ds.data.sources import Sample
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime import distributed
from zero_ds.training.monitor import Monitor

SEARCHED = 1000
"""Samples among which those with a picture are looked for."""


@dataclass(frozen=True)
class Answer:
    """What the model said about a training sample."""

    sample: str
    picture: str | None
    question: str
    answer: str
    expected: str


class Preview:
    """The samples that a run looks at, encoded once."""

    def __init__(self, config: RunConfig, loader: Loader) -> None:
        self.config = config.preview
        self.encoder = loader.sample_encoder
        self.pad_id = loader.pad_id
        self.samples: list[tuple[Sample, EncodedSample]] = []
        if self.config.every_steps is not None:
            self._choose(loader)

    def _choose(self, loader: Loader) -> None:
        """The first samples with a picture; the first ones, where none has."""
        numbers = list(range(min(SEARCHED, len(loader.records))))
        pictured = [i for i in numbers if loader.records.images(i)] if self.encoder.processor else []
        for number in pictured or numbers:
            if len(self.samples) == self.config.samples:
                return
            try:
                sample = loader.records[number]
                turns = self.encoder.turns(sample)
                asked = turns[: next(i for i, turn in enumerate(turns) if turn.role == "assistant")]
                prompt = self.encoder.encode(asked, generate=True, image_tokens=self.encoder.image_tokens(sample))
                pixels = self.encoder.pixels(sample, prompt.images)
            except (ConversationError, DataError):
                continue  # training says what is wrong with it when its turn comes
            if len(prompt.input_ids) + self.config.tokens <= self.encoder.max_length:
                encoded = EncodedSample(sample.id, prompt.input_ids, prompt.labels, prompt.responses, pixels)
                self.samples.append((sample, encoded))

    def due(self, step: int) -> bool:
        """Whether to look after this step, counted from 1; the same on every rank."""
        return bool(self.samples) and step % (self.config.every_steps or 1) == 0

    def show(self, step: int, model: VisionLanguageModel, monitor: Monitor) -> None:
        """Answers the samples and hands the answers to the monitor. A collective under ZeRO-3."""
        model.eval()
        try:
            answers = self.answers(model)
        finally:
            model.train()
        monitor.answers(step, [asdict(answer) for answer in answers], lambda: sheet(answers))

    @torch.no_grad()
    def answers(self, model: VisionLanguageModel) -> list[Answer]:
        """Greedy answers of at most `preview.tokens` tokens."""
        texts = [list(encoded.input_ids) for _, encoded in self.samples]
        starts = [len(text) for text in texts]
        device = distributed.device()
        for _ in range(self.config.tokens):  # always all of them, on every rank
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
        end = self.encoder.template.end_of_turn()
        answers = []
        for (sample, _), text, start in zip(self.samples, texts, starts, strict=True):
            tokens = text[start:]
            tokens = tokens[: tokens.index(end)] if end in tokens else tokens
            question = next(turn.text for turn in sample.turns if turn.role == "user")
            expected = next(turn.text for turn in sample.turns if turn.role == "assistant")
            said = self.encoder.template.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            answers.append(Answer(sample.id, (*sample.images, None)[0], question, said, expected))
        return answers


def sheet(answers: list[Answer]) -> Any:
    """A matplotlib figure: each picture above its question, what the model says, and what the data says."""
    import textwrap

    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(answers), 4.2), layout="constrained")
    for number, answer in enumerate(answers):
        axes = figure.add_subplot(1, len(answers), number + 1)
        axes.axis("off")
        if answer.picture is not None:
            axes.imshow(open_image(answer.picture))
        question = answer.question.replace("<image>", "").strip()
        lines = [f"Q: {question}", f"A: {answer.answer}", f"data: {answer.expected}"]
        text = "\n".join(line for entry in lines for line in textwrap.wrap(entry[:300], 38)).replace("$", r"\$")
        axes.text(0, -0.04, text, transform=axes.transAxes, va="top", ha="left", fontsize=8, family="monospace")
    return figure
