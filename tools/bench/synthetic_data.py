"""Makes random images and LLaVA records with the lengths of LLaVA-1.5-665K's, for measurements.

python tools/bench/synthetic_data.py OUT.json --records 665000
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from tqdm import tqdm


def draw_images(folder: Path, count: int) -> list[str]:
    """Writes JPEG files of 640 x 480 pixels with structure and noise; returns their names."""
    noise = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        fine = noise.integers(-12, 13, (480, 640, 3))
        Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg")
    return [f"{number}.jpg" for number in range(count)]


def write_records(path: Path, count: int, images: list[str], text_only: float = 0.0) -> None:
    """Writes a JSON list of `count` conversations, a share of them without an image.

    The number of turns is log-normal (1 to 12, median 2.7), answers are log-normal (median 20 words), and questions
    have 4 to 14 words.
    """
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    said = rng.choices(words, k=200_000)

    def text(length: float) -> str:
        size = max(1, min(4000, int(length)))
        start = rng.randrange(len(said) - size)
        return " ".join(said[start : start + size])

    with path.open("w", encoding="utf-8") as file:
        for number in tqdm(range(count), desc=path.name, disable=None, leave=False):
            shown = rng.random() >= text_only
            turns = []
            for turn in range(max(1, min(12, int(rng.lognormvariate(1.0, 0.7))))):
                asked = ("<image>\n" if shown and turn == 0 else "") + text(rng.randint(4, 14))
                turns.append({"from": "human", "value": asked})
                turns.append({"from": "gpt", "value": text(rng.lognormvariate(3.0, 1.1))})
            record = {"id": f"{number:09d}", "conversations": turns}
            if shown:
                record["image"] = images[number % len(images)]
            file.write("[" if number == 0 else ",\n")
            json.dump(record, file, indent=2)  # like LLaVA's own file
        file.write("]\n")


def main(
    out: Annotated[Path, typer.Argument(help="New JSON file.")],
    records: Annotated[int, typer.Option(min=1)] = 665_000,
    text_only: Annotated[float, typer.Option(min=0, max=1, help="Share of records without an image.")] = 0.06,
) -> None:
    """Write records that name images which do not exist: enough to read, to count tokens and to pack."""
    write_records(out, records, [f"{number:06d}.jpg" for number in range(100_000)], text_only)
    print(f"{out}: {records:,} records, {out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    typer.run(main)
