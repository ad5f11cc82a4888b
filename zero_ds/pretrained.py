"""Model folders of the Hugging Face format: their config, their tensors by name, and loading without gaps.

A folder of a multimodal class counts as the decoder in it: its text config, and the tensors of its text tower under the
names that the causal LM has for them (`Family.towers`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zero_ds.config import ConfigError
from zero_ds.families import family_of

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    name: str
    """Its name in that file."""


def text_config(folder: Path) -> Any:
    """The decoder's config with every default filled in, also where the folder is of a multimodal class.

    Raises:
        ConfigError: an unregistered family, or a config.json that transformers does not take.
    """
    from transformers import AutoConfig

    family_of(folder)
    try:
        return AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be used: {str(error).splitlines()[0]}") from None
    except Exception as error:  # the library validates configs with an error class of its own
        if "Validation" not in type(error).__name__:
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{folder / 'config.json'} cannot be used: {reason[:300]}") from None


def depth_of(folder: Path) -> int:
    """Number of decoder layers that config.json names.

    Raises:
        ConfigError: no readable config.json, or it names none.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        depth = content.get("text_config", content).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"{path} is missing or damaged; fetch the model again.") from None
    if not isinstance(depth, int):
        raise ConfigError(f"{path} does not say how many layers there are (num_hidden_layers={depth!r}).")
    return depth


def is_multimodal(folder: Path) -> bool:
    """Whether the folder holds a decoder as one tower of several."""
    return "text_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def shard_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a Hugging Face folder.

    Raises:
        ConfigError: no weights, a damaged index, or a shard that the index names and the folder lacks.
    """
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / Path(file).name for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index} is damaged; fetch the model again.") from None
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise ConfigError(f"shard {file} is missing; fetch the model again.")
        return files
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as handle:
                return dict.fromkeys(handle.keys(), single)
        except Exception as error:
            raise ConfigError(f"{single} cannot be read ({error}); fetch the model again.") from None
    raise ConfigError(f"{folder} holds no safetensors weights (model.safetensors or its index).")


def decoder_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's decoder under the causal LM's name.

    Raises:
        ConfigError: as `shard_files` and `family_of`; a multimodal folder without a text tower that is known.
    """
    files = shard_files(folder)
    if not is_multimodal(folder):
        return {name: Stored(file, name) for name, file in files.items()}
    family = family_of(folder)
    tensors = {}
    for name, file in files.items():
        prefix = next(((old, new) for old, new in family.towers if name.startswith(old)), None)
        if prefix is not None:
            tensors[prefix[1] + name.removeprefix(prefix[0])] = Stored(file, name)
    if not tensors:
        raise ConfigError(
            f"no tensor in {folder} has a name of a text tower ({', '.join(old for old, _ in family.towers)}); "
            f"name its prefix in families/ ({family.name})."
        )
    return tensors


def parameter_count(folder: Path) -> int:
    """Parameters of the folder's decoder, from the headers of its files alone.

    Raises:
        ConfigError: a file that cannot be read.
    """
    from safetensors import safe_open

    by_file: dict[Path, list[str]] = {}
    for stored in decoder_tensors(folder).values():
        by_file.setdefault(stored.file, []).append(stored.name)
    total = 0
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as handle:
                total += sum(math.prod(handle.get_slice(name).get_shape()) for name in names)
        except Exception as error:
            raise ConfigError(f"shard {file} cannot be read ({error}); fetch the model again.") from None
    return total


def target_hash(folder: Path) -> str:
    """Hash of config and of names, shapes and file sizes of the weights: tells one model from another in no time."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(shard_files(folder).values())):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 16))
            handle.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:32]


def load_decoder(folder: Path, *, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """The folder's causal LM, also out of a multimodal folder; straight into partitions where ZeRO-3 is active.

    attention: an implementation that the family does not have is replaced by its first one.

    Raises:
        ConfigError: as `load_complete`.
    """
    from transformers import AutoModelForCausalLM

    family = family_of(folder)
    if attention not in family.attentions:
        logger.info("%s has no %s attention; %s is used", family.name, attention, family.attentions[0])
        attention = family.attentions[0]
    more: dict[str, Any] = {}
    if is_multimodal(folder):
        renamed = {f"^{re.escape(old)}": new for old, new in family.towers}
        more = {"config": text_config(folder), "key_mapping": renamed}
    return load_complete(
        AutoModelForCausalLM.from_pretrained, folder, dtype=dtype, attn_implementation=attention, **more
    )


def load_complete(load: Any, folder: Path, **arguments: Any) -> nn.Module:
    """`from_pretrained` that refuses weights with missing or mismatched tensors instead of leaving them random.

    Raises:
        ConfigError: a folder that cannot be loaded, or weights that do not fill the model.
    """
    from safetensors import SafetensorError

    try:
        model, info = load(str(folder), output_loading_info=True, **arguments)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"the model in {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"the weights in {folder} have other shapes than its config.json says; fetch it again."
        ) from None
    missing = sorted(info.get("missing_keys", ())) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise ConfigError(
            f"the weights in {folder} do not fill the model: {missing[0]} and {len(missing) - 1} more are missing."
        )
    return cast("nn.Module", model)
