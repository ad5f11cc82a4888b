"""Low-rank adapters as a folder in PEFT's own format: adapter_config.json and adapter_model.safetensors.

A tensor's name is its name in the decoder with a prefix: `base_model.model.` in PEFT's files, and `lora.` in a run's.
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
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import check_vacant, new_folder
from zero_ds.runtime.safetensors import SafetensorsStream, torch_dtype
from zero_ds.runtime.zero3 import parameter_shape
from zero_ds.training.checkpoint.checkpoint import CheckpointError, find_checkpoint
from zero_ds.training.checkpoint.load import copy_into_

OURS, THEIRS = "lora.", "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PLAIN_LORA: dict[str, Any] = {
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
"""Settings of plain LoRA in adapter_config.json, which may also omit them or leave them empty."""


def is_peft_folder(folder: Path) -> bool:
    """Returns whether the folder holds low-rank adapters in PEFT's format."""
    return (folder / CONFIG).is_file()


def weights_hash(folder: Path) -> str | None:
    """Returns the SHA-256 of the weights in a folder of `init_from`.

    For a run it is read from the manifest, and for a folder in PEFT's format it is computed.

    Raises:
        CheckpointError: the folder holds neither, or files that cannot be read.
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

    The folder does not contain the run's vision encoder and adapter, because PEFT's format holds only additions to the
    decoder's layers.

    Raises:
        ConfigError: the run was trained without LoRA; `out` exists.
        CheckpointError: the run has no checkpoint, or a damaged one.
    """
    from safetensors import safe_open

    check_vacant(out)
    checkpoint = find_checkpoint(weights)
    config = validate(RunConfig, checkpoint.manifest.get("config"), what=f"manifest of {checkpoint.folder}")
    checkpoint.check_weights()
    with safe_open(checkpoint.weights_file, framework="pt") as held:
        names = [name for name in held.keys() if name.startswith(OURS)]  # noqa: SIM118 - not a mapping
        if config.lora is None or not names:
            raise ConfigError(
                f"{checkpoint.folder} holds no low-rank adapters; name a run that was trained with lora.rank."
            )
        with new_folder(out) as folder:
            _peft_config(config.lora, config.target).save_pretrained(str(folder))
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


def _peft_config(config: LoraConfig, target: str) -> Any:
    """Returns the PEFT config that describes a run's low-rank adapters."""
    import peft

    alpha = config.alpha
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else cast(Any, alpha),
        target_modules=list(config.modules),
        layers_to_transform=list(config.layers) if config.layers is not None else None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=target,
        inference_mode=True,
    )


def load_peft_(model: VisionLanguageModel, folder: Path, config: LoraConfig | None) -> set[str]:
    """Copies the low-rank adapters of a folder in PEFT's format into the model, and returns their names. A collective.

    config: the run's `lora` section.

    Raises:
        ConfigError: the adapters are not plain LoRA, or their modules, layers, rank or alpha differ from `config`.
        CheckpointError: a file cannot be read.
    """
    from safetensors import safe_open

    settings = _settings(folder)
    rank, alpha = settings["r"], settings["lora_alpha"]
    if config is None or config.rank != rank or config.alpha != alpha:
        here = f"lora.rank={config.rank} lora.alpha={config.alpha:g}" if config else "no lora"
        raise ConfigError(
            f"{folder} holds adapters of rank {rank} and alpha {alpha}, the run has {here}; set lora.rank and "
            "lora.alpha to the values of the adapters."
        )
    wanted = dict(model.parameters_of("lora"))
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            stored = {OURS + name.removeprefix(THEIRS): name for name in file.keys()}  # noqa: SIM118 - not a mapping
            if other := sorted(set(stored) ^ set(wanted)):
                where = "only in that folder" if other[0] in stored else "only in the run"
                raise ConfigError(
                    f"{folder} does not fit (differing tensors: {len(other)}): {other[0]} is {where}; set lora.modules "
                    "and lora.layers to those of the adapters."
                )
            for name, parameter in wanted.items():
                shape, expected = tuple(file.get_slice(stored[name]).get_shape()), tuple(parameter_shape(parameter))
                if shape != expected:
                    raise ConfigError(f"{name} in {folder} has shape {shape}, but in the model it has {expected}.")
                copy_into_(parameter, file, stored[name])
    except ConfigError:
        raise
    except Exception as error:  # the safetensors library raises exception types of its own
        raise CheckpointError(f"{path} cannot be read ({error}); save the adapters again, as safetensors.") from None
    return set(wanted)


def _settings(folder: Path) -> dict[str, Any]:
    """Reads adapter_config.json and checks that zero_ds can compute the adapters that it describes.

    Raises:
        CheckpointError: the file cannot be read, or lacks rank or alpha.
        ConfigError: the adapters are not plain LoRA.
    """
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        int(settings["r"])  # raises unless it is a number, and so does the next line
        float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); save the adapters again."
        ) from None
    for key, plain in PLAIN_LORA.items():
        value = settings.get(key)
        if value and value != plain:
            raise ConfigError(f"{path} says {key}={value!r}; only plain LoRA can be loaded into a run.")
    return dict(settings)
