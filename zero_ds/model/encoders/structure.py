"""Finds the parts of a vision encoder by its structure, and verifies them before anything relies on them.

A small random copy of the class (`shrink`) reads random images, and hooks record what goes in and out of every module.
The layers are the one list as long as the config says; the hidden states must be what goes in and out of them. A change
of one patch of the image must change one token of the embeddings, which says where the patches are. What does not hold
is refused with the check that failed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from zero_ds.model.decoders.shrink import on_the_cpu, seeded, without_dropout_
from zero_ds.model.encoders.base import EncoderFamily, native_size, side
from zero_ds.model.encoders.loading import load_tower
from zero_ds.model.encoders.shrink import is_auto, parameters, shrunk, small_model, vision_class
from zero_ds.model.verdicts import UnverifiedError, kept
from zero_ds.runtime.errors import ConfigError, one_line

TOLERANCE = 1e-5
"""Largest relative difference between two ways of computing the same features in float32."""
INTERPOLATION = "interpolate_pos_encoding"
"""Argument of many classes' forward pass that makes them interpolate position embeddings."""
_NESTED = ("siglip_vision_model", "metaclip_2_vision_model")
"""Types whose tensors begin with `vision_model.` in published files, as CLIP's do."""
_NOT_KEPT = ("load", "size")
"""Fields of a description that do not follow from the structure."""


def describe(config: Any) -> EncoderFamily:
    """Returns the verified description of a vision encoder, from the cache or by running a small copy of it.

    config: transformers' config of the vision transformer, in which every default is filled in.

    Raises:
        UnverifiedError: a check failed; the sentence begins with the check.
    """
    kind = vision_class(config)
    if kind is None:
        raise UnverifiedError(f"transformers has no class for '{config.model_type}' that reads images alone")
    try:
        small = shrunk(config)
        content = small.to_dict()
    except Exception as error:  # the libraries raise many exception types for configs that do not fit together
        raise UnverifiedError(f"no small copy of its config can be made ({one_line(error)})") from None

    def inspect() -> dict[str, Any]:
        with on_the_cpu():
            found = asdict(_inspect(kind, config, small))
        return {name: value for name, value in found.items() if name not in _NOT_KEPT}

    keys = {f.name for f in fields(EncoderFamily)} - set(_NOT_KEPT)
    found = kept("encoders", content, keys, inspect)
    return EncoderFamily(**found, load=partial(load_tower, kind.__name__))


@dataclass
class _Call:
    """Input and output of a module, the first time that it ran, and how often it did."""

    given: torch.Tensor | None
    returned: torch.Tensor | None
    times: int = 0


@dataclass
class _Copy:
    """A small copy of a vision encoder, and what its modules did with a few images."""

    model: Any
    config: Any
    pixels: torch.Tensor
    calls: dict[str, _Call] = field(default_factory=dict)
    """First call of every module, in the order in which they returned."""
    output: Any = None

    def run(self, family: EncoderFamily) -> None:
        """Runs the model and records the calls of its modules."""
        handles = [m.register_forward_hook(self._hook(n), with_kwargs=True) for n, m in self.model.named_modules()]
        try:
            self.output = look(self.model, family, self.pixels)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
            given = inputs[0] if inputs else keywords.get("hidden_states", keywords.get("inputs_embeds"))
            call = self.calls.setdefault(name, _Call(_tensor(given), _tensor(output)))
            call.times += 1

        return hook


def look(model: nn.Module, family: EncoderFamily, pixels: torch.Tensor, **more: Any) -> Any:
    """Returns the output of a class for images: (images, 3, height, width)."""
    with torch.no_grad(), seeded(0):
        config = cast(Any, model).config
        return model(**family.inputs(config, pixels), output_hidden_states=True, **more)


def _tensor(value: Any) -> torch.Tensor | None:
    """Returns a copy of the tensor that a module's input or output is, or begins with."""
    if isinstance(value, tuple | list):
        value = value[0] if value else None
    if value is not None and not isinstance(value, torch.Tensor):
        value = getattr(value, "last_hidden_state", None)
    return value.clone() if isinstance(value, torch.Tensor) else None


def _images(config: Any, size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size))


def _inspect(kind: Any, config: Any, small: Any) -> EncoderFamily:
    """Returns the verified description of a vision encoder; its `load` is not meant to be called.

    Raises:
        UnverifiedError: a check failed.
    """
    reads_patches = _reads_patches(kind)
    for name in ("num_hidden_layers", "patch_size", "hidden_size"):
        if not isinstance(getattr(config, name, None), int | list | tuple):
            raise UnverifiedError(f"its config has no {name}, which a vision transformer has")
    try:
        size = native_size(small)
        side(small.patch_size)
    except ConfigError as error:
        raise UnverifiedError(str(error)) from None
    except (AttributeError, TypeError, ValueError):
        raise UnverifiedError("its config does not say how large its images are") from None
    family = EncoderFamily(
        name=config.model_type,
        model_types=(config.model_type,),
        load=kind,
        prefix_tokens=0,
        final_norm="",
        class_name=kind.__name__,
        auto=is_auto(config),
        reads_patches=reads_patches,
    )
    try:
        copy = _Copy(small_model(kind, small), small, _images(small, size))
        copy.run(family)
    except Exception as error:  # the classes raise many exception types
        raise UnverifiedError(f"a small copy of it does not run ({one_line(error)})") from None
    try:
        family = _found(copy, family)
    except (LookupError, AttributeError, TypeError, RuntimeError) as error:
        raise UnverifiedError(f"its parts are not where those of encoders are ({one_line(error)})") from None
    family = replace(family, idle=_idle(copy, family), **_sizes(copy, family))
    _check_training(copy, family, kind)
    family = _with_attention(copy, family, kind)
    prefix = "vision_tower.vision_model." if config.model_type in _NESTED else "vision_tower."
    return replace(family, llava_prefix=prefix if family.auto and not family.reads_patches else None)


def _reads_patches(kind: Any) -> bool:
    """Returns whether a class reads rows of patches; raises UnverifiedError if it needs anything else than images."""
    needed = {name for name, one in parameters(kind).items() if one.default is one.empty} - {"pixel_values"}
    if needed == {"pixel_attention_mask", "spatial_shapes"}:
        return True
    if needed:
        raise UnverifiedError(f"{kind.__name__} needs {' and '.join(sorted(needed))} besides images")
    return False


def _found(copy: _Copy, family: EncoderFamily) -> EncoderFamily:
    """Returns the description that the structure of a small copy suggests, with every part of it checked."""
    layers = _layer_list(copy)
    depth = copy.config.num_hidden_layers
    states = getattr(copy.output, "hidden_states", None)
    if not isinstance(states, tuple) or len(states) != depth + 1:
        raise UnverifiedError(f"its class does not return {depth + 1} hidden states for {depth} layers")
    for number in range(depth):
        call = copy.calls[f"{layers}.{number}"]
        if not _equal(states[number], call.given):
            raise UnverifiedError(f"its hidden state {number} is not what layer {number} reads")
    last = copy.calls[f"{layers}.{depth - 1}"].returned
    if not _equal(states[-1], last):
        raise UnverifiedError("its last hidden state is not what its last layer returns")
    if states[0].dim() != 3 or states[0].shape[-1] != copy.config.hidden_size:
        raise UnverifiedError("its layers do not pass on one vector of its hidden size for each token")
    again = look(copy.model, family, copy.pixels)
    if not all(_equal(one, other) for one, other in zip(states, again.hidden_states, strict=True)):
        raise UnverifiedError("it computes something else each time")
    family = replace(family, layer_list=layers, final_norm=_final_norm(copy, layers))
    return replace(family, prefix_tokens=_prefix_tokens(copy, family, copy.pixels.shape[-1]))


def _layer_list(copy: _Copy) -> str:
    """Returns the name of the list of layers: as long as the config says, each of which runs once, in order."""
    depth = copy.config.num_hidden_layers
    order = {name: number for number, name in enumerate(copy.calls)}
    used = []
    for name, module in copy.model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != depth:
            continue
        names = [f"{name}.{number}" for number in range(depth)]
        if all(one in copy.calls and copy.calls[one].times == 1 for one in names):
            places = [order[one] for one in names]
            if places == sorted(places):
                used.append(name)
    outermost = [name for name in used if not any(name.startswith(f"{other}.") for other in used if other != name)]
    if len(outermost) != 1:
        how = "no list" if not outermost else f"{len(outermost)} lists"
        raise UnverifiedError(f"it has {how} of {depth} layers (num_hidden_layers) that run once each, in order")
    return outermost[0]


def _final_norm(copy: _Copy, layers: str) -> str:
    """Returns the path of the norm that reads all tokens after the last layer, or its first token; empty if none."""
    last = copy.calls[f"{layers}.{copy.config.num_hidden_layers - 1}"].returned
    assert last is not None
    after = list(copy.calls).index(f"{layers}.{copy.config.num_hidden_layers - 1}")
    for name in list(copy.calls)[after + 1 :]:
        module, call = copy.model.get_submodule(name), copy.calls[name]
        weight = getattr(module, "weight", None)
        if weight is None or tuple(weight.shape) != (copy.config.hidden_size,) or any(module.children()):
            continue
        if any(_equal(call.given, wanted) for wanted in (last, last[:, 0], last[:, :1])):
            return name
    return ""


def _prefix_tokens(copy: _Copy, family: EncoderFamily, size: int, **more: Any) -> int:
    """Returns the number of tokens before the patches of images of `size` pixels.

    Raises:
        UnverifiedError: a patch is not one token, or the tokens are not the patches row by row after the others.
    """
    patch = side(copy.config.patch_size)
    grid = size // patch
    pixels = _images(copy.config, size)
    whole = look(copy.model, family, pixels, **more).hidden_states[0]
    places = []
    for row, column in ((0, 0), (0, 1), (1, 0), (grid - 1, grid - 1)):
        changed = pixels.clone()
        changed[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] += 1.0
        tokens = look(copy.model, family, changed, **more).hidden_states[0]
        if tokens.shape != whole.shape:
            raise UnverifiedError("its number of tokens depends on the image's content")
        moved = (tokens - whole).abs().amax(dim=-1) > TOLERANCE
        if not bool((moved.sum(dim=1) == 1).all()):
            raise UnverifiedError("a patch of the image is not one token of its embeddings")
        places.append(int(moved[0].nonzero()[0]))
    first = places[0]
    if places != [first, first + 1, first + grid, first + grid * grid - 1]:
        raise UnverifiedError("its tokens are not the image's patches row by row")
    if whole.shape[1] != first + grid * grid:
        raise UnverifiedError(f"it has {whole.shape[1] - first - grid * grid} tokens after the patches")
    return first


def _sizes(copy: _Copy, family: EncoderFamily) -> dict[str, Any]:
    """Returns the fields that say whether the class reads images of other sizes than the config's."""
    patch, native = side(copy.config.patch_size), native_size(copy.config)
    larger = native + 2 * patch
    if _reads(copy, family, larger):
        return {"takes_any_size": True}
    if INTERPOLATION in parameters(type(copy.model)):
        plain = look(copy.model, family, copy.pixels).hidden_states[-1]
        try:
            asked = look(copy.model, family, copy.pixels, **{INTERPOLATION: True}).hidden_states[-1]
        except Exception:  # a class that has the argument but no table has no common exception type
            return {}
        if torch.equal(plain, asked) and _reads(copy, family, larger, **{INTERPOLATION: True}):
            return {"interpolation": INTERPOLATION}
    return {}


def _reads(copy: _Copy, family: EncoderFamily, size: int, **more: Any) -> bool:
    """Returns whether the class reads images of a size, with the tokens where they are in others."""
    try:
        return _prefix_tokens(copy, family, size, **more) == family.prefix_tokens
    except Exception:  # tables of positions that do not fit have no common exception type
        return False


def _idle(copy: _Copy, family: EncoderFamily) -> tuple[str, ...]:
    """Returns the names of the parameters that no patch feature depends on, or that have no elements."""
    model = copy.model.requires_grad_(True)
    try:
        with seeded(0):
            output = model(**family.inputs(copy.config, copy.pixels), output_hidden_states=True)
        patches = output.hidden_states[-1][:, family.prefix_tokens :]
        (patches * torch.linspace(-1, 1, patches.numel()).view(patches.shape)).sum().backward()
        idle = tuple(n for n, parameter in model.named_parameters() if parameter.grad is None or not parameter.numel())
    except Exception as error:  # the classes raise many exception types
        raise UnverifiedError(f"gradients of its features cannot be computed ({one_line(error)})") from None
    finally:
        model.zero_grad()
        model.requires_grad_(False)
    layers = f"{family.layer_list}."
    if all(name in idle for name, _ in model.named_parameters() if name.startswith(layers)):
        raise UnverifiedError("no gradient reaches its layers")
    return idle


def _check_training(copy: _Copy, family: EncoderFamily, kind: Any) -> None:
    """Checks that the model computes the same in training, without dropout, as otherwise."""
    model = small_model(kind, copy.config)
    without_dropout_(model)
    try:
        states = look(model.train(), family, copy.pixels).hidden_states
    except Exception as error:  # the classes raise many exception types
        raise UnverifiedError(f"a small copy of it does not run in training ({one_line(error)})") from None
    if not _close(states[-1], copy.output.hidden_states[-1]):
        raise UnverifiedError("in training, without dropout, it computes something else than otherwise")


def _with_attention(copy: _Copy, family: EncoderFamily, kind: Any) -> EncoderFamily:
    """Returns the description with the implementations of attention that compute something else than eager."""
    try:
        states = look(small_model(kind, copy.config, attention="sdpa"), family, copy.pixels).hidden_states
        right = _close(states[-1], copy.output.hidden_states[-1], 1e-4)
    except Exception:  # a class that refuses an implementation has no common exception type
        right = False
    return family if right else replace(family, wrong_attentions=("sdpa",))


def _equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return left is not None and right is not None and left.shape == right.shape and torch.equal(left, right)


def _close(left: torch.Tensor, right: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Returns whether two tensors are equal but for rounding."""
    if left.shape != right.shape or not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        return False
    return float((left - right).abs().max()) <= tolerance * max(1.0, float(right.abs().max()))
