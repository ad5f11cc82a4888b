"""Measures the costs of a large data file: first reading, later starts, random access, and memory of each worker.

python tools/bench/synthetic_data.py /tmp/665k.json && python tools/bench/records.py /tmp/665k.json --model MODEL

Every start is that of a new process. A worker's own memory is its private dirty pages, those that it has written and
shares with no other process, after 200 steps of the loader; pages of the mapped file belong to the page cache and are
not counted. Images are not opened, because the memory they need does not depend on the number of records.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer
from packing import WithoutImages

from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import ChatTemplate
from zero_ds.data.loader import Loader
from zero_ds.data.sources import Records
from zero_ds.model.loading import load_tokenizer
from zero_ds.runtime.hub import local_folder

START = """
import json, sys, time
from zero_ds.config.schema import SourceConfig
from zero_ds.data.sources import Records
started = time.perf_counter()
records = Records([SourceConfig(path=sys.argv[1])])
records[len(records) // 2]
print(json.dumps([time.perf_counter() - started, len(records)]))
"""


def start(data: Path, cache: Path) -> tuple[float, int]:
    """Starts a process that reads a record; returns the seconds until it has it, and the number of records."""
    done = subprocess.run(
        [sys.executable, "-c", START, str(data)],
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds, count = json.loads(done.stdout.splitlines()[-1])
    return seconds, count


def own_memory(data: Path, model: str, workers: int) -> list[float]:
    """Returns, for each worker, the megabytes that it has written and shares with no other process."""
    template = ChatTemplate(load_tokenizer(local_folder(model)))
    encoder = WithoutImages(template, "response", None, 576, 2048)
    records = Records([SourceConfig(path=str(data))])
    stream = Loader(records, encoder, 128, 8, 0, 1, 0, 0, workers=workers).steps(0, 300)
    for _ in range(200):  # a leak in a worker shows only after many steps
        next(stream)
    maps = [process.memory_maps(grouped=False) for process in psutil.Process().children()]
    found = [sum(part.private_dirty for part in parts) / 1e6 for parts in maps]
    stream.close()  # type: ignore[attr-defined]
    return sorted(found)[-workers:]


def main(
    data: Annotated[Path, typer.Argument(help="Data file.")],
    model: Annotated[str, typer.Option(help="Tokenizer and chat template of this model.")],
    workers: int = 4,
    rounds: int = 5,
    out: Path | None = None,
) -> None:
    """Measure the costs of a data file."""
    with tempfile.TemporaryDirectory() as cache:
        first, count = start(data, Path(cache))
        later = [start(data, Path(cache))[0] for _ in range(rounds)]
    records = Records([SourceConfig(path=str(data))])
    rng, rates = random.Random(0), []
    for _ in range(rounds):
        chosen = [rng.randrange(count) for _ in range(20_000)]
        began = time.perf_counter()
        for index in chosen:
            records[index]
        rates.append(len(chosen) / (time.perf_counter() - began))
    own = own_memory(data, model, workers)
    found = {
        "records": count,
        "gigabytes": data.stat().st_size / 1e9,
        "first_start_seconds": first,
        "later_start_seconds": later,
        "random_records_per_second": rates,
        "own_megabytes_of_each_worker": own,
    }
    print(f"{count:,} records, {found['gigabytes']:.2f} GB")
    print(f"first start    {first:8.1f} s, conversion included")
    print(f"later start    {statistics.median(later):8.2f} s ({min(later):.2f} to {max(later):.2f})")
    print(f"random access  {statistics.median(rates):8,.0f} records/s ({min(rates):,.0f} to {max(rates):,.0f})")
    print(f"a worker's own {max(own):8.1f} MB at most, of {workers}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
