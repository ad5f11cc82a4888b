"""Writes the embedded demo data set: drawn images with questions, captions and yes/no items, and texts without images.

It replaces LLaVA-1.5-665K where no data set and no hub is at hand. Images are ordinary files next to an ordinary
LLaVA JSON file, so that everything that reads them also reads LLaVA's data. Held-out questions are written as
evaluation records, which name the words that an answer is scored by.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zero_ds.data.demo.scenes import (
    CAPTION_PROMPTS,
    Item,
    Scene,
    caption,
    caption_items,
    draw,
    questions,
    sample_scene,
    scene_in_words,
    tell,
)
from zero_ds.runtime.files import new_folder

TEXT_FILE = Path(__file__).parent / "texts.json"
"""File of prompts with the target's own answers, made by tools/make_demo_text.py."""


def write_demo(
    out: Path, *, train: int = 6000, heldout: int = 500, told: int = 1500, lookups: int = 400, seed: int = 0
) -> None:
    """Writes the demo data set into the new folder `out`.

    * train.json: `train` images with two or three turns each.
    * text.json: text-only conversations, of which `told` tell a scene in words.
    * heldout.json: `heldout` other images, each with one question and one caption as evaluation records
      (`evaluation/heldout/records.py`). No held-out image equals a training image.
    * trajectory.json: the text-only conversations with answers of the target.
    * lookups.json: `lookups` questions about scenes that are told in words, whose answer is one of these words
      (`trajectory/lookup.py`).

    Raises:
        ConfigError: `out` exists.
    """
    with new_folder(out) as folder:
        (folder / "images").mkdir()
        rng = random.Random(seed)
        seen: set[bytes] = set()
        _write_texts(folder, told, rng)
        _write_training(folder, train, rng, seen)
        _write_heldout(folder, heldout, rng, seen)
        _write_lookups(folder, lookups, random.Random(f"{seed} lookups"))


def _write_texts(folder: Path, told: int, rng: random.Random) -> None:
    """Writes trajectory.json and text.json."""
    answered = json.loads(TEXT_FILE.read_text(encoding="utf-8"))
    texts = [_record(f"text-{i}", [(prompt, answer)]) for i, (prompt, answer) in enumerate(answered)]
    _write(folder / "trajectory.json", texts)
    texts += [_record(f"told-{i}", [scene_in_words(sample_scene(rng), rng)]) for i in range(told)]
    rng.shuffle(texts)
    _write(folder / "text.json", texts)


def _write_training(folder: Path, count: int, rng: random.Random, seen: set[bytes]) -> None:
    """Writes train.json and its images."""
    records = []
    for name, scene in _images(folder, "train", count, rng, seen):
        turns = [(item.question, item.answer) for item in questions(scene, rng)]
        if rng.random() < 0.6:
            turns.insert(0, (rng.choice(CAPTION_PROMPTS), caption(scene)))
        record = _record(name, turns[: rng.randint(2, 3)], f"images/{name}.jpg")
        records.append({**record, "scene": asdict(scene)})
    _write(folder / "train.json", records)


def _write_heldout(folder: Path, count: int, rng: random.Random, seen: set[bytes]) -> None:
    """Writes heldout.json and its images."""
    records = []
    for name, scene in _images(folder, "heldout", count, rng, seen):
        image = f"images/{name}.jpg"
        item = rng.choice(questions(scene, rng))
        prompt = rng.choice(CAPTION_PROMPTS)
        words = caption_items(scene, prompt)
        records.append(_evaluation_record(f"{name}-question", "question", image, item.answer, [item]))
        records.append(_evaluation_record(f"{name}-caption", "caption", image, caption(scene), words))
    _write(folder / "heldout.json", records)


def _write_lookups(folder: Path, count: int, rng: random.Random) -> None:
    """Writes lookups.json. Yes/no questions are left out: they compare, and look nothing up."""
    records: list[dict[str, Any]] = []
    while len(records) < count:
        scene = sample_scene(rng)
        item = rng.choice(questions(scene, rng))
        if item.kind != "yes/no":
            word = {"kind": item.kind, "start": len(item.prefix) + 1, "word": item.word, "choices": list(item.choices)}
            name = f"lookup-{len(records)}"
            asked = {
                "id": name,
                "question": tell(scene, item.question),
                "answer": item.answer,
                "words": [word],
            }
            records.append(asked)
    _write(folder / "lookups.json", records)


def _images(folder: Path, split: str, count: int, rng: random.Random, seen: set[bytes]) -> Iterator[tuple[str, Scene]]:
    """Draws and saves images whose hash is not in `seen`, and yields their names and scenes."""
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
    """Returns a training record in LLaVA's format."""
    record: dict[str, Any] = {"id": name}
    if image:
        record["image"] = image
    record["conversations"] = []
    for number, (question, answer) in enumerate(turns):
        asked = f"<image>\n{question}" if image and number == 0 else question
        record["conversations"] += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return record


def _evaluation_record(name: str, kind: str, image: str, answer: str, items: list[Item]) -> dict[str, Any]:
    """Returns a held-out record, whose words are those of the items."""
    words = []
    for item in items:
        start = len(item.prefix) + 1 if item.prefix else 0
        words.append({"kind": item.kind, "start": start, "word": item.word, "choices": list(item.choices)})
    return {"id": name, "kind": kind, "image": image, "question": items[0].question, "answer": answer, "words": words}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
