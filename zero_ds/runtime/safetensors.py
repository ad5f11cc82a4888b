"""Copies tensors from safetensors files to safetensors files under other names, byte for byte.

A tensor that cannot be copied, since it is cast or merged, is made in blocks while it is written (`Computed`).

A surrogate of a 70B model is 75 GB of unchanged tensors. Nothing of them is ever decoded: what is read of a source is
its header, what is written is a header and ranges of the source's bytes, copied by the kernel. So the memory needed is
that of the headers, whatever the size of the largest tensor. Files are opened with the safetensors library before and
after, which checks that header and size agree.

Format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, little endian; the header, JSON; data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from tqdm import tqdm

from zero_ds.runtime.errors import ConfigError

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights that are not quantized, as safetensors names them."""
SHARD_BYTES = 2 << 30
WRITERS = 2
"""Shards written at a time."""
BLOCK = 32 << 20
"""Bytes between two updates of the progress bar, and looks at whether to stop."""


@dataclass(frozen=True)
class Span:
    """A tensor's bytes in a file."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Computed:
    """A tensor of which the bytes are made when they are written."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    blocks: Callable[[], Iterable[Any]]
    """Its bytes from the first to the last, in pieces that know the buffer protocol; made anew at every call."""

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


Tensor = Span | Computed


def spans(file: Path) -> dict[str, Span]:
    """Where every tensor of a safetensors file lies.

    Raises:
        ConfigError: the file is truncated or no safetensors file.
    """
    from safetensors import safe_open

    try:
        if file.exists() and not file.is_file():
            raise OSError("it is no regular file")  # a pipe would be waited for
        with safe_open(file, framework="pt"):
            pass  # the library checks the header against the file's size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except Exception as error:
        raise ConfigError(f"shard {file} cannot be read ({error}); fetch the model again.") from None
    header.pop("__metadata__", None)
    return {
        name: Span(
            file,
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            entry["dtype"],
            tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }


def locate(tensors: dict[str, Stored]) -> dict[str, Span]:
    """The bytes of tensors by the names they go under.

    Raises:
        ConfigError: an unreadable file, or one that lacks a tensor which the index places in it.
    """
    files = {file: spans(file) for file in sorted({stored.file for stored in tensors.values()})}
    for stored in tensors.values():
        if stored.name not in files[stored.file]:
            raise ConfigError(f"shard {stored.file} lacks {stored.name}, which the index names; fetch the model again.")
    return {name: files[stored.file][stored.name] for name, stored in tensors.items()}


def write_shards(tensors: Sequence[tuple[str, Tensor]], out: Path, shard_bytes: int | None = None) -> None:
    """Writes (name, bytes) into the existing folder `out`: model.safetensors, or numbered shards with their index.

    shard_bytes: size of a shard, which only a single tensor may exceed; None: SHARD_BYTES.

    Raises:
        ConfigError: a source became shorter than its header says.
        OSError: the disk is full.
    """
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, span in tensors:
        if shards[-1] and size + span.size > (SHARD_BYTES if shard_bytes is None else shard_bytes):
            shards.append([])
            size = 0
        shards[-1].append((name, span))
        size += span.size
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    total = sum(span.size for _, span in tensors)
    with tqdm(total=total, desc="copying", unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        stop = Event()
        with ThreadPoolExecutor(WRITERS) as pool:
            written = [
                pool.submit(_write_shard, shard, out / file, bar, stop)
                for file, shard in zip(files, shards, strict=True)
            ]
            try:
                for one in as_completed(written):
                    one.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total, "total_parameters": sum(span.parameters for _, span in tensors)},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(shard: Sequence[tuple[str, Tensor]], path: Path, bar: Any, stop: Event) -> None:
    # wide types first, so that every tensor lies at a multiple of its type's width, as the format wants
    ordered = sorted(shard, key=lambda item: -item[1].size / max(1, item[1].parameters))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, span in ordered:
        header[name] = {"dtype": span.dtype, "shape": list(span.shape), "data_offsets": [end, end + span.size]}
        end += span.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        target.flush()
        source, opened = None, None
        try:
            for _, span in ordered:
                if isinstance(span, Computed):
                    _make(target, span, bar, stop)
                    continue
                if opened != span.file:
                    if source is not None:
                        source.close()
                    source, opened = span.file.open("rb"), span.file
                assert source is not None
                _copy(source, target, span, bar, stop)
        finally:
            if source is not None:
                source.close()
    if not stop.is_set():
        spans(path)


def _copy(source: Any, target: Any, span: Span, bar: Any, stop: Event) -> None:
    """Copies a tensor's bytes behind what the target holds; breaks off where another writer failed."""
    start, left = span.start, span.size
    while left and not stop.is_set():
        try:
            done = os.copy_file_range(source.fileno(), target.fileno(), min(left, BLOCK), start)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _NO_SPACE:
                raise
            done = _copy_in_memory(source, target, start, min(left, BLOCK))  # across file systems, or not on Linux
        if not done:
            raise ConfigError(f"shard {span.file} ended early; fetch the model again.")
        start, left = start + done, left - done
        bar.update(done)


def _make(target: Any, tensor: Computed, bar: Any, stop: Event) -> None:
    left = tensor.size
    for block in tensor.blocks():
        if stop.is_set():
            return
        size = memoryview(block).nbytes
        _put(target, block)
        left -= size
        bar.update(size)
    assert left == 0, f"a tensor of {tensor.size} bytes was made with {tensor.size - left}"


_NO_SPACE = (28, 122)


def _copy_in_memory(source: Any, target: Any, start: int, size: int) -> int:
    block = os.pread(source.fileno(), size, start)
    _put(target, block)
    return len(block)


def _put(target: Any, block: Any) -> None:
    view = memoryview(block).cast("B")
    while view:
        view = view[os.write(target.fileno(), view) :]


def content_hash(span: Span) -> str:
    """SHA-256 of a tensor's bytes, type and shape; the same wherever they lie."""
    digest = hashlib.sha256(f"{span.dtype}{span.shape}".encode())
    with span.file.open("rb") as handle:
        handle.seek(span.start)
        left = span.size
        while left:
            block = handle.read(min(left, BLOCK))
            if not block:
                raise ConfigError(f"{span.file} ended early; fetch the model again.")
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()[:32]


def same_bytes(left: Span, right: Span, bar: Any = None) -> bool:
    """Whether two tensors are of one type and shape and equal byte for byte; blocks of both are read in turn.

    bar: a progress bar that counts bytes.

    Raises:
        ConfigError: a file that ends before the tensor does.
    """
    if (left.dtype, left.shape, left.size) != (right.dtype, right.shape, right.size):
        return False
    with left.file.open("rb") as mine, right.file.open("rb") as theirs:
        mine.seek(left.start)
        theirs.seek(right.start)
        remaining = left.size
        while remaining:
            a, b = mine.read(min(remaining, BLOCK)), theirs.read(min(remaining, BLOCK))
            if not a or len(a) != len(b):
                ended = left.file if len(a) <= len(b) else right.file
                raise ConfigError(f"shard {ended} ended early; fetch the model again.")
            if a != b:
                return False
            remaining -= len(a)
            if bar is not None:
                bar.update(len(a))
    return True


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    name: str
    """Its name in that file."""


def shard_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a Hugging Face folder.

    Raises:
        ConfigError: no weights, a damaged index, or a shard that the index names and the folder lacks.
    """
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file() and not single.is_file():  # of both, transformers reads the single file
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / Path(file).name for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index} is damaged; fetch the model again.") from None
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise ConfigError(f"shard {file} is missing; fetch the model again.")
        return files
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as handle:
                return dict.fromkeys(handle.keys(), single)
        except Exception as error:
            raise ConfigError(f"{single} cannot be read ({error}); fetch the model again.") from None
    raise ConfigError(f"{folder} holds no safetensors weights (model.safetensors or its index).")
