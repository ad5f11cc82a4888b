"""A decoder's Hugging Face folder: reads its config, tensors and hashes, each once, and loads it.

The folder of a multimodal model counts as the decoder in it: its text config, and the tensors of its text tower under
the names that the causal LM has for them (`Family.towers`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zero_ds.model.attention import check_attention
from zero_ds.model.decoders import FAMILIES, Family, family_of_config, own_code, registered
from zero_ds.model.decoders.conversion import Conversion, Group
from zero_ds.model.decoders.shrink import causal_class
from zero_ds.model.layer_plan import LayerPlan, SurrogateInfo, read_surrogate
from zero_ds.model.loading import load_complete, load_tokenizer, model_hash
from zero_ds.runtime.errors import ConfigError, one_line
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.safetensors import DTYPES, Span, Stored, content_hash, locate, shard_files

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)


class DecoderFolder:
    """A folder with a decoder: a target, a surrogate, or a multimodal model of which only the text tower counts.

    Properties read their files on first use and cache the result, so one instance opens config.json at most twice (here
    and in transformers). After the folder has changed, make a new instance.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def of(cls, folder: DecoderFolder | str | Path) -> DecoderFolder:
        """Returns `folder` itself, or the DecoderFolder of a path."""
        return folder if isinstance(folder, DecoderFolder) else cls(folder)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"DecoderFolder({str(self.path)!r})"

    # -- config.json ---------------------------------------------------------------------------------------------------

    @property
    def config_file(self) -> Path:
        """Path of config.json."""
        return self.path / "config.json"

    @cached_property
    def config_bytes(self) -> bytes:
        """Content of config.json.

        Raises:
            ConfigError: the file does not exist.
        """
        if not self.config_file.is_file():
            raise ConfigError(f"{self.path} is not a Hugging Face model folder: it holds no config.json.")
        return self.config_file.read_bytes()

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """Content of config.json, parsed.

        Raises:
            ConfigError: config.json is missing, or is not a JSON object with a model_type.
        """
        text = self.config_bytes  # outside of the try: a ConfigError is a ValueError
        try:
            content = dict(json.loads(text))
        except (ValueError, TypeError):
            content = {}
        if "model_type" not in content:
            raise ConfigError(f"{self.config_file} names no model_type.")
        return content

    @cached_property
    def family(self) -> Family:
        """The description of the folder's decoder: that of a registered family, or of its verified structure.

        Raises:
            ConfigError: as `raw_config`; a config.json that transformers does not accept, a structure that cannot be
                verified.
        """
        known = registered(self.raw_config["model_type"])
        if known is not None:
            return known
        self._check_quantization()
        _ = self.depth  # a small copy has as many layers
        try:
            text = self._library_config.get_text_config(decoder=True)
        except ValueError as error:  # several text configs, none of them a decoder's
            raise self._unusable(error) from None
        return family_of_config(text, self.path)

    @property
    def is_registered(self) -> bool:
        """True if the description is that of a registered family."""
        return self.family.per_layer_config is not None

    @cached_property
    def depth(self) -> int:
        """Number of decoder layers according to config.json.

        Raises:
            ConfigError: config.json is missing or damaged, or does not state a number of layers.
        """
        try:
            content = json.loads(self.config_bytes)
            depth = content.get("text_config", content).get("num_hidden_layers")
        except (OSError, ValueError, AttributeError):
            raise ConfigError(f"{self.config_file} is missing or damaged; fetch the model again.") from None
        if depth is None and "model_type" in content and registered(content["model_type"]) is None:
            depth = getattr(self._library_config.get_text_config(decoder=True), "num_hidden_layers", None)
        if not isinstance(depth, int) or depth < 1:
            raise ConfigError(
                f"{self.config_file} does not say how many layers there are (num_hidden_layers={depth!r})."
            )
        self._check_numbers(depth)
        return depth

    def _check_numbers(self, depth: int) -> None:
        """Refuses a number of layers far from that of the weights, before anything of that size is built.

        Smaller differences are found by comparing all names (`spans`), which names the missing ones.
        """
        try:
            names = shard_files(self.path)
        except ConfigError:  # a config alone, or damaged weights, of which whoever reads them says more
            return
        largest = max((int(part) for name in names for part in name.split(".") if part.isdigit()), default=-1)
        if largest >= 0 and depth > 4 * (largest + 2):
            raise ConfigError(
                f"{self.config_file} counts {depth} layers, but the names of the weights end with number {largest}; "
                "fetch the model again."
            )

    @property
    def is_multimodal(self) -> bool:
        """True if the decoder is one tower of several in this folder."""
        return "text_config" in self.raw_config

    @cached_property
    def whole_config(self) -> Any:
        """transformers' config of the whole folder. In a multimodal model, the decoder's config is a part of it.

        Raises:
            ConfigError: an unregistered family, a config.json that transformers does not take.
        """
        self._check_family_and_depth()
        return self._library_config

    @cached_property
    def _library_config(self) -> Any:
        from transformers import CONFIG_MAPPING, AutoConfig

        if "auto_map" in self.raw_config and self.raw_config["model_type"] not in CONFIG_MAPPING:
            return own_code.load_config(self.path, self.raw_config)
        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # transformers raises many exception types for files edited by hand
            raise self._unusable(error) from None

    @property
    def own_code(self) -> list[Path]:
        """Files of the code that the folder brings for its class; empty for a class of transformers."""
        runs = own_code.is_own(type(self._library_config))
        return sorted(self.path.glob("*.py")) if runs else []

    @cached_property
    def _config(self) -> Any:
        whole = self.whole_config
        try:
            config = copy.deepcopy(whole.get_text_config(decoder=True))
            assert config.hidden_size and config.vocab_size
            config.tie_word_embeddings = getattr(
                whole, "tie_word_embeddings", False
            )  # the outer class decides, where there is one
        except Exception as error:  # transformers raises many exception types for files edited by hand
            raise self._unusable(error) from None
        self._check_quantization()
        return config

    def _check_quantization(self) -> None:
        if getattr(self._library_config, "quantization_config", None):
            raise ConfigError(f"{self.path} is quantized; give the model in bfloat16, float16 or float32.")

    def _check_family_and_depth(self) -> None:
        """Reads both, because their errors are more specific than the library's."""
        assert self.family is not None and self.depth is not None

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self.config_file} cannot be used ({one_line(error)}); fetch the model again.")

    def text_config(self) -> Any:
        """Returns a copy of the decoder's transformers config, with every default filled in.

        Raises:
            ConfigError: an unregistered family, a config.json that transformers does not accept, a quantized model.
        """
        return copy.deepcopy(self._config)

    @property
    def hidden_size(self) -> int:
        """Width of the decoder's hidden states."""
        return int(self._config.hidden_size)

    # -- surrogate.json ------------------------------------------------------------------------------------------------

    @property
    def is_surrogate(self) -> bool:
        """True if the folder holds a surrogate.json."""
        return (self.path / "surrogate.json").is_file()

    @cached_property
    def surrogate(self) -> SurrogateInfo | None:
        """Content of surrogate.json; None for a full model.

        Raises:
            ConfigError: the file is damaged.
        """
        return read_surrogate(self.path) if self.is_surrogate else None

    @property
    def plan(self) -> LayerPlan | None:
        """The surrogate's LayerPlan; None for a full model."""
        return self.surrogate.plan if self.surrogate else None

    # -- weights -------------------------------------------------------------------------------------------------------

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """File and stored name of every tensor of the decoder, by the causal LM's name for it.

        Raises:
            ConfigError: as `shard_files`; a multimodal folder without a known text tower.
        """
        files = shard_files(self.path)
        prefixes = self.towers if self.is_multimodal else self.family.renamed
        tensors: dict[str, Stored] = {}
        for name, file in files.items():
            prefix = next(((old, new) for old, new in prefixes if name.startswith(old)), None)
            if prefix is not None:
                tensors[prefix[1] + name.removeprefix(prefix[0])] = Stored(file, name)
            elif not self.is_multimodal:
                tensors[name] = Stored(file, name)
        if not tensors and self.is_multimodal:
            known = ", ".join(old for old, _ in self.towers)
            raise ConfigError(
                f"no tensor in {self.path} has a name of a text tower ({known}); "
                f"name its prefix in model/decoders/ ({self.family.name})."
            )
        if self.is_registered:
            return tensors
        return {self.conversion.key(name): stored for name, stored in tensors.items()}

    @cached_property
    def towers(self) -> tuple[tuple[str, str], ...]:
        """Prefixes of the text tower's tensors in a multimodal folder, each with that of the causal LM.

        A tower that no family names is where the tensor of its word embeddings is.
        """
        if self.family.towers:
            return self.family.towers
        inner = self.family.embeddings.removeprefix(f"{self.family.backbone}.")
        ends = [name.removesuffix(inner) for name in shard_files(self.path) if name.endswith(f".{inner}")]
        text = [end for end in ends if not re.search(r"vision|visual|audio|speech|image", end)]
        found = [(end, f"{self.family.backbone}.") for end in sorted(text, key=len)[:1]]
        heads = [name.removesuffix("weight") for name in shard_files(self.path) if name.endswith(self.family.head)]
        return tuple(found + [(end, self.family.head.removesuffix("weight")) for end in sorted(heads, key=len)[:1]])

    @cached_property
    def conversion(self) -> Conversion:
        """The changes that transformers makes to the tensors of the files when it loads them.

        Raises:
            ConfigError: no model can be built from config.json.
        """
        return Conversion(self.on_meta())

    @cached_property
    def class_tensors(self) -> list[Group]:
        """Tensors of the files with the tensors of the class that they become."""
        shapes = {name: self.spans[name].shape for name in self.expected_shapes}
        if self.is_registered:
            return [Group((name,), {name: shape}) for name, shape in shapes.items()]
        return self.conversion.groups(shapes)

    @cached_property
    def located(self) -> dict[str, Span]:
        """Bytes of every tensor of `stored`, not yet compared with config.json (see `spans`).

        Raises:
            ConfigError: an unreadable file, or one that lacks a tensor of its index.
        """
        return locate(self.stored)

    @cached_property
    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the causal LM that config.json describes, by name. No weights are allocated.

        Raises:
            ConfigError: no model can be built from config.json.
        """
        if self.is_registered:
            shapes = {name: tuple(value.shape) for name, value in self.on_meta().state_dict().items()}
        else:
            own = {name: tuple(value.shape) for name, value in self.conversion.state.items()}
            shapes = self.conversion.published()
            if any(name in self.stored for name in own.keys() - shapes.keys()):
                shapes = own  # files that hold the class's own tensors already
        if self._config.tie_word_embeddings:
            shapes.pop(self.family.head, None)
        return shapes

    def on_meta(self) -> nn.Module:
        """Builds the causal LM that config.json describes on the meta device.

        Raises:
            ConfigError: no model can be built from config.json.
        """
        import torch
        from transformers import AutoModelForCausalLM

        config = self.text_config()
        try:
            with torch.device("meta"):
                if not self.is_registered:  # called directly, since `from_config` partitions where ZeRO-3 is active
                    return cast("nn.Module", causal_class(config)(config))
                return cast("nn.Module", AutoModelForCausalLM.from_config(config))
        except Exception as error:  # transformers raises many exception types for files edited by hand
            raise self._unusable(error) from None

    @cached_property
    def spans(self) -> dict[str, Span]:
        """Bytes of every tensor of the decoder, checked against the names and shapes that config.json describes.

        Raises:
            ConfigError: damaged files; tensors that are missing, of another shape, quantized, or of layers that
                config.json does not have.
        """
        tensors = self.located
        for name, shape in self.expected_shapes.items():
            if name not in tensors:
                raise self._lacks(name)
            found = tensors[name]
            if found.dtype not in DTYPES:
                raise ConfigError(f"{name} in {self.path} is quantized ({found.dtype}); give the unquantized model.")
            if found.shape != shape:
                raise ConfigError(
                    f"{name} in {self.path} has shape {found.shape}, by config.json {shape}; fetch the model again."
                )
        unknown = [
            name for name in tensors if name.startswith(self.family.layer_prefix) and name not in self.expected_shapes
        ]
        self._refuse(unknown)
        return {name: span for name, span in tensors.items() if name not in unknown}

    def _lacks(self, name: str) -> ConfigError:
        """Returns the error about a missing tensor; quantized models have others in its place."""
        place = name.removesuffix("weight")
        others = [other for other in self.stored if other.startswith(place) and not other.endswith("bias")]
        if place.endswith(".") and others:
            return ConfigError(f"{self.path} is quantized ({others[0]}); give the unquantized model.")
        return ConfigError(f"the weights in {self.path} lack {name}; fetch the model again.")

    def _refuse(self, unknown: Iterable[str]) -> None:
        """Refuses tensors of layers that the class does not have, unless it is known to ignore them."""
        layers = {name for name in unknown if not name.endswith(".inv_freq")}  # old versions stored these; unused
        layers = {name for name in layers if not self._is_ignored(name)}
        if layers:
            raise ConfigError(
                f"the weights in {self.path} hold {min(layers)}, which config.json does not know; fetch it again."
            )

    def check_class_tensors(self) -> None:
        """Checks that the tensors of the files become exactly those of the class.

        Raises:
            ConfigError: as `spans`; a tensor that the files do not give, or that the class does not have.
        """
        if self.is_registered:
            return  # `spans` has compared the same names
        made = {name: shape for group in self.class_tensors for name, shape in group.targets.items()}
        wanted = {name: tuple(value.shape) for name, value in self.conversion.state.items()}
        if self._config.tie_word_embeddings:
            made.pop(self.family.head, None)
            wanted.pop(self.family.head, None)
        for name in sorted(made.keys() | wanted.keys()):
            if made.get(name) != wanted.get(name):
                raise ConfigError(
                    f"the weights in {self.path} give {name} the shape {made.get(name)}, its class has "
                    f"{wanted.get(name)}; fetch the model again."
                )

    def fused(self, group: Group) -> dict[str, torch.Tensor]:
        """Reads the tensors of a group; returns those of the class that they become, by name."""
        from safetensors import safe_open

        read = {}
        for key in group.sources:
            stored = self.stored[key]
            with safe_open(stored.file, framework="pt") as file:
                read[key] = file.get_tensor(stored.name)
        return read if self.is_registered else self.conversion.fuse(group, read)

    def class_tensor(self, name: str) -> torch.Tensor:
        """Reads a tensor of the causal LM's class, which may be made from several of the files."""
        if self.is_registered:
            return self.fused(Group((name,), {name: ()}))[name]
        return self.fused(next(group for group in self.class_tensors if name in group.targets))[name]

    def _is_ignored(self, name: str) -> bool:
        """Returns whether the class ignores a tensor of the files, such as a layer that predicts further tokens."""
        patterns = () if self.is_registered else self.conversion.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in patterns)

    # -- identity ------------------------------------------------------------------------------------------------------

    def hash(self, like: str = "") -> str:
        """Returns the model's hash (`model_hash`), taken in the same way as the recorded hash `like`."""
        return model_hash(self.path, like=like, config=self.config_bytes)

    @cached_property
    def text_hashes(self) -> dict[str, str]:
        """Hashes of the vocabulary (`tokenizer`) and the chat template (`template`); empty if the folder has none.

        Raises:
            ConfigError: a damaged tokenizer_config.json.
        """
        files = [self.path / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")]
        vocabulary = b"".join(file.read_bytes() for file in files if file.is_file())
        template = b""
        settings = self.path / "tokenizer_config.json"
        if (self.path / "chat_template.jinja").is_file():
            template = (self.path / "chat_template.jinja").read_bytes()
        elif settings.is_file():
            try:
                content = json.loads(settings.read_text(encoding="utf-8"))
                template = json.dumps(content.get("chat_template") or "").encode()
            except (ValueError, AttributeError):
                raise ConfigError(f"{settings} is damaged; fetch the model again.") from None
        return {
            "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:32] if vocabulary else "",
            "template": hashlib.sha256(template).hexdigest()[:32] if template else "",
        }

    @cached_property
    def relied_on(self) -> dict[str, str]:
        """Hashes of the parts that an encoder trained against this decoder relies on.

        These are `text_hashes` and, in a surrogate, also `embeddings`.

        Raises:
            ConfigError: a damaged file.
        """
        found = dict(self.text_hashes)
        if self.surrogate:
            found["embeddings"] = self.surrogate.hashes.get("embeddings", "")
        return found

    def embeddings_hash(self) -> str:
        """Returns the SHA-256 of the word embeddings; reads all of them."""
        return content_hash(self.located[self.family.embeddings])

    # -- loading -------------------------------------------------------------------------------------------------------

    def tokenizer(self) -> Any:
        """Loads the folder's tokenizer.

        Raises:
            ConfigError: it cannot be loaded.
        """
        return load_tokenizer(self.path, config=self.whole_config)

    def load(self, *, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
        """Loads the causal LM; under an active ZeRO-3 config it is loaded straight into partitions.

        attention: an implementation of attention; eager, if the family cannot use that one.

        Raises:
            ConfigError: as `load_complete`; or the implementation cannot be used here (`check_attention`).
        """
        from transformers import AutoModelForCausalLM

        family = self.family
        if family.attention(attention) != attention:
            logger.info("%s has no %s attention; %s is used", family.name, attention, family.attention(attention))
            attention = family.attention(attention)
        check_attention(attention)
        pattern = re.compile(re.escape(family.layer_prefix) + r"(\d+)\.")
        numbered = [(name, pattern.match(name)) for name in self.stored]
        self._refuse(name for name, match in numbered if match and int(match[1]) >= self.depth)  # would be ignored
        more: dict[str, Any] = {"config": self.text_config()}  # or the library would read config.json once more
        if self.is_multimodal:
            more["key_mapping"] = {f"^{re.escape(old)}": new for old, new in self.towers}
        return load_complete(
            AutoModelForCausalLM.from_pretrained, self.path, dtype=dtype, attn_implementation=attention, **more
        )


def family_of(folder: str | Path) -> Family:
    """Returns the description of the decoder in a folder.

    Raises:
        ConfigError: as `DecoderFolder.family`.
    """
    return DecoderFolder(folder).family


def family_of_manifest(manifest: dict[str, Any], target: str | None = None) -> Family:
    """Returns the description of the decoder that a run was made for.

    manifest: content of a checkpoint's manifest.json. target: folder or hub id of the run's target, if it is not where
    the run found it; registered families need none.

    Raises:
        ConfigError: no family has the recorded name, and the target cannot be found or verified.
    """
    known = FAMILIES.get(str(manifest["family"]))
    if known is not None:
        return known
    return family_of(local_folder(target or str(manifest.get("config", {}).get("target"))))
