"""Low-rank adapters as a folder in PEFT's own format: adapter_config.json and adapter_model.safetensors.

A tensor's name is its name in the decoder with a prefix: `base_model.model.` in PEFT's files, and `lora.` in a run's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, cast

import torch

from zero_ds.config.loading import validate
from zero_ds.config.schema import LoraConfig, RunConfig
from zero_ds.model.decoders import Family
from zero_ds.model.decoders.folder import DecoderFolder, family_of_manifest
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import check_vacant, home_path, new_folder
from zero_ds.runtime.hub import cached_folder, is_hub_id, local_folder
from zero_ds.runtime.safetensors import SafetensorsStream, torch_dtype
from zero_ds.runtime.zero3 import parameter_shape
from zero_ds.training.checkpoint.checkpoint import CheckpointError, find_checkpoint
from zero_ds.training.checkpoint.load import copy_into_

OURS, THEIRS = "lora.", "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

SAID_BY_TENSORS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Entries of adapter_config.json that choose the adapted layers. The names of the tensors say the same, and it is
they that are compared with the run."""

WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("lora_dropout", "megatron_core", "merge_weights", "qalora_group_size", "eva_config"),
)
"""Entries without an effect on what trained adapters compute: on the file, its training, or a feature that is off."""

PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "bias": ("none",),
    "task_type": ("CAUSAL_LM", False),
    **dict.fromkeys(
        (
            *("use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"),
            *("alora_invocation_tokens", "arrow_config", "corda_config", "enable_lora", "kasa_config"),
            *("layer_replication", "loftq_config", "lora_ga_config", "megatron_config", "modules_to_save"),
            *("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "velora_config"),
            *("alpha_pattern", "rank_pattern"),
        ),
        (False,),
    ),
}
"""Values of the other entries under which adapters compute the same as ours; False stands for every value that is off:
null, false, and empty lists and objects. The initial weights that are not listed change the base model (PiSSA, OLoRA,
CorDA, LoftQ, LoRA-GA) or how it is used."""

KNOWN = ("r", "lora_alpha", *SAID_BY_TENSORS, *WITHOUT_EFFECT, *PLAIN)
"""Every entry that adapter_config.json may have."""


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


def write_peft_folder(weights: Path, out: Path, target: str | None = None) -> LoraConfig:
    """Writes the low-rank adapters of a run as the new folder `out`, which PEFT loads onto the run's target.

    The folder does not contain the run's vision encoder and adapter, because PEFT's format holds only additions to the
    decoder's layers. Where the target is a multimodal class, names are those of its text tower.

    target: folder or hub id of the target, if it is not where the run found it.

    Raises:
        ConfigError: the run was trained without LoRA; `out` exists; a target that is needed does not exist.
        CheckpointError: the run has no checkpoint, or a damaged one.
    """
    check_vacant(out)
    checkpoint = find_checkpoint(weights)
    config = validate(RunConfig, checkpoint.manifest.get("config"), what=f"manifest of {checkpoint.folder}")
    checkpoint.check_weights()
    with checkpoint.open_weights() as held:
        names = [name for name in held.keys() if name.startswith(OURS)]  # noqa: SIM118 - not a mapping
        if config.lora is None or not names:
            raise ConfigError(
                f"{checkpoint.folder} holds no low-rank adapters; name a run that was trained with lora.rank."
            )
        tower = _tower(family_of_manifest(checkpoint.manifest, target), target or config.target)
        with new_folder(out) as folder:
            _peft_config(config.lora, target or config.target, tower).save_pretrained(str(folder))
            theirs = {name: _their_name(name, tower) for name in names}
            slices = {name: held.get_slice(name) for name in names}
            declared = [
                (theirs[name], torch_dtype(one.get_dtype()), torch.Size(one.get_shape()))
                for name, one in slices.items()
            ]
            stream = SafetensorsStream(folder / WEIGHTS, declared)
            for name in names:
                stream.write(theirs[name], held.get_tensor(name))
            stream.close()
    return config.lora


def _tower(family: Family, target: str) -> tuple[str, str] | None:
    """Returns the prefixes of the decoder in the target's class and in ours; None if the class is the causal LM.

    Raises:
        ConfigError: the family has multimodal classes, and the target is missing, which would show its class.
    """
    if not family.tower_in_class:
        if family.per_layer_config is None and DecoderFolder(local_folder(target)).is_multimodal:
            raise ConfigError(
                f"{target} is a multimodal class that no family describes, so the names of its text tower in memory "
                "are not known; add a family with tower_in_class in zero_ds/model/decoders/."
            )
        return None
    try:
        is_multimodal = DecoderFolder(local_folder(target)).is_multimodal
    except ConfigError as error:
        raise ConfigError(
            f"{str(error).rstrip('.')}; name the run's target with --target, because adapters of {family.name} have "
            "other names in a multimodal class."
        ) from None
    return (family.tower_in_class, f"{family.backbone}.") if is_multimodal else None


def _their_name(name: str, tower: tuple[str, str] | None) -> str:
    """Returns the name in PEFT's file of one of our tensors."""
    inner = name.removeprefix(OURS)
    return THEIRS + (tower[0] + inner.removeprefix(tower[1]) if tower else inner)


def _our_name(name: str, family: Family) -> str:
    """Returns our name of a tensor in PEFT's file, which may have been made with a multimodal class."""
    inner = name.removeprefix(THEIRS)
    for old, new in family.towers:
        if inner.startswith(old):
            return OURS + new + inner.removeprefix(old)
    return OURS + inner


def _peft_config(config: LoraConfig, target: str, tower: tuple[str, str] | None) -> Any:
    """Returns PEFT's description of a run's adapters. In a multimodal class only the text tower's layers are meant."""
    import peft

    alpha = config.alpha
    chosen: dict[str, Any] = {
        "target_modules": list(config.modules),
        "layers_to_transform": list(config.layers) if config.layers is not None else None,
    }
    if tower is not None:
        numbers = r"\d+" if config.layers is None else f"({'|'.join(map(str, config.layers))})"
        modules = "|".join(map(re.escape, config.modules))
        chosen = {"target_modules": rf"{re.escape(tower[0])}layers\.{numbers}\..*\.({modules})"}
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else cast(Any, alpha),
        task_type="CAUSAL_LM",
        base_model_name_or_path=target,
        inference_mode=True,
        **chosen,
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
            stored = {_our_name(name, model.family): name for name in file.keys()}  # noqa: SIM118 - not a mapping
            outside = [name for name in sorted(stored) if not name.startswith(OURS + model.family.layer_prefix)]
            if outside:
                raise ConfigError(
                    f"{folder} adapts {stored[outside[0]]}, which is not in a layer of the decoder; only adapters of "
                    "decoder layers can be loaded into a run."
                )
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


def other_base(folder: Path, target: str, target_hash: str) -> str | None:
    """Returns a sentence if the adapters in a folder were trained on another model than a run's target; else None.

    Content decides where both models are on this machine, so that a folder may have moved. Nothing is downloaded: of a
    model that is not here, only the ids of the hub are compared, and a folder that is gone could be any.

    target, target_hash: as in the run's manifest.
    """
    base = _settings(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or base == target:
        return None
    here = _known_folder(base)
    if here is not None:
        try:
            same = DecoderFolder(here).hash(like=target_hash) == target_hash
        except (ConfigError, OSError, ValueError):
            return None  # not a model that can be compared
    else:
        same = not (is_hub_id(base) and is_hub_id(target)) or Path(target).is_dir()
    if same:
        return None
    return (
        f"{folder / CONFIG} names {base} as the model of the adapters, and the run's target is {target}, another one: "
        "what they add was trained for other weights."
    )


def _known_folder(name: str) -> Path | None:
    """Returns the folder of a model that is on this machine, also in the hub's cache; None if it is not."""
    try:
        folder = home_path(name)
    except ConfigError:
        return None
    if (folder / "config.json").is_file():
        return folder.resolve()
    return cached_folder(name) if is_hub_id(name) else None


def _settings(folder: Path) -> dict[str, Any]:
    """Reads adapter_config.json and checks that zero_ds can compute the adapters that it describes.

    Raises:
        CheckpointError: the file cannot be read, or lacks rank or alpha.
        ConfigError: the adapters are not plain LoRA.
    """
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        for key in ("r", "lora_alpha"):
            if type(settings[key]) not in (int, float) or not math.isfinite(settings[key]):
                raise ValueError(f"{key}={settings[key]!r} is not a number")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); save the adapters again."
        ) from None
    for key, value in settings.items():
        if key not in KNOWN:
            raise ConfigError(f"{path} says {key}={value!r}, which is not known here; only plain LoRA can be loaded.")
        allowed = PLAIN.get(key)
        if allowed is None or (not value and False in allowed):
            continue
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ConfigError(f"{path} says {key}={value!r}; only plain LoRA can be loaded into a run.")
    return dict(settings)
