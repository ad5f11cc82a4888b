"""Prepared data: the tokens of every sample, written once, so that a run tokenises nothing and sizes no image.

A folder holds shards of SHARD samples and prepared.json, which lists everything that the tokens depend on. The samples
themselves stay where they are: images are still read from their own files. Each sample of each source is written once,
in the order of the sources, so weights and the order of the run may change afterwards.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from zero_ds.data.conversations import EncodedConversation
from zero_ds.data.formats import DataError, TooLongError
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the folder."""
SHARD = 4096
"""Number of samples of a shard."""
NAME = "prepared.json"
"""Name of the file that is written last."""


def description(records: Records, encoder: SampleEncoder) -> dict[str, Any]:
    """Returns everything that the tokens depend on, by name."""
    words = encoder.template.words
    backend = getattr(encoder.template.tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(encoder.template.tokenizer.get_vocab(), sort_keys=True)
    processor = encoder.processor
    return {
        "format": FORMAT,
        "samples": records.places,
        "data": records.content(),
        "order": records.order(),
        "chat_template": _hash(encoder.template.source),
        "tokenizer": _hash(vocabulary),
        "special_tokens": sorted(words.typed),
        "supervise": encoder.supervise,
        "max_length": encoder.max_length,
        "image_prompt": [encoder.image_prompt, encoder.seed if encoder.image_prompt == "random" else None],
        "system_prompt": encoder.system_prompt,
        "tokens_per_image": encoder.tokens_per_image,
        "image_grid": [processor.size, *map(list, processor.grid)] if processor and processor.grid else [],
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# -- writing -----------------------------------------------------------------------------------------------------------


def prepare(records: Records, encoder: SampleEncoder, folder: Path, workers: int = 0) -> int:
    """Writes the tokens of all samples into a folder; returns the number of samples that cannot be used.

    Shards that an interrupted call has written are kept.

    Raises:
        ConfigError: A folder of other data, or one that cannot be written.
    """
    stated = description(records, encoder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_begun(folder, stated)
        missing = [number for number in range(-(-records.places // SHARD)) if not _shard(folder, number).is_file()]
        writer = DataLoader(
            _Writing(records, encoder, folder, missing),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        with tqdm(total=records.places, desc="preparing", unit="sample", disable=None) as bar:
            bar.update(records.places - sum(_size(records, number) for number in missing))
            for number in writer:
                bar.update(_size(records, int(number)))
        write_atomically(folder / NAME, json.dumps(stated, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}.") from None
    return sum(_faults(folder, number) for number in range(-(-records.places // SHARD)))


def _check_begun(folder: Path, stated: dict[str, Any]) -> None:
    """Refuses a folder that was begun with other data; a new one gets the file that says so."""
    begun = folder / f"{NAME}.begun"
    if begun.is_file():
        if (changed := _difference(begun, stated)) is not None:
            raise ConfigError(f"{folder} holds data that differ in {changed}; choose another folder or remove it.")
        return
    if any(folder.glob("*.arrow")):
        raise ConfigError(f"{folder} holds other files; choose another folder.")
    write_atomically(begun, json.dumps(stated) + "\n")


def _difference(path: Path, stated: dict[str, Any]) -> str | None:
    """Returns the name of the first entry in which a folder's description differs."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return next((name for name, value in stated.items() if found.get(name) != value), None)
    except (OSError, ValueError, AttributeError):
        return "everything, because its description cannot be read"


def _shard(folder: Path, number: int) -> Path:
    return folder / f"tokens-{number:06d}.arrow"


def _size(records: Records, number: int) -> int:
    return min(SHARD, records.places - number * SHARD)


class _Writing(Dataset[int]):
    """Writes a shard for each index, and returns the shard's number."""

    def __init__(self, records: Records, encoder: SampleEncoder, folder: Path, missing: list[int]) -> None:
        self.records, self.encoder, self.folder, self.missing = records, encoder, folder, missing

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, index: int) -> int:
        import pyarrow

        number = self.missing[index]
        first = number * SHARD
        rows = list(self._rows(range(first, first + _size(self.records, number))))
        path = _shard(self.folder, number)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with pyarrow.OSFile(str(temporary), "wb") as sink, pyarrow.ipc.new_file(sink, _schema()) as writer:
                writer.write_table(pyarrow.Table.from_pylist(rows, _schema()))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return number

    def _rows(self, places: range) -> Iterator[dict[str, Any]]:
        for place in places:
            try:
                found = self.encoder.tokens(self.records.at_place(place))
            except DataError as error:
                yield {"fault": str(error), "too_long": isinstance(error, TooLongError)}
                continue
            yield {
                "input_ids": found.input_ids,
                "labels": found.labels,
                "responses": found.responses,
                "images": found.images,
            }


def _schema() -> Any:
    import pyarrow

    numbers = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema(
        {
            "input_ids": numbers,
            "labels": numbers,
            "responses": numbers,
            "images": pyarrow.int32(),
            "fault": pyarrow.string(),
            "too_long": pyarrow.bool_(),
        }
    )


def _faults(folder: Path, number: int) -> int:
    column = _open(folder, number).column("fault")
    return len(column) - int(column.null_count)


def _open(folder: Path, number: int) -> Any:
    import pyarrow

    with pyarrow.memory_map(str(_shard(folder, number))) as source:
        return pyarrow.ipc.open_file(source).read_all().combine_chunks()


# -- reading -----------------------------------------------------------------------------------------------------------


class Prepared:
    """The tokens of a run's samples, mapped from a folder."""

    def __init__(self, folder: Path, records: Records, encoder: SampleEncoder) -> None:
        """Opens a folder that `prepare` has written.

        Raises:
            ConfigError: It is not complete, or was written for other data or settings.
        """
        if not (folder / NAME).is_file():
            raise ConfigError(f"data.prepared={folder} is not complete; run zero-ds data prepare again.")
        if (changed := _difference(folder / NAME, description(records, encoder))) is not None:
            raise ConfigError(
                f"data.prepared={folder} was written for another run (it differs in {changed}); prepare again, or "
                "leave data.prepared out."
            )
        self.folder = folder
        self._records = records
        self._opened = functools.lru_cache(maxsize=64)(self._map)

    def _map(self, number: int) -> Any:
        import pyarrow

        try:
            return _open(self.folder, number)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{_shard(self.folder, number)} cannot be read: {error}; prepare again") from None

    def tokens(self, index: int) -> EncodedConversation:
        """Returns the tokens of a sample.

        Raises:
            DataError: As `SampleEncoder.tokens`.
        """
        table, row = self._usable(index)
        ids, labels, responses = (
            table.column(name)[row].values.to_numpy().tolist() for name in ("input_ids", "labels", "responses")
        )
        return EncodedConversation(ids, labels, table.column("images")[row].as_py(), responses)

    def length(self, index: int) -> int:
        """Returns the number of a sample's tokens, which stay unread.

        Raises:
            DataError: As `tokens`.
        """
        table, row = self._usable(index)
        return len(table.column("input_ids")[row])

    def _usable(self, index: int) -> tuple[Any, int]:
        """Returns the shard of a sample and its row there.

        Raises:
            DataError: A sample that cannot be used.
        """
        number, row = divmod(self._records.place(index), SHARD)
        table = self._opened(number)
        fault = table.column("fault")[row]
        if fault.is_valid:
            raise (TooLongError if table.column("too_long")[row].as_py() else DataError)(fault.as_py())
        return table, row
