"""The DeepSpeed JSON of a run: the file that `zero=` names, checked at every depth and filled in from the recipe.

For entries that follow from the recipe the JSON says "auto", leaves them out, or agrees; a contradiction is an error
that names both values.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zero_ds.config.loading import validate
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.environment import has_cuda, launched_ranks_here
from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.runtime.precision import bf16_is_fast
from zero_ds.training.deepspeed_keys import read_json
from zero_ds.training.options.sharding import check_sharding

if TYPE_CHECKING:
    import torch

_PACKAGE = Path(__file__).parent.parent
_CANDIDATES = (_PACKAGE.parent / "ds_configs", _PACKAGE / "ds_configs")
DS_CONFIG_ROOT = next((path for path in _CANDIDATES if path.is_dir()), _PACKAGE)
"""Folder of the JSON files: next to the package in a checkout, inside it where a wheel is installed."""

AUTO: dict[str, Callable[[RunConfig, int], Any]] = {
    "train_batch_size": lambda config, world: config.global_batch,
    "train_micro_batch_size_per_gpu": lambda config, world: config.micro_batch,
    "gradient_accumulation_steps": lambda config, world: config.global_batch // (config.micro_batch * world),
    "gradient_clipping": lambda config, world: config.optimizer.max_grad_norm,
}
"""Entries of the JSON that follow from the recipe and the number of ranks."""


def ds_config_names() -> list[str]:
    """Returns the names of the JSON files in ds_configs/."""
    return sorted(path.stem for path in DS_CONFIG_ROOT.glob("*.json"))


def precision_name(config: RunConfig) -> Literal["bf16", "fp16", "fp32"]:
    """Returns the precision of a run; `auto` becomes bf16 where the device multiplies it fast, fp32 elsewhere."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if bf16_is_fast() else "fp32"


DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""torch's name of each precision."""


def resolve_precision(config: RunConfig) -> torch.dtype:
    """Returns torch's dtype of the run's precision (see `precision_name`)."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[precision_name(config)])
    return dtype


def ds_config(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> dict[str, Any]:
    """Returns a run's DeepSpeed configuration: the JSON that `config.zero` names, filled in from the recipe.

    ranks_per_node: for a run that is only planned here and starts on other machines; then nothing depends on this one.

    Raises:
        ConfigError: the file does not exist or is not valid JSON, a key is unknown, a value contradicts the recipe, or
            DeepSpeed is known to train wrongly with a combination of values.
    """
    path = Path(config.zero) if config.zero.endswith(".json") else DS_CONFIG_ROOT / f"{config.zero}.json"
    text = _read(path, config.zero)
    raw = _parse(text, path)
    # loading DeepSpeed takes seconds, which a dry run can spare if the tests have asked it about the same text
    ask_deepspeed = "deepspeed" in sys.modules or not _is_released(path, text)
    if ask_deepspeed:
        _refuse_removed_keys(raw, path)
    content = read_json(raw, path.name)
    zero = content.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    _fill_from_recipe(content, config, world_size, path)
    _fill_from_machine(zero, config, path, ranks_per_node)
    if ask_deepspeed:
        _check_values(content, path)
    _check_dtypes(content, precision_name(config), path)
    _check_combinations(content, world_size, path)
    check_sharding(config, zero, path.name)
    if ranks_per_node is None:
        _check_compiler(zero, path)
        _check_monitors(content, path)
    curves = {"enabled": True, "output_path": str(Path(config.out)), "job_name": "tensorboard"}
    content["tensorboard"] = {**curves, **content.get("tensorboard", {})}
    content.setdefault("steps_per_print", 1_000_000_000)
    # DeepSpeed would wait for the device at the start and the end of every micro-batch, to measure its own speed
    content["timers"] = {"throughput": {"synchronized": False}}
    content.setdefault("zero_allow_untested_optimizer", True)
    content.setdefault("zero_force_ds_cpu_optimizer", False)
    return content


# -- names -------------------------------------------------------------------------------------------------------------


RELEASED = {
    "zero0": "4ddc6119a1cba158",
    "zero1": "378d7de601f60226",
    "zero2": "98a9cc64204b3c52",
    "zero2_offload": "34f16a5c0360cb11",
    "zero3": "70ee5988f6bfedb3",
    "zero3_hpz": "b74fab0b9b794deb",
    "zero3_nvme": "5ddb8bd39d55082d",
    "zero3_offload": "2ba0e3711eeab08a",
    "zero3_offload_params": "f97e4d47ba615413",
    "zero3_resident": "f0a2c57d61a35723",
}
"""Beginning of the SHA-256 of each file in ds_configs/ as released, by name. The tests check these files against
DeepSpeed's own schemas, so `ds_config` need not load DeepSpeed for an unchanged one. Files that are missing here, or
were changed, are checked every time."""


def _is_released(path: Path, text: str) -> bool:
    """Returns whether a DeepSpeed JSON is a file of ds_configs/ whose text is that of the release."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return path.parent == DS_CONFIG_ROOT and RELEASED.get(path.stem) == digest[:16]


def _read(path: Path, name: str) -> str:
    """Reads the text of a JSON file, which the recipe calls `name`."""
    if not path.is_file():
        raise ConfigError(f"unknown DeepSpeed config '{name}'{did_you_mean(name, ds_config_names())}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    """Parses the text of a JSON file, which must hold an object."""
    try:
        content = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    return content


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dictionary of a JSON object's entries. Python's own would silently keep only the last of equal keys."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key '{key}' appears twice")
        content[key] = value
    return content


def _refuse_removed_keys(content: dict[str, Any], path: Path) -> None:
    """Refuses keys that DeepSpeed once knew, in its own words."""
    from deepspeed.runtime.config import DeepSpeedConfigError, _reject_removed_config_keys

    try:
        _reject_removed_config_keys(content)
    except DeepSpeedConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


# -- values that follow from the recipe and the machine ----------------------------------------------------------------


def _fill_from_recipe(content: dict[str, Any], config: RunConfig, world_size: int, path: Path) -> None:
    """Fills in batch sizes, clipping and precision, which the JSON may not contradict."""
    for key, value_of in AUTO.items():
        value = value_of(config, world_size)
        stated = content.get(key, "auto")
        if stated not in ("auto", value):
            raise ConfigError(
                f'{path.name} says {key}={stated}, but the recipe gives {value}; write "auto" in the JSON.'
            )
        content[key] = value
    precision = precision_name(config)
    for key in ("bf16", "fp16"):
        section = dict(content.get(key) or {})
        stated = section.get("enabled", "auto")
        if stated not in ("auto", precision == key):
            raise ConfigError(
                f"{path.name} says {key}.enabled={stated}, but the recipe's precision is "
                f'{DTYPE_NAMES[precision]}; write "auto" in the JSON or set precision.'
            )
        content[key] = {**section, "enabled": precision == key}
    if "grad_accum_dtype" not in content.get("data_types", {}):
        # under stages 0 and 1 DeepSpeed 0.19 accumulates in the type it computes in, or needs another optimizer
        shards_gradients = content["zero_optimization"]["stage"] in (2, 3)
        content["data_types"] = {"grad_accum_dtype": "fp32"} if shards_gradients else {}


def _fill_from_machine(zero: dict[str, Any], config: RunConfig, path: Path, ranks_per_node: int | None) -> None:
    """Fills in entries of `zero_optimization` that say "auto" because they depend on the machine.

    Sizes that depend on the model are missing: `gathering.follow_layers_` fills them in.
    """
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = ranks_per_node or launched_ranks_here()
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name) and "device" not in zero[name]:
            raise ConfigError(
                f"{path.name}: {name} names no device, and DeepSpeed would offload nothing; write "
                f'"device": "cpu" or "nvme" into it, or remove it.'
            )
        if _device(zero, name) is None:
            zero.pop(name, None)  # a section whose device is "none" is as good as none
            continue
        section = zero[name]
        if section.get("pin_memory") == "auto":
            section["pin_memory"] = has_cuda()
        if section.get("nvme_path", "auto") != "auto":
            continue
        section.pop("nvme_path", None)
        if section["device"] == "nvme":
            if not config.nvme_path:
                raise ConfigError(f"{path.name} swaps to a disk; name a folder on it: nvme_path=/local_nvme.")
            section["nvme_path"] = config.nvme_path


# -- values ------------------------------------------------------------------------------------------------------------


def _check_values(content: dict[str, Any], path: Path) -> None:
    """Refuses values that DeepSpeed would refuse as well, but long after the models are loaded."""
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


def _check_dtypes(content: dict[str, Any], precision: str, path: Path) -> None:
    """Refuses a type of gradients that DeepSpeed cannot combine with the run's precision, or that rounds them."""
    stage = content["zero_optimization"]["stage"]
    accumulated = content["data_types"].get("grad_accum_dtype", precision)
    if stage < 2 and accumulated != precision:
        raise ConfigError(
            f"{path.name}: data_types.grad_accum_dtype={accumulated!r}, but ZeRO stage {stage} accumulates in the "
            f'precision of the run, {precision}; write "auto", or choose stage 2.'
        )
    for name, dtype in (
        ("data_types.grad_accum_dtype", accumulated),
        ("communication_data_type", content.get("communication_data_type", precision)),
    ):
        if dtype not in ("fp32", precision):
            others = "" if precision == "fp32" else f" or {precision}"
            raise ConfigError(
                f"{path.name}: {name}={dtype!r} would round the gradients of a run in {precision}; choose fp32{others}."
            )


def _check_combinations(content: dict[str, Any], world_size: int, path: Path) -> None:
    """Refuses combinations that DeepSpeed does not support, or with which it trains wrongly."""
    zero = content["zero_optimization"]
    stage = zero["stage"]
    parameters, optimizer = _device(zero, "offload_param"), _device(zero, "offload_optimizer")
    group = zero.get("zero_hpz_partition_size", 1)
    if group > 1 and (parameters or optimizer):
        raise ConfigError(
            f"{path.name} combines zero_hpz_partition_size with offload, which DeepSpeed trains wrongly; drop one."
        )
    if group > 1 and stage != 3:
        raise ConfigError(f"{path.name}: zero_hpz_partition_size needs ZeRO stage 3, and this is stage {stage}.")
    if world_size % max(1, group):
        raise ConfigError(
            f"{path.name}: {world_size} ranks are not a multiple of zero_hpz_partition_size={group}; set it to a "
            "divisor."
        )
    if stage < 3 and (parameters or optimizer == "nvme"):
        raise ConfigError(f"{path.name}: offload_param and offload to nvme need ZeRO stage 3, and this is {stage}.")
    if parameters == "nvme" and zero.setdefault("stage3_max_reuse_distance", 0):
        raise ConfigError(
            f"{path.name}: stage3_max_reuse_distance={zero['stage3_max_reuse_distance']} with parameters on a disk; "
            'write 0 or "auto", because parameters that wait for their next use would fill the buffers.'
        )
    if optimizer == "nvme":
        _fill_swap_buffers(zero["offload_optimizer"], path)
    if stage == 0 and (optimizer or content["fp16"]["enabled"]):
        raise ConfigError(f"{path.name}: ZeRO stage 0 has neither offload nor fp16 here; choose zero1 or zero2.")
    for key, plain in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if stage > 1 and content.get(key, plain) != plain:
            raise ConfigError(
                f"{path.name}: {key}={content[key]!r} works up to ZeRO stage 1, and this is {stage}; remove it."
            )
    if optimizer and content.get("zero_force_ds_cpu_optimizer"):
        raise ConfigError(
            f"{path.name}: zero_force_ds_cpu_optimizer=True with offload_optimizer needs DeepSpeed's own optimizer, "
            "but a run brings its AdamW; write false."
        )


def _fill_swap_buffers(section: dict[str, Any], path: Path) -> None:
    """Fills in the number of buffers for the optimizer state on a disk, and refuses one that is too small.

    A sub-group needs four: master copy, two moments and gradients. While it is updated, the next one may be read and
    the one before it written.
    """
    pipelines = [name for name in ("pipeline_read", "pipeline_write") if section.get(name)]
    least = 4 * (1 + len(pipelines))
    if section.setdefault("buffer_count", least) < least:
        raise ConfigError(
            f"{path.name}: offload_optimizer.buffer_count={section['buffer_count']} with {' and '.join(pipelines)}; "
            f'write {least} or more, or "auto".'
        )


def _device(zero: dict[str, Any], key: str) -> str | None:
    """Returns the device that a section of `zero_optimization` offloads to; None without offload."""
    device = str((zero.get(key) or {}).get("device", "none"))
    return None if device == "none" else device


def _check_compiler(zero: dict[str, Any], path: Path) -> None:
    """Refuses swapping to a disk where DeepSpeed cannot compile what that needs."""
    if "nvme" in (_device(zero, "offload_param"), _device(zero, "offload_optimizer")):
        from deepspeed.git_version_info import installed_ops
        from deepspeed.ops.op_builder import AsyncIOBuilder
        from torch.utils import cpp_extension

        is_built = bool(installed_ops.get(AsyncIOBuilder.NAME))
        if not is_built and not (AsyncIOBuilder().is_compatible() and cpp_extension.is_ninja_available()):
            raise ConfigError(
                f"{path.name} swaps to a disk, for which DeepSpeed compiles async_io; install a C++ compiler, ninja "
                "and libaio (libaio-dev), or choose zero=zero3_offload_params."
            )


_disks: dict[Path, int] = {}
"""Open files by which this process has the folders on disks that its run swaps to."""


def take_disks(ds: dict[str, Any]) -> None:
    """Makes the folders that a resolved configuration swaps to, tries to write there, and keeps them for this run.

    Two runs must not have one folder: DeepSpeed names the files after the rank alone. `release_disks` gives them back,
    as does the end of the process.

    Raises:
        ConfigError: a folder that cannot be made or written, that another run uses, or whose file system has no direct
            access to a disk.
    """
    zero = ds["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        if _device(zero, name) == "nvme":
            _take_disk(Path(zero[name]["nvme_path"]))


def release_disks() -> None:
    """Gives back what `take_disks` has taken."""
    while _disks:
        os.close(_disks.popitem()[1])


def _take_disk(folder: Path) -> None:
    """Takes this rank's share of a folder, with a file that is written as DeepSpeed writes."""
    import fcntl  # not on Windows, where runs can be planned

    path = folder.absolute() / f".zero_ds-rank-{os.environ.get('RANK', '0')}"
    if path in _disks:
        return
    advice = "choose another nvme_path=FOLDER, on a local disk."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0), 0o600)
    except OSError as error:
        direct = " (DeepSpeed needs direct access, O_DIRECT)" if error.errno == errno.EINVAL else ""
        raise ConfigError(f"nvme_path={folder} cannot be used: {error.strerror}{direct}; {advice}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with mmap.mmap(-1, mmap.PAGESIZE) as block:  # begins at a page, as direct access needs it
            os.write(file, block)
    except OSError as error:
        os.close(file)
        wrong = f"cannot be written: {error.strerror}"
        if isinstance(error, BlockingIOError):
            wrong = "is in use by another run on this machine"
        raise ConfigError(f"nvme_path={folder} {wrong}; {advice}") from None
    _disks[path] = file


def _check_monitors(content: dict[str, Any], path: Path) -> None:
    """Refuses logging through a package that is not installed here."""
    for name, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        if content.get(name, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{path.name}: {name}.enabled=True needs the package {package}, which is not installed; install it, or "
                "write false."
            )
