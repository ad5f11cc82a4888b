"""The embedded demo data set: seeded pictures of coloured shapes and words, with questions, captions and yes/no items.

It stands in for LLaVA-1.5-665K where no data set and no hub is at hand. Pictures are drawn with Pillow and written as
ordinary image files beside an ordinary LLaVA JSON file, so that everything that reads them reads LLaVA's data as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import cos, radians, sin
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from zero_ds.runtime.files import new_folder

logger = logging.getLogger(__name__)

COLORS = {
    "red": (214, 40, 40),
    "blue": (40, 80, 220),
    "green": (40, 160, 60),
    "yellow": (240, 210, 40),
    "purple": (130, 50, 170),
    "orange": (245, 130, 30),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star")
COUNTS = ("one", "two", "three", "four")
SIDES = ("left", "right")
SIZES = ("small", "large")
WORDS = ("TIME", "MAP", "CAR", "FREE", "ART", "BIG")
BACKGROUNDS = {"gray": (128, 128, 128), "pink": (250, 190, 200), "brown": (140, 95, 60), "cyan": (150, 225, 230)}
COLOR_WORDS = (*COLORS, *BACKGROUNDS)
"""Every colour word, for shapes and backgrounds alike: an answer that names the other one is wrong."""

CANVAS = 128
"""Side of a picture in pixels."""


@dataclass(frozen=True)
class Scene:
    """What is on one picture. `side` is None for several shapes, `word` is None where nothing is written."""

    shape: str
    color: str
    count: int
    side: str | None
    size: str
    background: str
    word: str | None
    jitter: int
    """Seed of everything that is not described in words: places, angles, noise."""

    @property
    def noun(self) -> str:
        return self.shape if self.count == 1 else self.shape + "s"

    @property
    def phrase(self) -> str:
        """The scene as a noun phrase: `a small red circle`, `three blue stars`."""
        if self.count == 1:
            return f"a {self.size} {self.color} {self.shape}"
        return f"{COUNTS[self.count - 1]} {self.color} {self.noun}"


def sample_scene(rng: random.Random) -> Scene:
    """Draws a scene; every attribute is uniform over its values and independent of the others."""
    count = rng.choice((1, 1, 1, 2, 3, 4))
    return Scene(
        shape=rng.choice(SHAPES),
        color=rng.choice(tuple(COLORS)),
        count=count,
        side=rng.choice(SIDES) if count == 1 else None,
        size=rng.choice(SIZES) if count == 1 else "small",
        background=rng.choice(tuple(BACKGROUNDS)),
        word=rng.choice(WORDS) if rng.random() < 0.2 else None,
        jitter=rng.getrandbits(48),
    )


def draw(scene: Scene) -> Image.Image:
    """Draws the scene as an RGB picture of CANVAS x CANVAS pixels, the same picture for the same scene."""
    rng = random.Random(scene.jitter)
    image = Image.new("RGB", (CANVAS, CANVAS), _shift(BACKGROUNDS[scene.background], rng, 14))
    pen = ImageDraw.Draw(image)
    color = _shift(COLORS[scene.color], rng, 12)
    if scene.count == 1:
        radius = rng.uniform(16, 20) if scene.size == "small" else rng.uniform(27, 31)
        quarter = CANVAS / 4 if scene.side == "left" else 3 * CANVAS / 4
        centers = [(quarter + rng.uniform(-3, 3), CANVAS * 0.42 + rng.uniform(-10, 10))]
    else:
        radius = rng.uniform(15, 19)
        cells = [(x, y) for y in (0.25, 0.67) for x in (0.27, 0.73)]
        centers = [
            (x * CANVAS + rng.uniform(-7, 7), y * CANVAS + rng.uniform(-6, 6))
            for x, y in rng.sample(cells, scene.count)
        ]
    for center in centers:
        _shape(pen, scene.shape, center, radius, rng.uniform(-15, 15), color)
    if scene.word:
        ink = (255, 255, 255) if sum(BACKGROUNDS[scene.background]) < 420 else (0, 0, 0)
        font = ImageFont.load_default(size=26)
        pen.text((CANVAS / 2, CANVAS - 16), scene.word, font=font, fill=ink, anchor="mm")
    noise = Image.frombytes("L", (CANVAS, CANVAS), rng.randbytes(CANVAS * CANVAS))
    return Image.blend(image, Image.merge("RGB", (noise, noise, noise)), 0.06)


def _shift(color: tuple[int, int, int], rng: random.Random, by: int) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, channel + rng.randint(-by, by))) for channel in color)
    return red, green, blue


def _shape(
    pen: ImageDraw.ImageDraw,
    shape: str,
    center: tuple[float, float],
    radius: float,
    angle: float,
    color: tuple[int, int, int],
) -> None:
    x, y = center
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "star":
        pen.polygon(_star(x, y, radius, angle), fill=color)
    else:
        sides = {"square": 4, "triangle": 3}[shape]
        grown = radius * {4: 1.2, 3: 1.25}[sides]
        pen.regular_polygon((x, y, grown), sides, rotation=angle, fill=color)


def _star(x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    points = []
    for tip in range(10):
        reach = radius * (1.25 if tip % 2 == 0 else 0.5)
        turn = radians(angle + 36 * tip - 90)
        points.append((x + reach * cos(turn), y + reach * sin(turn)))
    return points


# --------------------------------------------------------------------------------------------------------------------
# Language: an item is a question with its answer, of which one word is looked for.


@dataclass(frozen=True)
class Item:
    """A question about a picture. The answer is `prefix + " " + word + suffix`; `choices` are the words it could be."""

    kind: str
    question: str
    prefix: str
    word: str
    suffix: str
    choices: tuple[str, ...]

    @property
    def answer(self) -> str:
        return f"{self.prefix} {self.word}{self.suffix}".strip()


def _color(scene: Scene, rng: random.Random) -> Item:
    noun, verb = scene.noun, "is" if scene.count == 1 else "are"
    question = rng.choice(
        (f"what color {verb} the {noun}?", f"which color {'does' if verb == 'is' else 'do'} the {noun} have?")
    )
    return Item("color", question, f"The {noun} {verb}", scene.color, ".", COLOR_WORDS)


def _shape_item(scene: Scene, rng: random.Random) -> Item:
    question = rng.choice(
        ("what shape is in the picture?", "which shape do you see?", f"what is the {scene.color} shape?")
    )
    return Item("shape", question, "The shape is a", scene.shape, ".", SHAPES)


def _count(scene: Scene, rng: random.Random) -> Item:
    question = rng.choice((f"how many {scene.shape}s are there?", f"how many {scene.shape}s do you see?"))
    word = COUNTS[scene.count - 1]
    return Item("count", question, "The number of shapes is", word, ".", COUNTS)


def _side(scene: Scene, rng: random.Random) -> Item:
    question = rng.choice((f"on which side is the {scene.shape}?", f"where is the {scene.shape}, left or right?"))
    return Item("side", question, f"The {scene.shape} is on the", str(scene.side), ".", SIDES)


def _background(scene: Scene, rng: random.Random) -> Item:
    question = rng.choice(("what color is the background?", "which color does the background have?"))
    return Item("background", question, "The background is", scene.background, ".", COLOR_WORDS)


def _yes_no(scene: Scene, rng: random.Random) -> Item:
    true = rng.random() < 0.5
    if rng.random() < 0.5:
        color = scene.color if true else rng.choice([c for c in COLORS if c != scene.color])
        question, stated = f"is the color of the {scene.noun} {color}?", scene.color
        return Item("yes/no", question, "", "Yes" if true else "No", f", it is {stated}.", ("Yes", "No"))
    shape = scene.shape if true else rng.choice([s for s in SHAPES if s != scene.shape])
    return Item(
        "yes/no", f"is there a {shape}?", "", "Yes" if true else "No", f", there is a {scene.shape}.", ("Yes", "No")
    )


def _word(scene: Scene, rng: random.Random) -> Item:
    question = rng.choice(("what is written in the picture?", "which word do you read?"))
    return Item("word", question, "The word is", str(scene.word), ".", WORDS)


QUESTIONS: dict[str, Callable[[Scene, random.Random], Item]] = {
    "color": _color,
    "shape": _shape_item,
    "count": _count,
    "side": _side,
    "background": _background,
    "yes/no": _yes_no,
    "word": _word,
}

CAPTION_PROMPTS = ("describe the image briefly.", "what is shown here?", "give a short caption.")


def caption(scene: Scene) -> str:
    """One sentence that names count or size, colour, shape, side and background: `The image shows a red ...`."""
    where = f" on the {scene.side} of" if scene.side else " on"
    text = f", with the word {scene.word}" if scene.word else ""
    return f"The image shows {scene.phrase}{where} a {scene.background} background{text}."


def caption_items(scene: Scene, prompt: str) -> list[Item]:
    """The words of the caption that are looked for, each behind the true words before it."""
    text = caption(scene)
    items = []
    wanted = [("color", scene.color, COLOR_WORDS), ("shape", scene.shape, SHAPES)]
    for kind, word, choices in wanted:
        start = text.index(f" {word}")
        items.append(Item(kind, prompt, text[:start], word, text[start + 1 + len(word) :], choices))
    return items


def questions(scene: Scene, rng: random.Random) -> list[Item]:
    """Every question that fits the scene, in random order."""
    kinds = [
        k for k in QUESTIONS if not (k == "side" and scene.side is None) and not (k == "word" and scene.word is None)
    ]
    rng.shuffle(kinds)
    return [QUESTIONS[kind](scene, rng) for kind in kinds]


# --------------------------------------------------------------------------------------------------------------------
# Files: LLaVA JSON for training, the same plus the words that are looked for as held-out questions.

TEXT_FILE = Path(__file__).parent / "texts.json"
"""Prompts with the target's own answers, made by tools/make_demo_text.py."""


def scene_in_words(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question whose picture is told in words instead of shown, and its answer."""
    told = caption(scene).removeprefix("The image shows ").rstrip(".")
    item = rng.choice([*questions(scene, rng), None])
    if item is None:
        question, answer = rng.choice(CAPTION_PROMPTS), caption(scene)
    else:
        question, answer = item.question, item.answer
    return f"Based on the visual elements captured in this image of {told}, {question}", answer


def write_demo(out: Path, *, train: int = 6000, heldout: int = 500, told: int = 1500, seed: int = 0) -> None:
    """Writes the demo data set into the new folder `out`.

    train.json: `train` pictures with one to three turns each; text.json: text-only conversations, of which `told` tell
    a scene in words; heldout.json: `heldout` other pictures, each with one question and one caption as evaluation
    records (`evaluation/heldout/records.py`); trajectory.json: the text-only conversations answered by the target.
    No held-out picture equals a training picture.

    Raises:
        ConfigError: `out` exists.
    """
    with new_folder(out) as folder:
        (folder / "images").mkdir()
        rng = random.Random(seed)
        seen: set[bytes] = set()

        own = json.loads(TEXT_FILE.read_text(encoding="utf-8"))
        texts = [_record(f"text-{i}", [(prompt, answer)]) for i, (prompt, answer) in enumerate(own)]
        _write(folder / "trajectory.json", texts)
        texts += [_record(f"told-{i}", [scene_in_words(sample_scene(rng), rng)]) for i in range(told)]
        rng.shuffle(texts)
        _write(folder / "text.json", texts)

        records = []
        for name, scene in _pictures(folder, "train", train, rng, seen):
            turns = [(item.question, item.answer) for item in questions(scene, rng)]
            if rng.random() < 0.6:
                turns.insert(0, (rng.choice(CAPTION_PROMPTS), caption(scene)))
            record = _record(name, turns[: rng.randint(2, 3)], f"images/{name}.jpg")
            records.append({**record, "scene": asdict(scene)})
        _write(folder / "train.json", records)

        items = []
        for name, scene in _pictures(folder, "heldout", heldout, rng, seen):
            item = rng.choice(questions(scene, rng))
            prompt = rng.choice(CAPTION_PROMPTS)
            items.append(_evaluation_record(f"{name}-question", "question", f"images/{name}.jpg", item.answer, [item]))
            items.append(
                _evaluation_record(
                    f"{name}-caption", "caption", f"images/{name}.jpg", caption(scene), caption_items(scene, prompt)
                )
            )
        _write(folder / "heldout.json", items)


def _pictures(
    folder: Path, split: str, count: int, rng: random.Random, seen: set[bytes]
) -> Iterator[tuple[str, Scene]]:
    """Draws and saves pictures that are not in `seen`, and yields their names and scenes."""
    written = 0
    while written < count:
        scene = sample_scene(rng)
        image = draw(scene)
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        name = f"{split}-{written:05d}"
        image.save(folder / "images" / f"{name}.jpg", quality=92)
        yield name, scene
        written += 1


def _record(name: str, turns: list[tuple[str, str]], image: str | None = None) -> dict[str, Any]:
    conversations = []
    for number, (question, answer) in enumerate(turns):
        asked = f"<image>\n{question}" if image and number == 0 else question
        conversations += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": conversations}


def _evaluation_record(name: str, kind: str, image: str, answer: str, items: list[Item]) -> dict[str, Any]:
    words = [
        {"kind": i.kind, "start": len(i.prefix) + bool(i.prefix), "word": i.word, "choices": list(i.choices)}
        for i in items
    ]
    return {"id": name, "kind": kind, "image": image, "question": items[0].question, "answer": answer, "words": words}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
