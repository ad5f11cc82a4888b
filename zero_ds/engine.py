"""Recipe + DeepSpeed JSON -> engine. The only file that calls deepspeed.initialize."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zero_ds.config import ConfigError, RunConfig, did_you_mean, validate
from zero_ds.stages import Part, learning_rate

logger = logging.getLogger(__name__)

_BESIDE = Path(__file__).parent
DS_CONFIG_ROOT = next((p for p in (_BESIDE.parent / "ds_configs", _BESIDE / "ds_configs") if p.is_dir()), _BESIDE)

AUTO = {
    "train_batch_size": lambda config, world: config.global_batch,
    "train_micro_batch_size_per_gpu": lambda config, world: config.micro_batch,
    "gradient_accumulation_steps": lambda config, world: config.global_batch // (config.micro_batch * world),
    "gradient_clipping": lambda config, world: config.optimizer.max_grad_norm,
}
"""Entries of the JSON that follow from the recipe; the JSON may leave them out, say "auto", or agree."""

TOP_KEYS = (
    *AUTO,
    "zero_optimization",
    "bf16",
    "fp16",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "aio",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "memory_breakdown",
)


def ds_config_names() -> list[str]:
    """Names of the JSON files in ds_configs/."""
    return sorted(path.stem for path in DS_CONFIG_ROOT.glob("*.json"))


def resolve_precision(config: RunConfig) -> torch.dtype:
    """bf16, fp16 or fp32; `auto` takes bf16 where the device multiplies it fast."""
    if config.precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
    return fast_dtype()


def fast_dtype() -> torch.dtype:
    """bf16 on GPUs since Ampere and on CPUs with AVX512-BF16 or AMX, float32 elsewhere."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return (
        torch.bfloat16 if capable() or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)() else torch.float32
    )


def ds_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The run's DeepSpeed configuration: the JSON that `config.zero` names, filled in from the recipe.

    Raises:
        ConfigError: no such file, invalid JSON, an unknown key, a value that contradicts the recipe.
    """
    path = Path(config.zero) if config.zero.endswith(".json") else DS_CONFIG_ROOT / f"{config.zero}.json"
    if not path.is_file():
        raise ConfigError(f"there is no DeepSpeed config '{config.zero}'{did_you_mean(config.zero, ds_config_names())}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    _check(content, path)
    for key, of in AUTO.items():
        value = of(config, world_size)
        stated = content.get(key, "auto")
        if stated not in ("auto", value):
            raise ConfigError(
                f'{path.name} says {key}={stated}, but the recipe gives {value}; write "auto" in the JSON.'
            )
        content[key] = value
    dtype = resolve_precision(config)
    for key, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        block = dict(content.get(key) or {})
        stated = block.get("enabled", "auto")
        if stated not in ("auto", dtype is wanted):
            raise ConfigError(
                f"{path.name} says {key}.enabled={stated}, but the recipe's precision is "
                f'{str(dtype).removeprefix("torch.")}; write "auto" in the JSON or set precision.'
            )
        content[key] = {**block, "enabled": dtype is wanted}
    zero = content["zero_optimization"]
    if zero.get("zero_hpz_partition_size", 1) > 1 and (zero.get("offload_param") or zero.get("offload_optimizer")):
        raise ConfigError(
            f"{path.name} combines zero_hpz_partition_size with offload, which DeepSpeed trains wrongly; drop one."
        )
    content["tensorboard"] = {"enabled": True, "output_path": str(Path(config.out)), "job_name": "tensorboard"}
    content.setdefault("steps_per_print", 1_000_000_000)
    content["zero_allow_untested_optimizer"] = True
    content.setdefault("zero_force_ds_cpu_optimizer", False)
    return content


def _check(content: Any, path: Path) -> None:
    """Refuses keys and values that DeepSpeed would ignore, or trip over long after the models are loaded."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    for key in content:
        if key not in TOP_KEYS:
            raise ConfigError(f"{path.name}: unknown key '{key}'{did_you_mean(key, list(TOP_KEYS))}")
    sections = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, model in sections.items():
        section = content.get(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{path.name}: {name}={section!r} must be an object of settings.")
        validate(model, section, what=f"{path.name}, {name}")
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"{path.name}: zero_optimization.stage={stage!r}; commits are read from ZeRO 1, 2 or 3, choose one."
        )


def schedule(config: RunConfig, total_steps: int) -> Callable[[int], float]:
    """Factor of the peak rate before step 0, 1, ...: linear warm-up over `warmup_ratio`, then a cosine to zero."""
    warmup = math.ceil(config.optimizer.warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

    return factor


class Engine:
    """A DeepSpeed engine with this project's loss scaling, schedule and parameter names."""

    def __init__(
        self,
        config: RunConfig,
        model: torch.nn.Module,
        groups: dict[Part, list[tuple[str, torch.nn.Parameter]]],
        total_steps: int,
        ds: dict[str, Any],
    ) -> None:
        import deepspeed

        from zero_ds import distributed

        self.config = config
        self.named: dict[str, torch.nn.Parameter] = {n: p for group in groups.values() for n, p in group}
        self.rates = {part: learning_rate(config, part) for part in groups}
        self.factor = schedule(config, total_steps)
        self.world_size = distributed.world_size()
        optimizer = torch.optim.AdamW(
            [{"params": [p for _, p in group], "lr": self.rates[part], "name": part} for part, group in groups.items()],
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
        )
        if ds["zero_optimization"]["stage"] == 3:
            _frozen_layers_as_leaves(model)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
        self.model = model
        self._keep_frozen()
        self._create_moments()
        self.accumulation = ds["gradient_accumulation_steps"]

    def step(self, batches: list[dict[str, Any]], step: int, supervised_tokens: float) -> tuple[float, float]:
        """One optimizer step over the rank's micro-batches.

        `supervised_tokens` counts the tokens with loss of the GLOBAL batch. DeepSpeed divides by accumulation steps and
        averages over ranks; both are multiplied back, so that the gradient is that of the global token mean whatever
        the split. Returns this rank's share of the loss (the sum over ranks is the global mean) and the gradient norm.

        Raises:
            FloatingPointError: a loss that is not finite, before anything is updated, naming the samples.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates.values(), strict=True):
            group["lr"] = rate * self.factor(step)
        share = 0.0
        for batch in batches:
            inputs = {k: v.to(self.engine.device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
            loss = self.engine(**inputs) / max(1.0, supervised_tokens)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss of step {step + 1} is {value}; samples: {', '.join(batch['ids'])}. Nothing was updated."
                )
            share += value
            self.engine.backward(loss * (self.accumulation * self.world_size))
            self.engine.step()
        return share, float(self.engine.get_global_grad_norm() or 0.0)

    def _keep_frozen(self) -> None:
        """Keeps frozen persistent parameters whole between steps.

        ZeRO-3 (DeepSpeed 0.19) releases every parameter before the update and gathers the persistent ones anew behind
        it. Frozen ones cannot have changed. Where every parameter is persistent, that is the whole model a step.
        """
        persistent = getattr(self.optimizer, "persistent_parameters", None)
        if not persistent or not hasattr(self.optimizer, "_partition_all_parameters"):
            return
        kept = [p for p in persistent if not p.requires_grad]
        staying = {id(p) for p in kept}
        released: Any = torch.nn.ParameterList([p for p in self.model.parameters() if id(p) not in staying])
        released.ds_external_parameters = dict[str, torch.nn.Parameter]().items  # what DeepSpeed asks modules for
        coordinator = self.optimizer.parameter_offload.get_param_coordinator()

        def release() -> None:
            for parameter in kept:
                parameter.ds_active_sub_modules.clear()
            coordinator.release_and_reset_all(released)

        self.optimizer.persistent_parameters = [p for p in persistent if p.requires_grad]
        self.optimizer._partition_all_parameters = release

    # -- state of the optimizer, free of world size and ZeRO stage -----------------------------------------------------

    def _create_moments(self) -> None:
        """Makes Adam's moments now, so that they can be restored before the first step.

        Otherwise DeepSpeed (0.19) makes them in that step, and with ZeRO 1 and 2 it then tells the parameters of the
        first group only where theirs are, so that those of the others could not be saved.
        """
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        flats = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3 keeps them apart from the groups
        for flat in flats if flats is not None else [p for group in inner.param_groups for p in group["params"]]:
            if flat.numel() and not inner.state[flat]:  # empty: swapped out to a disk
                moments = {key: torch.zeros_like(flat.data) for key in ("exp_avg", "exp_avg_sq")}
                inner.state[flat] = {"step": torch.tensor(0.0), **moments}
        link = getattr(self.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()
        self.set_optimizer_step(0)

    def set_optimizer_step(self, step: int) -> None:
        """Sets Adam's step count, on which its bias correction depends."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        for state in inner.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step

    def full_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """The whole fp32 master copy and moments of one parameter. A collective: all ranks call it in one order."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {"master": safe_get_full_fp32_param(parameter)}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = safe_get_full_optimizer_state(parameter, key)
        missing = [key for key, value in state.items() if value is None]
        assert not missing, f"DeepSpeed holds no {missing[0]} for a trained parameter"
        return {key: value.detach().float().cpu() for key, value in state.items()}

    def set_full_state(self, parameter: torch.nn.Parameter, state: dict[str, torch.Tensor]) -> None:
        """Puts back what `full_state` returned, under any world size and ZeRO stage. A collective."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, state["master"].view(parameter_shape(parameter)))
        for key in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(parameter, state[key].view(parameter_shape(parameter)), key)


def _frozen_layers_as_leaves(model: Any) -> None:
    """Lets ZeRO-3 treat a frozen decoder layer as one unit: hooks around the layer instead of around each of its parts.

    Layers that train stay as they are: DeepSpeed (0.19) releases a leaf whose input has no gradient before the
    gradients of its weights are there.
    """
    from deepspeed.utils import set_z3_leaf_modules_by_name

    kind = type(model.family.layers(model.decoder)[0])
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, kind) and not any(p.requires_grad for p in module.parameters())
    ]
    set_z3_leaf_modules_by_name(model, names)


def parameter_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also when ZeRO-3 holds only a partition of it."""
    return getattr(parameter, "ds_shape", parameter.shape)
