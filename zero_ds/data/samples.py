"""Records -> encoded samples: token ids, labels and pixel values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zero_ds.data.conversations import (
    IMAGE_TOKEN,
    ChatTemplate,
    ConversationError,
    Encoded,
    Supervision,
    Turn,
    cut_turns,
    image_prompt,
)
from zero_ds.data.formats import DataError, TooLongError, named
from zero_ds.data.images import ImageError, ImageProcessor, image_size, open_image
from zero_ds.data.sources import Sample


@dataclass(frozen=True)
class SampleEncoder:
    """One sample -> token ids, labels and pixel values; shared by training, evaluation and chat."""

    template: ChatTemplate
    supervise: Supervision
    processor: ImageProcessor | None = None
    tokens_per_image: int = 0
    max_length: int = 2048
    image_prompt: Literal["fixed", "random", "off"] = "fixed"
    system_prompt: str | None = None
    seed: int = 0

    def turns(self, sample: Sample) -> list[Turn]:
        """The sample's turns with system prompt and image wrapper as configured."""
        turns = list(sample.turns)
        if self.system_prompt is not None and turns[0].role != "system":
            turns.insert(0, Turn("system", self.system_prompt))
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", image_prompt(turns[first].text, self.image_prompt, sample.id, self.seed))
        return turns

    def encode(
        self, turns: Sequence[Turn], generate: bool = False, image_tokens: Sequence[int] | None = None
    ) -> Encoded:
        """image_tokens: how many each picture has, where that is not `tokens_per_image`."""
        return self.template.encode(
            turns,
            tokens_per_image=self.tokens_per_image if image_tokens is None else image_tokens,
            supervise=self.supervise,
            generate=generate,
        )

    def image_tokens(self, sample: Sample) -> list[int]:
        """Image tokens of each picture of a sample; looks at their sizes where these decide.

        Raises:
            DataError: a picture whose size cannot be read.
        """
        if self.processor is None or not self.processor.grid:
            return [self.tokens_per_image] * len(sample.images)
        try:
            views = [self.processor.views(*image_size(path)) for path in sample.images]
        except ImageError as error:
            raise DataError(f"sample {named(sample.id)}: {error}") from None
        return [count * self.tokens_per_image for count in views]

    def pixels(self, sample: Sample, pictures: int | None = None) -> torch.Tensor:
        """Pixel values of the first so many pictures of a sample, or of all: (views, 3, size, size), float32.

        Raises:
            DataError: as `squares`.
        """
        squares = self.squares(sample, pictures)
        return squares.float() if self.processor is None else self.processor.normalized(squares)

    def squares(self, sample: Sample, pictures: int | None = None) -> torch.Tensor:
        """The same as bytes, which are not normalised yet: (views, 3, size, size), uint8.

        Raises:
            DataError: a picture that cannot be read, or one in a stage without an encoder.
        """
        if self.processor is None:
            if sample.images:
                raise DataError(
                    f"sample {named(sample.id)} has an image, but this stage has no vision encoder; drop image samples"
                )
            return torch.zeros(0, 3, 0, 0, dtype=torch.uint8)
        try:
            views = [self.processor.squares(open_image(path)) for path in sample.images[:pictures]]
        except ImageError as error:
            raise DataError(f"sample {named(sample.id)}: {error}") from None
        if not views:
            return torch.zeros(0, 3, self.processor.size, self.processor.size, dtype=torch.uint8)
        return views[0] if len(views) == 1 else torch.cat(views)

    def tokens(self, sample: Sample) -> Encoded:
        """The sample as ids and labels, cut to whole turns within max_length.

        Raises:
            TooLongError: nothing that carries a label fits. DataError: the chat template refuses the sample.
        """
        encode = functools.partial(self.encode, image_tokens=self.image_tokens(sample))
        try:
            encoded = cut_turns(self.turns(sample), self.max_length, encode)
        except ConversationError as error:
            raise DataError(f"sample {named(sample.id)}: {error}") from None
        if encoded is None:
            raise TooLongError(
                f"sample {named(sample.id)} has no answer within {self.max_length} tokens; raise data.max_length"
            )
        return encoded

    def __call__(self, sample: Sample) -> dict[str, Any]:
        """-> input_ids, labels, responses (lists of int), pixels (views, 3, size, size) as bytes, id.

        Raises:
            TooLongError, DataError: as `tokens`, or a picture that cannot be read.
        """
        return self.with_pixels(sample, self.tokens(sample))

    def with_pixels(self, sample: Sample, encoded: Encoded) -> dict[str, Any]:
        """What `tokens` made of a sample, and its pictures, as __call__ returns it."""
        pixels = self.squares(sample, encoded.images)
        if self.processor is not None and len(pixels) * self.tokens_per_image != encoded.input_ids.count(IMAGE_TOKEN):
            raise DataError(
                f"sample {named(sample.id)} has {encoded.input_ids.count(IMAGE_TOKEN)} image tokens for {len(pixels)} "
                f"views of {self.tokens_per_image}; its pictures changed while they were read, or their headers mislead"
            )
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "responses": encoded.responses,
            "pixels": pixels,
            "id": sample.id,
        }


def image_positions(input_ids: torch.Tensor) -> torch.Tensor:
    """Mask of the image tokens, (batch, seq)."""
    return input_ids == IMAGE_TOKEN
