"""Low-rank adapters as a folder in PEFT's own format: adapter_config.json and adapter_model.safetensors.

PEFT puts `base_model.model.` before the names that the adapters have in the decoder, we put `lora.` there (lora.py).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch

from zero_ds.config.loading import validate
from zero_ds.config.schema import LoraConfig, RunConfig
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import check_vacant, new_folder
from zero_ds.runtime.safetensors import SafetensorsStream, torch_dtype
from zero_ds.runtime.zero3 import gathered, is_partitioned, parameter_shape
from zero_ds.training.checkpoint.checkpoint import CheckpointError, check_hash, find_checkpoint

OURS, THEIRS = "lora.", "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
"""What adapter_config.json must say, where it says anything, for our adapters to compute the same."""


def is_peft_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def weights_hash(folder: Path) -> str | None:
    """Hash of the weights that a run starts from: of a result of ours as its manifest says, of adapters as they are.

    Raises:
        CheckpointError: neither of the two, or files that cannot be read.
    """
    if not is_peft_folder(folder):
        return find_checkpoint(folder).manifest.get("weights_sha256")
    path, digest = folder / WEIGHTS, hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); save the adapters again.") from None
    return digest.hexdigest()


def write_peft_folder(weights: Path, out: Path) -> LoraConfig:
    """Writes the low-rank adapters of a run as the new folder `out`, which PEFT loads onto the run's target.

    Encoder and adapter of the run are not in it: PEFT's format is for what stands beside the decoder's layers.

    Raises:
        ConfigError: a run without LoRA; `out` exists.
        CheckpointError: no commit, or a damaged one.
    """
    import peft
    from safetensors import safe_open

    check_vacant(out)
    commit = find_checkpoint(weights)
    config = validate(RunConfig, commit.manifest.get("config"), what=f"manifest of {commit.folder}")
    path = commit.folder / "weights.safetensors"
    check_hash(path, str(commit.manifest.get("weights_sha256")))
    with safe_open(path, framework="pt") as held:
        names = [name for name in held.keys() if name.startswith(OURS)]  # noqa: SIM118 - no mapping
        if config.lora is None or not names:
            raise ConfigError(
                f"{commit.folder} holds no low-rank adapters; name a run that was trained with lora.rank."
            )
        alpha = config.lora.alpha
        settings = peft.LoraConfig(
            r=config.lora.rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else cast(Any, alpha),
            target_modules=list(config.lora.modules),
            layers_to_transform=list(config.lora.layers) if config.lora.layers is not None else None,
            task_type="CAUSAL_LM",
            base_model_name_or_path=config.target,
            inference_mode=True,
        )
        with new_folder(out) as folder:
            settings.save_pretrained(str(folder))
            slices = {name: held.get_slice(name) for name in names}
            declared = [
                (THEIRS + name.removeprefix(OURS), torch_dtype(one.get_dtype()), torch.Size(one.get_shape()))
                for name, one in slices.items()
            ]
            stream = SafetensorsStream(folder / WEIGHTS, declared)
            for name in names:
                stream.write(THEIRS + name.removeprefix(OURS), held.get_tensor(name))
            stream.close()
    return config.lora


def load_peft_(model: VisionLanguageModel, folder: Path, config: LoraConfig | None) -> set[str]:
    """Copies the adapters of a folder in PEFT's format into the model's; returns their names. Every rank calls it.

    Raises:
        ConfigError: another kind of adapter, other modules, layers, rank or alpha than the run's `lora` says.
        CheckpointError: files that cannot be read.
    """
    from safetensors import safe_open

    said = _settings(folder)
    rank, alpha = said["r"], said["lora_alpha"]
    if config is None or config.rank != rank or config.alpha != alpha:
        here = f"lora.rank={config.rank} lora.alpha={config.alpha:g}" if config else "no lora"
        raise ConfigError(f"{folder} holds adapters of rank {rank} and alpha {alpha}, the run has {here}; set these.")
    wanted = dict(model.parameters_of("lora"))
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            stored = {OURS + name.removeprefix(THEIRS): name for name in file.keys()}  # noqa: SIM118 - no mapping
            if other := sorted(set(stored) ^ set(wanted)):
                side = "the run has not" if other[0] in stored else "it lacks"
                raise ConfigError(
                    f"{folder} does not fit: {other[0]} (and {len(other) - 1} more) is what {side}; set lora.modules "
                    "and lora.layers as the adapters have them."
                )
            for name, parameter in wanted.items():
                shape, expected = tuple(file.get_slice(stored[name]).get_shape()), tuple(parameter_shape(parameter))
                if shape != expected:
                    raise ConfigError(f"{name} in {folder} has shape {shape}, the model's has {expected}.")
                with gathered([parameter], modifier_rank=0), torch.no_grad():
                    if distributed.is_rank_zero() or not is_partitioned(parameter):
                        parameter.copy_(file.get_tensor(stored[name]).to(parameter.dtype))
    except ConfigError:
        raise
    except Exception as error:  # the safetensors library raises its own kinds
        raise CheckpointError(f"{path} cannot be read ({error}); save the adapters again, as safetensors.") from None
    return set(wanted)


def _settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, which asks for nothing that our adapters do not compute.

    Raises:
        CheckpointError: a file that cannot be read, or lacks rank or alpha.
        ConfigError: another kind of adapter.
    """
    path = folder / CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        int(said["r"]), float(said["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); save the adapters again."
        ) from None
    for key, plain in PLAIN.items():
        if key in said and (said[key] or plain) != plain:
            raise ConfigError(f"{path} says {key}={said[key]!r}; only plain LoRA can be started from.")
    return dict(said)
