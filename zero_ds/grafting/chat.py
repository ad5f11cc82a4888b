"""A conversation, with pictures where the model sees, answered greedily and word by word.

What has been read stays in the decoder's cache: a further question costs its own tokens and those of its answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from zero_ds.data.conversations import IMAGE_TOKEN, PLACEHOLDER, Turn
from zero_ds.data.formats import DataError
from zero_ds.data.images import open_image
from zero_ds.data.sources import Sample
from zero_ds.grafting.named_model import LoadedModel
from zero_ds.model.decoding import Context, Reader
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.answers import AnswerTrajectory, read_answer

HALF = "\ufffd"
"""What a tokenizer decodes bytes to that are no character yet."""


class Conversation:
    """Turns so far, and the pictures that they are about."""

    def __init__(self, loaded: LoadedModel, *, max_new_tokens: int = 256, system: str | None = None) -> None:
        """system: a system message in place of the one that the model was trained with.

        Raises:
            ConfigError: a limit below 1.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"an answer of at most {max_new_tokens} tokens is none; allow at least 1.")
        self.encoder = loaded.encoder
        self.max_new_tokens = max_new_tokens
        self.turns: list[Turn] = [] if system is None else [Turn("system", system)]
        self._model = loaded.model
        self._reader = Reader(loaded.model)
        self._stop = self.encoder.template.end_of_turn()
        self._pictures: list[torch.Tensor] = []
        self._new_pictures = 0
        self._read: list[int] = []
        """Token ids that the context holds."""
        self._context = Context(1, self._reader.device)
        self._last: tuple[list[int], list[int]] | None = None
        """Prompt and answer of the last question, in token ids."""

    def show(self, picture: str | Path | Image.Image) -> None:
        """Adds a picture, which the next question is about.

        Raises:
            ConfigError: the model has no vision encoder. ImageError: a picture that cannot be read.
        """
        self.show_features(self.features(picture))

    @torch.inference_mode()
    def features(self, picture: str | Path | Image.Image) -> torch.Tensor:
        """What encoder and adapter make of a picture: (tokens, hidden).

        A surrogate and the graft of the same run make the same of it.

        Raises:
            ConfigError, ImageError: as `show`.
        """
        if self.encoder.processor is None:
            raise ConfigError(
                "this model has no vision encoder; name a run, with --target for its graft, or an export."
            )
        views = self.encoder.processor(open_image(picture)).to(self._reader.device)
        return self._model.image_features(views).flatten(0, 1)

    def show_features(self, features: torch.Tensor) -> None:
        """Adds a picture by its features."""
        self._pictures.append(features.to(self._reader.device))
        self._new_pictures += 1

    def withdraw(self) -> None:
        """Takes back the pictures that no question has been asked about."""
        del self._pictures[len(self._pictures) - self._new_pictures :]
        self._new_pictures = 0

    def unask(self) -> None:
        """Takes back the last question, whose answer has not begun; its pictures wait for the next one."""
        assert self._unanswered()
        self._new_pictures += self.turns.pop().text.count(PLACEHOLDER)

    def _unanswered(self) -> bool:
        return bool(self.turns) and self.turns[-1].role == "user"

    def ask(self, question: str) -> Iterator[str]:
        """The answer, in pieces as it is made; what was said before a caller stops listening counts as the answer.

        A question that nobody listened to at all stays asked, and its answer is empty.

        Raises:
            DataError: the conversation has become longer than the model reads; the question then was not asked.
        """
        typed = question.replace(PLACEHOLDER, "image")  # somebody's text stands for no picture
        asked = Turn("user", PLACEHOLDER * self._new_pictures + "\n" * bool(self._new_pictures) + typed)
        before = [*self.turns, *[Turn("assistant", "")] * self._unanswered()]
        turns = self.encoder.turns(Sample("chat", (*before, asked), ()))
        encoded = self.encoder.encode(turns, generate=True, image_tokens=[len(tokens) for tokens in self._pictures])
        if len(encoded.input_ids) >= self.encoder.max_length:
            raise DataError(
                f"the conversation would have {len(encoded.input_ids)} tokens, and the model reads "
                f"{self.encoder.max_length}; begin a new one."
            )
        self.turns = [*before, asked]
        self._new_pictures = 0
        return self._answer(encoded.input_ids)

    def _answer(self, ids: list[int]) -> Iterator[str]:
        said = ""
        tokens: list[int] = []
        room = min(self.max_new_tokens, self.encoder.max_length - len(ids))
        try:
            open_ended = True
            while open_ended:
                token = self._next([*ids, *tokens])
                open_ended = token != self._stop and len(tokens) + 1 < room
                tokens += [token] * (token != self._stop)
                self._last = (ids, [*tokens, *[token] * (token == self._stop)])
                text = str(self.encoder.template.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
                whole = text.rstrip(HALF) if open_ended else text  # no half of a character
                if whole.startswith(said) and whole != said:
                    piece, said = whole[len(said) :], whole
                    yield piece
        finally:
            self.turns.append(Turn("assistant", said))

    def trajectory(self) -> AnswerTrajectory:
        """Layer by layer, what would have been said in the last answer.

        Raises:
            DataError: nothing has been answered yet.
        """
        if self._last is None:
            raise DataError("there is no answer yet whose trajectory could be read; ask something first.")
        return read_answer(self._reader, self._context, *self._last, self.encoder.template.tokenizer)

    @torch.inference_mode()
    def _next(self, ids: list[int]) -> int:
        """The most probable token behind these, of which the context may hold a beginning."""
        known = next((i for i, pair in enumerate(zip(self._read, ids, strict=False)) if pair[0] != pair[1]), None)
        known = min(len(self._read), len(ids) - 1) if known is None else known
        if known < len(self._read):
            self._context = self._context.rows(torch.tensor([0], device=self._reader.device), known)
        rest = ids[known:]
        seen = sum(token == IMAGE_TOKEN for token in ids[:known])
        features = torch.cat(self._pictures)[seen:] if IMAGE_TOKEN in rest else None
        hidden = self._reader.extend(self._context, [rest], features)
        self._read = ids
        greedy, _ = self._reader.read(hidden[:, -1])
        return greedy[0]
