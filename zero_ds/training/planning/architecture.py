"""Builds the model of a run on meta tensors, from config.json files alone, and marks the parameters that train.

A model's config.json is looked for in its folder, then in the hub's cache, then among the architectures that come with
zero-ds (`architectures/`: the paper's models, as published). Only then is it downloaded from the hub, and nothing else
is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from zero_ds.config.schema import RunConfig
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.layer_plan import LayerPlan, Replaced
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages
from zero_ds.training.gathering import Units
from zero_ds.training.options.int8 import quantize_
from zero_ds.training.planning.flops import StepCost

SHIPPED = Path(__file__).parent / "architectures"
"""Folder with the config.json of every model whose architecture comes with zero-ds."""

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
    dtype: torch.dtype
    """Type that the run computes in."""
    groups: dict[stages.Part, list[tuple[str, nn.Parameter]]]
    """Parameters of every part that trains: the optimizer's groups."""
    replaced: int = 0
    """Number of parameters of the target's layers that distillation loads in addition to the surrogate."""
    int8: bool = False
    """Whether the weights of frozen decoder layers take 8 bits."""
    sources: tuple[str, ...] = ()
    """Origin of every architecture, one sentence each."""

    @cached_property
    def trained(self) -> list[int]:
        """Sizes of the parameters that train."""
        return [p.numel() for group in self.groups.values() for _, p in group]

    @cached_property
    def frozen(self) -> list[int]:
        """Sizes of all other parameters."""
        sizes = [p.numel() for p in self.model.parameters() if not p.requires_grad]
        return [*sizes, self.replaced] if self.replaced else sizes

    @cached_property
    def frozen_bytes(self) -> int:
        """Bytes of all other parameters where they are not sharded; those in 8 bits take one byte each."""
        own = sum(p.nbytes for p in self.model.parameters() if not p.requires_grad)
        return own + self.replaced * (1 if self.int8 else self.dtype.itemsize)

    @cached_property
    def cost(self) -> StepCost:
        """FLOPs of a step. Counting them walks over all parameters, and a plan asks for them hundreds of times."""
        return StepCost.of(self.model)

    @cached_property
    def units(self) -> Units:
        """Sizes of the decoder's units."""
        sizes = {name: parameter.numel() for name, parameter in self.model.decoder.named_parameters()}
        return Units.of_sizes(sizes, self.model.family.layer_prefix)

    @cached_property
    def frozen_layers(self) -> list[list[int]]:
        """Sizes of the parameters of every frozen decoder layer, each of which ZeRO-3 gathers as one unit."""
        layers = self.model.family.layers(self.model.decoder)
        sizes = [list(layer.parameters()) for layer in layers]
        return [[p.numel() for p in layer] for layer in sizes if not any(p.requires_grad for p in layer)]

    @cached_property
    def largest_unit(self) -> int:
        """Elements of the largest unit that ZeRO-3 gathers at once: a frozen layer, or a module's own parameters."""
        units = [sum(layer) for layer in self.frozen_layers]
        units += [sum(p.numel() for p in module.parameters(recurse=False)) for module in self.model.modules()]
        return max(units)


@dataclass(frozen=True)
class ConfigSource:
    """A folder with the config.json of a model."""

    folder: Path
    origin: str
    """Origin of the folder, as the output names it."""


def find_config(name: str) -> ConfigSource:
    """Finds the config.json of a model given by path or hub id.

    Raises:
        ConfigError: there is none, here or on the hub.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return ConfigSource(folder.resolve(), "from its folder")
    import huggingface_hub

    hub_id = bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not folder.exists()
    if hub_id and isinstance(cached := huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return ConfigSource(Path(cached).parent, "from the hub's cache")
    for shipped in SHIPPED.iterdir():
        if shipped.name.lower() == folder.name.lower():
            return ConfigSource(shipped, "the architecture that comes with zero-ds, since the model is not at hand")
    known = ", ".join(sorted(path.name for path in SHIPPED.iterdir()))
    advice = f"give a folder that holds it, or a model whose architecture comes with zero-ds ({known})"
    if not hub_id:
        raise ConfigError(f"{name} holds no config.json; {advice}.")
    try:
        return ConfigSource(Path(huggingface_hub.hf_hub_download(name, "config.json")).parent, "from the hub")
    except Exception as error:  # the hub client raises many kinds; each means that the file cannot be had
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(f"config.json of '{name}' cannot be downloaded from the hub ({reason}); {advice}.") from None


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
    stage = stages.stage_of(config)
    found = find_config(config.target)
    target = DecoderFolder(found.folder)
    sources = [f"target {Path(config.target).name}: {found.origin}"]
    if stages.decoder_kind(config) == "surrogate":
        plan, how = (plan, "as it is") if plan else layer_plan(config, target, replace or [], translators)
        sources.append(f"surrogate {plan}, {plan.surrogate_depth} of {plan.depth} layers: {how}")
    encoder = None
    if stage.vision and config.encoder is not None:
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
    return Architecture(model, dtype, groups, replaced, int8, tuple(sources))
