"""Answers about pictures: greedy generation, and the log-probability of given words, from one pass over each prompt.

Prompts are read as a tree, so that nothing is computed twice: the text that all prompts begin with, then the pictures
(once each, whoever asks about them), then the questions, then the true answers of those that have one. Reading the true
answer gives the words' log-probabilities and, in the same pass, every greedy token up to the first that differs from
it; generation goes on from there. The result is the plain greedy answer: what is predicted at a position depends on the
tokens before it alone, and a token of the true answer counts as generated only where it is the argmax.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from PIL import Image

from zero_ds.data.conversations import IMAGE_TOKEN, ChatTemplate, Turn
from zero_ds.data.formats import DataError
from zero_ds.data.images import open_image
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Sample
from zero_ds.model.decoding import Context, Reader, Spot
from zero_ds.model.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Choice:
    """A word of the true answer that is looked for: at character `start`, one of `options`."""

    start: int
    word: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Query:
    """A prompt, and, where the true answer is known, the words in it that are to be chosen.

    `turns` end with a user's turn; the placeholders in them stand for the pictures `images`, as rows of the features
    that are passed along with the query.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[int, ...] = ()
    answer: str = ""
    choices: tuple[Choice, ...] = ()
    max_new_tokens: int | None = None
    """Longest answer to this query, in tokens; else the answerer's."""


@dataclass(frozen=True)
class Reply:
    """What the model says to a query."""

    text: str
    """The greedy answer."""
    log_probs: tuple[tuple[float, ...], ...]
    """For every choice, the log-probability of each option, given the prompt and the true answer before the word."""
    begins_true: bool = False
    """Whether every token of the true answer is the most probable one behind the prompt and those before it."""


@dataclass(frozen=True)
class _Option:
    """Where one option's tokens are predicted: at `places` of sequence `sequence` (0 is the true answer)."""

    sequence: int
    places: tuple[tuple[int, int], ...]
    """(position, token): position 0 is predicted by the prompt's last token."""


_Head = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens and pictures with which prompts begin."""


@dataclass(frozen=True)
class _Task:
    """A query in tokens: `head` ends with the last image token, `tail` opens the answer."""

    number: int
    head: tuple[int, ...]
    tail: tuple[int, ...]
    images: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]
    """The true answer, and further beginnings of answers that options of several tokens need."""
    options: tuple[tuple[_Option, ...], ...]
    limit: int
    """Longest answer, in tokens."""

    @property
    def length(self) -> int:
        return len(self.tail) + len(self.sequences[0])


class Answerer:
    """A model with what it needs to answer: template, image processor, and limits."""

    def __init__(
        self, model: VisionLanguageModel, encoder: SampleEncoder, *, batch_size: int = 64, max_new_tokens: int = 32
    ) -> None:
        assert batch_size > 0 and max_new_tokens > 0
        self.reader = Reader(model)
        self.model = self.reader.model
        self.encoder = encoder
        self.template: ChatTemplate = encoder.template
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.stop = self.template.end_of_turn()
        self.device = self.reader.device

    @torch.inference_mode()
    def features(
        self, pictures: Sequence[str | Image.Image], progress: Callable[[int], object] = lambda _: None
    ) -> list[torch.Tensor]:
        """Features of these pictures, files or loaded ones: (tokens, hidden) of each, on the model's device.

        They depend on encoder and adapter only: a surrogate and the full model it was made for can share them.

        Raises:
            ImageError: a picture that cannot be read.
        """
        assert self.encoder.processor is not None and pictures
        found: list[torch.Tensor] = []
        for start in range(0, len(pictures), self.batch_size):
            views = [self.encoder.processor(open_image(each)) for each in pictures[start : start + self.batch_size]]
            tokens = self.model.image_features(torch.cat(views).to(self.device))
            found += [part.flatten(0, 1) for part in tokens.split([len(each) for each in views])]
            progress(len(views))
        return found

    def reply(self, turns: Sequence[Turn], images: Sequence[str] = ()) -> str:
        """The answer to a conversation that ends with a user's turn and has a placeholder for each picture file."""
        features = self.features(images) if images else ()
        return self.examine([Query("chat", tuple(turns), tuple(range(len(images))))], features)[0].text

    @torch.inference_mode()
    def examine(
        self,
        queries: Sequence[Query],
        features: Sequence[torch.Tensor] = (),
        progress: Callable[[int], object] = lambda _: None,
    ) -> list[Reply]:
        """Answers queries, in their order; the batch size has no influence beyond float ties.

        features: of the pictures that queries name, see `features`; `progress` is told how many more are done.

        Raises:
            DataError: a query that does not fit its pictures, its answer or the length limit, named by its id.
        """
        tasks = [self._task(number, query, features) for number, query in enumerate(queries)]
        replies: dict[int, Reply] = {}
        for window in self._windows(tasks):
            heads = list(dict.fromkeys((task.head, task.images) for task in window))
            row_of = {head: row for row, head in enumerate(heads)}
            pictures = self._read_heads(heads, features)
            for part in self._batches(window):
                answered = self._answer(part, pictures, [row_of[task.head, task.images] for task in part])
                replies.update((task.number, reply) for task, reply in zip(part, answered, strict=True))
                progress(len(part))
        return [replies[number] for number in range(len(queries))]

    # -- queries in tokens ---------------------------------------------------------------------------------------------

    def _task(self, number: int, query: Query, features: Sequence[torch.Tensor]) -> _Task:
        turns = self.encoder.turns(Sample(query.id, query.turns, ()))
        encoded = self.encoder.encode(turns, generate=True, image_tokens=[len(features[i]) for i in query.images])
        ids = tuple(encoded.input_ids)
        if encoded.images != len(query.images):
            raise DataError(f"sample {query.id} has {len(query.images)} images for {encoded.images} placeholders")
        if len(ids) > (limit := self.encoder.max_length):
            raise DataError(f"sample {query.id} has {len(ids)} tokens, more than {limit}; raise data.max_length")
        last = max((place for place, token in enumerate(ids) if token == IMAGE_TOKEN), default=0)
        sequences = [tuple(self.template.encode_text(query.answer))]
        options = [self._options(query, choice, sequences) for choice in query.choices]
        most = self.max_new_tokens if query.max_new_tokens is None else query.max_new_tokens
        return _Task(number, ids[: last + 1], ids[last + 1 :], query.images, tuple(sequences), tuple(options), most)

    def _options(self, query: Query, choice: Choice, sequences: list[tuple[int, ...]]) -> tuple[_Option, ...]:
        """Splits the options of a choice into tokens behind what all of them share with the text before the word.

        A word that goes on behind the choice (`stars` for `star`) goes on alike for every option. Options whose tokens
        depend on more than the true answer's add a sequence of their own.
        """
        end = choice.start + len(choice.word)
        if choice.start < 0 or query.answer[choice.start : end] != choice.word or choice.word not in choice.options:
            raise DataError(f"sample {query.id}: {choice.word!r} is not at {choice.start}, or not among its options")
        ending = cast(re.Match[str], re.match(r"[^\W\d_]*", query.answer[end:])).group()
        before = query.answer[: choice.start]
        texts = [self.template.encode_text(before + option + ending) for option in choice.options]
        first = _common([*texts, self.template.encode_text(before.rstrip())])
        options = []
        for ids in texts:
            given = tuple(ids[:-1])
            sequence = next((i for i, known in enumerate(sequences) if known[: len(given)] == given), len(sequences))
            if sequence == len(sequences):
                sequences.append(given)
            options.append(_Option(sequence, tuple((place, ids[place]) for place in range(first, len(ids)))))
        return tuple(options)

    def _windows(self, tasks: Sequence[_Task]) -> Iterator[list[_Task]]:
        """Tasks about `batch_size` pictures at a time, those of like length together, the longest first."""
        groups: dict[Any, list[_Task]] = {}
        for task in tasks:
            groups.setdefault((task.head, task.images), []).append(task)
        ordered = sorted(groups.values(), key=lambda group: (-len(group[0].head), -max(t.length for t in group)))
        for start in range(0, len(ordered), self.batch_size):
            yield [task for group in ordered[start : start + self.batch_size] for task in group]

    def _batches(self, window: Sequence[_Task]) -> Iterator[list[_Task]]:
        """Tasks of like length that together have `batch_size` sequences, the longest first."""
        part: list[_Task] = []
        for task in sorted(window, key=lambda task: (-task.length, task.number)):
            if part and sum(len(other.sequences) for other in [*part, task]) > self.batch_size:
                yield part
                part = []
            part.append(task)
        yield part

    # -- passes through the decoder ------------------------------------------------------------------------------------

    def _read_heads(self, heads: Sequence[_Head], features: Sequence[torch.Tensor]) -> Context:
        """Reads the beginnings of prompts with their pictures; what text all begin with is read once."""
        shared = _common([ids for ids, _ in heads])
        shared = min(shared, next((i for i, token in enumerate(heads[0][0]) if token == IMAGE_TOKEN), shared))
        context = Context(1, self.device)
        if shared:
            self.reader.extend(context, [heads[0][0][:shared]])
        context = context.rows(torch.zeros(len(heads), dtype=torch.long, device=self.device))
        pictures = [row for _, images in heads for row in images]
        chosen = torch.cat([features[row] for row in pictures]).to(self.device) if pictures else None
        self.reader.extend(context, [ids[shared:] for ids, _ in heads], chosen)
        return context

    def _answer(self, tasks: Sequence[_Task], pictures: Context, rows: Sequence[int]) -> list[Reply]:
        """One batch: the questions, then the true answers, then what the model says from its first own token on."""
        context = pictures.rows(torch.tensor(rows, device=self.device))
        hidden = self.reader.extend(context, [task.tail for task in tasks])
        last = torch.tensor([len(task.tail) - 1 for task in tasks], device=self.device)
        opening = hidden[torch.arange(len(tasks), device=self.device), last].unsqueeze(1)
        columns = context.filled.shape[1]

        numbered = [(t, s) for t, task in enumerate(tasks) for s in range(len(task.sequences))]
        numbered.sort(key=lambda pair: pair[1] > 0)  # row t is the true answer of task t
        read = [tasks[t].sequences[s] for t, s in numbered]
        owners = torch.tensor([t for t, _ in numbered], device=self.device)
        context = context.rows(owners) if len(owners) > len(tasks) else context
        hidden = torch.cat(
            [opening[owners], self.reader.extend(context, read)], dim=1
        )  # column 0 predicts the first token

        flat = torch.cat([hidden[row, : len(tokens) + 1] for row, tokens in enumerate(read)])
        starts = list(accumulate((len(tokens) + 1 for tokens in read), initial=0))
        offset = dict(zip(numbered, starts, strict=False))

        def spots(t: int, option: _Option) -> list[Spot]:
            return [(offset[t, option.sequence] + place, token) for place, token in option.places]

        wanted = {
            spot for t, task in enumerate(tasks) for choice in task.options for o in choice for spot in spots(t, o)
        }
        greedy, known = self.reader.read(flat, wanted)

        spoken, agreed = [], []
        for t, task in enumerate(tasks):
            truth, predicted = task.sequences[0], greedy[starts[t] : starts[t + 1]]
            agreed.append(next((i for i, token in enumerate(truth) if predicted[i] != token), len(truth)))
            spoken.append([*truth[: agreed[t]], predicted[agreed[t]]])
        limits = [task.limit for task in tasks]
        self._continue(spoken, limits, context, columns)
        sums = [[[sum(known[s] for s in spots(t, o)) for o in c] for c in task.options] for t, task in enumerate(tasks)]
        return [
            Reply(self._text(spoken[t][: limits[t]]), tuple(map(tuple, sums[t])), agreed[t] == len(task.sequences[0]))
            for t, task in enumerate(tasks)
        ]

    def _continue(self, spoken: list[list[int]], limits: Sequence[int], context: Context, columns: int) -> None:
        """Lengthens each answer, greedily, until it is closed or full.

        The last token of each answer is not in the context yet; of the columns behind the prompt's, a row keeps those
        of the tokens before it. Rows that are done leave the batch once they are a quarter of it.
        """

        def goes_on(row: int) -> bool:
            return spoken[row][-1] != self.stop and len(spoken[row]) < limits[row]

        active = [row for row in range(len(spoken)) if goes_on(row)]
        longest = max((len(spoken[row]) for row in active), default=0) - 1
        context.filled[:, columns:] = 0
        for row in active:
            context.filled[row, columns : columns + len(spoken[row]) - 1] = 1
        if active:
            context = context.rows(torch.tensor(active, device=self.device), columns + longest)
        rows = active
        while active:
            hidden = self.reader.extend(context, [spoken[row][-1:] for row in rows])
            following, _ = self.reader.read(hidden[:, 0])
            for row, token in zip(rows, following, strict=True):
                if goes_on(row):
                    spoken[row].append(token)
            active = [row for row in rows if goes_on(row)]
            if active and len(active) <= 0.75 * len(rows):
                kept = [place for place, row in enumerate(rows) if goes_on(row)]
                context, rows = context.rows(torch.tensor(kept, device=self.device)), active

    def _text(self, tokens: Sequence[int]) -> str:
        kept = tokens[: tokens.index(self.stop)] if self.stop in tokens else tokens
        return str(self.template.tokenizer.decode(kept, skip_special_tokens=True)).strip()


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    shortest = min(len(s) for s in sequences)
    return next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)
