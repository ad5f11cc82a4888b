"""The model of a run on meta tensors, built from config.json files alone, with what trains in it marked.

A folder that is there is read, then the hub's cache; what is in neither may be an architecture that the package brings
(`architectures/`: the paper's models, as published), and at last config.json, and nothing else, is asked of the hub.
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
from zero_ds.model.decoders.folder import depth_of
from zero_ds.model.layer_plan import LayerPlan, Replaced, read_surrogate
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages
from zero_ds.training.options.int8 import quantize_
from zero_ds.training.planning.cost import StepCost

SHIPPED = Path(__file__).parent / "architectures"

PAPER_CUTS = {
    "Llama-3.2-3B-Instruct": "16:26",
    "Llama-3.1-8B-Instruct": "17:30",
    "Llama-3.1-70B-Instruct": "40:78",
}
"""Layers that the paper replaces in its surrogates (Table A.2: from the translator's layer to the last but one)."""

NAMED_CUT = re.compile(r"T(\d+)-(\d+)")
"""How recipes call the folders of surrogates."""


@dataclass(frozen=True)
class Architecture:
    """The run's model, without weights."""

    model: VisionLanguageModel
    dtype: torch.dtype
    groups: dict[stages.Part, list[tuple[str, nn.Parameter]]]
    """Parameters of every part that trains: the optimizer's groups."""
    replaced: int = 0
    """Parameters of the target's layers that distillation loads beside the surrogate."""
    int8: bool = False
    """Whether frozen decoder layers are in 8 bits."""
    sources: tuple[str, ...] = ()
    """Where every architecture comes from, a sentence each."""

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
        """Of them where they are whole: those in 8 bits have one each."""
        own = sum(p.nbytes for p in self.model.parameters() if not p.requires_grad)
        return own + self.replaced * (1 if self.int8 else self.dtype.itemsize)

    @cached_property
    def cost(self) -> StepCost:
        """FLOPs of a step. Counting them walks over all parameters, and a plan asks for them hundreds of times."""
        return StepCost.of(self.model)

    @cached_property
    def largest_unit(self) -> int:
        """Elements of the largest unit that ZeRO-3 gathers at once: a frozen layer, or a module's own parameters."""
        layers = self.model.family.layers(self.model.decoder)
        frozen = [layer for layer in layers if not any(p.requires_grad for p in layer.parameters())]
        units = [sum(p.numel() for p in layer.parameters()) for layer in frozen]
        units += [sum(p.numel() for p in module.parameters(recurse=False)) for module in self.model.modules()]
        return max(units)


def config_folder(name: str) -> tuple[Path, str]:
    """A folder with the config.json of a model given by path or hub id, and where that was found.

    Raises:
        ConfigError: no config.json is to be had.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve(), "folder"
    import huggingface_hub

    hub_id = bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not folder.exists()
    if hub_id and isinstance(cached := huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return Path(cached).parent, "cache"
    for shipped in SHIPPED.iterdir():
        if shipped.name.lower() == folder.name.lower():
            return shipped, "package"
    known = ", ".join(sorted(path.name for path in SHIPPED.iterdir()))
    advice = f"give a folder that holds it, or a model whose architecture comes with zero-ds ({known})"
    if not hub_id:
        raise ConfigError(f"there is no config.json in {name}; {advice}.")
    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json")).parent, "hub"
    except Exception as error:  # the hub client raises many kinds; each means that the file is not to be had
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(f"config.json of '{name}' cannot be had from the hub ({reason}); {advice}.") from None


WHENCE = {
    "folder": "from its folder",
    "cache": "from the hub's cache",
    "hub": "from the hub",
    "package": "the architecture that comes with zero-ds, since the model is not at hand",
}


def layer_plan(config: RunConfig, target: Path, replace: list[str], translators: int = 1) -> tuple[LayerPlan, str]:
    """How the run's surrogate is cut, and how that is known.

    replace: ranges `first:last` in place of those of the surrogate that the recipe names.

    Raises:
        ConfigError: the surrogate is not there, and nothing says how it will be cut.
    """
    name = str(config.surrogate)
    depth = depth_of(target)
    if replace:
        return LayerPlan(depth, tuple(Replaced.parse(text, translators) for text in replace)), "as --replace says"
    folder = Path(name).expanduser()
    if (folder / "surrogate.json").is_file():
        return read_surrogate(folder).plan, f"from {name}"
    if match := NAMED_CUT.fullmatch(folder.name):
        return LayerPlan(depth, (Replaced(int(match[1]), int(match[2])),)), f"by the name of {name}, not built yet"
    if target.name in PAPER_CUTS:
        return LayerPlan(depth, (Replaced.parse(PAPER_CUTS[target.name]),)), f"the paper's; {name} is not built yet"
    raise ConfigError(f"the surrogate {name} is not built yet; say how it will be cut with --replace first:last.")


def architecture(
    config: RunConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    replace: list[str] | None = None,
    translators: int = 1,
    plan: LayerPlan | None = None,
) -> Architecture:
    """The run's model on meta tensors; its surrogate as `plan` says, else as `layer_plan` finds.

    Raises:
        ConfigError: as `config_folder`, `layer_plan` and `stages.stage_of`.
    """
    stage = stages.stage_of(config)
    target, whence = config_folder(config.target)
    sources = [f"target {Path(config.target).name}: {WHENCE[whence]}"]
    if stages.decoder_kind(config) == "surrogate":
        plan, how = (plan, "as it is") if plan else layer_plan(config, target, replace or [], translators)
        sources.append(f"surrogate {plan}, {plan.surrogate_depth} of {plan.depth} layers: {how}")
    encoder = None
    if stage.vision and config.encoder is not None:
        encoder, whence = config_folder(config.encoder.path)
        sources.append(f"encoder {Path(config.encoder.path).name}: {WHENCE[whence]}")
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
