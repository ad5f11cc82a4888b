"""Cuts a decoder's config: the config of a model whose layers are some of the target's, each of its own kind.

A class decides by a layer's number what kind of layer it makes: by a list with an entry per layer, a list of layer
numbers, the number of first or last layers of a kind, or a period. Lists and counts can be cut; a period, or a formula
in the layer's number, often cannot. So the cut is checked on a small copy: every layer must have the kind that it had
in the target, and the cut model must equal the target with its other layers left out.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zero_ds.model.decoders.shrink import layer_overrides, on_the_cpu, shrunk, small_model
from zero_ds.runtime.errors import ConfigError, one_line

if TYPE_CHECKING:
    from zero_ds.model.decoders.base import Family

_NUMBERS = re.compile(
    r"mlp_only_layers|moe_layers|attn_layer_indices|full_attn_idxs|hybrid_layer_ids|(\w+_)?(layer_ids|layer_idxs?"
    r"|layer_indices|layer_idx_list|idx_list|block_indices|attention_layers_idx|cross_attention_layers)|global_layers"
)
"""Names of lists of layer numbers."""
_FIRST = re.compile(
    r"first_k_dense_replace|num_dense_layers|n_dense_layers|moe_layer_start_index|num_hash_layers|first_dense_layers"
    r"|first_k_dense_layers|num_first_dense_layers|n_hash_layers|dense_layers"
)
"""Names of numbers of layers at the beginning that are of another kind."""
_DEPTH = re.compile(r"num_blocks|num_layers|n_layers?")
"""Names of entries that repeat the number of layers, which some classes read in place of num_hidden_layers."""
_LAST = re.compile(r"num_kv_shared_layers")
"""Names of numbers of layers at the end that are of another kind."""
_OTHER_LISTS = re.compile(r"architectures|\w+_token_ids?|id2label|\w+_section|suppress_tokens|\w*time_step\w*|rope_\w+")
"""Names of lists that have nothing to do with layers, whatever their length."""
_INDEX = re.compile(r"layer_idx|layer_id|layer_number|layer_index|idx|num_calls|\w+_step|_\w+|training|\w*device\w*")
"""Names of attributes of a layer's modules that may follow its number without changing its results."""


def cut_config(config: Any, family: Family, sources: Sequence[int]) -> Any:
    """Returns the config of a model whose layers are the target's `sources`, in this order.

    config: the target's text config, in which every default is filled in.
    """
    cut = copy.deepcopy(config)
    if layer_overrides(config):
        cut.per_layer_config = None
    for name, value in cut_entries(config, family, sources).items():
        setattr(cut, name, value)
    return cut


def cut_entries(config: Any, family: Family, sources: Sequence[int]) -> dict[str, Any]:
    """Returns the entries of a config that a cut changes, by the name under which the class reads them."""
    depth = int(config.num_hidden_layers)
    changed: dict[str, Any] = {"num_hidden_layers": len(sources)}
    if family.per_layer_config is not None:
        for name in family.per_layer_config:
            values = getattr(config, name, None)
            if isinstance(values, list):
                changed[name] = [values[source] for source in sources]
        return changed
    for name, value in vars(config).items():
        if name.startswith("_") or _OTHER_LISTS.fullmatch(name):
            continue
        if isinstance(value, list | tuple):
            if name == "block_types":  # repeated until there is one for each layer
                changed[name] = [value[source % len(value)] for source in sources]
            elif _NUMBERS.fullmatch(name) and _ascending(value):
                changed[name] = [number for number, source in enumerate(sources) if source in value]
            elif len(value) == depth:
                changed[name] = [value[source] for source in sources]
        elif name == "scale_depth" and value:  # is divided by the root of the number of layers
            changed[name] = value * math.sqrt(len(sources) / depth)
        elif isinstance(value, int) and not isinstance(value, bool):
            if _DEPTH.fullmatch(name) and value == depth:
                changed[name] = len(sources)
            elif _FIRST.fullmatch(name):
                changed[name] = sum(source < value for source in sources)
            elif _LAST.fullmatch(name):
                changed[name] = sum(source >= depth - value for source in sources)
    _explicit_periods(config, changed, sources)
    overrides = layer_overrides(config)
    if overrides:
        changed["per_layer_config"] = {
            number: overrides[source] for number, source in enumerate(sources) if source in overrides
        }
    return changed


def _ascending(values: Sequence[Any]) -> bool:
    """Returns whether a list can be one of layer numbers, each of which occurs once."""
    return all(type(item) is int for item in values) and list(values) == sorted(set(values))


def _explicit_periods(config: Any, changed: dict[str, Any], sources: Sequence[int]) -> None:
    """Writes a period of sparse layers as a list of dense ones, where the class reads such a list as well."""
    period = getattr(config, "decoder_sparse_step", 1)
    dense = getattr(config, "mlp_only_layers", None)
    if not isinstance(dense, list) or not isinstance(period, int) or period <= 1:
        return
    changed["decoder_sparse_step"] = 1
    changed["mlp_only_layers"] = [
        number for number, source in enumerate(sources) if source in dense or (source + 1) % period
    ]


def kind_of(layer: nn.Module) -> dict[str, Any]:
    """Returns the kind of a layer: the shapes of its parameters, and its modules' settings that are plain values."""
    found: dict[str, Any] = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    for prefix, module in layer.named_modules():
        found[f"{prefix}()"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and not _INDEX.fullmatch(name):
                found[f"{prefix}.{name}"] = value
    return found


def check_cut(config: Any, family: Family, sources: Sequence[int]) -> None:
    """Checks on a small copy that the layers `sources` of a decoder can be a model of its class by themselves.

    Raises:
        ConfigError: the class makes another kind of layer at one of the new places, or computes something else than
            the target with its other layers left out.
    """
    with on_the_cpu():
        check_small_cut(shrunk(config), family, sources)


def read_again(config: Any, entries: dict[str, Any] | None = None) -> Any:
    """Returns a config as its class reads it from a config.json.

    entries: content of config.json; by default everything that the config holds.
    """
    content = config.to_dict() if entries is None else entries
    return type(config).from_dict(json.loads(json.dumps(content), object_hook=_special_floats))


def _special_floats(entry: dict[str, Any]) -> Any:
    """Returns the number that transformers writes as an object in JSON, which has no infinity."""
    return float(entry["__float__"]) if set(entry) == {"__float__"} else entry


def check_small_cut(small: Any, family: Family, sources: Sequence[int]) -> None:
    """Checks the same on a config that is small already.

    Raises:
        ConfigError: as `check_cut`.
    """
    whole = small_model(small)
    where = f"{type(whole).__name__}"
    try:
        part = small_model(read_again(cut_config(small, family, sources)), seed=1)
    except Exception as error:  # the classes raise many exception types for configs that do not fit together
        raise ConfigError(
            f"{where} cannot have only the layers {_ranges(sources)} ({one_line(error)}); replace others."
        ) from None
    layers, cut = family.layers(whole), family.layers(part)
    for number, source in enumerate(sources):
        _check_kind(where, kind_of(layers[source]), kind_of(cut[number]), source, number)
    try:
        _copy_weights(whole, part, family, sources)
    except (LookupError, RuntimeError) as error:
        raise ConfigError(
            f"{where} has tensors outside its layers that follow their number ({one_line(error)})"
        ) from None
    ids = torch.arange(20).remainder(small.vocab_size - 4).add(4).view(2, 10)
    try:
        with torch.no_grad():
            with layers_skipped(layers, set(range(len(layers))) - set(sources)):
                expected = whole(input_ids=ids, use_cache=False).logits
            seen = part(input_ids=ids, use_cache=False).logits
    except Exception as error:
        raise ConfigError(
            f"{where} cannot run with only the layers {_ranges(sources)} ({one_line(error)}); replace others."
        ) from None
    difference = float((seen - expected).abs().max())
    if not difference <= 1e-5 * max(1.0, float(expected.abs().max())):
        raise ConfigError(
            f"{where} with only the layers {_ranges(sources)} computes something else than with its other layers left "
            f"out (logits differ by {difference:.2g}); a layer that stays needs one that is replaced."
        )


def _same(left: Any, right: Any) -> bool:
    """Returns whether two settings are equal; numbers may differ by their last digits."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-12)
    return bool(left == right)


def _check_kind(where: str, wanted: dict[str, Any], found: dict[str, Any], source: int, number: int) -> None:
    """Raises ConfigError if a layer of the cut model has another kind than in the target."""
    name = next((name for name in sorted({*wanted, *found}) if not _same(wanted.get(name), found.get(name))), None)
    if name is None:
        return
    raise ConfigError(
        f"{where} makes another kind of layer of another number: layer {source} as number {number} would have "
        f"{name.strip('.')} {found.get(name)} instead of {wanted.get(name)}; replace other layers."
    )


def _copy_weights(whole: nn.Module, part: nn.Module, family: Family, sources: Sequence[int]) -> None:
    """Gives a cut model the weights of the whole one."""
    named = dict(whole.state_dict())
    own = {}
    pattern = re.compile(re.escape(family.layer_prefix) + r"(\d+)(\..+)")
    for name in part.state_dict():
        match = pattern.fullmatch(name)
        own[name] = named[f"{family.layer_prefix}{sources[int(match[1])]}{match[2]}" if match else name]
    part.load_state_dict(own)


@contextmanager
def layers_skipped(layers: nn.ModuleList, skipped: set[int]) -> Iterator[None]:
    """Makes layers return their input, as long as the block is open: the target with layers dropped by hand."""
    handles = [layers[number].register_forward_hook(_hand_on, with_kwargs=True) for number in skipped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_on(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
    """Returns a layer's input in the form of its output."""
    hidden = inputs[0] if inputs else keywords["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def fed(layer: nn.Module, hidden_states: torch.Tensor) -> Iterator[None]:
    """Makes a layer read `hidden_states` instead of what its model passes to it, as long as the block is open."""

    def replace(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if inputs:
            return (hidden_states, *inputs[1:]), keywords
        return inputs, {**keywords, "hidden_states": hidden_states}

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _ranges(numbers: Sequence[int]) -> str:
    """Returns layer numbers as text: `0-3, 9`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
