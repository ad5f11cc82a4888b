"""Reads files of `torch.save` without running code that they name."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zero_ds.runtime.errors import ConfigError


def read_torch_file(path: Path, stand_ins: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """Returns the content of a file of `torch.save`; its tensors stay in the file (mmap) until they are used.

    stand_ins: full name of a class that the file may name -> function that is called in its place. The class itself is
    never looked up, so no code of the library that wrote the file runs, whatever its version.

    Raises:
        ConfigError: the file does not exist, is not a complete zip archive of `torch.save`, or names other code.
    """
    import torch

    if not path.is_file():
        raise ConfigError(f"file {path} does not exist.")
    allowed: list[Any] = [(stand_in, name) for name, stand_in in (stand_ins or {}).items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}" if named else "it does more than name tensors"
        raise ConfigError(
            f"{path} is refused: {what}, which reading it would call, and code in files is never run here; get a file "
            "that holds only tensors."
        ) from None
    except Exception as error:  # torch raises many types for a file that is damaged or of another kind
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ConfigError(
            f"{path} is not a file of torch.save, is of a format older than its zip archives, or is damaged ({reason})."
        ) from None
