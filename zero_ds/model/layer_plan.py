"""LayerPlan: which layers of its target a surrogate keeps. All arithmetic on layer numbers is here.

Example: T(16,26) of a target with 28 layers (section 1.2 and Figure 4 of the paper):

    target       0 1 ... 15   16 17 ... 26   27        early layers 0..15, replaced 16..26, kept 27
    surrogate    0 1 ... 15   16             17        one translator, at 16, which starts as a copy of layer 16
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from zero_ds.runtime.errors import ConfigError


@dataclass(frozen=True, order=True)
class Replaced:
    """A range of the target's layers, first and last included, that `translators` trainable layers replace."""

    first: int
    last: int
    translators: int = 1

    @classmethod
    def parse(cls, text: str, translators: int = 1) -> Replaced:
        """Reads a range such as `40:78`.

        Raises:
            ConfigError: the text is not of the form first:last.
        """
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text.strip())
        if not match:
            raise ConfigError(f"'{text}' is not a layer range; write first:last, both included, e.g. 40:78.")
        return cls(int(match[1]), int(match[2]), translators)

    @property
    def sources(self) -> list[int]:
        """Target layers that the translators start as copies of: the first layer of each equal part of the range."""
        span = self.last - self.first + 1
        return [self.first + span * part // self.translators for part in range(self.translators)]


@dataclass(frozen=True)
class LayerPlan:
    """The layers of a surrogate in terms of those of its target.

    Raises:
        ConfigError: no range is given, or a range is outside the target, overlaps another, or has fewer layers than
            translators.
    """

    depth: int
    """Number of layers of the target."""
    replaced: tuple[Replaced, ...]
    """Replaced ranges, in ascending order."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "replaced", tuple(sorted(self.replaced)))
        for part in self.replaced:
            if not 0 <= part.first <= part.last < self.depth:
                raise ConfigError(
                    f"layers {part.first}:{part.last} are not inside the model's layers 0:{self.depth - 1}; "
                    "choose both from them."
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
        """For every layer of the surrogate: the target layer it is copied from, and whether it is a translator."""
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
        """Number of layers of the surrogate."""
        return len(self.layers)

    @property
    def translators(self) -> list[int]:
        """Layer numbers of the translators in the surrogate."""
        return [number for number, (_, translator) in enumerate(self.layers) if translator]

    @property
    def kept(self) -> dict[int, int]:
        """Target layer that each kept layer of the surrogate equals, by its number in the surrogate."""
        return {number: source for number, (source, translator) in enumerate(self.layers) if not translator}

    @property
    def dropped(self) -> list[int]:
        """Layers of the target that the translators replace."""
        return [layer for part in self.replaced for layer in range(part.first, part.last + 1)]

    @property
    def first_replaced(self) -> int:
        """First layer of the target that is replaced, which is also the number of layers before the translators."""
        return self.replaced[0].first

    @property
    def early(self) -> range:
        """Layers before the first translator, which have the same numbers in surrogate and target."""
        return range(self.first_replaced)

    @property
    def late(self) -> range:
        """Layers of the surrogate from the first translator on."""
        return range(self.first_replaced, self.surrogate_depth)

    @property
    def target_late(self) -> range:
        """Layers of the target from the first replaced one on."""
        return range(self.first_replaced, self.depth)

    def replaced_by(self, translator: int) -> tuple[int, int]:
        """Returns the target layers, first and last, that translator number `translator` (0, 1, ...) replaces."""
        spans = []
        for part in self.replaced:
            starts = [*part.sources, part.last + 1]
            spans += [(first, after - 1) for first, after in pairwise(starts)]
        return spans[translator]

    @property
    def sources(self) -> list[int]:
        """Target layer that each layer of the surrogate is copied from."""
        return [source for source, _ in self.layers]

    def __str__(self) -> str:
        """Returns the paper's name of the surrogate, e.g. `T(16,26)`, or `T(1,3)x2+T(5,6)` with several translators."""
        names = []
        for part in self.replaced:
            several = f"x{part.translators}" if part.translators > 1 else ""
            names.append(f"T({part.first},{part.last}){several}")
        return "+".join(names)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as it is stored in surrogate.json and in manifests."""
        return {"depth": self.depth, "replaced": [[p.first, p.last, p.translators] for p in self.replaced]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LayerPlan:
        """Reads what `to_json` returned.

        Raises:
            ConfigError: the content is not a plan.
        """
        try:
            return cls(content["depth"], tuple(Replaced(*part) for part in content["replaced"]))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"a layer plan is damaged ({type(error).__name__}: {error}).") from None


TRANSLATORS = ("copy", "dense")
"""Kinds of translators: a copy of the target's layer, or its attention with a dense network in place of its experts."""


def dense_width(translator: str, width: int | None) -> int | None:
    """Returns the units of the dense network of every translator, as two options say; None for copies of layers.

    Raises:
        ConfigError: an unknown kind of translator, or a width where none belongs or none where one does.
    """
    if translator not in TRANSLATORS:
        raise ConfigError(f"--translator {translator} is not known; choose {' or '.join(TRANSLATORS)}.")
    if (translator == "dense") != (width is not None):
        raise ConfigError("--translator dense and --translator-width N belong together; give both or neither.")
    return width


@dataclass(frozen=True)
class SurrogateInfo:
    """Content of surrogate.json."""

    family: str
    """Name of the decoder family."""
    target: str
    """Folder of the target at the time of the cut."""
    target_hash: str
    plan: LayerPlan
    kept_parameters: int
    """Number of parameters of the surrogate."""
    target_parameters: int
    """Number of parameters of the target."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Hashes of the parts that vision encoder and translators rely on: `tokenizer`, `template`, `embeddings`."""
    dense_width: int | None = None
    """Units of the dense network of every translator; None for translators that are copies of layers."""

    def to_json(self) -> dict[str, Any]:
        """Returns the content of surrogate.json."""
        content = {**self.__dict__, "plan": self.plan.to_json()}
        if self.dense_width is None:
            del content["dense_width"]
        return content


def read_surrogate(folder: str | Path) -> SurrogateInfo:
    """Reads surrogate.json from a folder.

    Raises:
        ConfigError: the folder is not a surrogate, or the file is damaged.
    """
    path = Path(folder) / "surrogate.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is not a surrogate: it holds no surrogate.json; build one with `zero-ds surrogate`."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        info = SurrogateInfo(**{**content, "plan": LayerPlan.from_json(content["plan"])})
        for name in ("family", "target", "target_hash"):
            if not isinstance(content[name], str):
                raise TypeError(f"{name} is not a text")
        for name in ("kept_parameters", "target_parameters"):
            if not isinstance(content[name], int):
                raise TypeError(f"{name} is not a whole number")
        return info
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); build the surrogate again.") from None
