"""Lists every type of the installed transformers with a vision transformer, and whether it can be a vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from zero_ds.model.decoders.listing import Verdict, table
from zero_ds.model.encoders import registered
from zero_ds.model.encoders.structure import describe
from zero_ds.model.verdicts import UnverifiedError
from zero_ds.runtime.errors import one_line

LAYERS = 4
"""Number of layers of the configs that verdicts are about, where a class allows it."""
_PUBLISHED: dict[str, dict[str, Any]] = {"dinov3_vit": {"num_register_tokens": 4}}
"""Entries that every published config of a type has, unlike the defaults of its class."""
_TWO_TOWERS = "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES"
"""Name of transformers' table of the classes with text and vision whose towers are trained together, as CLIP's."""


@cache
def offered_types() -> dict[str, str]:
    """Returns the class of every model type of the installed transformers that reads images alone.

    For classes with a text and a vision tower, such as CLIP, it is the whole class, whose vision tower is taken.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    found = dict(modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES)
    found |= getattr(modeling_auto, _TWO_TOWERS)
    towers = set(CONFIG_MAPPING.keys())
    for name, kind in modeling_auto.MODEL_MAPPING_NAMES.items():
        if isinstance(kind, str) and ("Vision" in kind or name == "radio" or f"{name}_vision_model" in towers):
            found.setdefault(name, kind)
    return {name: kind if isinstance(kind, str) else kind[0] for name, kind in sorted(found.items())}


def default_config(model_type: str, layers: int = LAYERS) -> Any:
    """Returns the config of a type's vision transformer with its class's defaults, and few layers.

    Raises:
        UnverifiedError: the class takes no config without further entries.
    """
    from transformers import CONFIG_MAPPING

    try:
        whole: Any = CONFIG_MAPPING[model_type]()
        config = getattr(whole, "vision_config", whole)
        if isinstance(getattr(config, "num_hidden_layers", None), int):
            config = type(config)(num_hidden_layers=layers, **_PUBLISHED.get(model_type, {}))
    except Exception as error:  # the classes raise many exception types
        raise UnverifiedError(f"its config has no defaults ({one_line(error)})") from None
    return config


def verdict(model_type: str) -> Verdict:
    """Returns the verdict on the defaults of a type."""
    name = offered_types()[model_type]
    known = registered(model_type)
    if known is not None:
        return Verdict(model_type, name, "registered", "1 token before the patches, interpolates when asked")
    try:
        family = describe(default_config(model_type))
    except UnverifiedError as error:
        return Verdict(model_type, name, "refused", str(error))
    notes = [f"tower `{family.class_name}`"] if family.class_name != name else []
    if family.prefix_tokens:
        notes.append(f"{family.prefix_tokens} token{'' if family.prefix_tokens == 1 else 's'} before the patches")
    if family.takes_any_size:
        notes.append("any size")
    else:
        notes.append("interpolates when asked" if family.interpolation else "one size")
    notes += ["reads rows of patches"] if family.reads_patches else []
    notes += [] if family.final_norm else ["no norm after its last layer"]
    notes += ["eager attention"] if family.wrong_attentions else []
    notes += ["export `remote-code`"] if family.llava_prefix is None or family.prefix_tokens > 1 else []
    return Verdict(model_type, name, "verified", ", ".join(notes))


def section(verdicts: Sequence[Verdict]) -> str:
    """Returns the section of docs/encoders.md that lists types."""
    usable = sum(one.how != "refused" for one in verdicts)
    return f"""
## Types
{usable} of {len(verdicts)} model types that read images can be vision encoders. Of classes with text and vision, such
as CLIP and SigLIP, the vision tower is taken. "Interpolates when asked" and "any size" mean that `encoder.image_size`
may be chosen. A verdict is about the defaults of a class, and `zero-ds models --page` prints this table.

{table(verdicts)}
"""
