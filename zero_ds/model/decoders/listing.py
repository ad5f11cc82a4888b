"""Lists every type of the installed transformers with a causal language model, and whether it can be a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zero_ds.model.decoders import FAMILIES, registered
from zero_ds.model.decoders.structure import UnverifiedError, describe
from zero_ds.runtime.errors import ConfigError, did_you_mean, one_line

LAYERS = 6
"""Number of layers of the configs that verdicts are about, where a class allows it."""
_FILLED: dict[str, Any] = {
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
}
"""Values of entries that every published config of a type has and the defaults of some classes have not."""


ONLY_WITH: dict[str, dict[str, Any]] = {
    name: {"hidden_size_per_layer_input": 0} for name in ("gemma4", "gemma4_text", "gemma4_unified_text")
}
"""Entries of models of a type that can be decoders, where those with the class's defaults cannot."""

_MIXED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 5]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 3},
}
"""Entries of hybrid types that with few layers would have layers of one kind only."""


@dataclass(frozen=True)
class Verdict:
    """True if models of the type can be decoders here."""

    model_type: str
    class_name: str
    """Causal LM class of the type."""
    how: str
    """`registered`, `verified` or `refused`."""
    note: str
    """Check that failed; for the others, what differs from Llama."""


def offered_types() -> dict[str, str]:
    """Returns the causal LM class of every model type for which the installed transformers has one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def default_config(model_type: str) -> Any:
    """Returns the text config of a type with its class's defaults, few layers, and the entries that these lack.

    Raises:
        UnverifiedError: the class takes no config without further entries.
    """
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[model_type]
    config = error = None
    for settings in ({"num_hidden_layers": LAYERS}, {}):
        try:
            config = kind(**settings).get_text_config(decoder=True)
            break
        except Exception as caught:  # the classes raise many exception types
            error = caught
    if config is None:
        raise UnverifiedError(f"its config has no defaults ({one_line(error or ValueError())})")
    for name, value in _MIXED.get(model_type, {}).items():
        setattr(config, name, value)
    for name, value in _FILLED.items():
        if vars(config).get(name, value) is None:
            setattr(config, name, value)
    return config


def verdict(model_type: str) -> Verdict:
    """Returns the verdict on the defaults of a type."""
    name = offered_types()[model_type]
    known = registered(model_type)
    if known is not None:
        return Verdict(model_type, name, "registered", f"family {known.name}")
    notes = []
    try:
        config = default_config(model_type)
        try:
            family = describe(config)
        except UnverifiedError:
            if model_type not in ONLY_WITH:
                raise
            for entry, value in ONLY_WITH[model_type].items():
                setattr(config, entry, value)
                notes.append(f"only with {entry}={value}")
            family = describe(config)
    except UnverifiedError as error:
        return Verdict(model_type, name, "refused", str(error))
    notes += [] if family.backbone == "model" else [f"backbone `{family.backbone}`"]
    if family.score_factor:
        notes.append(f"scores {'divided' if family.score_divides else 'multiplied'} by `{family.score_factor}`")
    if family.head_bias:
        notes.append("output head with a bias")
    if family.wrong_attentions:
        notes.append("eager attention")
    return Verdict(model_type, name, "verified", ", ".join(notes))


def check_types(types: Sequence[str]) -> None:
    """Checks that transformers has a causal LM for every type.

    Raises:
        ConfigError: it has none.
    """
    offered = offered_types()
    for model_type in types:
        if model_type not in offered and not any(model_type in family.model_types for family in FAMILIES.values()):
            hint = did_you_mean(model_type, list(offered))
            raise ConfigError(f"transformers has no causal language model of type '{model_type}'{hint}")


def table(verdicts: Sequence[Verdict]) -> str:
    """Returns verdicts as a table in Markdown."""
    rows = [f"| {v.model_type} | {v.class_name} | {v.how} | {v.note} |" for v in verdicts]
    return "\n".join(["| type | class | verdict | note |", "|---|---|---|---|", *rows])


def page(verdicts: Sequence[Verdict]) -> str:
    """Returns docs/models.md."""
    from importlib.metadata import version

    usable = sum(one.how != "refused" for one in verdicts)
    return f"""# Decoders

Generated by `zero-ds models --page`; do not edit.

transformers {version("transformers")} has a causal language model for {len(verdicts)} model types.
{usable} of them can be decoders. No code is written for a type: the structure of a model is found on a small random
copy of its config, and verified by computing before anything relies on it. A verdict is about the defaults of a class.
Another config of the same type (layers that share keys and values, embeddings for each layer) is verified for itself
when its folder is opened, and may be refused.

{table(verdicts)}
"""
