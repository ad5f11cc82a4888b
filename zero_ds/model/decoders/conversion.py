"""How tensors of published files become those of a class: transformers renames some, and fuses experts into one tensor.

A file of a mixture of experts holds a tensor for each expert, and its class one tensor for all of them. Surrogates and
checks work with the names of the files, after simple renames (`Conversion.key`); layers that run one by one, and
exports whose code builds the class itself, need the class's tensors (`Conversion.groups`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn


@dataclass(frozen=True)
class Group:
    """Tensors of the files that become some tensors of the class together; most groups are a tensor and itself."""

    sources: tuple[str, ...]
    """Keys of the tensors in the files, in the order in which they are put together."""
    targets: dict[str, tuple[int, ...]]
    """Shape of every tensor of the class that they become, by name."""


class Conversion:
    """The changes that transformers makes when it loads files of a class."""

    def __init__(self, model: nn.Module) -> None:
        """model: the causal LM, which may be on the meta device."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model = cast(Any, model)
        mapping = get_model_conversion_mapping(self.model)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.state: dict[str, torch.Tensor] = dict(model.state_dict())

    @property
    def plain(self) -> bool:
        """True if every tensor of a file is one of the class."""
        return not self.converters

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """Returns the class's name of a tensor in a file, and the pattern of its converter, or None without one."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.state)
        if renamed not in self.state:
            unchanged, _ = rename_source_key(name, [], [], prefix, self.state)
            if unchanged in self.state:
                return unchanged, None
        return renamed, pattern

    def key(self, name: str) -> str:
        """Returns the key of a tensor in a file: its name in the class or, if it is fused with others, its own name."""
        from transformers.core_model_loading import apply_renamings

        renamed, pattern = self._renamed(name)
        if pattern is None:
            return renamed
        own, prefix = apply_renamings(name, self.renamings), f"{self.model.base_model_prefix}."
        return own if own.startswith(prefix) or not renamed.startswith(prefix) else prefix + own

    def published(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor that the files hold where transformers writes them, by key."""
        if self.plain:
            return {name: tuple(value.shape) for name, value in self.state.items()}
        from transformers.core_model_loading import revert_weight_conversion

        meta: Any = {name: torch.empty_like(value, device="meta") for name, value in self.state.items()}
        return {
            self.key(name): tuple(value.shape) for name, value in revert_weight_conversion(self.model, meta).items()
        }

    def reread(self) -> dict[str, torch.Tensor]:
        """Returns the class's tensors by name, written as transformers writes files and read as this package does.

        Equal to `state` where files and class agree. The model must have values.
        """
        from transformers.core_model_loading import revert_weight_conversion

        written = revert_weight_conversion(self.model, dict(self.state))
        keyed = {self.key(name): value for name, value in written.items()}
        assert len(keyed) == len(written), "two tensors of a file get one name"
        made: dict[str, torch.Tensor] = {}
        for group in self.groups({name: tuple(value.shape) for name, value in keyed.items()}):
            made |= self.fuse(group, keyed)
        return made

    def groups(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
        """Returns which tensors of files become which of the class.

        shapes: shape of every tensor of the files, by key.
        """
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, list[str]] = {}
        fused: set[str] = set()
        for name in sorted(shapes, key=dot_natural_key):
            renamed, pattern = self._renamed(name)
            found.setdefault(renamed, []).append(name)
            if pattern is not None:
                fused.add(renamed)
        groups = []
        for first, names in found.items():
            if first not in fused:
                groups.append(Group(tuple(names), {first: shapes[names[0]]}))
                continue
            empty = {name: torch.empty(shapes[name], device="meta") for name in names}
            made = self.fuse(Group(tuple(names), {first: ()}), empty)
            groups.append(Group(tuple(names), {name: tuple(value.shape) for name, value in made.items()}))
        return groups

    def fuse(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the class's tensors of a group, by name, from those of the files, by key."""
        first = next(iter(group.targets))
        mapping: Any = None
        for key in group.sources:
            _, pattern = self._renamed(key)
            if pattern is None:
                return {first: tensors[key]}
            if mapping is None:
                mapping = copy.deepcopy(next(one for one in self.converters if pattern in one.source_patterns))
            mapping.add_tensor(first, key, pattern, tensors[key])
        made = mapping.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
