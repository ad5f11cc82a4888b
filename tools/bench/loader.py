"""Compares samples per second of the loader and of reading, tokenising and padding in the training step, in turns.

python tools/bench/loader.py --model MODEL --encoder ENCODER --workers 2

The second way is that of most training scripts: a list of records, images padded to squares, transformers' image
processor and chat template for every sample when the step needs it, labels by tokenising the conversation up to each
answer, and batches padded to the longest row. The data is random: JPEG images of 640 x 480 pixels, and conversations
with the lengths of LLaVA-1.5-665K's.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from synthetic_data import draw_images, write_records
from transformers import AutoImageProcessor, AutoTokenizer

from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import ChatTemplate
from zero_ds.data.images import ImageProcessor
from zero_ds.data.loader import Loader
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records


def conversations(data: Path) -> Iterator[tuple[Image.Image, list[dict[str, str]]]]:
    """Yields image and messages of each LLaVA record of a JSON list."""
    roles = {"human": "user", "gpt": "assistant"}
    for record in json.loads(data.read_text()):
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
        yield Image.open(data.parent / record["image"]), messages


def in_the_step(
    samples: Iterable[tuple[Image.Image, list[dict[str, str]]]],
    tokenizer: Any,
    processor: Any,
    batch: int,
    tokens: int,
    limit: int,
) -> Iterator[int]:
    """Makes batches in the obvious way, and yields the number of samples of each."""
    fill = tuple(int(255 * channel) for channel in processor.image_mean)
    stream = iter(samples)
    while len(chosen := list(itertools.islice(stream, batch))) == batch:
        rows = []
        for opened, messages in chosen:
            image = opened.convert("RGB")
            side = max(image.size)
            square = Image.new("RGB", (side, side), fill)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            pixels = processor(square, return_tensors="pt").pixel_values[0]
            ids: list[int] = tokenizer.apply_chat_template(messages, return_dict=False)
            labels = [-100] * len(ids)
            for number, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = tokenizer.apply_chat_template(
                        messages[:number], add_generation_prompt=True, return_dict=False
                    )
                    through = tokenizer.apply_chat_template(messages[: number + 1], return_dict=False)
                    labels[len(before) : len(through)] = ids[len(before) : len(through)]
            rows.append((([0] * tokens + ids)[:limit], ([-100] * tokens + labels)[:limit], pixels))
        longest = max(len(ids) for ids, _, _ in rows)
        torch.tensor([ids + [0] * (longest - len(ids)) for ids, _, _ in rows])
        torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels, _ in rows])
        torch.stack([pixels for _, _, pixels in rows])
        yield batch


def rate(batches: Iterator[int]) -> float:
    """Returns samples per second from before the first batch to the last, including the start of the workers."""
    started = time.perf_counter()
    count = sum(batches)
    return count / (time.perf_counter() - started)


def main(
    model: Annotated[Path, typer.Option(help="Folder with tokenizer and chat template.")],
    encoder: Annotated[Path, typer.Option(help="Folder with an image processor.")],
    size: Annotated[int, typer.Option(help="Side of the encoder's images, in pixels.")] = 336,
    batch: int = 16,
    workers: int = 2,
    samples: int = 1024,
    rounds: int = 5,
    out: Path | None = None,
) -> None:
    """Compare the loader with reading in the training step."""
    tokens, limit = (size // 14) ** 2, 2048
    found: dict[str, list[float]] = {"in the step": [], "loader, padded": [], "loader, packed": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        write_records(data, samples, draw_images(Path(folder), 64))
        processor: Any = ImageProcessor.from_folder(encoder, size)
        sides = {"height": size, "width": size}
        usual = AutoImageProcessor.from_pretrained(encoder, size={"shortest_edge": size}, crop_size=sides)
        tokenizer = AutoTokenizer.from_pretrained(model)
        template = ChatTemplate(tokenizer)
        sample_encoder = SampleEncoder(template, "response", processor, tokens, limit)
        records = Records([SourceConfig(path=str(data))])
        steps = samples // batch
        for _ in range(rounds):
            found["in the step"].append(rate(in_the_step(conversations(data), tokenizer, usual, batch, tokens, limit)))
            for name, packing in (("loader, padded", False), ("loader, packed", True)):
                loader = Loader(records, sample_encoder, batch, 4, 0, 1, 0, 0, workers=workers, packing=packing)
                found[name].append(rate(sum(len(b.ids) for b in step) for step in loader.steps(0, steps)))
    base = statistics.median(found["in the step"])
    for name, rates in found.items():
        median = statistics.median(rates)
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        print(f"{name:<16} {median:7.1f} samples/s ({spread}), {median / base:.2f} times")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"size": size, "workers": workers, "samples_per_second": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
