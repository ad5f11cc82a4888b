"""The keys of a DeepSpeed JSON and their values that a run accepts: everything else is refused before anything loads.

DeepSpeed (0.19) ignores some keys that it does not know, finds some values wrong only after the models are loaded, and
trains wrongly with others. So this is a list of what works: tools/sweep_deepspeed.py tries every key here with the
values in `Rule.tried`, and writes the table in docs/configs.md. Loads neither torch nor DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.runtime.files import home_path


@dataclass(frozen=True)
class Rule:
    """Values that a key may have."""

    words: str
    """Values in words, as advice that follows `key=value; `."""
    accepts: Callable[[Any], bool]
    tried: tuple[Any, ...]
    """Values with which the key has been tried."""
    read: Callable[[Any], Any] = lambda value: value
    """Returns the value as DeepSpeed gets it."""
    why: str = ""
    """Reason why other values that DeepSpeed knows are refused."""
    refused: tuple[Any, ...] = ()
    """Examples of such values."""


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_whole(value: Any) -> bool:
    return _is_number(value) and float(value).is_integer()


def _whole(*tried: int, least: int = 0, most: float = math.inf) -> Rule:
    words = f"write a whole number from {least} {_end(most)}, without quotes"
    return Rule(words, lambda value: _is_whole(value) and least <= value <= most, tried, read=int)


def _number(*tried: float, most: float = math.inf) -> Rule:
    words = f"write a number from 0 {_end(most)}, without quotes"
    return Rule(words, lambda value: _is_number(value) and 0 <= value <= most, tried)


def _end(most: float) -> str:
    return "on" if most == math.inf else f"to {most:.0f}"


def _positive(*tried: float) -> Rule:
    return Rule("write a number above 0, without quotes", lambda value: _is_number(value) and value > 0, tried)


def _share(*tried: float) -> Rule:
    return Rule("write a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1, tried)


def _one_of(*values: Any) -> Rule:
    *most, last = map(str, values)
    kinds = {type(value) for value in values}
    return Rule(f"choose {', '.join(most)} or {last}", lambda value: type(value) in kinds and value in values, values)


def _only(value: Any, *refused: Any, why: str) -> Rule:
    shown = str(value).lower() if isinstance(value, bool) else str(value)

    def accepts(given: Any) -> bool:
        return isinstance(given, bool) == isinstance(value, bool) and bool(given == value)

    return Rule(f"only {shown} works here, because {why}", accepts, (value,), why=why, refused=refused)


BOOLEAN = Rule("write true or false, without quotes", lambda value: isinstance(value, bool), (True, False))
TEXT = Rule("write a text", lambda value: isinstance(value, str), ("a", "b"))
PATH = replace(
    TEXT, tried=("csv", "other/csv"), read=lambda value: str(home_path(value)), words="write the path of a file"
)
FOLDER = replace(
    PATH, accepts=lambda value: isinstance(value, str) and bool(value.strip()), words="write the path of a folder"
)
BLOCK = replace(
    _whole(131_072, 1_048_576),
    accepts=lambda value: _is_whole(value) and 0 < value <= 2**30 and value % 512 == 0,
    words="write a multiple of 512, as a disk reads and writes, up to 1073741824",
)
DTYPE = _one_of("fp32", "bf16", "fp16")

_ROUNDS = "its rounding changes the numbers of a run"
_FOREIGN = "it needs an optimizer of DeepSpeed's own"

KEYS: dict[str, Rule] = {
    "train_batch_size": _whole(6, 8, least=1),
    "train_micro_batch_size_per_gpu": _whole(1, 2, least=1),
    "gradient_accumulation_steps": _whole(2, 3, least=1),
    "gradient_clipping": _number(0.5, 1.0),
    "steps_per_print": _whole(1, 1000, least=1),
    "wall_clock_breakdown": BOOLEAN,
    "memory_breakdown": BOOLEAN,
    "dump_state": BOOLEAN,
    "prescale_gradients": BOOLEAN,
    "gradient_predivide_factor": _positive(1.0, 2.0),
    "gradient_allreduce_op": _only("mean", "sum", why="a sum would count the ranks into the learning rate"),
    "communication_data_type": DTYPE,
    "managed_gradient_accumulation": _only(True, False, why="the training loop leaves the counting to DeepSpeed"),
    "zero_allow_untested_optimizer": BOOLEAN,
    "zero_force_ds_cpu_optimizer": BOOLEAN,
    # -- precision -----------------------------------------------------------------------------------------------------
    "data_types.grad_accum_dtype": DTYPE,
    "bf16.enabled": BOOLEAN,
    "bf16.immediate_grad_update": BOOLEAN,
    "bf16.check_grad_overflow": _only(True, False, why="a step with an infinite gradient would be made"),
    "bf16.bf16_master_weights_and_grads": _only(False, True, why=_FOREIGN),
    "bf16.bf16_optimizer_states": _only(False, True, why=_FOREIGN),
    "fp16.enabled": BOOLEAN,
    "fp16.auto_cast": BOOLEAN,
    "fp16.loss_scale": _number(0.0, 128.0, most=2**32),
    "fp16.initial_scale_power": _whole(8, 16, most=32),
    "fp16.loss_scale_window": _whole(2, 1000, least=1),
    "fp16.hysteresis": _whole(1, 2, least=1),
    "fp16.consecutive_hysteresis": BOOLEAN,
    "fp16.min_loss_scale": _whole(1, 4, least=1),
    "fp16.fp16_master_weights_and_grads": _only(False, True, why=_FOREIGN),
    # -- ZeRO ----------------------------------------------------------------------------------------------------------
    "zero_optimization.stage": _one_of(0, 1, 2, 3),
    "zero_optimization.contiguous_gradients": BOOLEAN,
    "zero_optimization.reduce_scatter": BOOLEAN,
    "zero_optimization.reduce_bucket_size": _whole(1000, 500_000_000, least=1),
    "zero_optimization.use_multi_rank_bucket_allreduce": BOOLEAN,
    "zero_optimization.allgather_partitions": BOOLEAN,
    "zero_optimization.allgather_bucket_size": _whole(1000, 500_000_000, least=1),
    "zero_optimization.overlap_comm": BOOLEAN,
    "zero_optimization.compute_grad_norm": _only(True, False, why="clipping and the log need the norm"),
    "zero_optimization.load_from_fp32_weights": BOOLEAN,
    "zero_optimization.elastic_checkpoint": BOOLEAN,
    "zero_optimization.sub_group_size": _whole(0, 1000, 1_000_000_000),
    "zero_optimization.ignore_unused_parameters": BOOLEAN,
    "zero_optimization.legacy_stage1": _only(False, True, why="DeepSpeed has removed it"),
    "zero_optimization.round_robin_gradients": BOOLEAN,
    "zero_optimization.parameter_alignment": BOOLEAN,
    "zero_optimization.stage3_prefetch_bucket_size": _whole(0, 1000, 50_000_000),
    "zero_optimization.stage3_param_persistence_threshold": _whole(0, 500, 100_000),
    "zero_optimization.stage3_model_persistence_threshold": _whole(0, 1000, 9_223_372_036_854_775_807),
    "zero_optimization.stage3_max_live_parameters": _whole(0, 1_000_000_000),
    "zero_optimization.stage3_max_reuse_distance": _whole(0, 1_000_000_000),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": BOOLEAN,
    "zero_optimization.stage3_module_granularity_threshold": _only(
        0, 1000, why="whole layers are already gathered as one unit"
    ),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": BOOLEAN,
    "zero_optimization.stage3_allgather_sequential": BOOLEAN,
    "zero_optimization.zero_hpz_partition_size": _whole(1, 2, least=1),
    "zero_optimization.zero_quantized_weights": _only(False, True, why=_ROUNDS),
    "zero_optimization.zero_quantized_nontrainable_weights": _only(False, True, why=_ROUNDS),
    "zero_optimization.zero_quantized_gradients": _only(False, True, why=_ROUNDS),
    "zero_optimization.memory_efficient_linear": BOOLEAN,
    "zero_optimization.pipeline_loading_checkpoint": BOOLEAN,
    "zero_optimization.override_module_apply": BOOLEAN,
    "zero_optimization.log_trace_cache_warnings": BOOLEAN,
    "zero_optimization.enable_sanity_checks": BOOLEAN,
    "zero_optimization.save_muon_momentum_buffer_in_memory": _only(False, True, why=_FOREIGN),
    "zero_optimization.offload_param.device": _one_of("none", "cpu", "nvme"),
    "zero_optimization.offload_param.nvme_path": FOLDER,
    "zero_optimization.offload_param.buffer_count": _whole(4, 5, least=1),
    "zero_optimization.offload_param.buffer_size": _whole(1_000_000, 100_000_000, least=1),
    "zero_optimization.offload_param.max_in_cpu": _whole(0, 1_000_000_000),
    "zero_optimization.offload_param.pin_memory": BOOLEAN,
    "zero_optimization.offload_optimizer.device": _one_of("none", "cpu", "nvme"),
    "zero_optimization.offload_optimizer.nvme_path": FOLDER,
    "zero_optimization.offload_optimizer.buffer_count": _whole(4, 5, least=4),
    "zero_optimization.offload_optimizer.pin_memory": BOOLEAN,
    "zero_optimization.offload_optimizer.pipeline_read": BOOLEAN,
    "zero_optimization.offload_optimizer.pipeline_write": BOOLEAN,
    "zero_optimization.offload_optimizer.fast_init": _only(
        False, True, why="a run with parameters on a disk would start from wrong weights, and others ignore it"
    ),
    "zero_optimization.offload_optimizer.ratio": _only(1.0, 0.5, why=_FOREIGN),
    "zero_optimization.offload_optimizer.super_offload": _only(False, True, why=_FOREIGN),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _share(0.5, 0.8),
    # -- disks, logs, profiles -----------------------------------------------------------------------------------------
    "aio.block_size": BLOCK,
    # a machine has room for 65,536 requests, which all ranks and their files share; without room a rank aborts
    "aio.queue_depth": _whole(8, 32, least=1, most=1024),
    "aio.intra_op_parallelism": _whole(1, 2, least=1, most=1000),
    "aio.single_submit": BOOLEAN,
    "aio.overlap_events": BOOLEAN,
    "aio.use_gds": _only(False, True, why="it has not been tried with GPUDirect Storage"),
    "tensorboard.enabled": BOOLEAN,
    "tensorboard.output_path": replace(PATH, tried=("curves", "other/curves")),
    "tensorboard.job_name": TEXT,
    "wandb.enabled": BOOLEAN,
    "wandb.group": TEXT,
    "wandb.team": TEXT,
    "wandb.project": TEXT,
    "csv_monitor.enabled": BOOLEAN,
    "csv_monitor.output_path": PATH,
    "csv_monitor.job_name": TEXT,
    "comet.enabled": BOOLEAN,
    "comet.samples_log_interval": _whole(1, 100, least=1),
    "comet.project": TEXT,
    "comet.workspace": TEXT,
    "comet.experiment_name": TEXT,
    "comet.experiment_key": TEXT,
    "comet.online": BOOLEAN,
    "comet.mode": _one_of("get", "create", "get_or_create"),
    "comms_logger.enabled": BOOLEAN,
    "comms_logger.prof_all": BOOLEAN,
    "comms_logger.prof_ops": Rule(
        'write a list of names, such as ["all_reduce"]',
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        (["all_reduce"], ["all_gather", "reduce"]),
    ),
    "comms_logger.verbose": BOOLEAN,
    "comms_logger.debug": BOOLEAN,
    "flops_profiler.enabled": BOOLEAN,
    "flops_profiler.recompute_fwd_factor": _number(0.0, 1.0),
    "flops_profiler.profile_step": _whole(1, 2, least=1),
    "flops_profiler.module_depth": Rule(
        "write a whole number from -1 on", lambda value: _is_whole(value) and value >= -1, (-1, 2), read=int
    ),
    "flops_profiler.top_modules": _whole(1, 3, least=1),
    "flops_profiler.detailed": BOOLEAN,
    "flops_profiler.output_file": replace(PATH, tried=("flops.txt", "other.txt")),
}
"""Every key that a JSON may have, with dots between sections and keys."""

_OURS = "follows from the recipe"
_NOT_HERE = "is not supported here; remove it"

REFUSED: dict[str, str] = {
    "optimizer": f"{_OURS}: remove it, and set optimizer.learning_rate and the like in the recipe",
    "scheduler": f"{_OURS}: remove it, and set optimizer.warmup_ratio in the recipe",
    "activation_checkpointing": f"{_OURS}: remove it, and set activation_checkpointing in the recipe",
    "torch_autocast": f"{_OURS}: remove it, and set precision in the recipe",
    "amp": f"{_OURS}: remove it, and set precision in the recipe",
    "bfloat16": "is now called bf16; rename it",
    "compile": f"{_OURS}: remove it, and set compile in the recipe",
    "checkpoint": "describes checkpoints of DeepSpeed's own, which a run does not write; remove it",
    "data_efficiency": f"{_OURS}: remove it, and set data.* in the recipe",
    "dataloader_drop_last": f"{_OURS}: remove it",
    "log_level": "is set on the command line (`deepspeed --log_level`); remove it",
    **dict.fromkeys(
        (
            *("autotuning", "compression_training", "datastates", "disable_allgather", "disable_python_gc"),
            *(
                "expert_parallel",
                "hybrid_engine",
                "pipeline",
                "quantize_training",
                "seq_parallel_communication_data_type",
            ),
            *("sequence_parallel_size", "sparse_gradients", "tensor_parallel", "timers"),
            *("use_data_before_expert_parallelism", "vocabulary_size", "weight_quantization"),
        ),
        _NOT_HERE,
    ),
    "data_types.param_dtype": f"{_OURS}: remove it, and set precision in the recipe",
    "data_types.buffer_dtype": _NOT_HERE,
    "data_types.keep_in_fp32_modules": _NOT_HERE,
    "zero_optimization.cpu_offload": 'is old; write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'is old; write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "is old; write pin_memory into offload_optimizer and offload_param",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "is old; write stage3_gather_16bit_weights_on_model_save"
    ),
    "zero_optimization.zenflow": "applies a part of the gradients later, which changes the numbers of a run; remove it",
    "zero_optimization.leaf_module": "is chosen here: a decoder layer is one unit where that is possible; remove it",
    "aio.thread_count": "is called intra_op_parallelism in DeepSpeed's code; rename it",
    "comet.api_key": "is a secret, and this file is copied into the run folder; set COMET_API_KEY instead",
}
"""Keys that DeepSpeed documents and that no value makes usable here, with the reason and the remedy."""

SECTIONS = tuple(dict.fromkeys(key.rpartition(".")[0] for key in (*KEYS, *REFUSED) if "." in key))
"""Names of the objects in a JSON, with dots between nested ones."""

FILLED = (
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.offload_param.nvme_path",
    "zero_optimization.offload_param.pin_memory",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_optimizer.pin_memory",
)
"""Keys whose "auto" depends on the recipe or the machine, and stays for the caller to fill in."""

DECIDED = (
    "zero_optimization.stage",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_optimizer.device",
)
"""Keys that may be neither "auto" nor null, although they may be missing: DeepSpeed's default would quietly switch off
what the JSON asks for."""

OPTIONAL = ("zero_optimization.offload_param", "zero_optimization.offload_optimizer")
"""Sections that may be null, which means the same as leaving them out."""

_SHORT = {key.rpartition(".")[2].removeprefix("stage3_"): key.rpartition(".")[2] for key in KEYS if ".stage3_" in key}
"""DeepSpeed's other names of keys in `zero_optimization`: those without `stage3_`."""


def read_json(content: dict[str, Any], file: str) -> dict[str, Any]:
    """Returns a DeepSpeed JSON with checked values, without entries that are "auto" or null: DeepSpeed's defaults hold.

    Keys in `FILLED` may stay "auto", and those in `DECIDED` may be neither. Whole numbers become integers (5e8), `~` in
    a path becomes the home folder, and keys have one name each.

    Raises:
        ConfigError: a key that is not in `KEYS` or a value that it does not accept; one sentence that names `file`.
    """
    return _read_section(content, "", file)


def _read_section(content: dict[str, Any], section: str, file: str) -> dict[str, Any]:
    """Reads the entries of one object; `section` is its name, empty for the whole JSON."""
    found: dict[str, Any] = {}
    for given, value in content.items():
        if "." in given:
            outer, _, inner = given.rpartition(".")
            raise ConfigError(
                f"{_where(f'{section}.' if section else '', file)}: unknown key '{given}'; write "
                f'{{"{outer}": {{"{inner}": ...}}}}, because DeepSpeed looks only into nested objects.'
            )
        name = _SHORT.get(given, given) if section == "zero_optimization" else given
        key = f"{section}.{name}" if section else name
        if name in found or (name != given and name in content):
            raise ConfigError(f"{_where(key, file)}: {given} and {name} are the same key; keep one of them.")
        if key in SECTIONS:
            if isinstance(value, dict):
                found[name] = _read_section(value, key, file)
            elif value is not None or key not in OPTIONAL:
                raise ConfigError(f"{file}: {key}={value!r} must be an object of settings.")
        elif key not in KEYS:
            raise ConfigError(_unknown(key, file))
        elif value == "auto" and key in FILLED:
            found[name] = value
        elif (value is not None and value != "auto") or key in DECIDED:
            found[name] = _checked(key, value, file)
    return found


def _checked(key: str, value: Any, file: str) -> Any:
    """Returns a key's value as DeepSpeed gets it."""
    rule = KEYS[key]
    if not rule.accepts(value):
        raise ConfigError(f"{_where(key, file)}: {_inside(key)}={value!r}; {rule.words}.")
    try:
        return rule.read(value)
    except ConfigError as error:
        raise ConfigError(f"{_where(key, file)}: {_inside(key)}={value!r}: {error}") from None


def _unknown(key: str, file: str) -> str:
    """Returns the sentence about a key that is not in `KEYS`."""
    if key in REFUSED:
        return f"{_where(key, file)}: {_inside(key)} {REFUSED[key]}."
    section, _, name = key.rpartition(".")
    within = f"{section}." if section else ""
    known = [k.removeprefix(within).partition(".")[0] for k in KEYS if k.startswith(within)]
    return f"{_where(key, file)}: unknown key '{_inside(key)}'{did_you_mean(name, list(dict.fromkeys(known)))}"


def _where(key: str, file: str) -> str:
    """Returns the file and the top section of a key."""
    section, dot, _ = key.partition(".")
    return f"{file}, {section}" if dot else file


def _inside(key: str) -> str:
    """Returns a key's name inside its top section."""
    return key.partition(".")[2] or key
