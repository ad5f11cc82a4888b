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
from zero_ds.training import stages
from zero_ds.training.gathering import Units
from zero_ds.training.options.int8 import quantize_
from zero_ds.training.planning.flops import step_cost
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
class Architecture:
    """The run's model, without weights."""

    model: VisionLanguageModel
    size: ModelSize


def layer_plan(
    config: RunConfig, target: DecoderFolder, replace: list[str], translators: int = 1
) -> tuple[LayerPlan, str]:
    """Returns how the run's surrogate is cut, and how that is known.

    Args:
        target: folder of the full model.
        replace: ranges `first:last` in place of those of the surrogate that the recipe names.
        translators: number of translators for each of these ranges.

    Raises:
        ConfigError: the surrogate is not built yet, and nothing says how it will be cut.
    """
    name = str(config.surrogate)
    if replace:
        ranges = tuple(Replaced.parse(text, translators) for text in replace)
        return LayerPlan(target.depth, ranges), "as --replace says"
    surrogate = DecoderFolder(Path(name).expanduser())
    if surrogate.plan is not None:
        return surrogate.plan, f"from {name}"
    if match := NAMED_CUT.fullmatch(surrogate.path.name):
        cut = Replaced(int(match[1]), int(match[2]))
        return LayerPlan(target.depth, (cut,)), f"by the name of {name}, not built yet"
    if target.path.name in PAPER_CUTS:
        cut = Replaced.parse(PAPER_CUTS[target.path.name])
        return LayerPlan(target.depth, (cut,)), f"the paper's; {name} is not built yet"
    raise ConfigError(f"the surrogate {name} is not built yet; say how it will be cut with --replace first:last.")


def architecture(
    config: RunConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    replace: list[str] | None = None,
    translators: int = 1,
    plan: LayerPlan | None = None,
) -> Architecture:
    """Builds the run's model on meta tensors.

    Args:
        dtype: type that the run computes in.
        replace, translators: as for `layer_plan`.
        plan: how the surrogate is cut; by default as `layer_plan` finds.

    Raises:
        ConfigError: as `find_config`, `layer_plan` and `stages.stage_of`.
    """
    stages.stage_of(config)
    found = find_config(config.target)
    target = DecoderFolder(found.folder)
    sources = [f"target {Path(config.target).name}: {found.origin}"]
    if stages.decoder_kind(config) == "surrogate":
        plan, how = (plan, "as it is") if plan else layer_plan(config, target, replace or [], translators)
        sources.append(f"surrogate {plan}, {plan.surrogate_depth} of {plan.depth} layers: {how}")
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
        image_tokens=model.tokens_per_image(),
        cost=step_cost(model),
        sources=tuple(sources),
    )
    return Architecture(model, size)


def _largest_unit(model: VisionLanguageModel) -> int:
    """Returns the elements of the largest unit that ZeRO-3 gathers at once."""
    units = [sum(layer) for layer in _frozen_layers(model)]
    units += [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return max(units)


def _frozen_layers(model: VisionLanguageModel) -> list[list[int]]:
    """Returns the elements of the parameters of every frozen decoder layer."""
    layers = [list(layer.parameters()) for layer in model.family.layers(model.decoder)]
    return [[p.numel() for p in layer] for layer in layers if not any(p.requires_grad for p in layer)]
