"""Decoders whose repository brings code of its own (`auto_map` in config.json), which runs only if the user says so.

Such code can do anything that the user can. With the permission (`trust.allow_code`), the classes are registered with
transformers, so that every other module finds them as it finds the library's. Types that transformers knows are
computed by the library, whatever code their repository brings.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path
from typing import Any, cast

from zero_ds.runtime.errors import ConfigError, one_line
from zero_ds.runtime.trust import code_is_allowed

logger = logging.getLogger(__name__)

_KINDS = ("AutoConfig", "AutoModelForCausalLM")
_PACKAGE = "transformers_modules."
"""Package that transformers makes of the code of repositories."""


def load_config(folder: Path, raw: dict[str, Any]) -> Any:
    """Loads the config of a folder with the folder's own code, and registers its classes with transformers.

    raw: content of config.json.

    Raises:
        ConfigError: the user has not permitted it, the code is not in the folder, or it does not run.
    """
    model_type = raw["model_type"]
    if not code_is_allowed():
        raise ConfigError(
            f"the model in {folder} ({model_type}) needs code of its own, which may do anything that you may do here "
            "and is not run unless you say so: read its .py files, then give --trust-remote-code (in a recipe: "
            "trust_remote_code: true), or use a version of transformers that knows this type."
        )
    named = raw["auto_map"] if isinstance(raw["auto_map"], dict) else {}
    for kind in _KINDS:
        module, dot, _ = str(named.get(kind, "")).partition(".")
        if not dot or "--" in module or not (folder / f"{module}.py").is_file():
            raise ConfigError(
                f"auto_map in {folder}/config.json names {named.get(kind)!r} as its {kind}, which is not in that "
                "folder; only code next to the weights is run."
            )
    try:
        return _with_classes(folder, named)
    except Exception as error:  # strangers' code raises anything
        raise ConfigError(f"the code in {folder} does not run here ({one_line(error)}).") from None


def _with_classes(folder: Path, named: dict[str, str]) -> Any:
    import torch
    from filelock import FileLock
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.utils.hub import HF_MODULES_CACHE

    lock = Path(HF_MODULES_CACHE) / ".zero_ds.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # transformers copies the code there, and all ranks of a machine get here at once
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        causal: Any = get_class_from_dynamic_module(named["AutoModelForCausalLM"], str(folder))
    logger.warning("the code in %s is run (%s, %s)", folder, type(config).__name__, causal.__name__)
    with torch.device("meta"):
        backbone = type(causal(config).base_model)
    for auto, kind in ((AutoModelForCausalLM, causal), (AutoModel, backbone)):
        # the public `register` refuses a class of the library, as the backbone may be
        cast(Any, auto)._model_mapping.register(type(config), kind, exist_ok=True)
    return config


def is_own(kind: type) -> bool:
    """Returns whether a class comes from the code of a repository."""
    return kind.__module__.startswith(_PACKAGE)


def digest(kind: type) -> str:
    """Returns a hash of the code that a class comes from, with that next to it; empty for a class of the library."""
    if not is_own(kind):
        return ""
    folder = Path(str(sys.modules[kind.__module__].__file__)).parent
    content = b"".join(file.name.encode() + file.read_bytes() for file in sorted(folder.glob("*.py")))
    return hashlib.sha256(content).hexdigest()
