"""Draws the demo's scenes (coloured shapes and words) and asks about them: questions, captions, yes/no items."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, radians, sin

from PIL import Image, ImageDraw, ImageFont

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
"""Every colour word, for shapes and for backgrounds: an answer that names the colour of the other one is wrong."""

CANVAS = 128
"""Side of an image in pixels."""


@dataclass(frozen=True)
class Scene:
    """Content of one image. `side` is None for several shapes, `word` is None where nothing is written."""

    shape: str
    color: str
    count: int
    side: str | None
    size: str
    background: str
    word: str | None
    jitter: int
    """Seed of everything that the other attributes do not say: positions, angles, noise."""

    @property
    def noun(self) -> str:
        """Shape in the singular or the plural."""
        return self.shape if self.count == 1 else self.shape + "s"

    @property
    def phrase(self) -> str:
        """Noun phrase for the shapes: `a small red circle`, `three blue stars`."""
        if self.count == 1:
            return f"a {self.size} {self.color} {self.shape}"
        return f"{COUNTS[self.count - 1]} {self.color} {self.noun}"


def sample_scene(rng: random.Random) -> Scene:
    """Draws a scene at random. Attributes are independent of each other and uniform, except for count and word."""
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
    """Draws the scene as an RGB image of CANVAS x CANVAS pixels, always the same image for the same scene."""
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
        is_outer = tip % 2 == 0
        reach = 1.25 * radius if is_outer else 0.5 * radius
        turn = radians(angle + 36 * tip - 90)
        points.append((x + reach * cos(turn), y + reach * sin(turn)))
    return points


# --------------------------------------------------------------------------------------------------------------------
# Language: an item is a question with its answer, which is scored by one of its words.


@dataclass(frozen=True)
class Item:
    """A question about an image. The answer is `prefix + " " + word + suffix`; `choices` are the possible words."""

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
    """Returns a sentence with count or size, colour, shape, side and background: `The image shows a small red ...`."""
    where = f" on the {scene.side} of" if scene.side else " on"
    text = f", with the word {scene.word}" if scene.word else ""
    return f"The image shows {scene.phrase}{where} a {scene.background} background{text}."


def caption_items(scene: Scene, prompt: str) -> list[Item]:
    """Returns the words by which the caption is scored, each after the true words before it."""
    text = caption(scene)
    items = []
    wanted = [("color", scene.color, COLOR_WORDS), ("shape", scene.shape, SHAPES)]
    for kind, word, choices in wanted:
        start = text.index(f" {word}")
        items.append(Item(kind, prompt, text[:start], word, text[start + 1 + len(word) :], choices))
    return items


def questions(scene: Scene, rng: random.Random) -> list[Item]:
    """Returns every question that fits the scene, in random order."""
    kinds = list(QUESTIONS)
    if scene.side is None:
        kinds.remove("side")
    if scene.word is None:
        kinds.remove("word")
    rng.shuffle(kinds)
    return [QUESTIONS[kind](scene, rng) for kind in kinds]


def scene_in_words(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Returns a question about an image that is described in words instead of shown, and its answer."""
    item = rng.choice([*questions(scene, rng), None])
    if item is None:
        question, answer = rng.choice(CAPTION_PROMPTS), caption(scene)
    else:
        question, answer = item.question, item.answer
    return tell(scene, question), answer


def tell(scene: Scene, question: str) -> str:
    """Returns a question about an image that is described in words instead of shown."""
    words = caption(scene).removeprefix("The image shows ").rstrip(".")
    return f"Based on the visual elements captured in this image of {words}, {question}"
