"""Safetensors files: finds the tensors in them, copies tensors byte for byte, and writes new files piece by piece.

There are three ways to write a tensor, and none of them holds a large tensor in memory:

    Span                bytes of a tensor in another file, copied by the kernel (`write_shards`)
    Computed            a tensor that is cast or merged in blocks while it is written (`write_shards`)
    SafetensorsStream   tensors that arrive one after the other, in pieces, such as those of a training checkpoint

A surrogate of a 70B model is 75 GB of unchanged tensors. None of them is decoded: this module reads only the headers
of the source files, and the kernel copies ranges of bytes. Memory therefore holds only headers, however large the
tensors are. The safetensors library opens every file before and after a copy, to check that its header and its size
agree.

Format (https://huggingface.co/docs/safetensors): length of the header in 8 bytes, little endian; the header as JSON;
the data. This module imports torch only where tensors are converted, so that commands that only copy start fast.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from tqdm import tqdm

from zero_ds.runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2 << 30
"""Largest size of a shard in bytes, unless a single tensor is larger."""
WRITERS = 2
"""Number of shards that are written at the same time."""
BLOCK = 32 << 20
"""Number of bytes after which a copy updates the progress bar and checks whether it should stop."""
_DISK_FULL = (28, 122)
"""Error numbers ENOSPC and EDQUOT."""


# -- number formats ----------------------------------------------------------------------------------------------------


class Dtype(NamedTuple):
    """A number format of weights."""

    torch_name: str
    """Name of the dtype in torch."""
    size: int
    """Size of an element in bytes."""


DTYPES = {
    "F64": Dtype("float64", 8),
    "F32": Dtype("float32", 4),
    "F16": Dtype("float16", 2),
    "BF16": Dtype("bfloat16", 2),
}
"""Number formats of weights that are not quantized, by their safetensors names. The package has no other such table."""
INTEGERS = {"I64": Dtype("int64", 8)}
"""Number formats of buffers that are not weights, such as the indices that some vision encoders store."""


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype of a safetensors name: `BF16` -> torch.bfloat16."""
    import torch

    dtype: torch.dtype = getattr(torch, (DTYPES | INTEGERS)[name].torch_name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the safetensors name of a torch dtype: torch.bfloat16 -> `BF16`."""
    torch_name = str(dtype).removeprefix("torch.")
    return next(name for name, known in (DTYPES | INTEGERS).items() if known.torch_name == torch_name)


# -- reading headers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A tensor's range of bytes in a file."""

    file: Path
    start: int
    """Offset of the first byte in the file."""
    size: int
    """Number of bytes."""
    dtype: str
    """Safetensors name of the number format."""
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Computed:
    """A tensor whose bytes are computed while they are written."""

    dtype: str
    """Safetensors name of the number format."""
    shape: tuple[int, ...]
    size: int
    """Number of bytes."""
    blocks: Callable[[], Iterable[Any]]
    """Function that returns the tensor's bytes in order, in blocks that support the buffer protocol. It may be called
    more than once and computes the bytes each time."""

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Tensor = Span | Computed
"""A tensor to write: copied from another file, or computed."""


@dataclass(frozen=True)
class Stored:
    """File and name of a stored tensor."""

    file: Path
    name: str
    """Name of the tensor in that file."""


def spans(file: Path) -> dict[str, Span]:
    """Returns the span of every tensor in a safetensors file.

    Raises:
        ConfigError: the file is truncated or not a safetensors file.
    """
    from safetensors import safe_open

    try:
        if file.exists() and not file.is_file():
            raise OSError("it is not a regular file")  # opening a pipe would wait for its other end
        with safe_open(file, framework="pt"):
            pass  # the library checks the header against the file's size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except Exception as error:
        raise ConfigError(f"shard {file} cannot be read ({error}); fetch the model again.") from None
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found[name] = Span(file, 8 + length + start, end - start, entry["dtype"], tuple(entry["shape"]))
    return found


def joint_spans(files: Iterable[Path]) -> dict[str, Span]:
    """Returns the span of every tensor in several files, file by file.

    Raises:
        ConfigError: as `spans`, or two files hold a tensor of the same name.
    """
    found: dict[str, Span] = {}
    for file in files:
        of_file = spans(file)
        if both := sorted(found.keys() & of_file.keys()):
            raise ConfigError(f"{found[both[0]].file} and {file} both hold {both[0]}; fetch them again.")
        found |= of_file
    return found


def shard_files(folder: Path) -> dict[str, Path]:
    """Returns the safetensors file of every tensor in a Hugging Face folder.

    Raises:
        ConfigError: the folder holds no weights, its index is damaged, or a shard that the index names is missing.
    """
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file() and not single.is_file():  # where both exist, transformers reads the single file
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


def locate(tensors: Mapping[str, Stored]) -> dict[str, Span]:
    """Returns the spans of stored tensors, under the keys of `tensors`.

    Raises:
        ConfigError: a file cannot be read, or lacks a tensor that the index places in it.
    """
    files = {file: spans(file) for file in sorted({stored.file for stored in tensors.values()})}
    for stored in tensors.values():
        if stored.name not in files[stored.file]:
            raise ConfigError(f"shard {stored.file} lacks {stored.name}, which the index names; fetch the model again.")
    return {name: files[stored.file][stored.name] for name, stored in tensors.items()}


class TensorFiles:
    """Tensors of one or several files, read with the safetensors library as if all were in one; a context manager."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)
        self._stack = ExitStack()
        self._holders: dict[str, Any] = {}

    def __enter__(self) -> TensorFiles:
        from safetensors import safe_open

        for file in self._files:
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
            self._holders |= dict.fromkeys(handle.keys(), handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._holders.clear()
        self._stack.close()

    def keys(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(self._holders)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Reads a tensor."""
        tensor: torch.Tensor = self._holders[name].get_tensor(name)
        return tensor

    def get_slice(self, name: str) -> Any:
        """Returns the library's view of a tensor, which knows its dtype and shape."""
        return self._holders[name].get_slice(name)


# -- comparing ---------------------------------------------------------------------------------------------------------


def content_hash(span: Span) -> str:
    """Returns a SHA-256 of a tensor's bytes, dtype and shape, which does not depend on the file that holds it.

    Raises:
        ConfigError: the file ends before the tensor does.
    """
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
    """Returns whether two tensors have the same dtype, shape and bytes. Reads both tensors block by block.

    bar: a progress bar that counts bytes.

    Raises:
        ConfigError: a file ends before its tensor does.
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


# -- writing folders of shards -----------------------------------------------------------------------------------------


def write_shards(tensors: Sequence[tuple[str, Tensor]], out: Path, shard_bytes: int | None = None) -> None:
    """Writes tensors into the existing folder `out`: model.safetensors, or numbered shards with their index.

    tensors: names and tensors, in the order in which they fill the shards. shard_bytes: largest size of a shard; a
    larger tensor gets its own shard. None means SHARD_BYTES.

    Raises:
        ConfigError: a source file has become shorter than its header says.
        OSError: the disk is full.
    """
    shards = _split(tensors, SHARD_BYTES if shard_bytes is None else shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    total = sum(tensor.size for _, tensor in tensors)
    with tqdm(total=total, desc="copying", unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        stop, pool = Event(), ThreadPoolExecutor(WRITERS)
        try:
            # a signal may raise anywhere from here on, also while work is submitted, and must not wait for the copies
            written = [
                pool.submit(_write_shard, shard, out / file, bar, stop)
                for file, shard in zip(files, shards, strict=True)
            ]
            for future in as_completed(written):
                future.result()
        except BaseException:
            stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total, "total_parameters": sum(tensor.parameters for _, tensor in tensors)},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Sequence[tuple[str, Tensor]], shard_bytes: int) -> list[list[tuple[str, Tensor]]]:
    """Splits tensors into shards of at most `shard_bytes`, in their order; a larger tensor gets its own shard."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.size
    return shards


def _write_shard(shard: Sequence[tuple[str, Tensor]], path: Path, bar: Any, stop: Event) -> None:
    # the widest dtypes come first: the format requires that every tensor starts at a multiple of its element size
    ordered = sorted(shard, key=lambda item: -item[1].size / max(1, item[1].parameters))
    with path.open("wb") as target:
        target.write(_header([(name, tensor.dtype, tensor.shape, tensor.size) for name, tensor in ordered]))
        target.flush()
        source: BinaryIO | None = None
        opened: Path | None = None
        try:
            for _, tensor in ordered:
                if isinstance(tensor, Computed):
                    _compute(target, tensor, bar, stop)
                    continue
                if opened != tensor.file:
                    if source is not None:
                        source.close()
                    source, opened = tensor.file.open("rb"), tensor.file
                assert source is not None
                _copy(source, target, tensor, bar, stop)
        finally:
            if source is not None:
                source.close()
    if not stop.is_set():
        spans(path)


def _header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Returns the start of a file, up to its data.

    tensors: name, safetensors dtype, shape and number of bytes of each, in the order of their data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(source: BinaryIO, target: BinaryIO, span: Span, bar: Any, stop: Event) -> None:
    """Appends a tensor's bytes to the target; stops early if `stop` is set because another writer failed."""
    start, left = span.start, span.size
    while left and not stop.is_set():
        try:
            done = os.copy_file_range(source.fileno(), target.fileno(), min(left, BLOCK), start)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise
            # the kernel does not copy between these file systems, or this is not Linux
            done = _copy_in_memory(source, target, start, min(left, BLOCK))
        if not done:
            raise ConfigError(f"shard {span.file} ended early; fetch the model again.")
        start, left = start + done, left - done
        bar.update(done)


def _copy_in_memory(source: BinaryIO, target: BinaryIO, start: int, size: int) -> int:
    block = os.pread(source.fileno(), size, start)
    _append(target, block)
    return len(block)


def _compute(target: BinaryIO, tensor: Computed, bar: Any, stop: Event) -> None:
    """Appends the bytes of a computed tensor to the target; stops early if `stop` is set."""
    left = tensor.size
    for block in tensor.blocks():
        if stop.is_set():
            return
        size = memoryview(block).nbytes
        _append(target, block)
        left -= size
        bar.update(size)
    assert left == 0, f"{tensor.size} bytes were declared, but {tensor.size - left} were computed"


def _append(target: BinaryIO, block: Any) -> None:
    view = memoryview(block).cast("B")
    while view:
        view = view[os.write(target.fileno(), view) :]


# -- writing one file as its tensors arrive ----------------------------------------------------------------------------


class SafetensorsStream:
    """A safetensors file that is written piece by piece, with no more than one piece in memory.

    The safetensors library needs all tensors of a file in memory. Here names, dtypes and shapes are declared first, and
    the data follows in that order: a tensor as a whole, or in pieces of its flattened form.
    """

    digests: dict[str, str]
    """SHA-256 of each tensor's dtype, shape and bytes, once all of it has been written."""

    def __init__(
        self, path: Path, tensors: Iterable[tuple[str, torch.dtype, torch.Size]], *, digests: bool = False
    ) -> None:
        """Opens the file and writes its header.

        tensors: name, dtype and shape of each, in order. digests: whether each tensor is hashed by itself as well.
        """
        self._with_digests = digests
        declared = [(name, dtype_name(dtype), shape, shape.numel() * dtype.itemsize) for name, dtype, shape in tensors]
        self._expected = [(name, size) for name, _, _, size in declared]
        self._next = 0  # index, in `_expected`, of the tensor that is being written
        self._written = 0  # number of its bytes that have been written
        self._digest = hashlib.sha256()
        self.digests = {}
        self._starts = {name: f"{dtype}{list(shape)}".encode() for name, dtype, shape, _ in declared}
        self._tensor_digest = hashlib.sha256()
        self._file = path.open("wb")
        self._put(_header(declared))
        self._begin_tensor()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Appends a tensor, or the next piece of one. `tensor` is on the CPU and has the declared dtype."""
        import torch

        data: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        if not data.nbytes:
            return
        assert self._next < len(self._expected), f"{name} was written after the last declared tensor"
        expected, size = self._expected[self._next]
        written = self._written + data.nbytes
        assert name == expected and written <= size, f"{name} ({written} bytes) where {expected} ({size}) was declared"
        self._put(data)
        if self._with_digests:
            self._tensor_digest.update(data)
        self._written = written
        if self._written == size:
            self._end_tensor()
            self._begin_tensor()

    def close(self) -> str:
        """Flushes the file to the disk, closes it and returns its SHA-256."""
        assert self._next == len(self._expected), "tensors are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Closes a file that stays incomplete."""
        with suppress(OSError):
            self._file.close()

    def _put(self, data: Any) -> None:
        self._digest.update(data)
        self._file.write(data)

    def _begin_tensor(self) -> None:
        """Starts the next tensor; for those without elements, no data will come."""
        while self._next < len(self._expected):
            name, size = self._expected[self._next]
            self._tensor_digest = hashlib.sha256(self._starts[name])
            if size:
                return
            self._end_tensor()

    def _end_tensor(self) -> None:
        if self._with_digests:
            self.digests[self._expected[self._next][0]] = self._tensor_digest.hexdigest()
        self._next, self._written = self._next + 1, 0


def content_sha256(digests: Mapping[str, str]) -> str:
    """Returns a SHA-256 of named tensors, however they are spread over files.

    digests: SHA-256 of each tensor (`SafetensorsStream.digests`).
    """
    lines = [f"{name}\0{digests[name]}\n" for name in sorted(digests)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
