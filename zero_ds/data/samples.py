"""Encodes samples: a conversation with its images becomes token ids, labels and pixel values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image

from zero_ds.data.conversations import (
    IGNORE,
    IMAGE_TOKEN,
    ChatTemplate,
    EncodedConversation,
    Supervision,
    Turn,
    cut_turns,
    image_prompt,
)
from zero_ds.data.formats import DataError, TooLongError, named
from zero_ds.data.images import ImageError, ImageProcessor, image_size, open_image
from zero_ds.data.sources import Sample
from zero_ds.data.tokens import ConversationError


@dataclass(frozen=True)
class EncodedSample:
    """A sample as a micro-batch takes it; `seq` is its number of tokens."""

    id: str
    input_ids: list[int]
    """Token ids: (seq,), with IMAGE_TOKEN at image positions."""
    labels: list[int]
    """Token ids where a token carries loss, IGNORE elsewhere: (seq,)."""
    responses: list[int]
    """Number of the response that a token belongs to, or -1: (seq,)."""
    pixels: torch.Tensor
    """Views of its images: (views, 3, size, size), uint8 as the sample encoder makes them."""
    images: tuple[Image.Image, ...] = ()
    """Its images as they were read, where they are not processed (`SampleEncoder.with_raw_images`)."""
    source: int = 0
    """Number of its source among those of the run."""


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes the text and the images of a sample in the same way for training, evaluation and chat."""

    template: ChatTemplate
    supervise: Supervision
    processor: ImageProcessor | None = None
    """Image processor of the vision encoder. None in a stage without one."""
    tokens_per_image: int = 0
    """Number of image tokens for each view of an image."""
    max_length: int = 2048
    """Longest sample in tokens; longer ones lose whole turns from their end."""
    image_prompt: Literal["fixed", "random", "off"] = "fixed"
    system_prompt: str | None = None
    seed: int = 0
    vocabulary: int | None = None
    """Number of rows of the decoder's embeddings; None if it is not known."""

    def turns(self, sample: Sample) -> list[Turn]:
        """Returns the sample's turns with the configured system prompt and image prompt."""
        turns = self.with_system(sample.turns)
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", image_prompt(turns[first].text, self.image_prompt, sample.id, self.seed))
        return turns

    def with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns turns with the configured system prompt, unless they have one of their own."""
        if self.system_prompt is not None and turns[0].role != "system":
            return [Turn("system", self.system_prompt), *turns]
        return list(turns)

    def encode(
        self, turns: Sequence[Turn], generate: bool = False, image_tokens: Sequence[int] | None = None
    ) -> EncodedConversation:
        """Encodes turns as they are.

        `image_tokens` is the number of tokens of each image, where it differs from `tokens_per_image`. With `generate`
        the text ends where the assistant's answer begins.

        Raises:
            ConversationError: The chat template rejects the turns, or a token has no row in the decoder's embeddings.
        """
        encoded = self.template.encode(
            turns,
            tokens_per_image=self.tokens_per_image if image_tokens is None else image_tokens,
            supervise=self.supervise,
            generate=generate,
        )
        largest = max(encoded.input_ids, default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            token = self.template.tokenizer.convert_ids_to_tokens(largest)
            raise ConversationError(
                f"it has token {largest} ({token!r}), but the decoder's embeddings have {self.vocabulary} rows; "
                "tokenizer and weights do not belong together"
            )
        return _without_loss(encoded, turns)

    def image_tokens(self, sample: Sample) -> list[int]:
        """Returns the number of tokens of each image of a sample, reading the images' sizes only if they decide it.

        Raises:
            DataError: An image whose size cannot be read.
        """
        if self.processor is None or not self.processor.grid:
            return [self.tokens_per_image] * len(sample.images)
        try:
            views = [self.processor.views(*image_size(path)) for path in sample.images]
        except ImageError as error:
            raise DataError(f"sample {named(sample.id)}: {error}") from None
        return [count * self.tokens_per_image for count in views]

    def pixels(self, sample: Sample, images: int | None = None) -> torch.Tensor:
        """Returns the pixel values of a sample's first `images` images, or of all: (views, 3, size, size), float32.

        Raises:
            DataError: As `squares`.
        """
        squares = self.squares(sample, images)
        return squares.float() if self.processor is None else self.processor.normalized(squares)

    def squares(self, sample: Sample, images: int | None = None) -> torch.Tensor:
        """Returns the same views before they are normalised: (views, 3, size, size), uint8.

        Raises:
            DataError: An image that cannot be read, or an image in a stage without a vision encoder.
        """
        if self.processor is None:
            if sample.images:
                raise DataError(
                    f"sample {named(sample.id)} has an image, but this stage has no vision encoder; drop image samples"
                )
            return torch.zeros(0, 3, 0, 0, dtype=torch.uint8)
        try:
            views = [self.processor.squares(self.processor.open(path)) for path in sample.images[:images]]
        except ImageError as error:
            raise DataError(f"sample {named(sample.id)}: {error}") from None
        if not views:
            return torch.zeros(0, 3, self.processor.size, self.processor.size, dtype=torch.uint8)
        return views[0] if len(views) == 1 else torch.cat(views)

    def tokens(self, sample: Sample) -> EncodedConversation:
        """Encodes the text of a sample, cut to the whole turns that fit within `max_length`.

        Raises:
            TooLongError: Nothing that carries a label fits.
            DataError: The chat template rejects the sample.
        """
        encode = functools.partial(self.encode, image_tokens=self.image_tokens(sample))
        try:
            conversation = cut_turns(self.turns(sample), self.max_length, encode)
        except ConversationError as error:
            raise DataError(f"sample {named(sample.id)}: {error}") from None
        if conversation is None:
            raise TooLongError(
                f"sample {named(sample.id)} has no answer within {self.max_length} tokens; raise data.max_length"
            )
        return conversation

    def __call__(self, sample: Sample) -> EncodedSample:
        """Encodes text and images of a sample.

        Raises:
            TooLongError: As `tokens`.
            DataError: As `tokens`, or an image that cannot be read.
        """
        return self.with_pixels(sample, self.tokens(sample))

    def with_pixels(self, sample: Sample, conversation: EncodedConversation) -> EncodedSample:
        """Adds the images of a sample to what `tokens` made of its text.

        Raises:
            DataError: An image that cannot be read, or images that do not fit the image tokens.
        """
        pixels = self.squares(sample, conversation.images)
        image_tokens = conversation.input_ids.count(IMAGE_TOKEN)
        if self.processor is not None and len(pixels) * self.tokens_per_image != image_tokens:
            raise DataError(
                f"sample {named(sample.id)} has {image_tokens} image tokens for {len(pixels)} views of "
                f"{self.tokens_per_image} each; its images changed while they were read, or their headers are wrong"
            )
        return EncodedSample(sample.id, conversation.input_ids, conversation.labels, conversation.responses, pixels)

    def with_raw_images(self, sample: Sample, conversation: EncodedConversation) -> EncodedSample:
        """Adds the images of a sample as they were read, upright and in RGB, in place of pixel values.

        For vision encoders with a preprocessing of their own. The tokens are the same as with pixel values.

        Raises:
            DataError: An image that cannot be read.
        """
        try:
            read = open_image if self.processor is None else self.processor.open
            images = tuple(read(path) for path in sample.images[: conversation.images])
        except ImageError as error:
            raise DataError(f"sample {named(sample.id)}: {error}") from None
        nothing = torch.zeros(0, 3, 0, 0, dtype=torch.uint8)
        labels, responses = conversation.labels, conversation.responses
        return EncodedSample(sample.id, conversation.input_ids, labels, responses, nothing, images)


def _without_loss(encoded: EncodedConversation, turns: Sequence[Turn]) -> EncodedConversation:
    """Returns the conversation without the labels of answers that are not learned and of the tokens that close them."""
    answers = [turn.learned for turn in turns if turn.role == "assistant"]
    if all(answers):
        return encoded
    labels = [
        IGNORE if response >= 0 and not answers[response] else label
        for label, response in zip(encoded.labels, encoded.responses, strict=True)
    ]
    return replace(encoded, labels=labels)


def image_positions(input_ids: torch.Tensor) -> torch.Tensor:
    """Returns the mask of image tokens: (batch, seq), bool."""
    return input_ids == IMAGE_TOKEN
