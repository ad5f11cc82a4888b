"""What trains in which stage, against which decoder, with which labels: the only file that knows stages by name.

Source: Table A.2 and appendix A.5 of the paper. `pretrain-early` is the paper's starred control: the kept layers before
the translators train, too, which makes a better surrogate and ruins the graft. `translator` is ours: text alone,
nothing but the translators, as a named first step before `pretrain` for small budgets. `align` is for a distilled small
model in the surrogate's place (appendix A.8): its width is another, and one linear layer is trained to bridge that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import Supervision
from zero_ds.runtime.errors import ConfigError, did_you_mean

if TYPE_CHECKING:  # the stage table is read by commands that compute nothing, which should not wait for torch
    import torch
    from torch import nn

Part = Literal["encoder", "adapter", "aligner", "translator", "early", "decoder", "lora"]

SURROGATE_ONLY = ("translator.", "early.")
"""Beginnings of the names of weights that belong to a surrogate and have no place in its target."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the stage table."""

    name: str
    trains: tuple[Part, ...]
    decoder: Literal["surrogate", "target"]
    supervise: Supervision
    vision: bool = True
    """Whether there is a vision encoder in the model at all."""


STAGES = {
    stage.name: stage
    for stage in (
        Stage(name="translator", trains=("translator",), decoder="surrogate", supervise="response", vision=False),
        Stage(name="pretrain", trains=("adapter", "translator"), decoder="surrogate", supervise="special_tokens"),
        Stage(
            name="pretrain-early",
            trains=("adapter", "translator", "early"),
            decoder="surrogate",
            supervise="special_tokens",
        ),
        Stage(name="adapter", trains=("adapter",), decoder="surrogate", supervise="special_tokens"),
        Stage(name="encoder", trains=("encoder", "adapter"), decoder="surrogate", supervise="special_tokens"),
        Stage(name="align", trains=("aligner",), decoder="target", supervise="special_tokens"),
        Stage(
            name="decoder", trains=("encoder", "adapter", "aligner", "decoder"), decoder="target", supervise="response"
        ),
    )
}


def stage_of(config: RunConfig) -> Stage:
    """The stage table's row.

    Raises:
        ConfigError: unknown stage, or a part of the configuration that the stage needs and that is missing.
    """
    if config.stage not in STAGES:
        raise ConfigError(f"there is no stage '{config.stage}'{did_you_mean(config.stage, list(STAGES))}")
    stage = STAGES[config.stage]
    if stage.vision and config.encoder is None:
        raise ConfigError(f"stage {stage.name} needs a vision encoder; set encoder.path=FOLDER.")
    if decoder_kind(config) == "surrogate" and not config.surrogate:
        raise ConfigError(f"stage {stage.name} trains against a surrogate; set surrogate=FOLDER or decoder=target.")
    if stage.trains == ("aligner",) and config.adapter.width is None:
        raise ConfigError(f"stage {stage.name} needs adapter.width, the hidden size that the adapter was trained for.")
    if config.lora and "decoder" not in stage.trains:
        raise ConfigError(f"stage {stage.name} does not train the decoder, so lora has no place in it; leave it out.")
    if config.frozen_weights == "int8" and "decoder" in trained_parts(config):
        raise ConfigError(
            f"stage {stage.name} trains the decoder; frozen_weights=int8 is for frozen layers, leave it out."
        )
    if not trained_parts(config):
        raise ConfigError(f"stage {stage.name} has nothing to train against the target; leave out decoder=target.")
    return stage


def decoder_kind(config: RunConfig) -> Literal["surrogate", "target"]:
    """Which decoder the run trains against."""
    return STAGES[config.stage].decoder if config.decoder == "auto" else config.decoder


def decoder_folder(config: RunConfig) -> str:
    """Folder or id of that decoder."""
    return str(config.surrogate) if decoder_kind(config) == "surrogate" else config.target


def supervision(config: RunConfig) -> Supervision:
    return STAGES[config.stage].supervise if config.data.supervise == "auto" else config.data.supervise


def trained_parts(config: RunConfig) -> tuple[Part, ...]:
    """Parts that train: the stage's, as far as they are there.

    Against the target there are no translators, without an `adapter.width` no aligner; translators that are distilled
    train in every stage; `lora` stands in for the decoder.
    """
    parts = tuple(p for p in STAGES[config.stage].trains if p != "aligner" or config.adapter.width is not None)
    if config.lora:
        parts = tuple("lora" if part == "decoder" else part for part in parts)
    if decoder_kind(config) == "target":
        return tuple(p for p in parts if f"{p}." not in SURROGATE_ONLY)
    return parts if "translator" in parts or not config.distill.active else (*parts, "translator")


def freeze_(model: nn.Module, config: RunConfig) -> dict[Part, list[tuple[str, torch.nn.Parameter]]]:
    """Leaves gradients on for the parts that train and off for all others.

    `model` is a `model.VisionLanguageModel`, which knows the parameters of each part by structure. Returns the named
    parameters of every trained part.

    Raises:
        RuntimeError: a part that should train has no parameter, for then it would stay silently untrained.
    """
    model.requires_grad_(False)
    groups: dict[Part, list[tuple[str, torch.nn.Parameter]]] = {}
    for part in trained_parts(config):
        parameters = model.parameters_of(part)  # type: ignore[operator]
        if not parameters:
            raise RuntimeError(f"stage {config.stage} should train the {part}, but no parameter of it was found")
        for _, parameter in parameters:
            parameter.requires_grad_(True)
        groups[part] = parameters
    return groups


def belongs_elsewhere(config: RunConfig, name: str) -> bool:
    """Whether a weight of this name has no place in the run's model: a translator's, where it uses the target."""
    return decoder_kind(config) == "target" and name.startswith(SURROGATE_ONLY)


def learning_rate(config: RunConfig, part: Part) -> float:
    return config.optimizer.learning_rates.get(part, config.optimizer.learning_rate)


def check_start(config: RunConfig) -> list[Path]:
    """Folders of the earlier results this run starts from.

    Raises:
        ConfigError: one that does not exist.
    """
    folders = [Path(path) for path in config.starts]
    for folder in folders:
        if not folder.is_dir():
            key = "continue_from" if str(folder) == config.continue_from else "init_from"
            raise ConfigError(f"{key} names {folder}, which does not exist; run the earlier stage first.")
    return folders
