"""Measures a data set with its images inside: first start, later starts, samples a second, and memory of each worker.

python tools/bench/image_table.py write runs/fine --samples 200000
python tools/bench/image_table.py measure runs/fine --model MODEL

The set is like FineVision's: Parquet shards with columns `images` (lists of bytes) and `texts` (pairs), written as the
library `datasets` writes them; `--webdataset` writes tar files instead. Each image has bytes of its own. The same set
is also read by `datasets` alone (`--no-plain` leaves that out); `--stream` reads shards when their turn comes, and
samples in the order of a run in place of random ones.

Samples are made ready in three ways, in turns: in the training step in the obvious way, with `datasets`, transformers'
image processor and chat template (loader.py); in the step by the loader's own code (no workers); and by the loader's
workers. Each is measured alone, and with steps that also wait for a device that computes (`--computing`, in seconds):
reading in the step adds to that time, and workers read meanwhile. Set OMP_NUM_THREADS=1 on two cores, as
launch/train.sh does.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow
import typer
from loader import in_the_step
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
records = Records([SourceConfig(path=sys.argv[1], stream="stream" in sys.argv)])
records[len(records) // 2].images[0].read()
print(json.dumps([time.perf_counter() - started, len(records)]))
"""
PLAIN_START = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import datasets
from image_table import plain_data, plain_sample
datasets.disable_progress_bars()
started = time.perf_counter()
data = plain_data(Path(sys.argv[1]), Path(os.environ["HF_DATASETS_CACHE"]))
plain_sample(data[len(data) // 2])
print(json.dumps([time.perf_counter() - started, len(data)]))
"""
BATCH = 32
"""Number of samples of a step."""
SIDE = 336
"""Side of the encoder's images, in pixels."""
TOKENS = (SIDE // 14) ** 2
"""Number of tokens of an image."""

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


def started(code: str, cache: Path, *arguments: str) -> tuple[float, int]:
    """Returns the seconds until a new process has a sample with its image, and the number of samples."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    seconds, count = json.loads(done.stdout.splitlines()[-1])
    return seconds, count


def plain_data(folder: Path, cache: Path) -> Any:
    """Returns the set as `datasets` alone reads it."""
    import datasets

    files = sorted(map(str, folder.glob("*.parquet")))
    if files:
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    files = sorted(map(str, folder.glob("*.tar")))
    data = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(cache))
    return data.cast_column("jpg", datasets.Image(decode=False))


def plain_sample(row: dict[str, Any]) -> tuple[bytes, list[dict[str, str]]]:
    """Returns the bytes of the image and the pairs of a row of `plain_data`."""
    if "jpg" in row:
        return row["jpg"]["bytes"], row["json"]["texts"]
    return row["images"][0]["bytes"], row["texts"]


def read_rate(read: Any, chosen: Sequence[int]) -> float:
    """Returns the number of samples per second that `read` gives."""
    began = time.perf_counter()
    for index in chosen:
        read(index)
    return len(chosen) / (time.perf_counter() - began)


def own_memory() -> list[float]:
    """Returns the megabytes that each child process has written and shares with no other, the largest last."""
    maps = [process.memory_maps(grouped=False) for process in psutil.Process().children()]
    return sorted(sum(part.private_dirty for part in parts) / 1e6 for parts in maps)


def step_rate(stream: Iterator[Any], steps: int, computing: float) -> float:
    """Returns the samples per second of steps that take a batch and then wait for a device that computes."""
    next(stream)  # workers have started
    began = time.perf_counter()
    for _ in range(steps):
        next(stream)
        time.sleep(computing)
    return steps * BATCH / (time.perf_counter() - began)


def obvious_steps(data: Any, tokenizer: Any) -> Iterator[int]:
    """Yields batches that are made in the step from random samples of `plain_data`."""
    from transformers import CLIPImageProcessor

    sides = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=sides)

    def samples() -> Iterator[tuple[Image.Image, list[dict[str, str]]]]:
        rng = random.Random(0)
        while True:
            content, pairs = plain_sample(data[rng.randrange(len(data))])
            messages = []
            for pair in pairs:
                messages.append({"role": "user", "content": pair["user"]})
                messages.append({"role": "assistant", "content": pair["assistant"]})
            yield Image.open(io.BytesIO(content)), messages

    return in_the_step(samples(), tokenizer, processor, BATCH, TOKENS, 2048)


@app.command()
def measure(
    folder: Annotated[Path, typer.Argument(help="Folder of the shards.")],
    model: Annotated[str, typer.Option(help="Tokenizer and chat template of this model.")],
    workers: int = 2,
    draws: int = 2_000,
    steps: int = 48,
    rounds: int = 3,
    computing: Annotated[float, typer.Option(help="Seconds for which a device computes in each step.")] = 0.1,
    plain: Annotated[bool, typer.Option(help="Also read the set with `datasets` alone.")] = True,
    stream: Annotated[bool, typer.Option(help="Read shards when their turn comes.")] = False,
    out: Path | None = None,
) -> None:
    """Measure a set that `write` has written."""
    found: dict[str, Any] = {"gigabytes": sum(file.stat().st_size for file in folder.iterdir()) / 1e9}
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        cache, how = Path(name), ["stream"] if stream else []
        found["first_start_seconds"], found["samples"] = started(START, cache, str(folder), *how)
        found["later_start_seconds"] = statistics.median(started(START, cache, str(folder), *how)[0] for _ in range(3))
        found["cache_gigabytes"] = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e9
        own, data = _records(folder, cache, stream), None
        chosen = range(draws) if stream else random.Random(0).choices(range(len(own)), k=draws)
        found["samples_per_second" if stream else "random_samples_per_second"] = read_rate(
            lambda index: [image.read() for image in own[index].images if isinstance(image, StoredImage)], chosen
        )
        if plain:
            found |= _plain(folder, cache / "plain", draws)
            data = plain_data(folder, cache / "plain")
        found |= _steps(own, data, model, workers, steps, rounds, computing)
    _report(found)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


def _records(folder: Path, cache: Path, stream: bool) -> Records:
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    return Records([SourceConfig(path=str(folder), stream=stream)])


def _plain(folder: Path, cache: Path, draws: int) -> dict[str, Any]:
    """Measures the same set as `datasets` reads it, with the bytes of images and without their pixels."""
    arguments = (str(folder), str(Path(__file__).parent))
    first, count = started(PLAIN_START, cache, *arguments)
    later = statistics.median(started(PLAIN_START, cache, *arguments)[0] for _ in range(3))
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e9
    data = plain_data(folder, cache)
    chosen = random.Random(0).choices(range(count), k=draws)
    return {
        "datasets_first_start_seconds": first,
        "datasets_later_start_seconds": later,
        "datasets_cache_gigabytes": size,
        "datasets_random_samples_per_second": read_rate(lambda index: plain_sample(data[index]), chosen),
    }


def _steps(
    records: Records, data: Any, model: str, workers: int, steps: int, rounds: int, computing: float
) -> dict[str, Any]:
    """Measures samples per second in each of the three ways, and the memory of workers."""
    tokenizer = load_tokenizer(local_folder(model))
    encode = SampleEncoder(ChatTemplate(tokenizer), "response", ImageProcessor(SIDE, [0.5] * 3, [0.5] * 3), TOKENS)

    def stream(count: int) -> Iterator[Any]:
        return Loader(records, encode, BATCH, 4, 0, 1, 0, 0, workers=count).steps(0, steps + 1)

    memory: list[float] = []
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for seconds in (0.0, computing):
            after = f"_with_{seconds:g}_s_of_computing" if seconds else ""
            if data is not None:
                obvious = step_rate(obvious_steps(data, tokenizer), max(2, steps // 4), seconds)
                rates.setdefault(f"in_the_step{after}", []).append(obvious)
            rates.setdefault(f"0_workers{after}", []).append(step_rate(stream(0), max(2, steps // 4), seconds))
            loading = stream(workers)
            rates.setdefault(f"{workers}_workers{after}", []).append(step_rate(loading, steps - 4, seconds))
            memory = max(memory, own_memory()[-workers:])
            loading.close()  # type: ignore[attr-defined]
    return {"own_megabytes_of_workers": memory, "samples_per_second_ready": rates}


def _report(found: dict[str, Any]) -> None:
    rates: dict[str, list[float]] = found["samples_per_second_ready"]
    for key, value in found.items():
        if key != "samples_per_second_ready":
            print(f"{key:40} {value if isinstance(value, list | int) else round(value, 3)}")
    for way, of_rounds in rates.items():
        base = rates.get("in_the_step" + way.partition("_workers")[2] if "_workers" in way else way, [])
        ratio = f", {statistics.median(of_rounds) / statistics.median(base):.2f} times in the step" if base else ""
        spread = f"{min(of_rounds):.0f} to {max(of_rounds):.0f}"
        print(f"{way:40} {statistics.median(of_rounds):.0f} samples/s ({spread}){ratio}")


if __name__ == "__main__":
    app()
