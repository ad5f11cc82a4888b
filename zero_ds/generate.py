"""Answers about pictures: greedy generation, and the log-probability of given words, from one pass over each prompt.

Prompts are read as a tree, so that nothing is computed twice: the text that all prompts begin with, then the pictures
(once each, whoever asks about them), then the questions, then the true answers of those that have one. Reading the true
answer gives the words' log-probabilities and, in the same pass, every greedy token up to the first that differs from
it; generation goes on from there. The result is the plain greedy answer: what is predicted at a position depends on the
tokens before it alone, and a token of the true answer counts as generated only where it is the argmax.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch

from zero_ds.data.conversations import IMAGE_TOKEN, ChatTemplate, Turn
from zero_ds.data.formats import DataError
from zero_ds.data.images import open_image
from zero_ds.data.loader import SampleEncoder, image_positions
from zero_ds.data.sources import Sample
from zero_ds.model import VisionLanguageModel

LOGITS_BYTES = 64 << 20  # of float32, held at a time


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


@dataclass(frozen=True)
class Reply:
    """What the model says to a query."""

    text: str
    """The greedy answer."""
    log_probs: tuple[tuple[float, ...], ...]
    """For every choice, the log-probability of each option, given the prompt and the true answer before the word."""


@dataclass(frozen=True)
class _Option:
    """Where one option's tokens are predicted: at `places` of sequence `sequence` (0 is the true answer)."""

    sequence: int
    places: tuple[tuple[int, int], ...]
    """(position, token): position 0 is predicted by the prompt's last token."""


_Head = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens and pictures with which prompts begin."""
_Spot = tuple[int, int]
"""A row of hidden states, and a token that may follow it."""


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

    @property
    def length(self) -> int:
        return len(self.tail) + len(self.sequences[0])


class _Context:
    """Sequences as a decoder has read them: key-value cache and which of its columns belong to which row.

    Rows may have gaps anywhere: `filled` (rows, columns) is the attention mask; positions count filled columns.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()
        self.filled = torch.zeros((rows, 0), dtype=torch.long, device=device)

    def rows(self, numbers: torch.Tensor, columns: int | None = None) -> _Context:
        """A copy that holds these rows (any number of times), and of them the first `columns` columns."""
        chosen = _Context(len(numbers), self.filled.device)
        chosen.filled = self.filled[numbers, :columns]
        for number, layer in enumerate(self.cache.layers):
            keys, values = (tensor[:, :, :columns] for tensor in (cast(Any, layer).keys, cast(Any, layer).values))
            chosen.cache.update(keys.index_select(0, numbers), values.index_select(0, numbers), number)
        return chosen


class Answerer:
    """A model with what it needs to answer: template, image processor, and limits."""

    def __init__(
        self, model: VisionLanguageModel, encoder: SampleEncoder, *, batch_size: int = 64, max_new_tokens: int = 32
    ) -> None:
        assert batch_size > 0 and max_new_tokens > 0
        self.model = model.eval()
        self.encoder = encoder
        self.template: ChatTemplate = encoder.template
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.stop = self.template.end_of_turn()
        self.device = next(model.parameters()).device
        self._head: torch.nn.Module | None = None

    @torch.inference_mode()
    def features(self, paths: Sequence[str], progress: Callable[[int], object] = lambda _: None) -> list[torch.Tensor]:
        """Features of the pictures in these files: (tokens, hidden) of each, on the model's device.

        They depend on encoder and adapter only: a surrogate and the full model it was made for can share them.

        Raises:
            ImageError: a picture that cannot be read.
        """
        assert self.encoder.processor is not None and paths
        found: list[torch.Tensor] = []
        for start in range(0, len(paths), self.batch_size):
            views = [self.encoder.processor(open_image(path)) for path in paths[start : start + self.batch_size]]
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
        return _Task(number, ids[: last + 1], ids[last + 1 :], query.images, tuple(sequences), tuple(options))

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

    def _read_heads(self, heads: Sequence[_Head], features: Sequence[torch.Tensor]) -> _Context:
        """Reads the beginnings of prompts with their pictures; what text all begin with is read once."""
        shared = _common([ids for ids, _ in heads])
        shared = min(shared, next((i for i, token in enumerate(heads[0][0]) if token == IMAGE_TOKEN), shared))
        context = _Context(1, self.device)
        if shared:
            self._extend(context, [heads[0][0][:shared]])
        context = context.rows(torch.zeros(len(heads), dtype=torch.long, device=self.device))
        pictures = [row for _, images in heads for row in images]
        chosen = torch.cat([features[row] for row in pictures]).to(self.device) if pictures else None
        self._extend(context, [ids[shared:] for ids, _ in heads], chosen)
        return context

    def _extend(
        self, context: _Context, rows: Sequence[Sequence[int]], features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Appends tokens to every row of a context, padded on the right: -> hidden states (rows, longest, hidden).

        An empty context wants a token in every row: no position may attend to nothing.
        """
        longest = max(len(row) for row in rows)
        padded = [[*row, *[0] * (longest - len(row))] for row in rows]
        ids = torch.tensor(padded, dtype=torch.long, device=self.device)
        filled = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        embeddings = self.model.embed(ids, None)
        if longest == 0:
            return embeddings
        if features is not None:
            images = image_positions(ids).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(images, features.to(embeddings.dtype))
        positions = context.filled.sum(1, keepdim=True) + filled.cumsum(1) - 1
        context.filled = torch.cat([context.filled, filled], dim=1)
        backbone = getattr(self.model.decoder, self.model.family.backbone)
        cached = {"past_key_values": context.cache, "use_cache": True}
        output = backbone(inputs_embeds=embeddings, attention_mask=context.filled, position_ids=positions, **cached)
        return cast(torch.Tensor, output.last_hidden_state)

    def _answer(self, tasks: Sequence[_Task], pictures: _Context, rows: Sequence[int]) -> list[Reply]:
        """One batch: the questions, then the true answers, then what the model says from its first own token on."""
        context = pictures.rows(torch.tensor(rows, device=self.device))
        hidden = self._extend(context, [task.tail for task in tasks])
        last = torch.tensor([len(task.tail) - 1 for task in tasks], device=self.device)
        opening = hidden[torch.arange(len(tasks), device=self.device), last].unsqueeze(1)
        columns = context.filled.shape[1]

        numbered = [(t, s) for t, task in enumerate(tasks) for s in range(len(task.sequences))]
        numbered.sort(key=lambda pair: pair[1] > 0)  # row t is the true answer of task t
        read = [tasks[t].sequences[s] for t, s in numbered]
        owners = torch.tensor([t for t, _ in numbered], device=self.device)
        context = context.rows(owners) if len(owners) > len(tasks) else context
        hidden = torch.cat([opening[owners], self._extend(context, read)], dim=1)  # column 0 predicts the first token

        flat = torch.cat([hidden[row, : len(tokens) + 1] for row, tokens in enumerate(read)])
        starts = list(accumulate((len(tokens) + 1 for tokens in read), initial=0))
        offset = dict(zip(numbered, starts, strict=False))

        def spots(t: int, option: _Option) -> list[_Spot]:
            return [(offset[t, option.sequence] + place, token) for place, token in option.places]

        wanted = {
            spot for t, task in enumerate(tasks) for choice in task.options for o in choice for spot in spots(t, o)
        }
        greedy, known = self._read(flat, wanted)

        spoken = []
        for t, task in enumerate(tasks):
            truth, predicted = task.sequences[0], greedy[starts[t] : starts[t + 1]]
            agreed = next((i for i, token in enumerate(truth) if predicted[i] != token), len(truth))
            spoken.append([*truth[:agreed], predicted[agreed]])
        self._continue(spoken, context, columns)
        sums = [[[sum(known[s] for s in spots(t, o)) for o in c] for c in task.options] for t, task in enumerate(tasks)]
        return [Reply(self._text(spoken[t]), tuple(map(tuple, sums[t]))) for t in range(len(tasks))]

    def _continue(self, spoken: list[list[int]], context: _Context, columns: int) -> None:
        """Lengthens each answer, greedily, until it is closed or full.

        The last token of each answer is not in the context yet; of the columns behind the prompt's, a row keeps those
        of the tokens before it. Rows that are done leave the batch once they are a quarter of it.
        """
        active = [row for row, tokens in enumerate(spoken) if self._open(tokens)]
        longest = max((len(spoken[row]) for row in active), default=0) - 1
        context.filled[:, columns:] = 0
        for row in active:
            context.filled[row, columns : columns + len(spoken[row]) - 1] = 1
        if active:
            context = context.rows(torch.tensor(active, device=self.device), columns + longest)
        rows = active
        while active:
            hidden = self._extend(context, [spoken[row][-1:] for row in rows])
            following, _ = self._read(hidden[:, 0])
            for row, token in zip(rows, following, strict=True):
                if self._open(spoken[row]):
                    spoken[row].append(token)
            active = [row for row in rows if self._open(spoken[row])]
            if active and len(active) <= 0.75 * len(rows):
                kept = [place for place, row in enumerate(rows) if self._open(spoken[row])]
                context, rows = context.rows(torch.tensor(kept, device=self.device)), active

    def _open(self, tokens: Sequence[int]) -> bool:
        return tokens[-1] != self.stop and len(tokens) < self.max_new_tokens

    def _text(self, tokens: Sequence[int]) -> str:
        kept = tokens[: self.max_new_tokens]
        kept = kept[: kept.index(self.stop)] if self.stop in kept else kept
        return str(self.template.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    # -- logits --------------------------------------------------------------------------------------------------------

    def _read(self, hidden: torch.Tensor, wanted: Collection[_Spot] = ()) -> tuple[list[int], dict[_Spot, float]]:
        """Most probable token of every row, and the log-probability of every wanted (row, token).

        hidden: (rows, hidden). In bf16 a logit of 20 is known to 0.1 only; one position in twenty has two equal ones
        at the top, of which always the same would win: such positions, and those with wanted tokens, go through the
        head a second time, in float32.
        """
        vocabulary = cast(Any, self.model.decoder).get_input_embeddings().weight.shape[0]
        step = max(1, LOGITS_BYTES // (4 * vocabulary))
        tokens_of: dict[int, list[int]] = {}
        for row, token in wanted:
            tokens_of.setdefault(row, []).append(token)
        greedy: list[int] = []
        known: dict[_Spot, float] = {}
        for start in range(0, len(hidden), step):
            part = hidden[start : start + step]
            logits = self.model.logits(part).float()
            top = logits.topk(2, dim=1)
            best = top.indices[:, 0]
            tied = (top.values[:, 0] == top.values[:, 1]).tolist()
            asked = [row for row in range(len(part)) if start + row in tokens_of or tied[row]]
            if asked:
                rows = torch.tensor(asked, device=self.device)
                exact = self._exact_logits(part[rows]) if part.dtype != torch.float32 else logits[rows]
                best[rows] = exact.argmax(1)
                log_probs = exact.log_softmax(1).cpu()
                for place, row in enumerate(asked):
                    for token in tokens_of.get(start + row, ()):
                        known[start + row, token] = float(log_probs[place, token])
            greedy += best.tolist()
        return greedy, known

    def _exact_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits through a float32 copy of the output head."""
        decoder = cast(Any, self.model.decoder)
        head = decoder.get_output_embeddings()
        if self._head is None:
            self._head = copy.deepcopy(head).float()
        decoder.set_output_embeddings(self._head)
        try:
            return self.model.logits(hidden.float())
        finally:
            decoder.set_output_embeddings(head)


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    shortest = min(len(s) for s in sequences)
    return next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)
