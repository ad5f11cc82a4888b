"""Numbers of a run's model that a plan needs, without its modules, and the cache in which they are kept.

Building a model on meta tensors takes milliseconds, but importing torch and transformers for it takes seconds. So the
numbers are written to `~/.cache/zero_ds/plans`, under a hash of everything that they follow from, and a second plan of
the same model loads neither library. The numbers of the paper's recipes come with the package (`numbers.json.gz`,
written by tools/plan_numbers.py), so that not even their first plan does.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from zero_ds.runtime.files import write_atomically
from zero_ds.training.gathering import Units
from zero_ds.training.stages import Part

logger = logging.getLogger(__name__)

SLICE = 1 << 28
"""Bytes of the float32 scores that the loss works on at a time on a GPU (`vocabulary.ROWS_BYTES`)."""
COPIES = 3
"""Number of copies of such a slice while the loss works on it."""


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that the passes keep for one sample of some length with some images, or for a micro-batch of them."""

    outside: float
    """Bytes that autograd keeps outside the decoder's layers."""
    layers: tuple[float, ...]
    """Bytes that it keeps in each decoder layer; 0 where nothing in or before the layer trains."""
    second_pass: tuple[float, ...]
    """Bytes that it keeps in each layer that distillation runs a second time."""
    layer_input: float
    """Bytes of a layer's input, which is all that stays of a layer that is recomputed in the backward pass."""
    scores: float
    """Bytes of the logits at the supervised positions and of their gradient."""
    loss_slice: float
    """Bytes of the float32 part of the logits that the loss works on at a time."""
    mask: float = 0.0
    """Additional bytes of each layer where sdpa gets a mask, that is where rows are packed."""

    def times(self, micro_batch: int) -> ActivationBytes:
        """Returns the bytes of `micro_batch` samples, padded to the longest; the loss's slice is limited to `SLICE`."""
        return replace(
            self,
            outside=self.outside * micro_batch,
            layers=tuple(size * micro_batch for size in self.layers),
            second_pass=tuple(size * micro_batch for size in self.second_pass),
            layer_input=self.layer_input * micro_batch,
            scores=self.scores * micro_batch,
            loss_slice=min(self.loss_slice * micro_batch, COPIES * SLICE),
        )

    def with_mask(self) -> ActivationBytes:
        """Returns the bytes of a packed row."""
        return replace(self, layers=self._masked(self.layers), second_pass=self._masked(self.second_pass), mask=0.0)

    def _masked(self, sizes: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(size + self.mask if size else 0.0 for size in sizes)

    @property
    def logits(self) -> float:
        """Bytes of the logits at the supervised positions, their gradient, and the loss's float32 slice."""
        return self.scores + self.loss_slice

    @property
    def recomputable(self) -> tuple[int, ...]:
        """Numbers of the decoder layers that keep something; only these can be recomputed."""
        return tuple(number for number, size in enumerate(self.layers) if size)

    @property
    def recompute_counts(self) -> Sequence[int]:
        """Possible numbers of recomputed layers: from none to all; none or all where some layers run a second time."""
        most = len(self.recomputable)
        return (0, most) if self.second_pass else range(most + 1)

    @property
    def whole(self) -> float:
        """Bytes with nothing recomputed."""
        return self.recomputing(0)

    @property
    def checkpointed(self) -> float:
        """Bytes with all decoder layers recomputed: their inputs, and the activations of the largest of them."""
        return self.recomputing(len(self.recomputable))

    def recomputing(self, count: int) -> float:
        """Returns the bytes at the peak with the first `count` recomputable layers recomputed.

        The backward pass reaches the first layers last, when the activations of later layers are freed. So the peak is
        at the end of the forward pass, unless one of the first layers keeps more than all later ones together.

        count: one of `recompute_counts`.
        """
        sizes = [self.layers[number] for number in self.recomputable]
        whole = self.outside + sum(sizes) + sum(self.second_pass)
        if not count:
            return whole
        inputs = self.layer_input * (count + len(self.second_pass))
        return min(whole, self.outside + inputs + max(sum(sizes[count:]), max(sizes[:count])))


@dataclass(frozen=True)
class Tower:
    """FLOPs of a stack of layers in one step, per token and per pair of tokens."""

    per_token: float
    """FLOPs of a token in the matrix products, forward and backward."""
    per_pair: float
    """FLOPs of a pair of tokens in the attention scores, forward and backward."""
    forward_token: float = 0.0
    """FLOPs of a token in the forward pass alone."""
    forward_pair: float = 0.0
    """FLOPs of a pair of tokens in the forward pass alone."""

    @property
    def backward(self) -> bool:
        """True if the part has a backward pass."""
        return self.per_token > self.forward_token


NO_TOWER = Tower(0.0, 0.0)


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a model's step: linear in the number of tokens, quadratic in the lengths of sequences."""

    encoder: Tower
    """Layers of the vision encoder."""
    patches: int
    """Number of tokens of an image in the vision encoder; 0 without one."""
    per_image: float
    """FLOPs of cutting an image into patch embeddings."""
    per_image_token: float
    """FLOPs of adapter and aligner for an image token."""
    decoder: Tower
    """Layers of the decoder in a batch with images."""
    per_supervised: float
    """FLOPs of the output head for a token with loss."""
    text_decoder: Tower
    """Layers of the decoder in a batch without images: nothing before its first trained layer needs a gradient."""
    per_supervised_text: float
    """FLOPs of the output head for a token with loss in a batch without images."""

    def flops(self, tokens: float, pairs: float, supervised: float, images: float, image_tokens: float) -> float:
        """Returns the FLOPs of a step.

        Args:
            tokens: number of tokens of all sequences.
            pairs: sum of the squared lengths of all sequences.
            supervised: number of tokens with loss.
            images: number of images.
            image_tokens: number of `tokens` that stand for images.
        """
        text = self.patches > 0 and images == 0
        decoder = self.text_decoder if text else self.decoder
        per_supervised = self.per_supervised_text if text else self.per_supervised
        of_tokens = decoder.per_token * tokens + decoder.per_pair * pairs + per_supervised * supervised
        of_image = self.per_image + self.encoder.per_token * self.patches + self.encoder.per_pair * self.patches**2
        return of_tokens + images * of_image + self.per_image_token * image_tokens


@dataclass(frozen=True)
class DecoderSize:
    """Parameters of a decoder: the full model, or a surrogate."""

    parameters: int
    """Number of all parameters."""
    active: int | None = None
    """Number of those that compute a token in a mixture of experts: of experts only the chosen ones, of embeddings only
    the output head. None for a decoder without experts."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes and cost of a run's model."""

    dtype: str
    """Name of the type that the run computes in, as torch calls it."""
    itemsize: int
    """Bytes of an element of that type."""
    groups: dict[Part, list[int]]
    """Elements of the parameters of every part that trains: the optimizer's groups."""
    frozen: list[int]
    """Elements of all other parameters."""
    frozen_bytes: int
    """Bytes of all other parameters where they are not sharded; those in 8 bits take one byte each."""
    largest_unit: int
    """Elements of the largest unit that ZeRO-3 gathers at once: a frozen layer, or a module's own parameters."""
    units: Units
    """Sizes of the decoder's units, by which ZeRO-3 gathers ahead."""
    frozen_layers: list[list[int]]
    """Elements of the parameters of every frozen decoder layer, each of which ZeRO-3 gathers as one unit."""
    decoder: DecoderSize
    image_tokens: int
    """Number of positions that an image takes in the decoder; 0 without a vision encoder."""
    cost: StepCost
    sources: tuple[str, ...]
    """Origin of every architecture, one sentence each."""
    patches: int | None = None
    """Number of patches of an image where the adapter merges them; None where each of them is an image token."""

    @property
    def trained(self) -> list[int]:
        """Elements of the parameters that train."""
        return [size for group in self.groups.values() for size in group]


# -- the cache ---------------------------------------------------------------------------------------------------------

Numbers = tuple[ModelSize, ActivationBytes]
"""Numbers of a model, and the bytes that one sample of the greatest length keeps."""

_NUMBERS: TypeAdapter[Numbers] = TypeAdapter(Numbers)


SHIPPED_NUMBERS = Path(__file__).parent / "numbers.json.gz"
"""Numbers of the paper's recipes by the hash of their facts; a test counts them again."""


def facts_hash(facts: Sequence[str]) -> str:
    """Returns the name of a model's numbers."""
    return hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()[:32]


@cache
def shipped_numbers() -> dict[str, Any]:
    """Returns the numbers that come with the package, as JSON values."""
    if not SHIPPED_NUMBERS.is_file():
        return {}
    return dict(json.loads(gzip.decompress(SHIPPED_NUMBERS.read_bytes())))


def as_values(numbers: Numbers) -> Any:
    """Returns a model's numbers as JSON values."""
    return _NUMBERS.dump_python(numbers, mode="json", exclude_none=True)


def cached_numbers(facts: Sequence[str], count: Callable[[], Numbers]) -> Numbers:
    """Returns the numbers of a model from the package or the cache, or counts and keeps them.

    A cache that cannot be read or written is not an error: the numbers are counted.

    Args:
        facts: everything that the numbers follow from, except the installed packages.
        count: builds the model and counts.
    """
    if (shipped := shipped_numbers().get(facts_hash(facts))) is not None:
        return _NUMBERS.validate_python(shipped)
    text = json.dumps([*facts, *(f"{name} {version(name)}" for name in ("torch", "transformers")), _source_hash()])
    path = _cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    try:
        return _NUMBERS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        pass
    numbers = count()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _NUMBERS.dump_json(numbers).decode())
    except OSError as error:
        logger.debug("the numbers of this plan are not kept in %s: %s", path, error)
    return numbers


def _cache_folder() -> Path:
    """Returns the folder of the cache, below $XDG_CACHE_HOME if that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zero_ds" / "plans"


@cache
def _source_hash() -> str:
    """Returns a hash of the code that builds and counts models, so that a changed version does not read old numbers."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for folder in ("model", "training", "runtime"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
