"""Settings that may differ when a run is resumed, and the fingerprint that detects a change of any other.

A checkpoint stores the fingerprint of its run. Resuming with another one is an error, because the run would continue
with other numbers than it began with.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

MAY_DIFFER = (
    "out",
    "log_every",
    "checkpoint",
    "preview",
    "validation.sources",
    "validation.every_steps",
    "validation.limit",
    "profile",
    "translate.states",
    "data.workers",
    "data.prepared",
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
    "deterministic",
    "trust_remote_code",
)
"""Dotted keys of a run that change its numbers by no more than rounding, so that they may differ on a resume.

A key that is added to `RunConfig` belongs either here or, if it changes numbers, in OLD_BEHAVIOUR.
"""

OLD_BEHAVIOUR: dict[str, Any] = {
    "frozen_weights": "native",
    "losses": {},
    "adapter.kind": "mlp",
    "adapter.factor": None,
    "encoder.image_size": None,
    "data.shuffle": False,
    "data.special_tokens": [],
    "data.image_background": "white",
    "data.sources.*.allowed_roots": [],
    "data.sources.*.subset": None,
    "data.sources.*.split": None,
    "data.sources.*.revision": None,
    "data.sources.*.columns": {},
    "data.sources.*.weight": None,
    "data.sources.*.repeat": 1.0,
    "data.sources.*.count": None,
    "data.sources.*.stream": False,
    "data.caption_prompt": "Describe the image.",
    "validation.share": 0.0,
    "validation": {},
    "distill.every": 1,
    "distill.positions": 1.0,
    "align.weight": 0.0,
    "align.scale": 20.0,
    "align.spread": 0.1,
    "align.words": 4096,
    "align.samples": 20000,
    "align": {},
    "translate.hidden": 1.0,
    "translate.logits": 1.0,
    "translate.next_token": 0.0,
    "translate.positions": 1.0,
    "translate.tokens": None,
    "translate.sample": 0,
    "translate.held_out": 0.05,
    "translate.lookups": None,
    "translate.store": "auto",
    "translate": {},
}
"""Dotted keys that old checkpoints lack, with the value that stands for what runs did before the key existed.

`*` stands for each item of a list.
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
        for section, key in _entries(content, name.split(".")):
            if section.get(key) == value:
                section.pop(key, None)  # None may stand for a key that is not there
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _entries(content: Any, parts: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the section and the key of every entry with a dotted name, in which `*` stands for each item of a list.

    An empty section, or one that a configuration of an older version lacks, yields nothing.
    """
    first, *others = parts
    if not isinstance(content, dict | list):
        return
    if isinstance(content, dict) and not others:
        yield content, first
        return
    for inner in content if isinstance(content, list) else [content.get(first)]:
        yield from _entries(inner, others)


def _remove(content: dict[str, Any], name: str) -> None:
    """Removes the entry with a dotted name."""
    for section, key in _entries(content, name.split(".")):
        section.pop(key, None)
