"""Finds the config.json of a model, without its weights.

A model's config.json is looked for in its folder, then in the hub's cache, then among the architectures that come with
zero-ds (`architectures/`: the paper's models, as published). Only then is it downloaded from the hub, and nothing else
is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError

SHIPPED = Path(__file__).parent / "architectures"
"""Folder with the config.json of every model whose architecture comes with zero-ds."""


@dataclass(frozen=True)
class ConfigSource:
    """A folder with the config.json of a model."""

    folder: Path
    origin: str
    """Origin of the folder, as the output names it."""


def find_config(name: str) -> ConfigSource:
    """Finds the config.json of a model given by path or hub id.

    Raises:
        ConfigError: there is none, here or on the hub.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return ConfigSource(folder.resolve(), "from its folder")
    import huggingface_hub

    hub_id = bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not folder.exists()
    if hub_id and isinstance(cached := huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return ConfigSource(Path(cached).parent, "from the hub's cache")
    for shipped in SHIPPED.iterdir():
        if shipped.name.lower() == folder.name.lower():
            return ConfigSource(shipped, "the architecture that comes with zero-ds, since the model is not at hand")
    known = ", ".join(sorted(path.name for path in SHIPPED.iterdir()))
    advice = f"give a folder that holds it, or a model whose architecture comes with zero-ds ({known})"
    if not hub_id:
        raise ConfigError(f"{name} holds no config.json; {advice}.")
    try:
        return ConfigSource(Path(huggingface_hub.hf_hub_download(name, "config.json")).parent, "from the hub")
    except Exception as error:  # the hub client raises many kinds; each means that the file cannot be had
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(f"config.json of '{name}' cannot be downloaded from the hub ({reason}); {advice}.") from None


def config_texts(config: RunConfig) -> list[str]:
    """Returns everything that the architectures of a run follow from, besides its configuration.

    These are the config.json of target and vision encoder, where each was found, and the surrogate.json of a surrogate
    that is built.

    Raises:
        ConfigError: as `find_config`.
    """
    names = [config.target, *([config.encoder.path] if config.encoder else [])]
    texts = []
    for name in names:
        found = find_config(name)
        folder = found.folder.name if found.folder.parent == SHIPPED else str(found.folder)
        texts += [found.origin, folder, (found.folder / "config.json").read_text(encoding="utf-8")]
    if config.surrogate is not None:
        plan = Path(config.surrogate).expanduser() / "surrogate.json"
        texts.append(plan.read_text(encoding="utf-8") if plan.is_file() else "")
    return texts
