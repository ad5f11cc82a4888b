"""Settings that may differ when a run is resumed, and the fingerprint that detects a change of any other.

A checkpoint stores the fingerprint of its run. Resuming with another one is an error, because the run would continue
with other numbers than it began with.
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

MAY_DIFFER = (
    "out",
    "log_every",
    "checkpoint",
    "preview",
    "data.workers",
    "data.bad_samples",
    "data.max_bad_samples",
    "data.packing",
    "zero",
    "nvme_path",
    "micro_batch",
    "activation_checkpointing",
    "short_backward",
    "kernels",
    "compile",
)
"""Dotted keys of a run that change its numbers by no more than rounding, so that they may differ on a resume.

A key that is added to `RunConfig` belongs either here or, if it changes numbers, in OLD_BEHAVIOUR.
"""

OLD_BEHAVIOUR: dict[str, Any] = {"frozen_weights": "native", "losses": {}}
"""Dotted keys that old checkpoints lack, with the value that stands for what runs did before the key existed.

A run with this value has the fingerprint that it had before, so that old runs can still be resumed.
"""


def fingerprint(content: dict[str, Any]) -> str:
    """Returns a hash of everything in a run's configuration that changes its numbers by more than rounding.

    `content` is the configuration as plain JSON values.
    """
    content = copy.deepcopy(content)
    for name in MAY_DIFFER:
        _remove(content, name)
    for name, value in OLD_BEHAVIOUR.items():
        if _value(content, name) == value:
            _remove(content, name)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _value(content: dict[str, Any], name: str) -> Any:
    """Returns the entry with a dotted name; None if a section on the way to it is empty."""
    value: Any = content
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _remove(content: dict[str, Any], name: str) -> None:
    """Removes the entry with a dotted name, unless a section on the way to it is empty."""
    *sections, key = name.split(".")
    section = _value(content, ".".join(sections)) if sections else content
    if isinstance(section, dict):
        del section[key]
