"""The stage table: what trains in which stage, against which decoder, with which labels.

Only this file knows stages by name. Source: Table A.2 and appendix A.5 of the paper. `pretrain-early` is the paper's
starred control: the kept layers before the translators train as well, which makes a better surrogate and ruins the
graft. `translator`, which the paper does not have, trains only the translators, on text, as a first step before
`pretrain` for small budgets. `words` and `words-encoder`, which the paper does not have either, train against the word
embeddings of the target alone (model/word_space.py). `align` is for a distilled small model in place of the surrogate
(appendix A.8): it has another width, and one linear layer is trained to bridge the two.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import Supervision
from zero_ds.runtime.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # the stage table is read by commands that compute nothing, which should not wait for torch
    import torch
    from torch import nn

Part = Literal["encoder", "adapter", "aligner", "translator", "early", "decoder", "lora"]

VISION: tuple[Part, ...] = ("encoder", "adapter", "aligner")
"""Parts that only a model with a vision encoder has; they get a gradient from images only."""

SURROGATE_ONLY = ("translator.", "early.")
"""Prefixes of the names of weights that belong to a surrogate and have no place in its target."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the stage table."""

    name: str
    trains: tuple[Part, ...]
    decoder: Literal["surrogate", "target"]
    supervise: Supervision
    vision: bool = True
    """True if the model has a vision encoder."""
    words_only: bool = False
    """True if of the decoder only the word embeddings are read."""
    without_vision: bool = False
    """True if the stage also trains a language model alone, in a run without `encoder`."""


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="words",
            trains=("adapter", "aligner"),
            decoder="target",
            supervise="response",
            words_only=True,
        ),
        Stage(
            name="words-encoder",
            trains=("encoder", "adapter", "aligner"),
            decoder="target",
            supervise="response",
            words_only=True,
        ),
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
            name="decoder",
            trains=("encoder", "adapter", "aligner", "decoder"),
            decoder="target",
            supervise="response",
            without_vision=True,
        ),
    )
}


def stage_of(config: RunConfig) -> Stage:
    """Returns the run's row of the stage table, after checking that the configuration suits it.

    Raises:
        ConfigError: the stage is unknown, or it needs something that the configuration lacks or excludes.
    """
    if config.stage not in STAGES:
        raise ConfigError(f"unknown stage '{config.stage}'{did_you_mean(config.stage, list(STAGES))}")
    stage = STAGES[config.stage]
    if config.losses:
        from zero_ds.model.losses import check_terms

        check_terms(config.losses)
    if stage.vision and config.encoder is None and not stage.without_vision:
        raise ConfigError(f"stage {stage.name} needs a vision encoder; set encoder.path=FOLDER.")
    if trains_alone(config):
        _check_text_alone(config)
    if stage.words_only:
        _check_words_only(config)
    if decoder_kind(config) == "surrogate" and not config.surrogate:
        raise ConfigError(f"stage {stage.name} trains against a surrogate; set surrogate=FOLDER or decoder=target.")
    if stage.trains == ("aligner",) and config.adapter.width is None:
        raise ConfigError(f"stage {stage.name} needs adapter.width, the hidden size that the adapter was trained for.")
    if config.lora and "decoder" not in stage.trains:
        raise ConfigError(f"stage {stage.name} does not train the decoder, so lora has no place in it; leave it out.")
    if config.frozen_weights == "int8" and "decoder" in trained_parts(config):
        raise ConfigError(
            f"stage {stage.name} trains the decoder; frozen_weights=int8 is for frozen layers, so leave it out."
        )
    if not trained_parts(config):
        raise ConfigError(f"stage {stage.name} has nothing to train against the target; leave out decoder=target.")
    return stage


def words_only(config: RunConfig) -> bool:
    """Returns whether the run reads only the word embeddings of its decoder."""
    return STAGES[config.stage].words_only


def uses_words(config: RunConfig) -> bool:
    """Returns whether a loss in the space of words belongs to the run."""
    return has_vision(config) and (words_only(config) or config.align.weight > 0)


def _check_words_only(config: RunConfig) -> None:
    """Refuses settings that need a decoder in a run that has only its word embeddings.

    Raises:
        ConfigError: answers or distillation are asked for, or dynamic weights of responses.
    """
    without = f"stage {config.stage} has no decoder"
    if config.preview.every_steps:
        raise ConfigError(f"{without} that could answer; set preview.every_steps=null.")
    if config.distill.active:
        raise ConfigError(f"{without} to distil; set distill.logits=0 and distill.hidden=0.")
    if config.losses or config.dynamic_loss.order:
        raise ConfigError(f"{without}, so losses and dynamic_loss have no place in it; leave them out.")


def has_vision(config: RunConfig) -> bool:
    """Returns whether the run's model has a vision encoder."""
    return STAGES[config.stage].vision and config.encoder is not None


def trains_alone(config: RunConfig) -> bool:
    """Returns whether the run trains a language model alone in a stage that usually has a vision encoder."""
    return STAGES[config.stage].without_vision and config.encoder is None


def _check_text_alone(config: RunConfig) -> None:
    """Refuses settings of images in a run without a vision encoder.

    Raises:
        ConfigError: an adapter, or a data set of which only samples with an image would be used.
    """
    without = f"stage {config.stage} has no vision encoder here"
    if config.adapter.width is not None:
        raise ConfigError(f"{without}, so adapter.width={config.adapter.width} has no place in it; leave it out.")
    for source in config.data.sources:
        if source.images_only:
            raise ConfigError(f"{without}, and {source.path} is used for its images only; name a data set of texts.")


def decoder_kind(config: RunConfig) -> Literal["surrogate", "target"]:
    """Returns which decoder the run trains against."""
    return STAGES[config.stage].decoder if config.decoder == "auto" else config.decoder


def decoder_folder(config: RunConfig) -> str:
    """Returns the folder or hub id of the decoder that the run trains against."""
    return str(config.surrogate) if decoder_kind(config) == "surrogate" else config.target


def supervision(config: RunConfig) -> Supervision:
    """Returns which tokens carry loss."""
    return STAGES[config.stage].supervise if config.data.supervise == "auto" else config.data.supervise


def trained_parts(config: RunConfig) -> tuple[Part, ...]:
    """Returns the parts that train: those of the stage that the model has.

    A run against the target has no translators, one without `adapter.width` no aligner, one without `encoder` nothing
    that sees. Distilled translators train in
    every stage. With `lora`, low-rank adapters train in place of the decoder.
    """
    parts = tuple(p for p in STAGES[config.stage].trains if p != "aligner" or config.adapter.width is not None)
    if not has_vision(config):
        parts = tuple(part for part in parts if part not in VISION)
    if config.lora:
        parts = tuple("lora" if part == "decoder" else part for part in parts)
    if decoder_kind(config) == "target":
        return tuple(p for p in parts if f"{p}." not in SURROGATE_ONLY)
    return parts if "translator" in parts or not config.distill.active else (*parts, "translator")


def freeze_(model: nn.Module, config: RunConfig) -> dict[Part, list[tuple[str, torch.nn.Parameter]]]:
    """Turns gradients on for the parts that train and off for all others; returns the named parameters of each part.

    `model` is a `VisionLanguageModel`, which finds the parameters of each part by structure.

    Raises:
        RuntimeError: a part that should train has no parameter, so it would silently stay untrained.
    """
    from zero_ds.runtime.zero3 import parameter_shape

    model.requires_grad_(False)
    groups: dict[Part, list[tuple[str, torch.nn.Parameter]]] = {}
    for part in trained_parts(config):
        parameters = model.parameters_of(part)  # type: ignore[operator]
        if not parameters:
            raise RuntimeError(f"stage {config.stage} should train the {part}, but no parameter of it was found")
        for _, parameter in parameters:
            parameter.requires_grad_(True)
        groups[part] = parameters
    sizes = {part: sum(parameter_shape(p).numel() for _, p in group) for part, group in groups.items()}
    logger.info("stage %s trains %s", config.stage, ", ".join(f"{part} ({n:,})" for part, n in sizes.items()))
    return groups


def belongs_elsewhere(config: RunConfig, name: str) -> bool:
    """Returns whether a weight has no place in the run's model: a translator's, in a run against the target."""
    return decoder_kind(config) == "target" and name.startswith(SURROGATE_ONLY)


def learning_rate(config: RunConfig, part: Part) -> float:
    """Returns the peak learning rate of a part."""
    return config.optimizer.learning_rates.get(part, config.optimizer.learning_rate)


def remarks(config: RunConfig) -> list[str]:
    """Returns a sentence for each setting that has no effect in this run."""
    trained = trained_parts(config)
    return [
        f"optimizer.learning_rates.{part} has no effect: this run trains {', '.join(trained)} alone."
        for part in config.optimizer.learning_rates
        if part not in trained
    ] + (
        [f"align.weight={config.align.weight:g} has no effect: this run sees no images."]
        if config.align.weight and not has_vision(config)
        else []
    )


def check_start(config: RunConfig) -> list[Path]:
    """Returns the folders of the earlier results that this run starts from.

    Raises:
        ConfigError: one of them does not exist.
    """
    folders = [Path(path) for path in config.starts]
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            key = "init_from" if number < len(config.init_from) else "continue_from"
            raise ConfigError(f"{key} names {folder}, which does not exist; run the earlier stage first.")
    return folders
