"""A conversation, with images if the model has a vision encoder, answered greedily and word by word.

The decoder's cache keeps everything that has been read, so a further question costs its own tokens and its answer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from zero_ds.data.conversations import IMAGE_TOKEN, PLACEHOLDER, Turn
from zero_ds.data.formats import DataError
from zero_ds.data.sources import Sample
from zero_ds.grafting.named_model import LoadedModel
from zero_ds.model.decoding import Context, Reader
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.answers import AnswerTrajectory, read_answer

INCOMPLETE = "\ufffd"
"""Character to which a tokenizer decodes the first bytes of a character whose other bytes have not come yet."""


class Conversation:
    """The turns so far, the images that they are about, and the decoder's cache of keys and values."""

    def __init__(self, loaded: LoadedModel, *, max_new_tokens: int = 256, system: str | None = None) -> None:
        """Begins a conversation.

        max_new_tokens: longest answer in tokens; system: system message, in place of the one of the model's training.

        Raises:
            ConfigError: a limit below 1.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"an answer needs room for at least 1 token, not {max_new_tokens}.")
        self.encoder = loaded.encoder
        self.max_new_tokens = max_new_tokens
        self.turns: list[Turn] = [] if system is None else [Turn("system", system)]
        self._model = loaded.model
        self._reader = Reader(loaded.model)
        self._stop = self.encoder.template.end_of_turn()
        self._images: list[torch.Tensor] = []
        """Features of all images: (tokens, hidden) of each."""
        self._new_images = 0
        """Number of images about which no question has been asked yet; they are the last ones."""
        self._read: list[int] = []
        """Token ids that the context holds."""
        self._context = Context(1, self._reader.device)
        self._last: tuple[list[int], list[int]] | None = None
        """Prompt and answer of the last question, in token ids."""

    # -- images --------------------------------------------------------------------------------------------------------

    def show(self, image: str | Path | Image.Image) -> None:
        """Adds an image, which the next question is about.

        Raises:
            ConfigError: the model has no vision encoder. ImageError: an image that cannot be read.
        """
        self.show_features(self.features(image))

    @torch.inference_mode()
    def features(self, image: str | Path | Image.Image) -> torch.Tensor:
        """Returns the features of an image: (tokens, hidden).

        They are the same for a surrogate and for the graft of the same run.

        Raises:
            ConfigError, ImageError: as `show`.
        """
        if self.encoder.processor is None:
            raise ConfigError(
                "this model has no vision encoder; name a run, with --target for its graft, or an export."
            )
        views = self.encoder.processor(self.encoder.processor.open(image)).to(self._reader.device)
        return self._model.image_features(views).flatten(0, 1)

    def show_features(self, features: torch.Tensor) -> None:
        """Adds an image by its features."""
        self._images.append(features.to(self._reader.device))
        self._new_images += 1

    def withdraw(self) -> None:
        """Removes the images about which no question has been asked."""
        del self._images[len(self._images) - self._new_images :]
        self._new_images = 0

    # -- questions and answers -----------------------------------------------------------------------------------------

    def ask(self, question: str) -> Iterator[str]:
        """Asks a question; returns an iterator over the answer, in pieces as they are generated.

        If the caller stops iterating, the answer consists of the pieces up to there. If the caller never starts, the
        question stays asked and its answer is empty.

        Raises:
            DataError: the conversation would become longer than the model's context; the question is not asked then.
        """
        typed = question.replace(PLACEHOLDER, "image")  # a typed placeholder does not stand for an image
        if self._new_images:
            typed = PLACEHOLDER * self._new_images + "\n" + typed
        before = list(self.turns)
        if self._is_unanswered():
            before.append(Turn("assistant", ""))
        asked = [*before, Turn("user", typed)]
        turns = self.encoder.turns(Sample("chat", tuple(asked), ()))
        encoded = self.encoder.encode(turns, generate=True, image_tokens=[len(features) for features in self._images])
        if len(encoded.input_ids) >= self.encoder.max_length:
            raise DataError(
                f"the conversation would have {len(encoded.input_ids)} tokens, and the model reads "
                f"{self.encoder.max_length}; begin a new one."
            )
        self.turns = asked
        self._new_images = 0
        return self._answer(encoded.input_ids)

    def unask(self) -> None:
        """Takes back the last question, whose answer must not have begun; its images wait for the next question."""
        assert self._is_unanswered()
        self._new_images += self.turns.pop().text.count(PLACEHOLDER)

    def trajectory(self) -> AnswerTrajectory:
        """Returns what each layer would have said in place of the last answer.

        Raises:
            DataError: nothing has been answered yet.
        """
        if self._last is None:
            raise DataError("no answer has been given whose trajectory could be read; ask something first.")
        prompt, answer = self._last
        return read_answer(self._reader, self._context, prompt, answer, self.encoder.template.tokenizer)

    def _is_unanswered(self) -> bool:
        return bool(self.turns) and self.turns[-1].role == "user"

    def _answer(self, ids: list[int]) -> Iterator[str]:
        """Generates the answer to a prompt and appends it to the turns, also if the caller stops iterating."""
        said = ""
        tokens: list[int] = []
        limit = min(self.max_new_tokens, self.encoder.max_length - len(ids))
        try:
            closed = False
            while not closed:
                token = self._next([*ids, *tokens])
                if token == self._stop:
                    closed = True
                    self._last = (ids, [*tokens, token])
                else:
                    tokens.append(token)
                    closed = len(tokens) >= limit
                    self._last = (ids, list(tokens))
                text = str(self.encoder.template.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
                if not closed:
                    text = text.rstrip(INCOMPLETE)
                if text.startswith(said) and text != said:
                    piece, said = text[len(said) :], text
                    yield piece
        finally:
            self.turns.append(Turn("assistant", said))

    @torch.inference_mode()
    def _next(self, ids: list[int]) -> int:
        """Returns the most probable token after `ids`; reads only those that the context does not hold already."""
        known = _common_length(self._read, ids)
        known = min(known, len(ids) - 1)  # at least one token has to be read for a prediction
        if known < len(self._read):
            self._context = self._context.rows(torch.tensor([0], device=self._reader.device), known)
        rest = ids[known:]
        features = None
        if IMAGE_TOKEN in rest:
            features_read = ids[:known].count(IMAGE_TOKEN)
            features = torch.cat(self._images)[features_read:]
        hidden = self._reader.extend(self._context, [rest], features)
        self._read = ids
        greedy, _ = self._reader.read(hidden[:, -1])
        return greedy[0]


def _common_length(first: list[int], second: list[int]) -> int:
    """Returns the number of tokens with which both lists begin."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
