"""The trajectory of a model of any size: one decoder layer at a time is read from its file and applied to all samples.

What is in memory is a layer, a block of the output head, and the samples' hidden states, which go into a file when they
are large. Attention masks and rotary positions are the library's own: the layer runs as the only one of a one-layer
model of the same class, whose final norm is taken out.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zero_ds.model.decoders import Family, family_of
from zero_ds.model.decoders.folder import decoder_spans, decoder_tensors, depth_of, text_config
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.safetensors import Stored
from zero_ds.trajectory.lens import (
    Floats,
    Lens,
    TokenSample,
    batches,
    padded,
    per_sample,
    progress,
    readings,
    refuse_non_finite,
)

logger = logging.getLogger(__name__)

HEAD_BYTES = 128 << 20
"""Size of the block of the output head that is held at a time."""
POSITIONS = 16384
"""Positions that the lens reads at a time; for each such part the head is read once more."""
MEMORY_BYTES = 1 << 30
"""Hidden states beyond this size go into a file."""


@dataclass(frozen=True)
class LayerFiles:
    """A decoder's tensors in their files, read one by one in the precision of the measurement."""

    folder: Path
    family: Family
    config: Any
    tensors: dict[str, Stored]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> LayerFiles:
        """Raises ConfigError where the files do not hold, whole, what config.json says (`shards.decoder_spans`)."""
        decoder_spans(folder)
        return cls(folder, family_of(folder), text_config(folder), decoder_tensors(folder), dtype, device)

    def stored(self, name: str) -> Stored:
        """Raises ConfigError if the weights lack the tensor."""
        if name not in self.tensors:
            raise ConfigError(f"the weights in {self.folder} lack {name}; fetch the model again.")
        return self.tensors[name]

    def fill_(self, module: nn.Module, prefix: str) -> None:
        """Gives a module, made without memory, its weights from the file."""
        names = [name for name, _ in module.named_parameters()]
        values = {name: self.read(f"{prefix}{name}") for name in names}
        module.load_state_dict(values, strict=False, assign=True)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or rows of it.

        Raises:
            ConfigError: the weights lack it, or its shard is damaged.
        """
        with self.open(name) as (file, stored):
            value = file.get_slice(stored) if rows else file.get_tensor(stored)
            return cast(torch.Tensor, value[rows] if rows else value).to(self.device, self.dtype, copy=True)

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[Any, str]]:
        """The open shard of a tensor, and the tensor's name in it."""
        from safetensors import SafetensorError, safe_open

        stored = self.stored(name)
        try:
            with safe_open(stored.file, framework="pt") as file:
                yield file, stored.name
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"shard {stored.file} cannot be read ({error}); fetch the model again.") from None

    def read_rows(self, name: str, numbers: Sequence[int]) -> torch.Tensor:
        """Single rows of a tensor, (len(numbers), ...), without the rest of it."""
        with self.open(name) as (file, stored):
            table = file.get_slice(stored)
            return torch.cat([table[n : n + 1] for n in numbers]).to(self.device, self.dtype)

    def head(self) -> str:
        """Name of the head's tensor, which is the embeddings' where they are tied."""
        return self.family.embeddings if self.config.tie_word_embeddings else self.family.head


class FileLens(Lens):
    """The lens with a head that is read from its file block by block."""

    def __init__(self, files: LayerFiles, norm: nn.Module) -> None:
        super().__init__(files.family, files.config, norm)
        self.files = files
        self.name = files.head()

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        rows = max(1, HEAD_BYTES // (self.config.hidden_size * self.files.dtype.itemsize))
        for start in range(0, self.config.vocab_size, rows):
            yield start, self.files.read(self.name, slice(start, min(start + rows, self.config.vocab_size)))


def measure_streamed(
    folder: Path,
    samples: Sequence[TokenSample],
    *,
    metric: str,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    scratch: Path,
) -> Floats:
    """What `lens.measure` gives, (samples, layers) in nats, without ever holding the model.

    scratch: existing folder for a file of hidden states, which is removed in the end. The `vocabulary` metric runs the
    layers twice, because a layer is compared with the last one.

    Raises:
        ConfigError: weights that are damaged or lack a tensor; predictions that are not finite.
        OSError: no space for the hidden states.
    """
    files = LayerFiles.of(folder, dtype, device)
    depth = depth_of(folder)
    order = [row for rows in batches([len(s.input_ids) for s in samples], batch_size) for row in rows]
    ordered = [samples[row].input_ids for row in order]
    starts = torch.tensor([0, *(len(ids) for ids in ordered)]).cumsum(0).tolist()
    flat = torch.tensor([token for ids in ordered for token in ids], device=device)
    own, reading = readings(ordered)
    parts = own.to(device).split(POSITIONS)
    spans = [slice(start, start + POSITIONS) for start in range(0, len(own), POSITIONS)]
    targets = flat.roll(-1)
    shape = (starts[-1], files.config.hidden_size)
    passes = 2 if metric == "vocabulary" else 1
    statistics: list[torch.Tensor] = []
    with (
        torch.inference_mode(),
        ExitStack() as stack,
        _hidden_states(shape, dtype, device, scratch) as hidden_states,
        progress(passes * depth * starts[-1], "measuring", "token") as bar,
    ):
        model = _one_layer(files, 0)
        norm = model.norm
        files.fill_(norm, files.family.final_norm)
        lens = FileLens(files, norm)
        kept = (len(own) if metric == "vocabulary" else 0, shape[1])
        final = stack.enter_context(_hidden_states(kept, dtype, device, scratch))
        normalizers: list[torch.Tensor] = []
        for turn in range(passes):
            _embed(files, model, flat, hidden_states)
            for layer in range(depth):
                _apply_layer(files, layer, ordered, starts, batch_size, hidden_states)
                states = (hidden_states[part] for part in parts)
                if metric == "sequence":
                    read = [lens.true_token_log_probs(x, targets[p]) for x, p in zip(states, parts, strict=True)]
                    statistics.append(torch.cat(read))
                elif turn == 0 and layer == depth - 1:
                    for x, rows in zip(states, spans, strict=True):
                        final[rows] = norm(x)
                        normalizers.append(lens.normalizer(final[rows]))
                elif turn == 1 and layer == depth - 1:
                    statistics.append(torch.zeros_like(statistics[0]))
                elif turn == 1:
                    read = [
                        lens.divergence(*args)
                        for args in zip(states, (final[rows] for rows in spans), normalizers, strict=True)
                    ]
                    statistics.append(torch.cat(read))
                bar.update(starts[-1])
    curves = per_sample(torch.stack(statistics)[:, reading], [len(ids) for ids in ordered], metric)
    result = curves.copy()
    result[order] = curves
    refuse_non_finite(result, samples, dtype)
    return result


def _one_layer(files: LayerFiles, layer: int) -> Any:
    """A model of the decoder's class with one layer of the kind of number `layer`, weights without memory."""
    from accelerate import init_empty_weights
    from transformers import AutoModel

    config = copy.deepcopy(files.config)
    config.num_hidden_layers = 1
    for key in files.family.per_layer_config:
        values = getattr(files.config, key, None)
        if isinstance(values, list):
            setattr(config, key, [values[layer]])
    attention = "sdpa" if "sdpa" in files.family.attentions else "eager"
    with init_empty_weights(include_buffers=False):
        return AutoModel.from_config(config, dtype=files.dtype, attn_implementation=attention).eval()


def _embed(files: LayerFiles, model: Any, flat: torch.Tensor, hidden_states: torch.Tensor) -> None:
    """Word embeddings of all tokens, of which only the rows that occur are read."""
    used, compact = flat.unique(return_inverse=True)
    module = model.get_input_embeddings()
    module.padding_idx = None
    module.weight = nn.Parameter(files.read_rows(files.family.embeddings, used.tolist()), requires_grad=False)
    module.to(files.device)
    for rows in torch.arange(len(flat), device=flat.device).split(POSITIONS):
        hidden_states[rows] = module(compact[rows])


def _apply_layer(
    files: LayerFiles,
    layer: int,
    samples: Sequence[list[int]],
    starts: Sequence[int],
    batch_size: int,
    hidden_states: torch.Tensor,
) -> None:
    """Replaces every sample's hidden states by what the layer makes of them."""
    model = _one_layer(files, layer)
    files.fill_(model.layers[0], f"{files.family.layer_prefix}{layer}.")
    model.norm = nn.Identity()
    model.embed_tokens = nn.Identity()
    model.to(files.device)
    for begin in range(0, len(samples), batch_size):
        group = samples[begin : begin + batch_size]
        _, mask = padded(group, files.device)
        inputs = hidden_states.new_zeros((*mask.shape, hidden_states.shape[1]))
        span = slice(starts[begin], starts[begin + len(group)])
        inputs[mask.bool()] = hidden_states[span]
        output = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        hidden_states[span] = output[mask.bool()]


@contextmanager
def _hidden_states(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, scratch: Path
) -> Iterator[torch.Tensor]:
    """(tokens, hidden), in memory, or in a file where that would be large and the device is the host."""
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
