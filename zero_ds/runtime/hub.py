"""Model folders: a local path is used as it is, a hub id is downloaded into the hub library's cache."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import home_path, new_folder
from zero_ds.runtime.torch_files import read_torch_file
from zero_ds.runtime.trust import code_is_allowed

logger = logging.getLogger(__name__)

PICKLED = "pytorch_model.bin"
"""Weights file of older repositories, which is a pickle."""


def is_hub_id(name: str) -> bool:
    """Returns whether a name has the form of a model's id on the hub, `owner/model`."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(("./", "../"))


def cached_folder(name: str) -> Path | None:
    """Returns the folder in the hub's cache of a model that has been downloaded, by its id; None if it has not been."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def local_folder(name: str) -> Path:
    """Returns the folder of a model that is given by path or hub id, and downloads it if necessary.

    Raises:
        ConfigError: the folder does not exist, and no model of that id can be downloaded (no network, unknown, not
            permitted).
    """
    folder = home_path(name)
    if name and folder.is_dir():
        return folder.resolve()
    if not is_hub_id(name):
        raise ConfigError(f"model folder {name} does not exist.")
    import huggingface_hub

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    patterns += ["*.py"] if code_is_allowed() else []
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*patterns, PICKLED]))
    except Exception as error:  # the hub client raises many types; each means that the model cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"'{name}' is not a local folder and could not be fetched from the hub: {reason[:200].rstrip('. ')}; "
            "give a local folder, or check the network, the id and your access token."
        ) from None
    if (folder / PICKLED).is_file() and not any(folder.glob("*.safetensors")):
        return _with_safetensors(folder, name)
    return folder


def _with_safetensors(folder: Path, name: str) -> Path:
    """Converts the pickled weights of an older repository into safetensors, once, and returns the new folder.

    The pickle is read without running code that it names.

    Raises:
        ConfigError: the file is damaged, or names code.
    """
    from filelock import FileLock
    from huggingface_hub.constants import HF_HOME
    from safetensors.torch import save_file

    out = Path(HF_HOME) / "zero_ds" / f"{name.replace('/', '--')}-{folder.name[:12]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(out.name + ".lock")):  # all ranks of a machine get here at the same time
        if out.is_dir():
            return out
        logger.info("%s holds only %s; its tensors are written as safetensors into %s", name, PICKLED, out)
        content = read_torch_file(folder / PICKLED)
        if not isinstance(content, dict) or not all(hasattr(value, "contiguous") for value in content.values()):
            raise ConfigError(f"{PICKLED} of {name} holds more than tensors by name; give a folder with safetensors.")
        tensors = {key: value.contiguous() for key, value in content.items()}
        with new_folder(out) as written:
            save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
            for file in folder.iterdir():
                if file.suffix in (".json", ".jinja", ".model"):
                    (written / file.name).write_bytes(file.read_bytes())
    return out
