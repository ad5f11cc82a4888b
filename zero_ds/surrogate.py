"""Surrogates T(k, e): which layers they keep (LayerPlan), and the writer that streams them out of the target.

Source: section 1.2 and Figure 4 of the paper. All arithmetic on layer numbers in this project is in `LayerPlan`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from zero_ds.config import ConfigError
from zero_ds.families import family_of
from zero_ds.files import check_vacant, new_folder
from zero_ds.pretrained import depth_of, is_multimodal, text_config
from zero_ds.shards import Span, content_hash, decoder_spans, target_hash, write_shards

logger = logging.getLogger(__name__)

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


def build_surrogate(target: Path, replaced: Iterable[Replaced], out: Path) -> SurrogateInfo:
    """Writes the surrogate of `target` to the new folder `out`: an ordinary Hugging Face folder plus surrogate.json.

    Bytes are copied from file to file; neither model is ever held in memory. Of a multimodal class the decoder alone is
    cut, into a folder of its causal LM's class.

    Raises:
        ConfigError: ranges that do not fit, an existing `out`, missing or damaged weights, too little disk space.
    """
    family = family_of(target)
    plan = LayerPlan(depth_of(target), tuple(replaced))
    check_vacant(out)
    tensors = decoder_spans(target)
    written = [(name, tensors[source]) for source, name in _renamed(list(tensors), family.layer_prefix, plan)]
    config, hashes = _cut_config(target, plan), text_hashes(target)
    copied = [file for file in target.iterdir() if COPIED.fullmatch(file.name) and file.is_file()]
    with new_folder(out, need=sum(span.size for _, span in written)) as folder, ThreadPoolExecutor(1) as aside:
        embeddings = aside.submit(content_hash, tensors[family.embeddings])
        write_shards(written, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in copied:
            (folder / file.name).write_bytes(file.read_bytes())
        info = SurrogateInfo(
            family=family.name,
            target=str(target),
            target_hash=target_hash(target),
            plan=plan,
            kept_parameters=sum(span.parameters for _, span in written),
            target_parameters=sum(span.parameters for span in tensors.values()),
            hashes={**hashes, "embeddings": embeddings.result()},
        )
        (folder / "surrogate.json").write_text(json.dumps(info.to_json(), indent=2) + "\n", encoding="utf-8")
    return info


def _cut_config(target: Path, plan: LayerPlan) -> dict[str, Any]:
    """config.json of the surrogate: the target's own words, per-layer lists written out and cut like the layers.

    Written out, because a default that counts layers (every sixth is global) would count the surrogate's.
    """
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    text = text_config(target)
    if is_multimodal(target):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config = text.to_dict()
        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    config["num_hidden_layers"] = plan.surrogate_depth
    for key in family_of(target).per_layer_config:
        values = config.get(key) or getattr(text, key, None)
        if isinstance(values, list):
            if len(values) != plan.depth:
                raise ConfigError(
                    f"{target / 'config.json'} lists {len(values)} {key} for {plan.depth} layers; fetch it again."
                )
            config[key] = [values[source] for source, _ in plan.layers]
    return config


def text_hashes(folder: Path) -> dict[str, str]:
    """Hashes of a folder's vocabulary and chat template; an empty text where there is none.

    Raises:
        ConfigError: a tokenizer_config.json that is damaged.
    """
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")]
    vocabulary = b"".join(file.read_bytes() for file in files if file.is_file())
    template = b""
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_bytes()
    elif (path := folder / "tokenizer_config.json").is_file():
        try:
            template = json.dumps(json.loads(path.read_text(encoding="utf-8")).get("chat_template") or "").encode()
        except (ValueError, AttributeError):
            raise ConfigError(f"{path} is damaged; fetch the model again.") from None
    return {
        "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:32] if vocabulary else "",
        "template": hashlib.sha256(template).hexdigest()[:32] if template else "",
    }


def relied_on(folder: Path) -> dict[str, str]:
    """Hashes of what an encoder trained against this decoder relies on: `text_hashes`, and a surrogate's `embeddings`.

    Raises:
        ConfigError: a damaged file.
    """
    found = text_hashes(folder)
    if (folder / "surrogate.json").is_file():
        found["embeddings"] = read_surrogate(folder).hashes.get("embeddings", "")
    return found


def kept_tensors(
    plan: LayerPlan, prefix: str, surrogate: dict[str, Span], target: dict[str, Span]
) -> list[tuple[str, Span, Span | None]]:
    """(name in the surrogate, its bytes there, the target's bytes it should equal) of all but the translators.

    prefix: of the layers' tensors. Without the target's bytes: it has no such tensor.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d+)(\..+)")
    found = []
    for name, span in surrogate.items():
        match = pattern.fullmatch(name)
        if match and int(match[1]) not in plan.kept:
            continue
        source = f"{prefix}{plan.kept[int(match[1])]}{match[2]}" if match else name
        found.append((name, span, target.get(source)))
    return found


def _renamed(names: list[str], prefix: str, plan: LayerPlan) -> Iterator[tuple[str, str]]:
    """(name in the target, name in the surrogate) of all the surrogate's tensors, in the target's order."""
    made_from: dict[int, list[int]] = {}
    for number, (source, _) in enumerate(plan.layers):
        made_from.setdefault(source, []).append(number)
    pattern = re.compile(re.escape(prefix) + r"(\d+)(\..+)")
    seen: set[int] = set()
    for name in names:
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
