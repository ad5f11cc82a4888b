# SPDX-License-Identifier: Apache-2.0
"""Chat text and pictures -> what the model reads: `input_ids`, `attention_mask`, `pixel_values`."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin


class GraftedProcessor(ProcessorMixin):
    """Pads pictures to a square with the mean colour, resizes, normalises; puts image tokens into the text.

    tokens_per_view: image tokens of one view; image_grid: tilings (rows, columns) that show large pictures in parts as
    well; before, between: the words around the image that the model was trained with.
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

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self, images: Any = None, text: Any = None, *, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """text: one prompt or several; images: one picture, or as many as all texts have places for.

        A text without a place for its picture gets one before the first user's words, with the words of training
        around it. Special tokens are those that stand in the text; none is added.

        Raises:
            ValueError: another number of pictures than places.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = _flat(images)
        places = [one.count(self.image_token) for one in texts]
        if pictures and texts and not any(places):
            if len(texts) > 1 and len(texts) != len(pictures):
                raise ValueError(f"{len(pictures)} pictures for {len(texts)} texts without a place for one")
            each = len(pictures) if len(texts) == 1 else 1
            texts, places = [self._placed(one, each) for one in texts], [each] * len(texts)
        if texts and sum(places) != len(pictures):
            raise ValueError(f"the text has {sum(places)} places ({self.image_token}) for {len(pictures)} pictures")
        data: dict[str, Any] = {}
        views = [self.views(picture) for picture in pictures]
        if texts:
            counts = iter([len(one) * self.tokens_per_view for one in views])
            expanded = []
            for one in texts:
                first, *rest = one.split(self.image_token)
                expanded.append(first + "".join(self.image_token * next(counts) + part for part in rest))
            kwargs.setdefault("add_special_tokens", False)
            options = {key: value for key, value in kwargs.items() if key in _TEXT_OPTIONS}
            encoded = self.tokenizer(expanded, **options)
            data = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if views:
            data["pixel_values"] = np.concatenate(views)
        return BatchFeature(data, tensor_type=return_tensors)

    # -- text ----------------------------------------------------------------------------------------------------------

    def _placed(self, text: str, pictures: int) -> str:
        """The prompt with so many places for pictures before the first user's words."""
        opening = self._opening()
        head, found, tail = text.partition(opening)
        if not found:
            head, opening, tail = "", "", text
        before, between = (self.before, self.between) if pictures == 1 else ("", "\n")
        return head + opening + before + self.image_token * pictures + between + tail

    def _opening(self) -> str:
        """What the chat template writes before a user's words, whatever stands before it."""
        texts = []
        for earlier in ([], [("system", "s")], [("user", "q"), ("assistant", "a")]):
            turns = [*earlier, ("user", "zq0qz")]
            messages = [{"role": role, "content": content} for role, content in turns]
            try:
                texts.append(self.apply_chat_template(messages, tokenize=False).partition("zq0qz")[0])
            except Exception:  # a template refuses roles in its own way
                continue
        opening = texts[0] if texts else ""
        while not all(text.endswith(opening) for text in texts):
            opening = opening[1:]
        return opening

    # -- pictures ------------------------------------------------------------------------------------------------------

    def views(self, picture: Any) -> np.ndarray:
        """A picture -> its views: (views, 3, size, size) float32, the whole first, then tiles row by row."""
        image, size = _rgb(picture), self.image_size
        rows, columns = self._tiling(*image.size)
        squares = [self._fitted(image, 1, 1)]
        if rows * columns > 1:
            tiled = self._fitted(image, rows, columns)
            squares += [
                tiled.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
                for row in range(rows)
                for column in range(columns)
            ]
        pixels = np.stack([np.asarray(square, dtype=np.float32) for square in squares]) / np.float32(255.0)
        mean, std = np.asarray(self.image_mean, np.float32), np.asarray(self.image_std, np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(0, 3, 1, 2))

    def _tiling(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns in which most pixels survive, of those that do the ones with the least padding."""
        best, best_key = (1, 1), (-1, 0)
        for rows, columns in [(1, 1), *self.image_grid]:
            across, down = columns * self.image_size, rows * self.image_size
            scale = min(across / width, down / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            if (key := (kept, kept - across * down)) > best_key:
                best, best_key = (rows, columns), key
        return best

    def _fitted(self, image: Image.Image, rows: int, columns: int) -> Image.Image:
        """The picture in the middle of so many squares, padded with the mean colour, resized."""
        fill = tuple(int(255 * channel) for channel in self.image_mean)
        width = max(image.width, -(-image.height * columns // rows))
        height = max(image.height, -(-image.width * rows // columns))
        if image.size != (width, height):
            padded = Image.new("RGB", (width, height), fill)
            padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            image = padded
        target = (columns * self.image_size, rows * self.image_size)
        return image if image.size == target else image.resize(target, Image.Resampling(self.resample))


_TEXT_OPTIONS = {"add_special_tokens", "padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of"}


def _flat(images: Any) -> list[Any]:
    """Pictures in the order in which they are named, out of any nesting of lists."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for part in images for picture in _flat(part)]
    return [images]


def _rgb(picture: Any) -> Image.Image:
    """An upright RGB picture out of a PIL image, an array (height, width, 3), a path or an address."""
    if isinstance(picture, str):
        picture = load_image(picture)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # sixteen bits, which convert() would cut off at 255
        values = np.asarray(image, dtype=np.float64).clip(0, 65535)
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    return image.convert("RGB")
