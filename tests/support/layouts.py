"""Writes the same conversations about images in every layout in which people keep them."""

from __future__ import annotations

import base64
import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

LARGE_PAGES = {"data_page_size": 1 << 16, "row_group_size": 50}


def image_bytes(number: int, size: int = 40) -> bytes:
    """Returns an image file of its own for each number: PNG and JPEG in turns."""
    pixels = np.random.default_rng(number).integers(0, 255, (size, size + number % 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG" if number % 2 else "PNG")
    return buffer.getvalue()


def conversations(count: int) -> list[dict[str, Any]]:
    """Returns samples of no, one or two images (`bytes`), with one or two questions each."""
    samples = []
    for number in range(count):
        images = [image_bytes(3 * number + place) for place in range((number + 1) % 3)]
        pairs = [(f"What is {number}.{turn}?", f"It is {number * turn}.") for turn in range(1 + number % 2)]
        samples.append({"id": f"s{number}", "bytes": images, "pairs": pairs})
    return samples


def names(sample: dict[str, Any]) -> list[str]:
    """Returns the paths of a sample's images."""
    return [f"deep/{sample['id']}-{place}.img" for place in range(len(sample["bytes"]))]


def llava(sample: dict[str, Any]) -> dict[str, Any]:
    """Returns a sample in LLaVA's form, with paths."""
    turns = []
    for question, answer in sample["pairs"]:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": sample["id"], "image": names(sample), "conversations": turns}


def finevision(sample: dict[str, Any]) -> dict[str, Any]:
    """Returns a sample in FineVision's form, with bytes."""
    images = [{"bytes": content, "path": None} for content in sample["bytes"]]
    texts = [{"user": question, "assistant": answer} for question, answer in sample["pairs"]]
    return {"id": sample["id"], "images": images, "texts": texts}


def image_table(samples: Sequence[dict[str, Any]]) -> pyarrow.Table:
    """Returns samples in FineVision's form as a table."""
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    turn = pyarrow.struct({"user": pyarrow.string(), "assistant": pyarrow.string()})
    schema = pyarrow.schema({"id": pyarrow.string(), "images": pyarrow.list_(image), "texts": pyarrow.list_(turn)})
    return pyarrow.Table.from_pylist([finevision(sample) for sample in samples], schema)


def write_tables(folder: Path, shards: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Writes a Parquet file for each list of samples."""
    folder.mkdir()
    for part, samples in enumerate(shards):
        parquet.write_table(image_table(samples), folder / f"train-{part:05d}-of-{len(shards):05d}.parquet")


def write_tars(folder: Path, shards: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Writes a WebDataset shard for each list of samples."""
    folder.mkdir()
    for part, samples in enumerate(shards):
        with tarfile.open(folder / f"train-{part:05d}-of-{len(shards):05d}.tar", "w") as tar:
            for sample in samples:
                members = {f"{place}.img.jpg": content for place, content in enumerate(sample["bytes"])}
                for extension, content in {**members, "json": json.dumps(llava(sample)).encode()}.items():
                    member = tarfile.TarInfo(f"{sample['id']}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_layouts(folder: Path, samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Writes samples in every layout; returns the source of each by name."""
    found: dict[str, dict[str, Any]] = {}
    records = json.dumps([llava(sample) for sample in samples])
    contents = {n: b for sample in samples for n, b in zip(names(sample), sample["bytes"], strict=True)}

    files = folder / "files"
    (files / "deep").mkdir(parents=True)
    (files / "data.json").write_text(records)
    for name, content in contents.items():
        (files / name).write_bytes(content)
    found["files"] = {"path": str(files / "data.json")}

    packed = folder / "packed"
    packed.mkdir()
    (packed / "data.json").write_text(records)
    with tarfile.open(packed / "images.tar", "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found["tar"] = {"path": str(packed / "data.json"), "root": str(packed / "images.tar")}
    halves = list(contents.items())
    for part, chosen in enumerate((halves[::2], halves[1::2])):
        method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[part]
        with zipfile.ZipFile(packed / f"part{part}.zip", "w", method) as archive:
            for name, content in chosen:
                archive.writestr(name, content)
    found["zips"] = {"path": str(packed / "data.json"), "root": str(packed / "part*.zip")}

    middle = len(samples) // 2
    write_tars(folder / "shards", (samples[:middle], samples[middle:]))
    found["shards"] = {"path": str(folder / "shards")}

    table = image_table(samples)
    for name, options in {
        "parquet": {},
        "uncompressed": {"compression": "none"},
        "zstd, pages of version 2": {"compression": "zstd", "data_page_version": "2.0"},
        "large pages": {"compression": "snappy", "use_dictionary": False, **LARGE_PAGES},
    }.items():
        path = folder / f"{name.replace(' ', '-').replace(',', '')}.parquet"
        parquet.write_table(table, path, **{"row_group_size": 7, **options})
        found[name] = {"path": str(path)}

    hub = folder / "hub"
    (hub / "talks").mkdir(parents=True)
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: talks\n  data_files:\n  - split: train\n    path: talks/train-*\n"
        "  - split: test\n    path: talks/test-*\n---\n# Talks\n"
    )
    parquet.write_table(table.slice(0, middle), hub / "talks" / "train-00000-of-00002.parquet")
    parquet.write_table(table.slice(middle), hub / "talks" / "train-00001-of-00002.parquet")
    parquet.write_table(table.slice(0, 1), hub / "talks" / "test-00000-of-00001.parquet")
    found["hub"] = {"path": str(hub), "name": "talks", "split": "train"}

    text = [[base64.b64encode(content).decode() for content in sample["bytes"]] for sample in samples]
    addresses = [[f"data:image/png;base64,{content}" for content in of_sample] for of_sample in text]
    parquet.write_table(table.set_column(1, "images", pyarrow.array(addresses)), folder / "base64.parquet")
    found["base64"] = {"path": str(folder / "base64.parquet")}
    plain = pyarrow.array([sample["bytes"] for sample in samples], pyarrow.list_(pyarrow.large_binary()))
    parquet.write_table(table.set_column(1, "photos", plain), folder / "binary.parquet")
    found["columns"] = {"path": str(folder / "binary.parquet"), "columns": {"image": "photos"}}

    _save_to_disk(folder, samples, found)
    return found


def _save_to_disk(folder: Path, samples: Sequence[dict[str, Any]], found: dict[str, dict[str, Any]]) -> None:
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
        }
    )
    data = datasets.Dataset.from_list([finevision(sample) for sample in samples], features=features)
    datasets.disable_progress_bars()
    splits = datasets.DatasetDict({"train": data, "test": data.select(range(1))})
    splits.save_to_disk(str(folder / "saved"), num_shards={"train": 2, "test": 1})
    found["save_to_disk"] = {"path": str(folder / "saved"), "split": "train"}
    data.to_parquet(str(folder / "written.parquet"))
    found["Image features"] = {"path": str(folder / "written.parquet")}
