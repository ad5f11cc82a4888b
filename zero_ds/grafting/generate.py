"""Answers about images: greedy generation, and log-probabilities of given words, from one pass over each prompt.

Prompts are read as a tree, so that nothing is computed twice: first the text that all prompts begin with, then the
images (once each, however many questions are about them), then the questions, then the true answers of the queries that
have one. Reading the true answer yields the log-probabilities of its words and, in the same pass, every greedy token up
to the first that differs from it; generation continues from there. The result is the plain greedy answer, because the
prediction at a position depends only on the tokens before it, and a token of the true answer counts as generated only
where it is the argmax.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from zero_ds.data.conversations import IMAGE_TOKEN, ChatTemplate, Turn
from zero_ds.data.formats import DataError
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Sample
from zero_ds.model.decoding import Context, Reader, Spot
from zero_ds.model.vlm import VisionLanguageModel

SHRINK = 0.75
"""Finished rows leave a batch when at most this share of its rows is still generating."""


@dataclass(frozen=True)
class Choice:
    """A word of the true answer that the model chooses from `options`."""

    start: int
    """Position of the word's first character in the true answer."""
    word: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Query:
    """A prompt and, if the true answer is known, the words in it that are to be chosen."""

    id: str
    turns: tuple[Turn, ...]
    """Conversation that ends with a user's turn, with a placeholder for each image."""
    images: tuple[int, ...] = ()
    """Images of the placeholders, as indices into the features that are passed along with the query."""
    answer: str = ""
    choices: tuple[Choice, ...] = ()
    max_new_tokens: int | None = None
    """Longest answer in tokens; None means the limit of the Answerer."""


@dataclass(frozen=True)
class Reply:
    """The model's answer to a query."""

    text: str
    """The greedy answer."""
    log_probs: tuple[tuple[float, ...], ...]
    """Log-probability of each option of each choice, given the prompt and the true answer up to the word."""
    begins_true: bool = False
    """Whether every token of the true answer is the most probable one, given the prompt and the tokens before it."""


@dataclass(frozen=True)
class _Option:
    """The tokens that distinguish an option of a choice, and where the model predicts them."""

    sequence: int
    """Index of the task's sequence in which they are predicted; 0 is the true answer."""
    tokens: tuple[tuple[int, int], ...]
    """(position in the sequence, token). The last token of the prompt predicts position 0."""


@dataclass(frozen=True)
class _Head:
    """The beginning of a prompt, up to its last image token."""

    ids: tuple[int, ...]
    images: tuple[int, ...]
    """Indices of the images."""


@dataclass(frozen=True)
class _Task:
    """A query in tokens."""

    number: int
    """Index of the query."""
    head: _Head
    tail: tuple[int, ...]
    """Rest of the prompt, after the head."""
    sequences: tuple[tuple[int, ...], ...]
    """The true answer, then further beginnings of answers, for options that do not continue the true answer."""
    options: tuple[tuple[_Option, ...], ...]
    """The options of each choice."""
    limit: int
    """Longest answer in tokens."""

    @property
    def length(self) -> int:
        """Number of tokens after the head: the rest of the prompt and the true answer."""
        return len(self.tail) + len(self.sequences[0])


@dataclass(frozen=True)
class _Sequences:
    """Hidden states along all sequences of a batch."""

    hidden: torch.Tensor
    """(rows, hidden): one sequence after the other, each with a row for every token and one for the token after it."""
    first_row: dict[tuple[int, int], int]
    """Row that predicts the first token of a sequence, by (number of the task in the batch, number of the sequence)."""

    def spots(self, number: int, option: _Option) -> list[Spot]:
        """Returns the rows that predict the tokens of an option of task `number`, with these tokens."""
        start = self.first_row[number, option.sequence]
        return [(start + place, token) for place, token in option.tokens]

    def wanted(self, tasks: Sequence[_Task]) -> set[Spot]:
        """Returns the spots of all options of all tasks."""
        found: set[Spot] = set()
        for number, task in enumerate(tasks):
            for choice in task.options:
                for option in choice:
                    found.update(self.spots(number, option))
        return found


class Answerer:
    """Answers queries with a model. Holds what that takes: chat template, image processor and limits."""

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
        self.ends = self.template.ends()
        self.device = self.reader.device

    @torch.inference_mode()
    def features(
        self, images: Sequence[str | Image.Image], progress: Callable[[int], object] = lambda _: None
    ) -> list[torch.Tensor]:
        """Returns the features of image files or loaded images: (tokens, hidden) of each, on the model's device.

        They depend on vision encoder and adapter alone, so a surrogate and its target can share them. progress:
        function that receives the number of images that were finished since its last call.

        Raises:
            ImageError: an image that cannot be read.
        """
        assert self.encoder.processor is not None and images
        features: list[torch.Tensor] = []
        for start in range(0, len(images), self.batch_size):
            opened = [self.encoder.processor.open(image) for image in images[start : start + self.batch_size]]
            views = [self.encoder.processor(image) for image in opened]
            tokens = self.model.image_features(torch.cat(views).to(self.device))
            features += [part.flatten(0, 1) for part in tokens.split([len(each) for each in views])]
            progress(len(views))
        return features

    def reply(self, turns: Sequence[Turn], images: Sequence[str] = ()) -> str:
        """Returns the answer to a conversation that ends with a user's turn.

        images: an image file for each placeholder in the conversation.
        """
        features = self.features(images) if images else ()
        query = Query("chat", tuple(turns), tuple(range(len(images))))
        return self.examine([query], features)[0].text

    @torch.inference_mode()
    def examine(
        self,
        queries: Sequence[Query],
        features: Sequence[torch.Tensor] = (),
        progress: Callable[[int], object] = lambda _: None,
    ) -> list[Reply]:
        """Returns the replies to queries, in their order; they depend on the batch size only where floats tie.

        features: features of the images that the queries name, as `features` returns them. progress: function that
        receives the number of queries that were answered since its last call.

        Raises:
            DataError: a query that does not fit its images, its answer or the length limit; the message has its id.
        """
        tasks = [self._task(number, query, features) for number, query in enumerate(queries)]
        replies: dict[int, Reply] = {}
        for window in self._windows(tasks):
            heads = list(dict.fromkeys(task.head for task in window))
            row_of = {head: row for row, head in enumerate(heads)}
            context = self._read_heads(heads, features)
            for batch in self._batches(window):
                answered = self._answer(batch, context, [row_of[task.head] for task in batch])
                replies.update((task.number, reply) for task, reply in zip(batch, answered, strict=True))
                progress(len(batch))
        return [replies[number] for number in range(len(queries))]

    # -- queries in tokens ---------------------------------------------------------------------------------------------

    def _task(self, number: int, query: Query, features: Sequence[torch.Tensor]) -> _Task:
        turns = self.encoder.turns(Sample(query.id, query.turns, ()))
        encoded = self.encoder.encode(turns, generate=True, image_tokens=[len(features[i]) for i in query.images])
        ids = tuple(encoded.input_ids)
        if encoded.images != len(query.images):
            raise DataError(f"sample {query.id} has {len(query.images)} images for {encoded.images} placeholders")
        if len(ids) > self.encoder.max_length:
            raise DataError(
                f"sample {query.id} has {len(ids)} tokens, more than {self.encoder.max_length}; raise data.max_length"
            )
        head_length = 1 + max((place for place, token in enumerate(ids) if token == IMAGE_TOKEN), default=0)
        sequences = [tuple(self.template.encode_text(query.answer))]
        options = tuple(self._options(query, choice, sequences) for choice in query.choices)
        return _Task(
            number=number,
            head=_Head(ids[:head_length], query.images),
            tail=ids[head_length:],
            sequences=tuple(sequences),
            options=options,
            limit=self.max_new_tokens if query.max_new_tokens is None else query.max_new_tokens,
        )

    def _options(self, query: Query, choice: Choice, sequences: list[tuple[int, ...]]) -> tuple[_Option, ...]:
        """Returns the options of a choice as tokens, without those that all options share with the text before.

        If the text continues the chosen word (`stars` for `star`), it continues every option in the same way. An option
        whose tokens depend on others than the true answer's appends a sequence of its own to `sequences`.
        """
        end = choice.start + len(choice.word)
        if choice.start < 0 or query.answer[choice.start : end] != choice.word or choice.word not in choice.options:
            raise DataError(
                f"sample {query.id}: {choice.word!r} is not at character {choice.start} of the answer, or not among "
                "its options"
            )
        continuation = re.match(r"[^\W\d_]*", query.answer[end:])
        assert continuation is not None, "the pattern matches an empty text as well"
        before = query.answer[: choice.start]
        texts = [self.template.encode_text(before + option + continuation.group()) for option in choice.options]
        first = _common_length([*texts, self.template.encode_text(before.rstrip())])
        options = []
        for ids in texts:
            sequence = _find_or_append(sequences, tuple(ids[:-1]))
            options.append(_Option(sequence, tuple((place, ids[place]) for place in range(first, len(ids)))))
        return tuple(options)

    def _windows(self, tasks: Sequence[_Task]) -> Iterator[list[_Task]]:
        """Yields the tasks with `batch_size` heads at a time, longest heads first, so that lengths are similar."""
        groups: dict[_Head, list[_Task]] = {}
        for task in tasks:
            groups.setdefault(task.head, []).append(task)

        def longest_first(group: list[_Task]) -> tuple[int, int]:
            return -len(group[0].head.ids), -max(task.length for task in group)

        ordered = sorted(groups.values(), key=longest_first)
        for start in range(0, len(ordered), self.batch_size):
            yield [task for group in ordered[start : start + self.batch_size] for task in group]

    def _batches(self, window: Sequence[_Task]) -> Iterator[list[_Task]]:
        """Yields tasks that together have at most `batch_size` sequences, longest first, so that lengths are similar.

        A task with more sequences than that is a batch of its own.
        """
        batch: list[_Task] = []
        sequences = 0
        for task in sorted(window, key=lambda task: (-task.length, task.number)):
            if batch and sequences + len(task.sequences) > self.batch_size:
                yield batch
                batch, sequences = [], 0
            batch.append(task)
            sequences += len(task.sequences)
        yield batch

    # -- passes through the decoder ------------------------------------------------------------------------------------

    def _read_heads(self, heads: Sequence[_Head], features: Sequence[torch.Tensor]) -> Context:
        """Reads the heads with their images; the text that all of them begin with is read once."""
        first = heads[0].ids
        shared = _common_length([head.ids for head in heads])
        if IMAGE_TOKEN in first[:shared]:
            shared = first.index(IMAGE_TOKEN)
        context = Context(1, self.device)
        if shared:
            self.reader.extend(context, [first[:shared]])
        context = context.rows(torch.zeros(len(heads), dtype=torch.long, device=self.device))
        images = [image for head in heads for image in head.images]
        chosen = torch.cat([features[image] for image in images]).to(self.device) if images else None
        self.reader.extend(context, [head.ids[shared:] for head in heads], chosen)
        return context

    def _answer(self, tasks: Sequence[_Task], heads: Context, rows: Sequence[int]) -> list[Reply]:
        """Answers one batch: reads the questions, then the true answers, then generates from where these differ.

        heads: context of the heads; rows: row of each task's head in it.
        """
        context = heads.rows(torch.tensor(rows, device=self.device))
        hidden = self.reader.extend(context, [task.tail for task in tasks])
        last = torch.tensor([len(task.tail) - 1 for task in tasks], device=self.device)
        opening = hidden[torch.arange(len(tasks), device=self.device), last].unsqueeze(1)
        prompt_columns = context.filled.shape[1]

        context, sequences = self._read_sequences(tasks, context, opening)
        greedy, log_probs = self.reader.read(sequences.hidden, sequences.wanted(tasks))

        answers, agreed = [], []
        for number, task in enumerate(tasks):
            truth = task.sequences[0]
            start = sequences.first_row[number, 0]
            predicted = greedy[start : start + len(truth) + 1]
            same = next((place for place, token in enumerate(truth) if predicted[place] != token), len(truth))
            agreed.append(same == len(truth))
            answers.append([*truth[:same], predicted[same]])
        limits = [task.limit for task in tasks]
        self._continue_(answers, limits, context, prompt_columns)

        replies = []
        for number, task in enumerate(tasks):
            text = self._text(answers[number][: limits[number]])
            sums = []
            for choice in task.options:
                sums.append(tuple(sum(log_probs[spot] for spot in sequences.spots(number, o)) for o in choice))
            replies.append(Reply(text, tuple(sums), agreed[number]))
        return replies

    def _read_sequences(
        self, tasks: Sequence[_Task], context: Context, opening: torch.Tensor
    ) -> tuple[Context, _Sequences]:
        """Reads all sequences of a batch after its prompts. Row i of the returned context has task i's true answer.

        opening: (tasks, 1, hidden), the hidden states that predict the first token after each prompt.
        """
        numbered = [(number, 0) for number in range(len(tasks))]
        for number, task in enumerate(tasks):
            numbered += [(number, sequence) for sequence in range(1, len(task.sequences))]
        read = [tasks[number].sequences[sequence] for number, sequence in numbered]
        owners = torch.tensor([number for number, _ in numbered], device=self.device)
        if len(owners) > len(tasks):
            context = context.rows(owners)
        # column 0 predicts the first token of a sequence
        hidden = torch.cat([opening[owners], self.reader.extend(context, read)], dim=1)
        first_row, rows = {}, 0
        for key, tokens in zip(numbered, read, strict=True):
            first_row[key] = rows
            rows += len(tokens) + 1
        flat = torch.cat([hidden[row, : len(tokens) + 1] for row, tokens in enumerate(read)])
        return context, _Sequences(flat, first_row)

    def _continue_(
        self, answers: list[list[int]], limits: Sequence[int], context: Context, prompt_columns: int
    ) -> None:
        """Lengthens each answer greedily, in place, until it is closed or full.

        The last token of an answer is not in the context yet. A row of the context keeps, of its columns after the
        prompt's, those of the answer's tokens before the last.
        """

        def is_open(row: int) -> bool:
            return answers[row][-1] not in self.ends and len(answers[row]) < limits[row]

        rows = [row for row in range(len(answers)) if is_open(row)]
        if not rows:
            return
        context.filled[:, prompt_columns:] = 0
        for row in rows:
            context.filled[row, prompt_columns : prompt_columns + len(answers[row]) - 1] = 1
        longest = max(len(answers[row]) for row in rows) - 1
        context = context.rows(torch.tensor(rows, device=self.device), prompt_columns + longest)
        active = rows
        while active:
            hidden = self.reader.extend(context, [answers[row][-1:] for row in rows])
            following, _ = self.reader.read(hidden[:, 0])
            for row, token in zip(rows, following, strict=True):
                if is_open(row):
                    answers[row].append(token)
            active = [row for row in rows if is_open(row)]
            if active and len(active) <= SHRINK * len(rows):
                kept = [place for place, row in enumerate(rows) if is_open(row)]
                context = context.rows(torch.tensor(kept, device=self.device))
                rows = active

    def _text(self, tokens: Sequence[int]) -> str:
        """Returns an answer's tokens as text, up to the token that ends it."""
        return self.template.spoken(tokens)


def _find_or_append(sequences: list[tuple[int, ...]], tokens: tuple[int, ...]) -> int:
    """Returns the index of the first sequence that begins with `tokens`, after appending them if there is none."""
    for number, sequence in enumerate(sequences):
        if sequence[: len(tokens)] == tokens:
            return number
    sequences.append(tokens)
    return len(sequences) - 1


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Returns the length of the longest common beginning."""
    shortest = min(len(sequence) for sequence in sequences)
    for place in range(shortest):
        if len({sequence[place] for sequence in sequences}) > 1:
            return place
    return shortest
