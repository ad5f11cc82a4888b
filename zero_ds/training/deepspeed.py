"""The DeepSpeed JSON of a run: the file that `zero=` names, checked at every depth and filled in from the recipe.

What the recipe knows stands in the JSON as "auto", is left out, or agrees; a contradiction names both values.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zero_ds.config.loading import validate
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.environment import has_cuda, launched_ranks_here
from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.runtime.precision import bf16_is_fast

if TYPE_CHECKING:
    import torch

_BESIDE = Path(__file__).parent.parent
DS_CONFIG_ROOT = next((p for p in (_BESIDE.parent / "ds_configs", _BESIDE / "ds_configs") if p.is_dir()), _BESIDE)

AUTO: dict[str, Callable[[RunConfig, int], Any]] = {
    "train_batch_size": lambda config, world: config.global_batch,
    "train_micro_batch_size_per_gpu": lambda config, world: config.micro_batch,
    "gradient_accumulation_steps": lambda config, world: config.global_batch // (config.micro_batch * world),
    "gradient_clipping": lambda config, world: config.optimizer.max_grad_norm,
}
"""Entries of the JSON that follow from the recipe."""

PLAIN_SECTIONS = {
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "flops_profiler": (
        "enabled",
        "recompute_fwd_factor",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
    ),
    "data_types": ("grad_accum_dtype",),
}
"""Sections that DeepSpeed reads entry by entry, ignoring what it does not know."""

TOP_KEYS = (
    *AUTO,
    *PLAIN_SECTIONS,
    "zero_optimization",
    "bf16",
    "fp16",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "comms_logger",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "memory_breakdown",
)


def ds_config_names() -> list[str]:
    """Names of the JSON files in ds_configs/."""
    return sorted(path.stem for path in DS_CONFIG_ROOT.glob("*.json"))


def precision_name(config: RunConfig) -> Literal["bf16", "fp16", "fp32"]:
    """Returns the precision of a run; `auto` becomes bf16 where the device multiplies it fast, fp32 elsewhere."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if bf16_is_fast() else "fp32"


DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What torch calls each precision."""


def resolve_precision(config: RunConfig) -> torch.dtype:
    """Returns torch's dtype of the run's precision (see `precision_name`)."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[precision_name(config)])
    return dtype


def ds_config(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> dict[str, Any]:
    """The run's DeepSpeed configuration: the JSON that `config.zero` names, filled in from the recipe.

    ranks_per_node: for a run on other machines, that is only planned here; nothing then depends on this one.

    Raises:
        ConfigError: no such file, invalid JSON, an unknown key, a value that contradicts the recipe, or a combination
        that DeepSpeed is known to train wrongly.
    """
    path = Path(config.zero) if config.zero.endswith(".json") else DS_CONFIG_ROOT / f"{config.zero}.json"
    if not path.is_file():
        raise ConfigError(f"there is no DeepSpeed config '{config.zero}'{did_you_mean(config.zero, ds_config_names())}")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_no_key_twice)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    # loading DeepSpeed takes seconds, which a dry run can spare where the tests have asked it about the same text
    ask_deepspeed = "deepspeed" in sys.modules or not _is_released(path, text)
    if ask_deepspeed:
        _refuse_removed_keys(content, path)
    _check_names(content, path)
    content["zero_optimization"].setdefault("stage", 0)
    _fill_from_recipe(content, config, world_size, path)
    _fill_from_machine(content["zero_optimization"], config, path, ranks_per_node)
    if ask_deepspeed:
        _check_values(content, path)
    _check_accumulation_dtype(content, path)
    _refuse_bad_combinations(content, world_size, path)
    if config.frozen_weights == "int8" and content["zero_optimization"]["stage"] == 3:
        raise ConfigError(
            f"frozen_weights=int8 keeps whole weights on each rank, which {path.name} shards; set zero=zero2, or "
            "frozen_weights=native."
        )
    if config.compile and content["zero_optimization"]["stage"] == 3:
        kept = content["zero_optimization"].get("stage3_param_persistence_threshold", 100_000)
        if isinstance(kept, int | float) and kept < 1_000_000:  # any language model has larger matrices
            raise ConfigError(
                f"compile=true would keep all that {path.name} gathers; set zero=zero3_resident or zero=zero2, where "
                "parameters are whole on every rank, or compile=false."
            )
    if ranks_per_node is None:
        _refuse_missing_compiler(content["zero_optimization"], path)
    content["tensorboard"] = {"enabled": True, "output_path": str(Path(config.out)), "job_name": "tensorboard"}
    content.setdefault("steps_per_print", 1_000_000_000)
    content["zero_allow_untested_optimizer"] = True
    content.setdefault("zero_force_ds_cpu_optimizer", False)
    return content


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"the key '{twice[0]}' stands twice")
    return dict(pairs)


RELEASED = {
    "zero0": "4ddc6119a1cba158",
    "zero1": "378d7de601f60226",
    "zero2": "98a9cc64204b3c52",
    "zero2_offload": "34f16a5c0360cb11",
    "zero3": "34d8f27b1a80f53d",
    "zero3_hpz": "1407d6c98e9410f9",
    "zero3_nvme": "9e7a4ac1214f602f",
    "zero3_offload": "df3c71115b9ab91f",
    "zero3_offload_params": "6ec47bfb353ac4ec",
    "zero3_resident": "b7adec3530be8fe2",
}
"""Name of every file in ds_configs/ as released -> beginning of its SHA-256. The tests hold each of them to DeepSpeed's
own schemas, so `ds_config` need not load DeepSpeed to check an unchanged one. Files that are missing here, or were
changed, are checked every time."""


def _is_released(path: Path, text: str) -> bool:
    """Returns whether a DeepSpeed JSON is a file of ds_configs/ whose text is that of the release."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return path.parent == DS_CONFIG_ROOT and RELEASED.get(path.stem) == digest[:16]


def _refuse_removed_keys(content: dict[str, Any], path: Path) -> None:
    """Refuses keys that DeepSpeed no longer knows, in DeepSpeed's own words."""
    from deepspeed.runtime.config import DeepSpeedConfigError, _reject_removed_config_keys

    try:
        _reject_removed_config_keys(content)
    except DeepSpeedConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def _check_names(content: dict[str, Any], path: Path) -> None:
    """Refuses keys that DeepSpeed would ignore, at the top and in sections that it reads entry by entry."""
    for key in content:
        if key not in TOP_KEYS:
            raise ConfigError(f"{path.name}: unknown key '{key}'{did_you_mean(key, list(TOP_KEYS))}")
    content.setdefault("zero_optimization", {})
    for name in ("zero_optimization", "bf16", "fp16", "tensorboard", "wandb", "csv_monitor", "comet", *PLAIN_SECTIONS):
        if not isinstance(section := content.get(name, {}), dict):
            raise ConfigError(f"{path.name}: {name}={section!r} must be an object of settings.")
        for key in section:
            if key not in PLAIN_SECTIONS.get(name, (key,)):
                near = did_you_mean(key, list(PLAIN_SECTIONS[name]))
                raise ConfigError(f"{path.name}, {name}: unknown key '{key}'{near}")


def _fill_from_recipe(content: dict[str, Any], config: RunConfig, world_size: int, path: Path) -> None:
    for key, of in AUTO.items():
        value = of(config, world_size)
        stated = content.get(key, "auto")
        if stated not in ("auto", value):
            raise ConfigError(
                f'{path.name} says {key}={stated}, but the recipe gives {value}; write "auto" in the JSON.'
            )
        content[key] = value
    precision = precision_name(config)
    for key in ("bf16", "fp16"):
        block = dict(content.get(key) or {})
        stated = block.get("enabled", "auto")
        if stated not in ("auto", precision == key):
            raise ConfigError(
                f"{path.name} says {key}.enabled={stated}, but the recipe's precision is "
                f'{DTYPE_NAMES[precision]}; write "auto" in the JSON or set precision.'
            )
        content[key] = {**block, "enabled": precision == key}
    if content.get("data_types", {}).get("grad_accum_dtype", "auto") == "auto":
        # stages 0 and 1 of DeepSpeed 0.19 add up in the type they compute in, or need another optimizer for it
        content["data_types"] = {"grad_accum_dtype": "fp32"} if content["zero_optimization"]["stage"] in (2, 3) else {}


def _fill_from_machine(zero: dict[str, Any], config: RunConfig, path: Path, ranks_per_node: int | None) -> None:
    """Entries of `zero_optimization` that say "auto" because they depend on the machine."""
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = ranks_per_node or launched_ranks_here()
    for section in (zero.get("offload_optimizer"), zero.get("offload_param")):
        if not isinstance(section, dict):
            continue
        if section.get("pin_memory") == "auto":
            section["pin_memory"] = has_cuda()
        if section.get("nvme_path") == "auto":
            if not config.nvme_path:
                raise ConfigError(f"{path.name} swaps to a disk; name a folder on it: nvme_path=/local_nvme.")
            section["nvme_path"] = config.nvme_path


def _check_values(content: dict[str, Any], path: Path) -> None:
    """Refuses values over which DeepSpeed would trip long after the models are loaded."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    sections = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
    }
    for name, model in sections.items():
        if name in content:
            validate(model, content[name], what=f"{path.name}, {name}")


def _check_accumulation_dtype(content: dict[str, Any], path: Path) -> None:
    dtype = content.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if dtype not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"{path.name}: data_types.grad_accum_dtype={dtype!r}; choose fp32, bf16 or fp16.")


def _refuse_bad_combinations(content: dict[str, Any], world_size: int, path: Path) -> None:
    zero = content["zero_optimization"]
    stage = zero.get("stage", 0)
    offloads = {key: zero[key] for key in ("offload_param", "offload_optimizer") if zero.get(key)}
    devices = {str(section.get("device", "none")) for section in offloads.values()} - {"none"}
    group = zero.get("zero_hpz_partition_size", 1)
    if group > 1 and devices:
        raise ConfigError(
            f"{path.name} combines zero_hpz_partition_size with offload, which DeepSpeed trains wrongly; drop one."
        )
    if group > 1 and stage != 3:
        raise ConfigError(f"{path.name}: zero_hpz_partition_size needs ZeRO stage 3, and this is stage {stage}.")
    if world_size % max(1, group):
        raise ConfigError(
            f"{path.name}: {world_size} ranks are no multiple of zero_hpz_partition_size={group}; set it to a divisor."
        )
    if stage < 3 and (offloads.get("offload_param", {}).get("device", "none") != "none" or "nvme" in devices):
        raise ConfigError(f"{path.name}: offload_param and offload to nvme need ZeRO stage 3, and this is {stage}.")
    if stage == 0 and (offloads or content["fp16"]["enabled"]):
        raise ConfigError(f"{path.name}: ZeRO stage 0 has neither offload nor fp16 here; choose zero1 or zero2.")


def _refuse_missing_compiler(zero: dict[str, Any], path: Path) -> None:
    sections = [zero.get("offload_param"), zero.get("offload_optimizer")]
    if any(isinstance(section, dict) and section.get("device") == "nvme" for section in sections):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible():
            raise ConfigError(
                f"{path.name} swaps to a disk, for which DeepSpeed compiles async_io; install a C++ compiler and "
                "libaio (libaio-dev), or choose zero=zero3_offload_params."
            )
