"""Builds the model of a run on meta tensors, from config.json files alone, and marks the parameters that train."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from zero_ds.config.schema import RunConfig
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.layer_plan import LayerPlan, Replaced
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import home_path
from zero_ds.training import stages
from zero_ds.training.gathering import Units
from zero_ds.training.options.int8 import quantize_
from zero_ds.training.planning.flops import decoder_size, step_cost
from zero_ds.training.planning.model_config import find_config
from zero_ds.training.planning.model_size import ModelSize

PAPER_CUTS = {
    "Llama-3.2-3B-Instruct": "16:26",
    "Llama-3.1-8B-Instruct": "17:30",
    "Llama-3.1-70B-Instruct": "40:78",
}
"""Layers that the paper replaces in its surrogates (Table A.2: from the translator's layer to the last but one)."""

NAMED_CUT = re.compile(r"T(\d+)-(\d+)")
"""How recipes name the folders of surrogates."""


@dataclass(frozen=True)
class PlannedCut:
    """How a run's surrogate is cut."""

    plan: LayerPlan
    how: str
    """How that is known."""
    dense_width: int | None = None
    """Units of the dense network of every translator; None for translators that are copies of layers."""

    def __str__(self) -> str:
        """Returns the sentence that the output prints."""
        kind = "" if self.dense_width is None else f", translators with dense networks of {self.dense_width} units"
        return f"surrogate {self.plan}, {self.plan.surrogate_depth} of {self.plan.depth} layers{kind}: {self.how}"


@dataclass(frozen=True)
class Architecture:
    """The run's model, without weights."""

    model: VisionLanguageModel
    size: ModelSize


def planned_cut(
    config: RunConfig,
    target: DecoderFolder,
    replace: list[str],
    translators: int = 1,
    dense_width: int | None = None,
) -> PlannedCut:
    """Returns how the run's surrogate is cut.

    Args:
        target: folder of the full model.
        replace: ranges `first:last` in place of those of the surrogate that the recipe names.
        translators: number of translators for each of these ranges.
        dense_width: units of dense translators, unless the recipe's surrogate is built and nothing is replaced.

    Raises:
        ConfigError: the surrogate is not built yet, and nothing says how it will be cut; or it is built with other
            translators.
    """
    name = str(config.surrogate)
    if replace:
        ranges = tuple(Replaced.parse(text, translators) for text in replace)
        return PlannedCut(LayerPlan(target.depth, ranges), "as --replace says", dense_width)
    surrogate = DecoderFolder(home_path(name))
    if surrogate.surrogate is not None:
        info = surrogate.surrogate
        if dense_width not in (None, info.dense_width):
            kind = "copies of layers" if info.dense_width is None else f"dense networks of {info.dense_width} units"
            raise ConfigError(
                f"the translators of {name} are {kind}; to plan others, say with --replace which layers they replace."
            )
        return PlannedCut(info.plan, f"from {name}", info.dense_width)
    if match := NAMED_CUT.fullmatch(surrogate.path.name):
        cut, how = Replaced(int(match[1]), int(match[2])), f"by the name of {name}, not built yet"
    elif target.path.name in PAPER_CUTS:
        cut, how = Replaced.parse(PAPER_CUTS[target.path.name]), f"the paper's; {name} is not built yet"
    else:
        raise ConfigError(f"the surrogate {name} is not built yet; say how it will be cut with --replace first:last.")
    return PlannedCut(LayerPlan(target.depth, (cut,)), how, dense_width)


def architecture(
    config: RunConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    replace: list[str] | None = None,
    translators: int = 1,
    dense_width: int | None = None,
    plan: LayerPlan | None = None,
) -> Architecture:
    """Builds the run's model on meta tensors.

    Args:
        dtype: type that the run computes in.
        replace, translators, dense_width: as for `planned_cut`.
        plan: layers of the surrogate, which is built; by default `planned_cut` finds them.

    Raises:
        ConfigError: as `find_config`, `planned_cut` and `stages.stage_of`; the target has no dense translators.
    """
    stages.stage_of(config)
    found = find_config(config.target)
    target = DecoderFolder(found.folder)
    sources = [f"target {Path(config.target).name}: {found.origin}"]
    cut = None
    if stages.decoder_kind(config) == "surrogate":
        if plan is not None:
            info = DecoderFolder(home_path(str(config.surrogate))).surrogate
            cut = PlannedCut(plan, "as it is", info.dense_width if info is not None and info.plan == plan else None)
        else:
            cut = planned_cut(config, target, replace or [], translators, dense_width)
        plan = cut.plan
        sources.append(str(cut))
    encoder = None
    if config.encoder is not None and stages.has_vision(config):
        found = find_config(config.encoder.path)
        encoder = found.folder
        sources.append(f"encoder {Path(config.encoder.path).name}: {found.origin}")
    model = build_model(
        ModelSpec(
            target,
            encoder=encoder,
            encoder_config=config.encoder,
            adapter_config=config.adapter,
            dtype=dtype,
            attention="eager",
            lora=config.lora,
            plan=plan,
            dense_width=cut.dense_width if cut is not None else None,
            on_meta=True,
        )
    )
    groups = stages.freeze_(model, config)
    model.train()
    replaced = 0
    if config.distill.active and plan is not None:
        layer = model.family.layers(model.decoder)[0]
        replaced = len(plan.dropped) * sum(p.numel() for p in layer.parameters())
    if int8 := config.frozen_weights == "int8":
        quantize_(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    size = ModelSize(
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        groups={part: [p.numel() for _, p in group] for part, group in groups.items()},
        frozen=[p.numel() for p in frozen] + ([replaced] if replaced else []),
        frozen_bytes=sum(p.nbytes for p in frozen) + replaced * (1 if int8 else dtype.itemsize),
        largest_unit=_largest_unit(model),
        units=Units.of_sizes({n: p.numel() for n, p in model.decoder.named_parameters()}, model.family.layer_prefix),
        frozen_layers=_frozen_layers(model),
        decoder=decoder_size(model),
        image_tokens=model.tokens_per_image(),
        cost=step_cost(model),
        sources=tuple(sources),
        patches=_merged_patches(model),
    )
    return Architecture(model, size)


def _merged_patches(model: VisionLanguageModel) -> int | None:
    """Returns the number of patches of an image if the adapter merges them, otherwise None."""
    if model.encoder is None or model.encoder_family is None or model.adapter_config.square == 1:
        return None
    return model.encoder_family.tokens_per_image(model.encoder_family.vision_config(model.encoder))


def _largest_unit(model: VisionLanguageModel) -> int:
    """Returns the elements of the largest unit that ZeRO-3 gathers at once."""
    units = [sum(layer) for layer in _frozen_layers(model)]
    units += [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return max(units)


def _frozen_layers(model: VisionLanguageModel) -> list[list[int]]:
    """Returns the elements of the parameters of every frozen decoder layer."""
    layers = [list(layer.parameters()) for layer in model.family.layers(model.decoder)]
    return [[p.numel() for p in layer] for layer in layers if not any(p.requires_grad for p in layer)]
