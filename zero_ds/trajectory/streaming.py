"""Measures the trajectory of a model of any size: reads one decoder layer at a time and applies it to all texts.

In memory are a layer, a block of the output head, and the hidden states of all texts; large hidden states go into a
file. Attention masks and rotary positions are the library's own: each layer runs as the only one of a one-layer model
of the same class, whose final norm is taken out.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zero_ds.model.decoders import Family
from zero_ds.model.decoders.conversion import Group
from zero_ds.model.decoders.cut import cut_config, fed
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.safetensors import Stored
from zero_ds.trajectory.batching import batches, padded, progress, readings
from zero_ds.trajectory.curves import check_finite
from zero_ds.trajectory.lens import FinalLayer, Lens, tapped, with_bias
from zero_ds.trajectory.metrics import Metric
from zero_ds.trajectory.texts import TokenSample
from zero_ds.trajectory.transition import Floats

logger = logging.getLogger(__name__)

HEAD_BYTES = 128 << 20
"""Bytes of the output head in memory at a time."""
POSITIONS = 16384
"""Number of positions that the lens reads at a time; the head is read from its file once for each such group."""
MEMORY_BYTES = 1 << 30
"""Bytes of hidden states that stay in memory; larger ones go into a file."""


@dataclass(frozen=True)
class LayerFiles:
    """A decoder's tensors in their files, read one by one in the precision of the measurement."""

    folder: DecoderFolder
    family: Family
    config: Any
    tensors: dict[str, Stored]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, folder: DecoderFolder | Path, dtype: torch.dtype, device: torch.device) -> LayerFiles:
        """Returns the files of a folder.

        Raises:
            ConfigError: the files do not hold completely what config.json describes (`DecoderFolder.spans`).
        """
        folder = DecoderFolder.of(folder)
        _ = folder.spans
        return cls(folder, folder.family, folder.text_config(), folder.stored, dtype, device)

    def stored(self, name: str) -> Stored:
        """Returns the file and stored name of a tensor.

        Raises:
            ConfigError: the weights lack it.
        """
        if name not in self.tensors:
            raise ConfigError(f"the weights in {self.folder} lack {name}; fetch the model again.")
        return self.tensors[name]

    def fill_(self, module: nn.Module, prefix: str) -> None:
        """Gives a module that was made without memory its weights from the files."""
        names = [name for name, _ in module.named_parameters()]
        names += [name for name in dict(module.named_buffers()) if f"{prefix}{name}" in self.groups]
        values: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in values:
                made = self.made(f"{prefix}{name}").items()
                values |= {other.removeprefix(prefix): value for other, value in made if other.startswith(prefix)}
        module.load_state_dict(values, strict=False, assign=True)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Tensors of the files that become a tensor of the class, by its name."""
        return {name: group for group in self.folder.class_tensors for name in group.targets}

    @cached_property
    def skeleton(self) -> Any:
        """The whole model without its layers' weights: each returns its input until it is given them.

        So every layer runs at its own place, whatever its class makes of its number.
        """
        from accelerate import init_empty_weights
        from transformers import AutoModel

        attention = self.family.attention("sdpa")
        with init_empty_weights(include_buffers=False):
            model = AutoModel.from_config(self.config, dtype=self.dtype, attn_implementation=attention).eval()
        model.set_input_embeddings(nn.Identity())
        layers = f"{self.family.layer_list}."
        for name, module in self.family.inner(model).named_modules():
            own = dict(module.named_parameters(recurse=False))
            if not name.startswith(layers) and any(value.is_meta for value in own.values()):
                self.fill_(module, f"{self.family.backbone}.{name}." if name else f"{self.family.backbone}.")
        held = self.family.layers(model)
        self.family.replace_layers_(model, nn.ModuleList())
        model.to(self.device)  # the layers have no memory, and no place
        self.family.replace_layers_(model, held)
        for layer in held:
            _leave_out_(layer, self.family)
        return model

    def put_in_(self, layer: int) -> nn.Module:
        """Gives a layer of the skeleton its weights, so that it computes; returns it."""
        module = self.family.layers(self.skeleton)[layer]
        vars(module).pop("forward")
        self.fill_(module, f"{self.family.layer_prefix}{layer}.")
        return module.to(self.device)

    def made(self, name: str) -> dict[str, torch.Tensor]:
        """Returns a tensor of the class by its name, and those that are made from the same tensors of the files.

        Raises:
            ConfigError: as `read`.
        """
        group = self.groups.get(name)
        if group is None or group.sources == (name,):
            return {name: self.read(name)}
        return self.folder.conversion.fuse(group, {source: self.read(source) for source in group.sources})

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Returns a tensor, or some of its rows.

        Raises:
            ConfigError: the weights lack it, or its shard is damaged.
        """
        with self.open(name) as (file, stored):
            value = file.get_slice(stored)[rows] if rows else file.get_tensor(stored)
            return cast(torch.Tensor, value).to(self.device, self.dtype, copy=True)

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[Any, str]]:
        """Opens the shard of a tensor; yields the shard and the tensor's name in it."""
        from safetensors import SafetensorError, safe_open

        stored = self.stored(name)
        try:
            with safe_open(stored.file, framework="pt") as file:
                yield file, stored.name
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"shard {stored.file} cannot be read ({error}); fetch the model again.") from None

    def read_rows(self, name: str, numbers: Sequence[int]) -> torch.Tensor:
        """Returns single rows of a tensor, (len(numbers), ...), without reading the rest of it."""
        with self.open(name) as (file, stored):
            table = file.get_slice(stored)
            return torch.cat([table[number : number + 1] for number in numbers]).to(self.device, self.dtype)

    def head(self) -> str:
        """Returns the name of the head's tensor, which is that of the embeddings where the two are tied."""
        return self.family.embeddings if self.config.tie_word_embeddings else self.family.head


class FileLens(Lens):
    """The lens with a head that is read from its file block by block."""

    def __init__(self, files: LayerFiles, norm: nn.Module) -> None:
        super().__init__(files.family, files.config, norm)
        self.files = files
        self.name = files.head()
        self.bias = files.family.head.removesuffix("weight") + "bias"

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the head in blocks of HEAD_BYTES."""
        rows = max(1, HEAD_BYTES // (self.config.hidden_size * self.files.dtype.itemsize))
        for start in range(0, self.config.vocab_size, rows):
            part = slice(start, min(start + rows, self.config.vocab_size))
            head = self.files.read(self.name, part)
            yield start, with_bias(head, self.files.read(self.bias, part)) if self.family.head_bias else head


@dataclass(frozen=True)
class _Texts:
    """All texts, one after another, in the order in which batches take them."""

    ids: list[list[int]]
    """Token ids of every text."""
    tokens: torch.Tensor
    """Token ids of all texts, (tokens,)."""
    positions: tuple[torch.Tensor, ...]
    """Indices of the tokens that the lens reads, in groups of POSITIONS."""
    reading: torch.Tensor
    """For every position that has a next token, which of these readings it has (`batching.readings`)."""

    @classmethod
    def of(cls, ids: list[list[int]], device: torch.device) -> _Texts:
        tokens = torch.tensor([token for text in ids for token in text], device=device)
        own, reading = readings(ids)
        return cls(ids, tokens, own.to(device).split(POSITIONS), reading)

    @property
    def read(self) -> int:
        """Number of positions that the lens reads."""
        return sum(len(group) for group in self.positions)


@dataclass(frozen=True)
class _StreamedDecoder:
    """A decoder that exists one layer at a time, and the hidden states of all texts."""

    files: LayerFiles
    texts: _Texts
    batch_size: int
    hidden_states: torch.Tensor
    """(tokens, hidden): output of the layer that ran last."""
    bar: Any
    """Progress bar in tokens."""

    def run(self, depth: int) -> Iterator[None]:
        """Runs the first `depth` layers over all texts, and yields after each, when `hidden_states` is its output."""
        embed(self.files, self.texts.tokens, self.hidden_states)
        for layer in range(depth):
            _apply_layer(self.files, layer, self.texts, self.batch_size, self.hidden_states)
            yield
            self.bar.update(len(self.texts.tokens))


def measure_streamed(
    folder: DecoderFolder | Path,
    samples: Sequence[TokenSample],
    *,
    metric: Metric,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    scratch: Path,
) -> Floats:
    """Returns the same as `measure_resident`, (samples, layers), without ever loading the whole model.

    Args:
        scratch: existing folder for a file of hidden states, which is removed in the end.

    Raises:
        ConfigError: weights that are damaged or lack a tensor; predictions that are not finite.
        OSError: no space for the hidden states.
    """
    files = LayerFiles.of(folder, dtype, device)
    depth = files.folder.depth
    order = [row for rows in batches([len(sample.input_ids) for sample in samples], batch_size) for row in rows]
    texts = _Texts.of([samples[row].input_ids for row in order], device)
    hidden = files.config.hidden_size
    width = hidden + files.family.head_bias
    applied = 2 * depth - 1 if metric.needs_final_layer else depth
    with torch.inference_mode(), ExitStack() as stack:
        hidden_states = stack.enter_context(_hidden_states((len(texts.tokens), hidden), dtype, device, scratch))
        bar = stack.enter_context(progress(applied * len(texts.tokens), "measuring", "token"))
        decoder = _StreamedDecoder(files, texts, batch_size, hidden_states, bar)
        lens = lens_of_files(files.folder, dtype, device)
        if metric.needs_final_layer:
            normed = stack.enter_context(_hidden_states((texts.read, width), dtype, device, scratch))
            final = _final_layer(decoder, depth, lens, normed)
            numbers = _read_layers(decoder, depth - 1, lens, metric, final)
            numbers.append(torch.zeros(texts.read, device=device))
        else:
            numbers = _read_layers(decoder, depth, lens, metric, [None] * len(texts.positions))
    curves = metric.curves(torch.stack(numbers)[:, texts.reading], [len(text) for text in texts.ids])
    result = curves.copy()
    result[order] = curves
    check_finite(result, samples, dtype)
    return result


def last_states_streamed(
    folder: DecoderFolder | Path,
    texts: Sequence[list[int]],
    *,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Yields every layer's hidden states at the last tokens of texts: (texts, hidden)."""
    files = LayerFiles.of(folder, dtype, device)
    order = [row for rows in batches([len(text) for text in texts], batch_size) for row in rows]
    placed = _Texts.of([list(texts[row]) for row in order], device)
    ends = torch.tensor([len(texts[row]) for row in order], device=device).cumsum(0) - 1
    with torch.inference_mode(), progress(files.folder.depth * len(placed.tokens), "looking up", "token") as bar:
        hidden_states = torch.empty((len(placed.tokens), files.config.hidden_size), dtype=dtype, device=device)
        decoder = _StreamedDecoder(files, placed, batch_size, hidden_states, bar)
        for _ in decoder.run(files.folder.depth):
            found = torch.empty_like(hidden_states[: len(order)])
            found[order] = hidden_states[ends]
            yield found


def lens_of_files(folder: DecoderFolder | Path, dtype: torch.dtype, device: torch.device) -> FileLens:
    """Returns the lens of a decoder that is not in memory."""
    files = LayerFiles.of(folder, dtype, device)
    norm = files.family.norm(_one_layer(files, 0))
    files.fill_(norm, files.family.final_norm)
    return FileLens(files, norm)


def _final_layer(decoder: _StreamedDecoder, depth: int, lens: Lens, normed: torch.Tensor) -> list[FinalLayer]:
    """Runs all layers; returns the last one's prediction for every group of positions.

    normed: (positions that are read, width of `lens.norm`), which is filled with the final-normed states.
    """
    for _ in decoder.run(depth):
        pass
    found = []
    start = 0
    for group in decoder.texts.positions:
        rows = slice(start, start + len(group))
        normed[rows] = lens.norm(decoder.hidden_states[group])
        found.append(FinalLayer(normed[rows], lens.normalizer(normed[rows])))
        start = rows.stop
    return found


def _read_layers(
    decoder: _StreamedDecoder, depth: int, lens: Lens, metric: Metric, final: Sequence[FinalLayer | None]
) -> list[torch.Tensor]:
    """Runs the first `depth` layers; returns the metric's numbers of each, (positions that are read,).

    final: the last layer's prediction for every group of positions.
    """
    targets = decoder.texts.tokens.roll(-1)
    numbers = []
    for _ in decoder.run(depth):
        groups = zip(decoder.texts.positions, final, strict=True)
        numbers.append(
            torch.cat([metric.read(lens, decoder.hidden_states[group], targets[group], last) for group, last in groups])
        )
    return numbers


def _one_layer(files: LayerFiles, layer: int) -> Any:
    """Returns a one-layer model of the decoder's class, with a layer of the kind of layer `layer`, without memory."""
    from accelerate import init_empty_weights
    from transformers import AutoModel

    config = cut_config(files.config, files.family, [layer])
    attention = files.family.attention("sdpa")
    with init_empty_weights(include_buffers=False):
        return AutoModel.from_config(config, dtype=files.dtype, attn_implementation=attention).eval()


def embed(files: LayerFiles, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
    """Writes the word embeddings of all tokens to `hidden_states`; reads only the rows of tokens that occur."""
    used, compact = tokens.unique(return_inverse=True)
    module = _one_layer(files, 0).get_input_embeddings()
    module.padding_idx = None
    module.weight = nn.Parameter(files.read_rows(files.family.embeddings, used.tolist()), requires_grad=False)
    for name, value in list(module.named_parameters()):
        if value.is_meta:  # some classes have a norm in their table
            part, _, own = name.rpartition(".")
            setattr(
                module.get_submodule(part),
                own,
                nn.Parameter(files.read(files.family.embeddings.removesuffix("weight") + name), requires_grad=False),
            )
    module.to(files.device)
    for rows in torch.arange(len(tokens), device=tokens.device).split(POSITIONS):
        hidden_states[rows] = module(compact[rows])


@dataclass(frozen=True)
class LoadedLayer:
    """One decoder layer with its weights, at its place in a model of its class whose other layers do nothing."""

    files: LayerFiles
    number: int
    model: Any
    module: nn.Module

    def apply_(self, texts: Sequence[Sequence[int]], batch_size: int, hidden_states: torch.Tensor) -> None:
        """Replaces the hidden states of texts by the layer's output.

        texts: token ids of each, of which only the numbers count. hidden_states: (tokens of all texts, hidden).
        """
        outputs: list[torch.Tensor] = []
        start = 0
        with tapped(nn.ModuleList([self.module]), lambda _, output: outputs.append(output)):
            for begin in range(0, len(texts), batch_size):
                batch = [list(text) for text in texts[begin : begin + batch_size]]
                _, mask = padded(batch, self.files.device)
                inputs = hidden_states.new_zeros((*mask.shape, hidden_states.shape[1]))
                span = slice(start, start + sum(len(text) for text in batch))
                inputs[mask.bool()] = hidden_states[span]
                # steps of a class before its first layer, such as scaling the embeddings, must not happen again
                with fed(self.module, inputs.clone()) if self.number else nullcontext():
                    self.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
                hidden_states[span] = outputs.pop()[mask.bool()]
                start = span.stop


@contextmanager
def loaded_layer(files: LayerFiles, layer: int) -> Iterator[LoadedLayer]:
    """Yields a layer, whose weights are in memory as long as the block is open."""
    if files.folder.is_registered:
        model = _one_layer(files, layer)
        module = files.family.layers(model)[0]
        files.family.replace_norm_(model, nn.Identity())
        model.set_input_embeddings(nn.Identity())
        files.fill_(module, f"{files.family.layer_prefix}{layer}.")
        model.to(files.device)
    else:
        model = files.skeleton
        module = files.put_in_(layer)
    yield LoadedLayer(files, layer, model, module)
    if not files.folder.is_registered:
        _leave_out_(module, files.family)
        for part in module.modules():  # buffers stay: they are small, and many are not in the files
            for name, value in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False))


def _apply_layer(files: LayerFiles, layer: int, texts: _Texts, batch_size: int, hidden_states: torch.Tensor) -> None:
    """Replaces the hidden states of all texts by the layer's output; the layer is gone when it returns."""
    with loaded_layer(files, layer) as loaded:
        loaded.apply_(texts.ids, batch_size, hidden_states)


def _leave_out_(layer: nn.Module, family: Family) -> None:
    """Makes a layer return its input, without weights, in the form of its class."""

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, *[None] * (family.layer_outputs - 1)) if family.layer_outputs else hidden_states

    cast(Any, layer).forward = forward


@contextmanager
def _hidden_states(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, scratch: Path
) -> Iterator[torch.Tensor]:
    """Yields an empty tensor (tokens, hidden), in memory, or in a file if it is large and the device is the CPU."""
    size = shape[0] * shape[1] * dtype.itemsize
    if device.type != "cpu" or size <= MEMORY_BYTES:
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    logger.info("hidden states take %.1f GB and go into a file in %s", size / 1e9, scratch)
    with tempfile.TemporaryDirectory(prefix=".hidden-states.", dir=scratch) as folder:
        path = Path(folder) / "states"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, not a signal later
        yield torch.from_file(str(path), shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape)
