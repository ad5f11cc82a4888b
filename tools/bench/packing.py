"""Measures the share of positions that hold a token in padded, length-grouped and packed batches of a data set.

python tools/bench/packing.py DATA.json --model MODEL --global-batch 128 --ranks 8 --micro-batch 1

It counts tokens only and opens no images. A micro-batch of one row has no padding of its own, so the other two figures
give the cost of rows of different lengths. Prints a line for each way, and writes JSON.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import ChatTemplate, EncodedConversation
from zero_ds.data.loader import Loader
from zero_ds.data.samples import EncodedSample, SampleEncoder
from zero_ds.data.sources import Records, Sample
from zero_ds.model.loading import load_tokenizer
from zero_ds.runtime.hub import local_folder


class WithoutImages(SampleEncoder):
    """A sample encoder that counts image tokens and opens no images."""

    def with_pixels(self, sample: Sample, conversation: EncodedConversation) -> EncodedSample:
        return super().with_pixels(replace(sample, images=()), conversation)


def main(
    data: Annotated[Path, typer.Argument(help="Data file.")],
    model: Annotated[str, typer.Option(help="Tokenizer and chat template of this model.")],
    global_batch: int = 128,
    ranks: int = 8,
    micro_batch: int = 1,
    max_length: int = 2048,
    tokens_per_image: int = 576,
    steps: int = 40,
    out: Path | None = None,
) -> None:
    """Measure the share of positions that hold a token."""
    template = ChatTemplate(load_tokenizer(local_folder(model)))
    encoder = WithoutImages(template, "response", None, tokens_per_image, max_length)
    records = Records([SourceConfig(path=str(data))])
    rows = []
    ways: dict[str, tuple[int, dict[str, bool]]] = {
        "padded": (micro_batch, {}),
        "padded, rows as many as packed": (max(micro_batch, 4), {}),
        "grouped": (max(micro_batch, 4), {"grouping": "length"}),
        "packed": (micro_batch, {"packing": True}),
    }
    for name, (micro, options) in ways.items():
        tokens = positions = waiting = whole = passes = 0
        loaders = [Loader(records, encoder, global_batch, micro, r, ranks, 0, 0, **options) for r in range(ranks)]
        streams = [loader.steps(0, steps) for loader in loaders]
        for _ in tqdm(range(steps), desc=name, leave=False, disable=None):
            held = [next(stream) for stream in streams]
            passes += len(held[0])
            of_step = [batch.input_ids.shape for batches in held for batch in batches]
            whole += sum(count for count, _ in of_step) * max(length for _, length in of_step)
            for simultaneous in zip(*held, strict=True):
                shapes = torch.tensor([list(batch.input_ids.shape) for batch in simultaneous])
                tokens += sum(int(batch.lengths.sum()) for batch in simultaneous)
                positions += int(shapes.prod(1).sum())
                waiting += int(shapes.prod(1).max()) * ranks
        row = {
            "way": name,
            "used": tokens / positions,
            "used_with_waiting": tokens / waiting,
            "used_as_one": tokens / whole,
            "passes": passes / steps,
        }
        rows.append({**row, "micro_batch": micro})
        print(
            f"{name:<32} {row['used']:6.1%} of positions hold a token, {row['used_with_waiting']:6.1%} counting ranks "
            f"that wait for the longest, {row['used_as_one']:6.1%} with all rows of a step as long as the longest, "
            f"{row['passes']:.1f} passes a step"
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({"data": str(data), "ranks": ranks, "global_batch": global_batch, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    typer.run(main)
