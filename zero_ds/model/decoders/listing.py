"""Lists every type of the installed transformers with a causal language model, and whether it can be a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_ds.model.decoders import FAMILIES, registered
from zero_ds.model.decoders.structure import describe
from zero_ds.model.verdicts import UnverifiedError
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


STEPS = {
    "surrogate": "logits of a surrogate equal to the model's without the replaced layers, to 1e-5",
    "trajectory": "curves of the model in memory and of one layer after the other are equal",
    "gradients": "a loss on text reaches every parameter of the adapter through the surrogate",
    "graft": "the encoder on the full model changes its predictions with the image",
    "export": "transformers alone computes the same logits and answers from the exported folder",
    "ZeRO-3": "a step of two stages on two ranks",
}
"""Proofs of the census in their order, by the names of their columns."""


@dataclass(frozen=True)
class Proofs:
    """Proofs that a tiny random model of a type has passed in the census."""

    done: frozenset[str]
    """Names in STEPS."""
    error: str = ""
    """Sentence with which the first other proof failed."""

    @property
    def whole(self) -> bool:
        """True if it has passed them all."""
        return self.done >= STEPS.keys()


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


def known_types() -> set[str]:
    """Returns the types with a causal LM in the installed transformers, and those of registered families."""
    return {*offered_types(), *(one for family in FAMILIES.values() for one in family.model_types)}


def check_types(types: Sequence[str]) -> None:
    """Checks that transformers has a causal LM for every type.

    Raises:
        ConfigError: it has none.
    """
    known = known_types()
    for model_type in types:
        if model_type not in known:
            hint = did_you_mean(model_type, list(offered_types()))
            raise ConfigError(f"transformers has no causal language model of type '{model_type}'{hint}")


def table(verdicts: Sequence[Verdict], proofs: Mapping[str, Proofs] | None = None) -> str:
    """Returns verdicts as a table in Markdown, with a column for each proof of a census."""
    columns = () if proofs is None else tuple(STEPS)
    names = ["type", "class", "verdict", *columns, "note"]
    lines = [names, ["---"] * len(names)]
    for one in verdicts:
        proof = (proofs or {}).get(one.model_type, Proofs(frozenset()))
        marks = ["yes" if step in proof.done else "" for step in columns]
        note = one.note if not proof.error else "; ".join(filter(None, (one.note, proof.error.rstrip("."))))
        lines.append([one.model_type, one.class_name, one.how, *marks, note.replace("|", "/")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(verdicts: Sequence[Verdict], proofs: Mapping[str, Proofs] | None = None) -> str:
    """Returns docs/models.md; without proofs, a page of the verdicts alone."""
    from importlib.metadata import version

    usable = sum(one.how != "refused" for one in verdicts)
    by = "`zero-ds models --page`" if proofs is None else "`python tools/census.py --zero3 --page docs/models.md`"
    return f"""# Decoders

Generated by {by}; do not edit.

transformers {version("transformers")} has a causal language model for {len(verdicts)} model types.
{usable} of them can be decoders. No code is written for a type: the structure of a model is found on a small random
copy of its config, and verified by computing before anything relies on it. A verdict is about the defaults of a class.
Another config of the same type (layers that share keys and values, embeddings for each layer) is verified for itself
when its folder is opened, and may be refused.
{"" if proofs is None else _about(proofs)}
{table(verdicts, proofs)}
"""


def _about(proofs: Mapping[str, Proofs]) -> str:
    """Returns the paragraph about a census."""
    whole = sum(one.whole for one in proofs.values())
    steps = "\n".join(f"* **{name}**: {meaning}" for name, meaning in STEPS.items())
    return f"""
A census has carried a tiny random model of every type through the method, with three of its layers replaced by one:
{whole} types passed every proof. The note of any other says which check or proof failed.

{steps}
"""
