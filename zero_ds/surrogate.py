"""Surrogates T(k, e): which layers they keep (LayerPlan), and the writer that streams them out of the target.

Source: section 1.2 and Figure 4 of the paper. All arithmetic on layer numbers in this project is in `LayerPlan`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from zero_ds.config import ConfigError
from zero_ds.families import family_of
from zero_ds.files import new_folder

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30
COPIED = re.compile(
    r"(tokenizer.*|special_tokens_map|generation_config|chat_template|vocab|merges|added_tokens)\.(json|jinja|txt|model)"
)


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
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
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

    def __str__(self) -> str:
        return "+".join(
            f"T({part.first},{part.last})" + (f"x{part.translators}" if part.translators > 1 else "")
            for part in self.replaced
        )

    def to_json(self) -> dict[str, Any]:
        return {"depth": self.depth, "replaced": [[p.first, p.last, p.translators] for p in self.replaced]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LayerPlan:
        return cls(content["depth"], tuple(Replaced(*part) for part in content["replaced"]))


@dataclass(frozen=True)
class SurrogateInfo:
    """Content of surrogate.json."""

    family: str
    target: str
    target_hash: str
    plan: LayerPlan
    kept_parameters: int
    target_parameters: int

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
        return SurrogateInfo(**{**content, "plan": LayerPlan.from_json(content["plan"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); build the surrogate again.") from None


def shard_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a Hugging Face folder.

    Raises:
        ConfigError: no weights, a damaged index, or a shard that the index names and the folder lacks.
    """
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / Path(file).name for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index} is damaged; fetch the model again.") from None
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise ConfigError(f"shard {file} is missing; fetch the model again.")
        return files
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as handle:
                return dict.fromkeys(handle.keys(), single)
        except Exception as error:
            raise ConfigError(f"{single} cannot be read ({error}); fetch the model again.") from None
    raise ConfigError(f"{folder} holds no safetensors weights (model.safetensors or its index).")


def target_hash(folder: Path) -> str:
    """Hash of config and of names, shapes and file sizes of the weights: tells one model from another in no time."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(shard_files(folder).values())):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 16))
            handle.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:32]


def depth_of(folder: Path) -> int:
    """Number of decoder layers that a Hugging Face folder's config.json names.

    Raises:
        ConfigError: no readable config.json, or it names none.
    """
    path = folder / "config.json"
    try:
        depth = json.loads(path.read_text(encoding="utf-8")).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"{path} is missing or damaged; fetch the model again.") from None
    if not isinstance(depth, int):
        raise ConfigError(f"{path} does not say how many layers there are (num_hidden_layers={depth!r}).")
    return depth


def build_surrogate(target: Path, replaced: Iterable[Replaced], out: Path) -> SurrogateInfo:
    """Writes the surrogate of `target` to the new folder `out`: an ordinary Hugging Face folder plus surrogate.json.

    Tensors are read and written shard by shard; neither model is ever held in memory.

    Raises:
        ConfigError: ranges that do not fit, an existing `out`, missing or damaged weights, too little disk space.
    """
    family = family_of(target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    plan = LayerPlan(depth_of(target), tuple(replaced))
    files = shard_files(target)
    names = list(_renamed(files, family.layer_prefix, plan))
    with new_folder(out, need=sum(file.stat().st_size for file in set(files.values()))) as folder:
        kept, total = _write_shards(files, names, folder)
        config["num_hidden_layers"] = plan.surrogate_depth
        for key in family.per_layer_config:
            if isinstance(config.get(key), list):
                config[key] = [config[key][source] for source, _ in plan.layers]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in target.iterdir():
            if COPIED.fullmatch(file.name):
                shutil.copyfile(file, folder / file.name)
        info = SurrogateInfo(family.name, str(target), target_hash(target), plan, kept, total)
        (folder / "surrogate.json").write_text(json.dumps(info.to_json(), indent=2) + "\n", encoding="utf-8")
    return info


def _renamed(files: dict[str, Path], prefix: str, plan: LayerPlan) -> Iterator[tuple[str, str]]:
    """(name in the target, name in the surrogate) of all the surrogate's tensors, in the target's file order."""
    made_from: dict[int, list[int]] = {}
    for number, (source, _) in enumerate(plan.layers):
        made_from.setdefault(source, []).append(number)
    pattern = re.compile(re.escape(prefix) + r"(\d+)(\..+)")
    seen: set[int] = set()
    for name, _ in sorted(files.items(), key=lambda item: (item[1], item[0])):
        match = pattern.fullmatch(name)
        if not match:
            yield name, name
            continue
        seen.add(int(match[1]))
        for number in made_from.get(int(match[1]), ()):
            yield name, f"{prefix}{number}{match[2]}"
    missing = set(range(plan.depth)) - seen
    if missing:
        raise ConfigError(f"the weights hold no layer {min(missing)} although config.json counts {plan.depth} layers.")


def _write_shards(files: dict[str, Path], names: list[tuple[str, str]], out: Path) -> tuple[int, int]:
    """Copies tensors under their new names into shards; returns parameters written and parameters of the target."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shard: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    written: list[Path] = []
    size = total_size = parameters = 0

    def flush() -> None:
        nonlocal shard, size
        path = out / f"model-{len(written) + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        written.append(path)
        weight_map.update(dict.fromkeys(shard, path.name))
        shard, size = {}, 0

    handles: dict[Path, Any] = {}
    for source, name in names:
        try:
            if files[source] not in handles:
                handles.clear()  # the names come file by file
                handles[files[source]] = safe_open(files[source], framework="pt")
            tensor = handles[files[source]].get_tensor(source)
        except Exception as error:
            raise ConfigError(f"shard {files[source]} cannot be read ({error}); fetch the model again.") from None
        width = tensor.numel() * tensor.element_size()
        if size and size + width > SHARD_BYTES:
            flush()
        shard[name] = tensor
        size += width
        total_size += width
        parameters += tensor.numel()
    flush()
    if len(written) == 1:
        written[0].rename(out / "model.safetensors")
    else:
        final = {p.name: f"model-{i:05d}-of-{len(written):05d}.safetensors" for i, p in enumerate(written, 1)}
        for path in written:
            path.rename(out / final[path.name])
        index = {
            "metadata": {"total_size": total_size, "total_parameters": parameters},
            "weight_map": {name: final[file] for name, file in weight_map.items()},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    total = 0
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                count = 1
                for side in handle.get_slice(key).get_shape():
                    count *= side
                total += count
    return parameters, total
