"""Model folders: a local path as it is, a hub id fetched into the library's cache."""

from __future__ import annotations

import re
from pathlib import Path

from zero_ds.config import ConfigError


def local_folder(name: str) -> Path:
    """The folder of a model given by path or hub id.

    Raises:
        ConfigError: no such folder, and not an id that can be fetched (no network, unknown, or not permitted).
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder.resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(("./", "../")):
        raise ConfigError(f"there is no model folder {name}.")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
        )
    except Exception as error:  # the hub client raises many kinds; each means that the model is not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"'{name}' is no local folder and could not be fetched from the hub: {reason[:200]} "
            "Give a local folder, or check the network, the id and your access token."
        ) from None
