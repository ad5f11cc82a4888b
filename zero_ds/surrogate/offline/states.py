"""Hidden states of the target on disk: computed one layer at a time, of all texts, and kept where they are needed.

    FOLDER/states.json                     target, texts, number formats, and the numbers of layers that are kept
    FOLDER/after-019/00003.safetensors     hidden states of the texts of shard 3 after 19 layers: (tokens, hidden)

A file is written whole or not at all, and depends on nothing but the file before it, so a pass that was killed goes on
where it was, with the same result. Files of other layers than the kept ones exist only until the next layer has run;
at any time there is one of each shard, and one more. In memory are one layer and one shard.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically
from zero_ds.runtime.safetensors import SafetensorsStream
from zero_ds.surrogate.offline.corpus import Corpus, Shard
from zero_ds.trajectory.batching import progress
from zero_ds.trajectory.streaming import LayerFiles, embed, loaded_layer

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20
"""Bytes of the hidden states of one shard after one layer, in the precision of the pass."""
NAME = "hidden_states"
"""Name of the tensor in a file."""


class StateStore:
    """The folder of the hidden states of a corpus."""

    def __init__(self, folder: Path, corpus: Corpus, hidden: int, dtype: torch.dtype, stored: torch.dtype) -> None:
        """Divides the corpus into shards.

        hidden: width of hidden states. dtype: number format of the pass. stored: that of the files that are kept.
        """
        self.folder, self.corpus, self.hidden = folder, corpus, hidden
        self.dtype, self.stored = dtype, stored
        self.shards = corpus.shards(max(1, SHARD_BYTES // (hidden * dtype.itemsize)))
        self.kept: set[int] = set()
        """Numbers of layers after which hidden states are kept."""
        self._places: dict[int, tuple[Shard, int]] = {}
        for shard in self.shards:
            start = 0
            for text in shard.texts:
                self._places[text] = shard, start
                start += len(corpus.ids[text])
        self._open: dict[Path, Any] = {}

    def claim(self, target_hash: str, wanted: Iterable[int]) -> None:
        """Makes the folder this corpus's own, and adds to the numbers of layers that are kept.

        Raises:
            ConfigError: it holds hidden states of another target or of other texts, or something else.
        """
        path = self.folder / "states.json"
        setting: dict[str, Any] = {
            "target_hash": target_hash,
            "texts": self.corpus.content(),
            "tokens": self.corpus.tokens,
            "shards": len(self.shards),
            "dtype": str(self.dtype).removeprefix("torch."),
            "stored": str(self.stored).removeprefix("torch."),
        }
        earlier: dict[str, Any] = {}
        if path.is_file():
            try:
                earlier = dict(json.loads(path.read_text(encoding="utf-8")))
                self.kept = {int(number) for number in earlier["kept"]}
            except (OSError, ValueError, KeyError, TypeError):
                raise ConfigError(f"{path} is damaged; remove {self.folder}, and run again.") from None
            different = [name for name, value in setting.items() if earlier.get(name) != value]
            if different:
                name = different[0]
                raise ConfigError(
                    f"{self.folder} holds hidden states of another run: its {name} is {earlier.get(name)!r}, and here "
                    f"it is {setting[name]!r}; choose another translate.states, or remove that folder."
                )
        self.kept |= set(wanted)
        write_atomically(path, json.dumps({**setting, "kept": sorted(self.kept)}, indent=1) + "\n")

    def path(self, after: int, shard: Shard) -> Path:
        """Returns the path of the hidden states of a shard after `after` layers."""
        return self.folder / f"after-{after:03d}" / f"{shard.number:05d}.safetensors"

    def present(self, shard: Shard) -> set[int]:
        """Returns the numbers of layers after which there are hidden states of a shard."""
        found = self.folder.glob(f"after-*/{shard.number:05d}.safetensors")
        return {int(path.parent.name.removeprefix("after-")) for path in found}

    def write(self, after: int, shard: Shard, hidden_states: torch.Tensor) -> None:
        """Writes the hidden states of a shard, whole or not at all."""
        path = self.path(after, shard)
        path.parent.mkdir(exist_ok=True)
        value = hidden_states.to("cpu", self.stored if after in self.kept else self.dtype)
        temporary = path.with_suffix(".tmp")
        stream = SafetensorsStream(temporary, [(NAME, value.dtype, value.shape)])
        try:
            stream.write(NAME, value)
            stream.close()
        except BaseException:
            stream.abandon()
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(path)

    def read(self, after: int, shard: Shard, device: torch.device) -> torch.Tensor:
        """Returns the hidden states of a shard after `after` layers: (tokens, hidden)."""
        value: torch.Tensor = self._file(self.path(after, shard)).get_tensor(NAME)
        self._open.clear()  # the file may be removed next
        return value.to(device, self.dtype, copy=True)

    def rows(self, after: int, text: int) -> torch.Tensor:
        """Returns the hidden states of one text after `after` layers: (tokens, hidden), on the CPU."""
        shard, start = self._places[text]
        rows: torch.Tensor = self._file(self.path(after, shard)).get_slice(NAME)[
            start : start + len(self.corpus.ids[text])
        ]
        return rows.to(self.dtype)

    def _file(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path} cannot be read ({error}); remove it, and run again.") from None
        return self._open[path]

    def remove(self, after: int, shard: Shard) -> None:
        """Removes the hidden states of a shard after `after` layers, unless they are kept."""
        if after not in self.kept:
            self.path(after, shard).unlink(missing_ok=True)

    def steps(self, shard: Shard) -> set[int]:
        """Returns the layers that have to run over a shard, and -1 if the word embeddings have to be read."""
        present, steps = self.present(shard), set()
        for goal in sorted(self.kept - present):
            start = max((number for number in present if number < goal), default=-1)
            steps |= set(range(start, goal))
            present.add(goal)
        return steps

    def tidy(self) -> None:
        """Removes files that are not kept, and half-written ones."""
        for path in self.folder.glob("after-*/*.tmp"):
            path.unlink(missing_ok=True)
        for shard in self.shards:
            for after in self.present(shard) - self.kept:
                self.remove(after, shard)
        for folder in self.folder.glob("after-*"):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def compute_states(store: StateStore, files: LayerFiles, batch_size: int) -> None:
    """Runs the target over all texts, as far as hidden states that are kept are missing.

    batch_size: number of texts that are in the layer at a time.

    Raises:
        ConfigError: the disk has too little space, weights that are damaged, hidden states that are not finite.
    """
    steps = {shard.number: store.steps(shard) for shard in store.shards}
    work = sum(
        sum(len(store.corpus.ids[text]) for text in shard.texts) * len(steps[shard.number]) for shard in store.shards
    )
    if not work:
        store.tidy()
        return
    _check_space(store)
    store.folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), progress(work, "reading the target", "token") as bar:
        for layer in range(-1, max(max(found, default=-1) for found in steps.values()) + 1):
            shards = [shard for shard in store.shards if layer in steps[shard.number]]
            if shards:
                _advance(store, files, layer, shards, batch_size, bar)
    store.tidy()


def _advance(
    store: StateStore, files: LayerFiles, layer: int, shards: Sequence[Shard], batch_size: int, bar: Any
) -> None:
    """Runs one layer over shards; of layer -1, reads their word embeddings."""
    if layer < 0:
        for shard in shards:
            tokens = torch.tensor([token for text in shard.texts for token in store.corpus.ids[text]])
            hidden_states = torch.empty((len(tokens), store.hidden), dtype=files.dtype, device=files.device)
            embed(files, tokens.to(files.device), hidden_states)
            store.write(0, shard, hidden_states)
            bar.update(len(tokens))
        return
    with loaded_layer(files, layer) as loaded:
        for shard in shards:
            hidden_states = store.read(layer, shard, files.device)
            loaded.apply_([store.corpus.ids[text] for text in shard.texts], batch_size, hidden_states)
            if not bool(torch.isfinite(hidden_states).all()):
                raise ConfigError(
                    f"hidden states after layer {layer} of {files.folder} are not finite; its weights are damaged, or "
                    "need precision=fp32."
                )
            store.write(layer + 1, shard, hidden_states)
            store.remove(layer, shard)
            bar.update(len(hidden_states))


def _check_space(store: StateStore) -> None:
    """Checks that the disk has room for the states and for one layer in between.

    Raises:
        ConfigError: it has not.
    """
    tokens, hidden = store.corpus.tokens, store.hidden
    need = tokens * hidden * (len(store.kept) * store.stored.itemsize + store.dtype.itemsize)
    there = sum(path.stat().st_size for path in store.folder.glob("after-*/*.safetensors"))
    free = shutil.disk_usage(store.folder).free + there
    logger.info("hidden states of %d tokens take %.2f GB in %s", tokens, need / 1e9, store.folder)
    if need > free:
        raise ConfigError(
            f"hidden states of {tokens:,} tokens need {need / 1e9:.1f} GB, and {store.folder} has {free / 1e9:.1f} GB "
            "free; lower translate.tokens, or choose another translate.states."
        )
