"""Shows samples as the model sees them: images after padding, text with the trained tokens marked, token ids."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image

from zero_ds.data.conversations import IGNORE, IMAGE_TOKEN
from zero_ds.data.images import image_name
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Sample

THUMBNAIL = 40
"""Columns of an image in a terminal, each of one character."""
IDS_SHOWN = 64
"""Number of token ids that the terminal shows; the page has all of them."""


@dataclass(frozen=True)
class Token:
    """A token of a sample."""

    id: int
    text: str
    """Part of the decoded text; empty inside of a character that several tokens make."""
    trained: bool
    """True if it carries loss."""


@dataclass(frozen=True)
class Shown:
    """A sample as the model sees it."""

    number: int
    id: str
    tokens: tuple[Token, ...]
    """All tokens; those of images have IMAGE_TOKEN as id and no text."""
    image_names: tuple[str, ...]
    views: torch.Tensor
    """Views of its images, before they are normalised: (views, 3, size, size), uint8."""

    def summary(self) -> str:
        """Returns a line with the id and the numbers of tokens and views."""
        trained = sum(token.trained for token in self.tokens)
        of_images = sum(token.id == IMAGE_TOKEN for token in self.tokens)
        line = f"sample {self.number} ({self.id}): {len(self.tokens)} tokens, {trained} of them trained"
        return line + (f", {of_images} of {len(self.views)} views of images" if of_images else "")


def look(number: int, sample: Sample, encoder: SampleEncoder) -> Shown:
    """Encodes a sample as training does.

    Raises:
        DataError: As the sample encoder.
    """
    encoded = encoder(sample)
    ids = encoded.input_ids
    trained = [place > 0 and label != IGNORE for place, label in enumerate(encoded.labels)]
    texts = _texts(ids, encoder.template.tokenizer)
    tokens = tuple(Token(*parts) for parts in zip(ids, texts, trained, strict=True))
    names = tuple(image_name(image) for image in sample.images)
    return Shown(number, sample.id, tokens, names, encoded.pixels)


def _texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Returns each token's part of the text.

    A token is decoded after the one before it, because some tokenizers drop a blank at the beginning; the bytes of one
    character are shown at its last token.
    """
    texts = []
    start = 0
    for place, token in enumerate(ids):
        if token == IMAGE_TOKEN:
            texts.append("")
            start = place + 1
            continue
        before = max(start - 1, 0)
        before = start if ids[before] == IMAGE_TOKEN else before
        known = tokenizer.decode(ids[before:start]) if before < start else ""
        text = tokenizer.decode(ids[before : place + 1]).removeprefix(known)
        unfinished = text.endswith("\ufffd") and place - start < 4
        texts.append("" if unfinished else text)
        start = start if unfinished else place + 1
    return texts


# -- in a terminal -----------------------------------------------------------------------------------------------------


def terminal(shown: Shown, colors: bool) -> str:
    """Returns a sample as text. Trained tokens are underlined, or between « and » without `colors`."""
    lines = [shown.summary()]
    lines += [f"  image {number}: {name}" for number, name in enumerate(shown.image_names, 1)]
    if colors:
        lines += [_blocks(view) for view in shown.views]
    begin, end = ("\x1b[4;32m", "\x1b[0m") if colors else ("«", "»")
    parts = []
    for (image, trained), group in groupby(shown.tokens, key=lambda token: (token.id == IMAGE_TOKEN, token.trained)):
        members = list(group)
        text = _printable("".join(token.text for token in members))
        if image:
            parts.append(f"[image: {len(members)} tokens]")
        else:
            parts.append(f"{begin}{text}{end}" if trained else text)
    lines.append("".join(parts))
    ids = [str(token.id) for token in shown.tokens if token.id != IMAGE_TOKEN]
    more = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
    lines.append(f"ids without images: {' '.join(ids[:IDS_SHOWN])}{more}")
    return "\n".join(lines) + "\n"


def _printable(text: str) -> str:
    """Returns text from data without characters that steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _blocks(view: torch.Tensor) -> str:
    """Draws a view with two pixels in a character."""
    image = _image(view).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    pixels = np.asarray(image)
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = []
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            front, back = (";".join(map(str, color)) for color in (above, below))
            cells.append(f"\x1b[38;2;{front};48;2;{back}m\u2580")
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def _image(view: torch.Tensor) -> Image.Image:
    return Image.fromarray(view.numpy().transpose(1, 2, 0))


# -- as a page ---------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { font-size: 1rem; margin: 2.5rem 0 .5rem; border-top: 1px solid #ccc; padding-top: 1rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 13px }
.text span { border-bottom: 1px dotted #bbb } .trained { background: #cdeccd }
.image { background: #dde6f5; padding: 0 .4em } img { margin: 0 .5rem .5rem 0; border: 1px solid #ccc }
details { color: #666; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } .trained { background: #245024 } .image { background: #2a3a55 } }
"""


def page(title: str, samples: Iterable[Shown]) -> str:
    """Returns a page of samples that needs no other file. Trained tokens are coloured; each token's id is its title."""
    name = html.escape(title)
    parts = [
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{name}</title>\n<style>{STYLE}</style>',
        f"<h1>{name}</h1>\n<p>As the model sees them; tokens with loss are <span class=trained>marked</span>, and "
        "the id of a token shows under the pointer.</p>",
    ]
    for shown in samples:
        parts.append(f"<h2>{html.escape(shown.summary())}</h2>")
        images = "".join(f'<img width=224 alt="view of an image" src="{_address(view)}">' for view in shown.views)
        names = ", ".join(map(html.escape, shown.image_names))
        parts.append(f"<p>{images}<br>{names}</p>" if images else "")
        parts.append(f"<div class=text>{''.join(_spans(shown.tokens))}</div>")
        ids = " ".join(str(token.id) for token in shown.tokens if token.id != IMAGE_TOKEN)
        parts.append(f"<details><summary>token ids without images</summary>{ids}</details>")
    return "\n".join(part for part in parts if part) + "\n</html>\n"


def _spans(tokens: Sequence[Token]) -> Iterable[str]:
    for image, group in groupby(tokens, key=lambda token: token.id == IMAGE_TOKEN):
        if image:
            yield f"<b class=image>image: {len(list(group))} tokens</b>"
            continue
        for token in group:
            kind = " class=trained" if token.trained else ""
            yield f"<span{kind} title={token.id}>{html.escape(token.text)}</span>"


def _address(view: torch.Tensor) -> str:
    buffer = io.BytesIO()
    _image(view).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
