# SPDX-License-Identifier: Apache-2.0
"""Turns chat text and images into the model's inputs: `input_ids`, `attention_mask`, `pixel_values`."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from huggingface_hub import get_session
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .read_image import open_image

_TEXT_OPTIONS = {"add_special_tokens", "padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of"}
"""Arguments of a call that are passed to the tokenizer."""


class GraftedProcessor(ProcessorMixin):
    """Pads images to a square with the mean colour, resizes and normalises them, and puts image tokens into the text.

    image_token: text of the image token; in a prompt it stands for a whole image.
    tokens_per_view: number of image tokens of one view of an image.
    image_size: height and width of a view in pixels.
    image_mean, image_std: mean and standard deviation of each colour channel, for values from 0 to 1.
    resample: number of PIL's resampling filter.
    image_grid: tilings (rows, columns); in the best one of them, a large image is shown in parts as well.
    image_background: colour on which transparent parts of an image are laid.
    before, between: text that training put before an image, and between image and question.
    """

    attributes = ["tokenizer"]  # noqa: RUF012 - as transformers has it
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        tokens_per_view: int = 576,
        image_size: int = 336,
        image_mean: Any = (0.5, 0.5, 0.5),
        image_std: Any = (0.5, 0.5, 0.5),
        resample: int = 3,
        image_grid: Any = (),
        before: str = "",
        between: str = "\n",
        image_background: str = "white",
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.tokens_per_view = tokens_per_view
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resample = resample
        self.image_grid = [list(tiling) for tiling in image_grid]
        self.before = before
        self.between = between
        self.image_background = image_background

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self, images: Any = None, text: Any = None, *, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Returns the model's inputs for one prompt or several.

        text: a prompt or a list of prompts. images: an image, or as many as all prompts together have image tokens.

        Images for prompts without an image token are put before the first user's text, with the text of training around
        them. No special tokens are added, because the chat template has written them.

        Raises:
            ValueError: the number of images is not the number of image tokens.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        flat_images = _flatten(images)
        if texts:
            texts = self._with_image_tokens(texts, len(flat_images))
        views = [self.views(image) for image in flat_images]
        data: dict[str, Any] = {}
        if texts:
            tokens = [len(of_image) * self.tokens_per_view for of_image in views]
            kwargs.setdefault("add_special_tokens", False)
            options = {key: value for key, value in kwargs.items() if key in _TEXT_OPTIONS}
            encoded = self.tokenizer(self._repeat_image_tokens(texts, tokens), **options)
            data["input_ids"] = encoded["input_ids"]
            data["attention_mask"] = encoded["attention_mask"]
        if views:
            data["pixel_values"] = np.concatenate(views)
        return BatchFeature(data, tensor_type=return_tensors)

    # -- text ----------------------------------------------------------------------------------------------------------

    def _with_image_tokens(self, texts: list[str], images: int) -> list[str]:
        """Returns prompts that have an image token for each image, in all."""
        places = sum(text.count(self.image_token) for text in texts)
        if images and not places:
            if len(texts) == 1:
                return [self._insert_image_tokens(texts[0], images)]
            if len(texts) != images:
                raise ValueError(f"{images} images for {len(texts)} texts without an image token")
            return [self._insert_image_tokens(text, 1) for text in texts]
        if places != images:
            raise ValueError(f"the text has {places} image tokens ({self.image_token}) for {images} images")
        return texts

    def _insert_image_tokens(self, text: str, images: int) -> str:
        """Returns the prompt with image tokens before the first user's text."""
        opening = self._opening()
        if opening and opening in text:
            head, _, tail = text.partition(opening)
        else:
            head, opening, tail = "", "", text
        before, between = self.before, self.between
        if images > 1:
            before, between = "", "\n"
        return head + opening + before + self.image_token * images + between + tail

    def _opening(self) -> str:
        """Returns the text that the chat template writes before every user message."""
        question = "zq0qz"
        prompts = []
        for earlier in ([], [("system", "s")], [("user", "q"), ("assistant", "a")]):
            turns = [*earlier, ("user", question)]
            messages = [{"role": role, "content": content} for role, content in turns]
            try:
                prompt = self.apply_chat_template(messages, tokenize=False)
            except Exception:  # a template refuses roles in its own way
                continue
            prompts.append(prompt.partition(question)[0])
        opening = prompts[0] if prompts else ""
        while not all(prompt.endswith(opening) for prompt in prompts):
            opening = opening[1:]
        return opening

    def _repeat_image_tokens(self, texts: list[str], counts: list[int]) -> list[str]:
        """Returns the prompts with each image token repeated: `counts[i]` times for the i-th of all images."""
        repeated = []
        image = 0
        for text in texts:
            first, *rest = text.split(self.image_token)
            parts = [first]
            for part in rest:
                parts += [self.image_token * counts[image], part]
                image += 1
            repeated.append("".join(parts))
        return repeated

    # -- images --------------------------------------------------------------------------------------------------------

    def views(self, image: Any) -> np.ndarray:
        """Returns the views of an image, float32 of shape (views, 3, size, size): the whole, then tiles row by row."""
        image = open_image(_fetched(image), self.image_background)
        size = self.image_size
        rows, columns = self._tiling(image.width, image.height)
        squares = [self._fit(image, 1, 1)]
        if rows * columns > 1:
            tiled = self._fit(image, rows, columns)
            for row in range(rows):
                for column in range(columns):
                    box = (column * size, row * size, (column + 1) * size, (row + 1) * size)
                    squares.append(tiled.crop(box))
        pixels = np.stack([np.asarray(square, dtype=np.float32) for square in squares]) / np.float32(255.0)
        mean, std = np.asarray(self.image_mean, np.float32), np.asarray(self.image_std, np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(0, 3, 1, 2))

    def _tiling(self, width: int, height: int) -> tuple[int, int]:
        """Returns the rows and columns that keep most pixels of an image; among those, the ones with least padding."""
        best, best_score = (1, 1), (-1, 0)
        for rows, columns in [(1, 1), *self.image_grid]:
            tiled_width, tiled_height = columns * self.image_size, rows * self.image_size
            scale = min(tiled_width / width, tiled_height / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            score = (kept, kept - tiled_width * tiled_height)
            if score > best_score:
                best, best_score = (rows, columns), score
        return best

    def _fit(self, image: Image.Image, rows: int, columns: int) -> Image.Image:
        """Returns the image in the middle of a grid of squares, padded with the mean colour and resized."""
        fill = tuple(int(255 * channel) for channel in self.image_mean)
        # the smallest rectangle with the grid's proportions that holds the image, rounded up
        width = max(image.width, -(-image.height * columns // rows))
        height = max(image.height, -(-image.width * rows // columns))
        if image.size != (width, height):
            padded = Image.new("RGB", (width, height), fill)
            padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            image = padded
        target = (columns * self.image_size, rows * self.image_size)
        if image.size == target:
            return image
        return image.resize(target, Image.Resampling(self.resample))


def _flatten(images: Any) -> list[Any]:
    """Returns the images of nested lists in one list, in their order."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in _flatten(part)]
    return [images]


def _fetched(image: Any) -> Any:
    """Returns what `open_image` takes for one of these, for base64, an array, or an address on the web."""
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        response = get_session().get(image)
        response.raise_for_status()
        return Image.open(io.BytesIO(response.content))
    if isinstance(image, str) and len(image) > 4096 and not image.startswith("data:"):  # no path is that long
        return f"data:;base64,{image}"
    if isinstance(image, (str, os.PathLike, Image.Image)):
        return image
    return Image.fromarray(np.asarray(image))
