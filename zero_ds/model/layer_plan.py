"""Which layers of its target a surrogate keeps (LayerPlan). All arithmetic on layer numbers is here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from zero_ds.runtime.errors import ConfigError


@dataclass(frozen=True, order=True)
class Replaced:
    """Layers first..last (inclusive) of the target, replaced by `translators` trainable layers."""

    first: int
    last: int
    translators: int = 1

    @classmethod
    def parse(cls, text: str, translators: int = 1) -> Replaced:
        """`40:78` -> Replaced(40, 78).

        Raises:
            ConfigError: anything else.
        """
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text.strip())
        if not match:
            raise ConfigError(f"'{text}' is no layer range; write first:last, both replaced, e.g. 40:78.")
        return cls(int(match[1]), int(match[2]), translators)

    @property
    def sources(self) -> list[int]:
        """Target layers from which the translators are initialised: the shallowest of each equal part of the range."""
        span = self.last - self.first + 1
        return [self.first + span * part // self.translators for part in range(self.translators)]


@dataclass(frozen=True)
class LayerPlan:
    """How the layers of a surrogate follow from those of its target of `depth` layers."""

    depth: int
    replaced: tuple[Replaced, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "replaced", tuple(sorted(self.replaced)))
        for part in self.replaced:
            if not 0 <= part.first <= part.last < self.depth:
                raise ConfigError(
                    f"layers {part.first}:{part.last} are not inside the model's layers 0:{self.depth - 1}; "
                    "choose both in it."
                )
            if not 1 <= part.translators <= part.last - part.first + 1:
                raise ConfigError(
                    f"{part.translators} translators cannot replace the {part.last - part.first + 1} layers "
                    f"{part.first}:{part.last}; use fewer."
                )
        for left, right in pairwise(self.replaced):
            if right.first <= left.last:
                raise ConfigError(
                    f"the ranges {left.first}:{left.last} and {right.first}:{right.last} overlap; separate them."
                )
        if not self.replaced:
            raise ConfigError("no layers are replaced; give at least one range, e.g. 40:78.")

    @property
    def layers(self) -> list[tuple[int, bool]]:
        """For every layer of the surrogate: the target's layer it is made from, and whether it is a translator."""
        starts = {part.first: part for part in self.replaced}
        result: list[tuple[int, bool]] = []
        layer = 0
        while layer < self.depth:
            if layer in starts:
                result += [(source, True) for source in starts[layer].sources]
                layer = starts[layer].last + 1
            else:
                result.append((layer, False))
                layer += 1
        return result

    @property
    def surrogate_depth(self) -> int:
        return len(self.layers)

    @property
    def translators(self) -> list[int]:
        """Layer numbers, in the surrogate, of the translators."""
        return [number for number, (_, translator) in enumerate(self.layers) if translator]

    @property
    def kept(self) -> dict[int, int]:
        """Layer number in the surrogate -> the target's layer it equals."""
        return {number: source for number, (source, translator) in enumerate(self.layers) if not translator}

    @property
    def dropped(self) -> list[int]:
        """Layers of the target that the translators replace."""
        return [layer for part in self.replaced for layer in range(part.first, part.last + 1)]

    def replaced_by(self, translator: int) -> tuple[int, int]:
        """Target layers (first, last) whose work translator number `translator` (0, 1, ...) does."""
        spans = []
        for part in self.replaced:
            starts = [*part.sources, part.last + 1]
            spans += [(first, after - 1) for first, after in pairwise(starts)]
        return spans[translator]

    def cut_(self, config: Any, per_layer: Iterable[str]) -> None:
        """Turns a target's text config into its surrogate's: number of layers, and lists with one entry a layer.

        per_layer: names of those lists (`Family.per_layer_config`).
        """
        config.num_hidden_layers = self.surrogate_depth
        for key in per_layer:
            values = getattr(config, key, None)
            if isinstance(values, list):
                setattr(config, key, self.cut_list(values))

    def cut_list(self, values: Sequence[Any]) -> list[Any]:
        """Returns the surrogate's list, one entry a layer, from the target's."""
        return [values[source] for source, _ in self.layers]

    def __str__(self) -> str:
        return "+".join(
            f"T({part.first},{part.last})" + (f"x{part.translators}" if part.translators > 1 else "")
            for part in self.replaced
        )

    def to_json(self) -> dict[str, Any]:
        return {"depth": self.depth, "replaced": [[p.first, p.last, p.translators] for p in self.replaced]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LayerPlan:
        """Raises ConfigError where it is none."""
        try:
            return cls(content["depth"], tuple(Replaced(*part) for part in content["replaced"]))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"a layer plan is damaged ({type(error).__name__}: {error}).") from None


@dataclass(frozen=True)
class SurrogateInfo:
    """Content of surrogate.json."""

    family: str
    target: str
    target_hash: str
    plan: LayerPlan
    kept_parameters: int
    target_parameters: int
    hashes: dict[str, str] = field(default_factory=dict)
    """Of what encoder and translators rely on: `tokenizer`, `template`, `embeddings`."""

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": self.plan.to_json()}


def read_surrogate(folder: str | Path) -> SurrogateInfo:
    """Reads surrogate.json.

    Raises:
        ConfigError: the folder is no surrogate, or the file is damaged.
    """
    path = Path(folder) / "surrogate.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is no surrogate: it holds no surrogate.json; make one with `zero-ds surrogate`.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        info = SurrogateInfo(**{**content, "plan": LayerPlan.from_json(content["plan"])})
        assert all(isinstance(text, str) for text in (info.family, info.target, info.target_hash))
        assert all(isinstance(count, int) for count in (info.kept_parameters, info.target_parameters))
        return info
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"{path} is damaged ({error}); build the surrogate again.") from None
