"""Measures a data set with its images inside: first start, later starts, samples a second, and memory of each worker.

python tools/bench/image_table.py write runs/fine --samples 200000
python tools/bench/image_table.py measure runs/fine --model MODEL

The set is like FineVision's: Parquet shards with columns `images` (lists of bytes) and `texts` (pairs), written as the
library `datasets` writes them; `--webdataset` writes tar files instead, which are measured with `--no-plain`. Each
image has bytes of its own. The same set is also read by `datasets` alone.
A worker's own memory is its private dirty pages after some steps, as in records.py.
"""

from __future__ import annotations

import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow
import typer
from PIL import Image
from pyarrow import parquet
from tqdm import tqdm

from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import ChatTemplate
from zero_ds.data.images import ImageProcessor
from zero_ds.data.loader import Loader
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records
from zero_ds.data.stored import StoredImage
from zero_ds.model.loading import load_tokenizer
from zero_ds.runtime.hub import local_folder

START = """
import json, sys, time
from zero_ds.config.schema import SourceConfig
from zero_ds.data.sources import Records
started = time.perf_counter()
records = Records([SourceConfig(path=sys.argv[1])])
records[len(records) // 2].images[0].read()
print(json.dumps([time.perf_counter() - started, len(records)]))
"""
PLAIN_START = """
import datasets, glob, json, sys, time
datasets.disable_progress_bars()
started = time.perf_counter()
data = datasets.load_dataset("parquet", data_files=sorted(glob.glob(sys.argv[1] + "/*.parquet")), split="train")
data[len(data) // 2]["images"][0]["bytes"]
print(json.dumps([time.perf_counter() - started, len(data)]))
"""

app = typer.Typer()


@app.command()
def write(
    folder: Annotated[Path, typer.Argument(help="Folder of the shards.")],
    samples: int = 200_000,
    shard: int = 5_000,
    compression: str = "snappy",
    webdataset: Annotated[bool, typer.Option(help="Write tar files instead of Parquet.")] = False,
) -> None:
    """Write a set of samples, each with one image of 640 x 480 pixels and one to three pairs."""
    folder.mkdir(parents=True)
    noise, rng = np.random.default_rng(0), random.Random(0)
    pool = []
    for _ in range(64):
        coarse = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        fine = noise.integers(-8, 9, (480, 640, 3))
        buffer = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=70)
        pool.append(buffer.getvalue())
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    pair = pyarrow.struct({"user": pyarrow.string(), "assistant": pyarrow.string()})
    schema = pyarrow.schema({"images": pyarrow.list_(image), "texts": pyarrow.list_(pair), "source": pyarrow.string()})
    shards = -(-samples // shard)
    for number in tqdm(range(shards), desc="writing", unit="shard"):
        rows_of_shard = range(number * shard, min(samples, (number + 1) * shard))
        if webdataset:
            _write_tar(folder / f"train-{number:05d}-of-{shards:05d}.tar", rows_of_shard, pool, rng)
            continue
        path = folder / f"train-{number:05d}-of-{shards:05d}.parquet"
        with parquet.ParquetWriter(
            path, schema, compression=compression, use_content_defined_chunking=True, write_page_index=True
        ) as writer:
            for first in rows_of_shard[::100]:
                rows = [_row(place, pool, rng) for place in rows_of_shard if first <= place < first + 100]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _write_tar(path: Path, numbers: range, pool: list[bytes], rng: random.Random) -> None:
    with tarfile.open(path, "w") as shard:
        for number in numbers:
            row = _row(number, pool, rng)
            members = {"jpg": row["images"][0]["bytes"], "json": json.dumps({"texts": row["texts"]}).encode()}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def _row(number: int, pool: list[bytes], rng: random.Random) -> dict[str, Any]:
    content = pool[number % len(pool)] + number.to_bytes(8, "little")  # after a JPEG file's end nothing is read
    texts = [
        {"user": f"What is in part {turn} of image {number}?", "assistant": " ".join(["colours"] * rng.randint(3, 60))}
        for turn in range(rng.randint(1, 3))
    ]
    return {"images": [{"bytes": content, "path": None}], "texts": texts, "source": "synthetic"}


def started(code: str, folder: Path, cache: Path) -> tuple[float, int]:
    """Returns the seconds until a new process has a sample with its image, and the number of samples."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    seconds, count = json.loads(done.stdout.splitlines()[-1])
    return seconds, count


def random_rate(read: Any, count: int, draws: int) -> float:
    """Returns the number of samples per second that `read` gives in random order."""
    chosen = random.Random(0).choices(range(count), k=draws)
    began = time.perf_counter()
    for index in chosen:
        read(index)
    return draws / (time.perf_counter() - began)


def own_memory() -> list[float]:
    """Returns the megabytes that each child process has written and shares with no other, the largest last."""
    maps = [process.memory_maps(grouped=False) for process in psutil.Process().children()]
    return sorted(sum(part.private_dirty for part in parts) / 1e6 for parts in maps)


def loader_rate(loader: Loader, steps: int) -> tuple[float, list[float]]:
    """Returns the samples per second of a loader after its first steps, and the memory of its workers."""
    stream = loader.steps(0, steps + 4)
    for _ in range(4):
        next(stream)
    began = time.perf_counter()
    for _ in range(steps):
        next(stream)
    rate = steps * loader.global_batch / (time.perf_counter() - began)
    memory = own_memory()[-loader.workers :] if loader.workers else []
    stream.close()  # type: ignore[attr-defined]
    return rate, memory


@app.command()
def measure(
    folder: Annotated[Path, typer.Argument(help="Folder of the shards.")],
    model: Annotated[str, typer.Option(help="Tokenizer and chat template of this model.")],
    workers: int = 2,
    draws: int = 2_000,
    steps: int = 24,
    plain: Annotated[bool, typer.Option(help="Also read the set with `datasets` alone.")] = True,
    out: Path | None = None,
) -> None:
    """Measure a set that `write` has written."""
    import datasets

    found: dict[str, Any] = {"gigabytes": sum(file.stat().st_size for file in folder.iterdir()) / 1e9}
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        cache = Path(name)
        found["first_start_seconds"], found["samples"] = started(START, folder, cache)
        found["later_start_seconds"] = statistics.median(started(START, folder, cache)[0] for _ in range(3))
        found["cache_gigabytes"] = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e9
        datasets.config.HF_DATASETS_CACHE = cache
        records = Records([SourceConfig(path=str(folder))])

        def read(index: int) -> None:
            for image in records[index].images:
                assert isinstance(image, StoredImage)
                image.read()

        found["random_samples_per_second"] = random_rate(read, len(records), draws)
        template = ChatTemplate(load_tokenizer(local_folder(model)))
        encode = SampleEncoder(template, "response", ImageProcessor(336, [0.5] * 3, [0.5] * 3), 576)
        for count in (0, workers):
            loader = Loader(records, encode, 32, 4, 0, 1, 0, 0, workers=count)
            rate, memory = loader_rate(loader, steps)
            found[f"loader_samples_per_second_{count}_workers"] = rate
            found[f"own_megabytes_of_{count}_workers"] = memory
        if plain:
            found |= _plain(folder, cache / "plain", draws)
    for key, value in found.items():
        print(f"{key:40} {value if isinstance(value, list | int) else round(value, 3)}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


def _plain(folder: Path, cache: Path, draws: int) -> dict[str, Any]:
    """Measures the same set as `datasets` reads it, with the bytes of images and without their pixels."""
    import datasets

    first, count = started(PLAIN_START, folder, cache)
    later = statistics.median(started(PLAIN_START, folder, cache)[0] for _ in range(3))
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e9
    files = sorted(map(str, folder.glob("*.parquet")))
    data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    rate = random_rate(lambda index: data[index]["images"][0]["bytes"], count, draws)
    return {
        "datasets_first_start_seconds": first,
        "datasets_later_start_seconds": later,
        "datasets_cache_gigabytes": size,
        "datasets_random_samples_per_second": rate,
    }


if __name__ == "__main__":
    app()
