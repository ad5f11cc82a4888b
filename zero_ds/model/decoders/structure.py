"""Finds the parts of a decoder by its structure, and verifies them before anything relies on them.

A small random copy of the model (`shrink`) runs once, and hooks record what goes in and out of every module. The layers
are the one list as long as the config says, the final norm is the module between the last layer and the head, and so
on. Then each claim is checked by computing: what does not hold is refused with the check that failed.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from zero_ds.model.decoders import own_code
from zero_ds.model.decoders.base import Family
from zero_ds.model.decoders.conversion import Conversion
from zero_ds.model.decoders.cut import check_small_cut, layers_skipped
from zero_ds.model.decoders.shrink import (
    POSITIONS,
    causal_class,
    on_the_cpu,
    position_limit,
    shrunk,
    small_model,
    without_dropout_,
)
from zero_ds.model.verdicts import UnverifiedError, kept
from zero_ds.runtime.errors import ConfigError, one_line

TOLERANCE = 1e-5
"""Largest relative difference between two ways of computing the same logits in float32."""
LENGTH = 12
"""Number of tokens that a small copy reads."""
_FACTORS = ("logit_scale", "logits_scale", "lm_head_multiplier", "logits_scaling", "logits_mup_width_multiplier")
"""Config entries that the scores of the head may be multiplied with, or divided by."""


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "logit_soft_cap", "output_logit_soft_cap")
"""Config entries that may bound the scores of the head."""


def describe(config: Any) -> Family:
    """Returns the verified description of a decoder, from the cache or by running a small copy of it.

    config: transformers' text config, in which every default is filled in.

    Raises:
        UnverifiedError: a check failed; the sentence begins with the check.
    """
    try:
        small = shrunk(config)
        content = small.to_dict()
    except Exception as error:  # the libraries raise many exception types for configs that do not fit together
        raise UnverifiedError(f"no small copy of its config can be made ({one_line(error)})") from None

    def inspect() -> dict[str, Any]:
        with on_the_cpu():
            return asdict(_inspect(config, small))

    keys = {f.name for f in fields(Family)}
    return Family(**kept("decoders", content, keys, inspect, code=own_code.digest(type(config))))


# -- running a small copy --------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """Input and output of a module, the first and the last time that it ran."""

    name: str
    given: torch.Tensor | None
    returned: torch.Tensor | None
    times: int = 1
    last_given: torch.Tensor | None = None
    last_returned: torch.Tensor | None = None
    items: int = 0
    """Number of items of a tuple that it returned; 0 for a tensor."""


@dataclass
class _Copy:
    """A small copy of a decoder, and what its modules did with a few tokens."""

    model: Any
    config: Any
    ids: torch.Tensor
    calls: dict[str, _Call] = field(default_factory=dict)
    """First call of every module, in the order in which they returned."""
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def run(cls, model: nn.Module, config: Any) -> _Copy:
        ids = torch.arange(2 * LENGTH).mul(7).remainder(config.vocab_size - 4).add(4).view(2, LENGTH)
        made = cls(model, config, ids)
        handles = [
            module.register_forward_hook(made._hook(name), with_kwargs=True) for name, module in model.named_modules()
        ]
        try:
            with torch.no_grad():
                made.logits = cast(Any, model)(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return made

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
            given = _tensor(inputs[0] if inputs else keywords.get("hidden_states"))
            returned = _tensor(output)
            call = self.calls.setdefault(name, _Call(name, given, returned, times=0))
            call.times += 1
            call.items = len(output) if isinstance(output, tuple) else 0
            call.last_given, call.last_returned = given, returned

        return hook

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    def name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.modules.items() if other is module)


def _tensor(value: Any) -> torch.Tensor | None:
    """Returns a copy of the tensor that a module's input or output is, or begins with."""
    if isinstance(value, tuple | list):
        value = value[0] if value else None
    if value is not None and not isinstance(value, torch.Tensor):
        value = getattr(value, "last_hidden_state", None)
    return value.clone() if isinstance(value, torch.Tensor) else None


def _inspect(config: Any, small: Any) -> Family:
    """Returns the verified description of a decoder.

    Raises:
        UnverifiedError: a check failed.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnverifiedError("it is an encoder-decoder model, whose decoder reads an encoder's output")
    if causal_class(config) is None:
        sees = hasattr(config, "patch_size") and hasattr(config, "image_size")
        hint = ", and a vision encoder is given as encoder.path" if sees else ""
        raise UnverifiedError(f"transformers has no causal language model for '{config.model_type}'{hint}")
    try:
        with torch.random.fork_rng(devices=[]):
            copy = _Copy.run(small_model(small), small)
    except Exception as error:  # the classes raise many exception types
        raise UnverifiedError(f"a small copy of it does not run ({one_line(error)})") from None
    try:
        with torch.no_grad():
            _check_causal(copy)
        family = _found(copy)
    except (LookupError, AttributeError, TypeError, RuntimeError, AssertionError) as error:
        raise UnverifiedError(f"its parts are not where those of decoders are ({one_line(error)})") from None
    for check in (_check_embeddings, _check_scores, _check_layers):
        try:
            with torch.no_grad():
                check(copy, family)
        except UnverifiedError:
            raise
        except Exception as error:
            raise UnverifiedError(f"a small copy of it does not run with image features ({one_line(error)})") from None
    for verify in (_check_training, _check_initialization, _check_longer_text, _check_tensors):
        with torch.random.fork_rng(devices=[]):
            verify(copy)
    _check_nothing_replaced(copy, family)
    family = _with_attention(copy, family)
    return replace(family, packs=_packs(copy, family), counted_positions=_is_limited(copy, family))


def _found(copy: _Copy) -> Family:
    """Returns the description that the structure of a small copy suggests."""
    model = copy.model
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise UnverifiedError("it has no table of word embeddings")
    if not isinstance(head, nn.Linear):
        raise UnverifiedError("it has no linear output head")
    layers = _layer_list(copy)
    place, at_head = copy.name_of(embeddings), copy.name_of(head)
    backbone = _backbone(copy, layers)
    if not backbone or not place.startswith(f"{backbone}."):
        raise UnverifiedError("its layers and its embeddings are not parts of one backbone")
    norm = _final_norm(copy, layers, backbone)
    names = set(model.state_dict())
    if f"{place}.weight" not in names or f"{at_head}.weight" not in names:
        raise UnverifiedError("its embeddings or its head have no tensor of their own")
    return Family(
        name=copy.config.model_type,
        model_types=(copy.config.model_type,),
        backbone=backbone,
        layer_list=layers.removeprefix(f"{backbone}."),
        last_norm=norm.removeprefix(f"{backbone}."),
        layer_prefix=f"{layers}.",
        embeddings=f"{place}.weight",
        head=f"{at_head}.weight",
        final_norm=f"{norm}.",
        per_layer_config=None,
        head_bias=head.bias is not None,
        layer_outputs=copy.calls[f"{layers}.0"].items,
        **_factor(copy, head, backbone),
    )


def _layer_list(copy: _Copy) -> str:
    """Returns the name of the list of layers: as long as the config says, each of which runs once, in order."""
    depth = copy.config.num_hidden_layers
    lists = [
        (name, module)
        for name, module in copy.modules.items()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    order = list(copy.calls)
    used = []
    for name, module in lists:
        names = [f"{name}.{number}" for number in range(depth)]
        calls = [copy.calls.get(one) for one in names]
        if all(call is not None and call.times == 1 for call in calls) and len(set(map(id, module))) == depth:
            places = [order.index(one) for one in names]
            if places == sorted(places):
                used.append(name)
    outermost = [name for name in used if not any(name.startswith(f"{other}.") for other in used if other != name)]
    if not outermost:
        raise UnverifiedError(f"it has no list of {depth} layers (num_hidden_layers) that run once each, in order")
    if len(outermost) > 1:
        raise UnverifiedError(f"it has {len(outermost)} lists of {depth} layers ({', '.join(outermost)})")
    return outermost[0]


def _backbone(copy: _Copy, layers: str) -> str:
    """Returns the name of the outermost module around the layers that runs and returns hidden states."""
    parts = layers.split(".")
    above = [".".join(parts[:count]) for count in range(1, len(parts))]
    return next((name for name in above if name in copy.calls and copy.calls[name].returned is not None), "")


def _final_norm(copy: _Copy, layers: str, backbone: str) -> str:
    """Returns the name of the module that reads the last layer's output and returns the backbone's."""
    last = copy.calls[f"{layers}.{copy.config.num_hidden_layers - 1}"].returned
    result = copy.calls[backbone].returned
    for name, call in copy.calls.items():
        if not name.startswith(f"{backbone}.") or name.startswith(f"{layers}.") or _equal(last, result):
            continue
        if _equal(call.last_given, last) and _equal(call.last_returned, result):
            return name
    if last is not None and last.dim() != 3:
        raise UnverifiedError(f"its layers pass on states of {last.dim()} dimensions, not one vector for each token")
    raise UnverifiedError("no module turns the last layer's output into the hidden states that the head reads")


def _equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return left is not None and right is not None and left.shape == right.shape and torch.equal(left, right)


def _factor(copy: _Copy, head: nn.Linear, backbone: str) -> dict[str, Any]:
    """Returns the fields of a description that say by which config entry scores are scaled."""
    scores = head(copy.calls[backbone].returned)
    for cap in _CAPS:
        if _close(Family(name="", model_types=(), score_cap=cap).capped(copy.config, scores), copy.logits):
            return {"score_cap": cap}
    for entry in _FACTORS:
        value = getattr(copy.config, entry, None)
        if not isinstance(value, int | float) or not value:
            continue
        for divides in (False, True):
            scaled = Family(name="", model_types=(), score_factor=entry, score_divides=divides)
            if _close(scaled.capped(copy.config, scores), copy.logits):
                return {"score_factor": entry, "score_divides": divides}
    return {}


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Returns whether two tensors are equal but for rounding."""
    if left.shape != right.shape or not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        return False
    return float((left - right).abs().max()) <= TOLERANCE * max(1.0, float(right.abs().max()))


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_embeddings(copy: _Copy, family: Family) -> None:
    """The model must read embeddings in the place of token ids, as it will read image features."""
    embeddings = copy.model.get_input_embeddings()(copy.ids)
    hidden = family.hidden_states(copy.model, embeddings, torch.ones_like(copy.ids))
    before = copy.calls[family.backbone].returned
    assert before is not None
    generator = torch.Generator().manual_seed(0)
    features = embeddings + 0.1 * torch.randn(embeddings.shape, generator=generator)
    try:
        moved = family.hidden_states(copy.model, features, torch.ones_like(copy.ids))
    except Exception:  # a class that looks for the token of each embedding has no common exception type
        moved = before
    if not _close(family.hidden_states(copy.model, embeddings, None), before):
        raise UnverifiedError("without padding, a mask changes its results")
    if not _close(hidden, before) or _close(moved, before):
        raise UnverifiedError("its layers need token ids besides their embeddings, and image features have none")


def _check_scores(copy: _Copy, family: Family) -> None:
    """The last layer's output through norm and head must be the model's logits."""
    last = copy.calls[f"{family.layer_prefix}{copy.config.num_hidden_layers - 1}"].returned
    assert last is not None
    seen = family.logits(copy.model, family.norm(copy.model)(last))
    if not _close(seen, copy.logits):
        raise UnverifiedError("the last layer through its norm and head differs from its own logits")


def _check_causal(copy: _Copy) -> None:
    """No token may see a later one."""
    changed = copy.ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 4 + 4
    logits = copy.model(input_ids=changed, use_cache=False).logits
    if not _close(logits[:, :-1], copy.logits[:, :-1]):
        raise UnverifiedError("its tokens see later tokens, so it is not a decoder")
    if _close(logits[:, -1], copy.logits[:, -1]):
        raise UnverifiedError("its logits do not follow from its tokens")


def _check_layers(copy: _Copy, family: Family) -> None:
    """Every layer must take the hidden states alone from the one before it."""
    depth = copy.config.num_hidden_layers
    for number in range(1, depth):
        before, after = (copy.calls[f"{family.layer_prefix}{n}"] for n in (number - 1, number))
        if not _equal(before.returned, after.given):
            raise UnverifiedError(f"layer {number} does not read the output of layer {number - 1}")
    hidden = copy.calls[f"{family.layer_prefix}0"].given
    if hidden is None or hidden.dim() != 3 or hidden.shape[-1] != copy.config.hidden_size:
        raise UnverifiedError("its layers do not take hidden states of its hidden size")
    with layers_skipped(family.layers(copy.model), {depth - 1}):
        copy.model(input_ids=copy.ids, use_cache=False)


def _check_training(copy: _Copy) -> None:
    """In training, without dropout and noise, the model must compute what it computes otherwise."""
    model = cast(Any, small_model(copy.config))
    without_dropout_(model)
    try:
        with torch.no_grad():
            logits = model.train()(input_ids=copy.ids, use_cache=False).logits
    except Exception as error:  # the classes raise many exception types
        raise UnverifiedError(f"a small copy of it does not run in training ({one_line(error)})") from None
    if not _close(logits, copy.logits):
        raise UnverifiedError("in training, without dropout and noise, it computes something else than otherwise")


def _check_initialization(copy: _Copy) -> None:
    """The class's initialization must leave weights alone that are there already, since it runs after loading."""
    from transformers.initialization import guard_torch_init_functions

    model = cast(Any, small_model(copy.config))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for value in (*model.parameters(), *model.buffers()):
        value._is_hf_initialized = True
    with torch.no_grad(), guard_torch_init_functions():
        for module in model.modules():
            with suppress(Exception):  # some classes look for modules that only their backbone has
                model._init_weights(module)
    changed = next((n for n, value in model.state_dict().items() if not torch.equal(value, before[n])), None)
    if changed is not None:
        raise UnverifiedError(f"its class changes {changed} after loading it")


def _check_longer_text(copy: _Copy) -> None:
    """A text longer than a chunk of a recurrent layer must run."""
    longest = position_limit(copy.config) or POSITIONS
    length = min(97, longest)
    ids = torch.arange(length).remainder(copy.config.vocab_size - 4).add(4).view(1, -1)
    try:
        with torch.no_grad():
            copy.model(input_ids=ids, use_cache=False)
    except Exception as error:  # the classes raise many exception types
        raise UnverifiedError(f"a text of {length} tokens does not run ({one_line(error)})") from None


def _check_tensors(copy: _Copy) -> None:
    """The tensors of files must become those of the class, by name and value."""
    conversion = Conversion(copy.model)
    try:
        read = conversion.reread()
    except Exception as error:  # conversions raise many exception types
        raise UnverifiedError(f"its tensors cannot be read from files ({one_line(error)})") from None
    differing = sorted(read.keys() ^ conversion.state.keys())
    differing += [n for n, value in conversion.state.items() if n in read and not _equal(read[n], value)]
    if differing:
        raise UnverifiedError(f"the tensors of its files do not become those of its class ({differing[0]})")


def _check_nothing_replaced(copy: _Copy, family: Family) -> None:
    """A surrogate in which nothing is replaced must equal the model, with a config.json that was written and read."""
    try:
        check_small_cut(copy.config, family, range(copy.config.num_hidden_layers))
    except ConfigError as error:
        raise UnverifiedError(f"a surrogate with nothing replaced is not equal to it ({one_line(error)})") from None


def _is_limited(copy: _Copy, family: Family) -> bool:
    """Returns whether a sample longer than the config's number of positions fails."""
    longest = position_limit(copy.config) or 0
    if not 0 < longest <= POSITIONS:
        return False
    embeddings = torch.zeros(1, longest + 8, copy.config.hidden_size)
    try:
        with torch.no_grad():
            family.hidden_states(copy.model, embeddings, torch.ones(1, longest + 8, dtype=torch.long))
    except Exception:  # tables are looked up in many ways, each with errors of its own
        return True
    return False


def _packs(copy: _Copy, family: Family) -> bool:
    """Returns whether samples in one row, told apart by their positions, are computed as if they were alone."""
    embeddings = copy.model.get_input_embeddings()(copy.ids)
    positions = torch.arange(LENGTH).repeat(2).view(1, -1)
    try:
        with torch.no_grad():
            packed = family.hidden_states(copy.model, embeddings.view(1, 2 * LENGTH, -1), None, positions)
    except Exception:  # a class that takes no positions has no common exception type
        return False
    alone = copy.calls[family.backbone].returned
    return alone is not None and _close(packed.view(2, LENGTH, -1), alone)


def _with_attention(copy: _Copy, family: Family) -> Family:
    """Returns the description with the implementations of attention that compute something else than eager."""
    try:
        model = cast(Any, small_model(copy.config, attention="sdpa"))
        with torch.no_grad():
            logits = model(input_ids=copy.ids, use_cache=False).logits
            embeddings = model.get_input_embeddings()(copy.ids)
            masked = family.logits(model, family.hidden_states(model, embeddings, torch.ones_like(copy.ids)))
        bound = 1e-4 * max(1.0, float(copy.logits.abs().max()))
        right = all(bool((one - copy.logits).abs().max() <= bound) for one in (logits, masked))
    except Exception:  # a class that refuses an implementation has no common exception type
        right = False
    return family if right else replace(family, wrong_attentions=("sdpa",))


__all__ = ["UnverifiedError", "describe"]
