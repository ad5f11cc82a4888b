"""Dense translators: layers of a mixture of experts whose experts and router are replaced by one dense network.

A copy of a layer with 128 experts has billions of parameters, all of which train, get optimizer state and are saved.
A dense layer of a stated width keeps the source's attention and norms, and learns the rest. surrogate/dense.py makes
its tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zero_ds.model.decoders.cut import kind_of
from zero_ds.model.decoders.shrink import active_share, causal_class, is_expert, shrunk, small_model
from zero_ds.runtime.errors import ConfigError, one_line

if TYPE_CHECKING:
    from zero_ds.model.decoders.folder import DecoderFolder


def dense_config(target: DecoderFolder, cut: Any, numbers: Sequence[int], width: int) -> tuple[Any, dict[str, Any]]:
    """Returns the config of a surrogate with dense translators, and the entries in which it differs from `cut`.

    cut: config of the surrogate with copied translators, whose numbers are `numbers`. width: units of a dense network.

    Raises:
        ConfigError: the target has no experts, or its class no dense layers there.
    """
    if target.is_registered or active_share(target.text_config()) == 1:
        raise ConfigError(f"{target} has no experts that a dense translator could replace; keep --translator copy.")
    entries = dense_entries(cut, numbers, width)
    dense = copy.deepcopy(cut)
    for name, value in entries.items():
        setattr(dense, name, value)
    check_dense(target, cut, dense, numbers)
    return dense, entries


def dense_entries(config: Any, numbers: Sequence[int], width: int) -> dict[str, Any]:
    """Returns the config entries that make layers dense.

    config: config of the surrogate, as it is cut with copied layers. numbers: layers of the surrogate. width: units of
    the dense network.

    Raises:
        ConfigError: the class has no dense layers, or decides by a layer's number which they are, or its other dense
            layers have another width.
    """
    found = dict(vars(config))
    entries: dict[str, Any] | None = None
    others = 0
    if isinstance(found.get("mlp_layer_types"), list):
        kinds = ["dense" if number in numbers else kind for number, kind in enumerate(found["mlp_layer_types"])]
        entries, others = {"mlp_layer_types": kinds}, kinds.count("dense") - len(numbers)
    elif isinstance(found.get("mlp_only_layers"), list) and found.get("decoder_sparse_step", 1) == 1:
        others = len(set(found["mlp_only_layers"]) - set(numbers))
        entries = {"mlp_only_layers": sorted({*found["mlp_only_layers"], *numbers})}
    elif isinstance(found.get("moe_layers"), list):
        entries = {"moe_layers": [number for number in found["moe_layers"] if number not in numbers]}
        others = config.num_hidden_layers - len(found["moe_layers"])
    elif "first_k_dense_replace" in found:
        first = found["first_k_dense_replace"]
        if list(numbers) == list(range(first, first + len(numbers))):
            entries, others = {"first_k_dense_replace": first + len(numbers)}, first
    name = type(config).__name__.removesuffix("Config")
    if entries is None:
        raise ConfigError(f"{name} has no dense layers at {list(numbers)}; keep --translator copy.")
    key = "intermediate_size_mlp" if "intermediate_size_mlp" in found else "intermediate_size"
    if others > 0 and found.get(key) != width:
        raise ConfigError(
            f"the dense layers of {name} all have {found.get(key)} units; give --translator-width {found.get(key)}."
        )
    return {**entries, key: width}


def check_dense(target: DecoderFolder, cut: Any, dense: Any, numbers: Sequence[int]) -> None:
    """Checks on small copies that layers became dense and all others stayed the same.

    cut, dense: configs of the surrogate with copied and with dense translators.

    Raises:
        ConfigError: they did not.
    """
    family = target.family
    try:
        before, after = (family.layers(small_model(shrunk(config))) for config in (cut, dense))
    except Exception as error:  # the classes raise many exception types for configs that do not fit together
        raise ConfigError(
            f"no model has a dense translator at {list(numbers)} ({one_line(error)}); keep --translator copy."
        ) from None
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        has_experts = any(is_expert(name) for name, _ in new.named_parameters())
        right = not has_experts if number in numbers else kind_of(old) == kind_of(new)
        if not right:
            raise ConfigError(
                f"{causal_class(cut).__name__} cannot make layer {number} dense and leave all others as they are; keep "
                "--translator copy."
            )
