"""The weights of an export: those of a run over the files of decoder and vision encoder. No decoder is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zero_ds.config.schema import EncoderConfig, LoraConfig, RunConfig
from zero_ds.export.tensors import as_dtype, buffer, in_memory, merged
from zero_ds.grafting.compatibility import compatibility, run_config
from zero_ds.model.adapter import adapter_shapes
from zero_ds.model.decoders.conversion import Group
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.encoders import ENCODERS, EncoderFamily, encoder_of, load_encoder, published_names
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.safetensors import Computed, Span, Tensor, dtype_name
from zero_ds.training.checkpoint.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_manifest,
    find_checkpoint,
)
from zero_ds.training.stages import SURROGATE_ONLY

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number formats that an export can have, by their names on the command line."""
_LORA = re.compile(r"lora\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass
class Source:
    """A run on a decoder, as it is exported."""

    checkpoint: Checkpoint
    config: RunConfig
    """Configuration that the checkpoint was trained with."""
    target: str
    """Name of the decoder, as the user gave it."""
    decoder: DecoderFolder
    """Folder of the decoder. This one instance serves the whole export, so that its files are read once."""
    dtype: torch.dtype
    """Number format of the export."""
    weights: dict[str, Span]
    """Tensors that the run and the results it started from trained, later ones first, by their names in weights
    files."""

    # -- decoder and encoder -------------------------------------------------------------------------------------------

    @cached_property
    def text(self) -> Any:
        """transformers' config of the decoder."""
        return self.decoder.text_config()

    @property
    def sees(self) -> bool:
        """True if the model has a vision encoder."""
        return self.config.encoder is not None

    @property
    def encoder_config(self) -> EncoderConfig:
        """The run's configuration of the vision encoder."""
        assert self.config.encoder is not None
        return self.config.encoder

    @cached_property
    def encoder_folder(self) -> Path:
        """Folder of the vision encoder that training began with."""
        return local_folder(self.encoder_config.path)

    @cached_property
    def encoder_family(self) -> EncoderFamily:
        """Family of the vision encoder."""
        return encoder_of(self.encoder_folder, self.encoder_config.image_size)

    @cached_property
    def encoder(self) -> nn.Module:
        """The vision encoder that training began with. It is small next to a decoder and stays in memory."""
        return load_encoder(self.encoder_family, self.encoder_folder, dtype=self.dtype)

    @cached_property
    def encoder_names(self) -> dict[str, str]:
        """Names of the vision encoder's tensors in files, by their names in memory."""
        if self.encoder_family.name in ENCODERS:  # published folders have the names of its class
            return {name: name for name in self.encoder.state_dict()}
        return published_names(self.encoder)

    @property
    def vision(self) -> Any:
        """transformers' config of the vision encoder."""
        return self.encoder_family.vision_config(self.encoder)

    @property
    def image_size(self) -> int:
        """Height and width of a view of an image, in pixels."""
        return self.encoder_family.image_size(self.vision)

    @property
    def tokens_per_image(self) -> int:
        """Number of image tokens of one view of an image, with its boundary embeddings."""
        return self.config.adapter.image_tokens(self.encoder_family.tokens_per_image(self.vision))

    @property
    def has_aligner(self) -> bool:
        """True if a linear layer brings the adapter's output to the decoder's width."""
        return self.config.adapter.width is not None

    def plain_configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the configs of decoder and vision encoder as dictionaries, without paths of this machine."""
        dtype = str(self.dtype).removeprefix("torch.")
        text = {**self.text.to_dict(), "dtype": dtype}
        vision = {**self.vision.to_dict(), "dtype": dtype}
        for config in (text, vision):
            for name in ("_name_or_path", "_model_name_or_path"):
                config.pop(name, None)
        return text, vision

    # -- tensors -------------------------------------------------------------------------------------------------------

    def decoder_tensors(self) -> dict[str, Tensor]:
        """Returns every tensor of the decoder under its name in the causal LM; no head if it is tied to the embeddings.

        Raises:
            ConfigError, CheckpointError: damaged files of the decoder, weights that do not fit it.
        """
        # tied models have no head among their expected tensors, although some files contain one
        bases: dict[str, Tensor] = dict(self._class_tensors())
        for name, span in self.weights.items():
            place = self._place_in_decoder(name)
            if place is None:
                continue
            if place not in bases:
                raise CheckpointError(
                    f"{span.file} holds {name}, which {self.target} does not have; it was trained for another model."
                )
            if bases[place].shape != span.shape:
                raise CheckpointError(
                    f"{name} in {span.file} has shape {span.shape}, in {self.target} {bases[place].shape}."
                )
            bases[place] = span
        tensors: dict[str, Tensor] = {
            name: as_dtype(base, self.dtype) if isinstance(base, Span) else base for name, base in bases.items()
        }
        lora = self.config.lora
        for module, sides in self.lora().items():
            name = f"{module}.weight"
            base = bases.get(name)
            if lora is None or not isinstance(base, Span) or set(sides) != {"A", "B"}:
                raise CheckpointError(
                    f"{self.checkpoint.folder} holds LoRA of {module}, which does not fit {self.target}."
                )
            tensors[name] = merged(base, sides["A"], sides["B"], scaling(lora), self.dtype)
        return tensors

    def _class_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor of the decoder's class; those that its files hold in parts are put together later."""
        files = self.decoder.spans
        for group in self.decoder.class_tensors:
            for name, shape in group.targets.items():
                if group.sources == (name,):
                    yield name, files[name]
                else:
                    size = math.prod(shape) * self.dtype.itemsize
                    yield name, Computed(dtype_name(self.dtype), shape, size, partial(self._fused, group, name))

    def _fused(self, group: Group, name: str) -> Iterator[Any]:
        yield buffer(self.decoder.fused(group)[name].to(self.dtype))

    def lora(self) -> dict[str, dict[str, Span]]:
        """Returns the LoRA weights by module of the decoder and by side: A (rank, in) and B (out, rank)."""
        found: dict[str, dict[str, Span]] = {}
        for name, span in self.weights.items():
            if match := _LORA.fullmatch(name):
                found.setdefault(match["module"], {})[match["side"]] = span
        return found

    def merged_weights(self) -> set[str]:
        """Returns the names of the decoder's tensors into which LoRA is merged."""
        return {f"{module}.weight" for module in self.lora()}

    def _place_in_decoder(self, name: str) -> str | None:
        """Returns the decoder's name for a trained tensor; None if the tensor belongs to another part of the model."""
        part, _, rest = name.partition(".")
        if part == "decoder":
            return rest
        plan = self.decoder.plan
        if plan is None or f"{part}." not in SURROGATE_ONLY:
            return None
        number, _, inner = rest.partition(".")
        layers = plan.translators if part == "translator" else range(plan.surrogate_depth)
        if not number.isdecimal() or int(number) >= len(layers):
            return name  # no decoder has a tensor of this name, so it is refused
        return f"{self.decoder.family.layer_prefix}{layers[int(number)]}.{inner}"

    def encoder_tensors(self) -> dict[str, Tensor]:
        """Returns every tensor of the vision encoder under its name in memory.

        Raises:
            CheckpointError: trained weights that do not fit the encoder.
        """
        tensors: dict[str, Tensor] = {}
        for name, value in self.encoder.state_dict().items():
            tensors[name] = in_memory(value, self.dtype if value.is_floating_point() else value.dtype)
        for name, span in self.weights.items():
            if not name.startswith("encoder."):
                continue
            place = name.removeprefix("encoder.")
            if place not in tensors or tensors[place].shape != span.shape:
                raise CheckpointError(f"{name} in {span.file} does not fit the encoder in {self.encoder_folder}.")
            tensors[place] = as_dtype(span, self.dtype)
        return tensors

    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns name and shape of every tensor between vision encoder and decoder."""
        return adapter_shapes(self.config.adapter, self.vision.hidden_size, self.text.hidden_size)

    def adapter_spans(self) -> dict[str, Span]:
        """Returns every tensor between vision encoder and decoder.

        Raises:
            ConfigError: a tensor that no result holds, or that has another shape.
        """
        found = {}
        for name, shape in self.adapter_shapes().items():
            if name not in self.weights:
                raise ConfigError(f"{self.checkpoint.folder} holds no {name}; name a run of a later stage.")
            found[name] = self.weights[name]
            if found[name].shape != shape:
                raise ConfigError(f"{name} of {self.checkpoint.folder} has shape {found[name].shape}, not {shape}.")
        return found


def scaling(lora: LoraConfig) -> float:
    """Returns the factor by which PEFT multiplies B A."""
    return lora.alpha / lora.rank


def open_source(run: str | Path, target: str | None, dtype: str = "auto", chat_template: str | None = None) -> Source:
    """Finds and checks everything that an export reads. Of large files it reads the run's weights, to hash them.

    run: run or checkpoint folder; target: folder or hub id of a decoder that the run fits, which is its full model or
    its surrogate; None means the full model that it was trained for; dtype: a name in KINDS, or auto for the number
    format in which the decoder is stored; chat_template: file with a chat template that replaces the run's.

    Raises:
        ConfigError, CheckpointError: an unfinished or damaged run, or a decoder that it was not trained for.
    """
    checkpoint = find_checkpoint(run)
    config = run_config(checkpoint)
    if chat_template is not None:
        data = config.data.model_copy(update={"chat_template": chat_template})
        config = config.model_copy(update={"data": data})
    if dtype not in (*KINDS, "auto"):
        raise ConfigError(f"--dtype {dtype} is not known; choose {', '.join(KINDS)} or auto.")
    target = target or config.target
    decoder = DecoderFolder(local_folder(target))
    _ = decoder.surrogate  # a damaged surrogate.json is an error before the weights are hashed
    results = [*(find_checkpoint(path) for path in config.starts), checkpoint]
    weights = _trained_tensors(results, decoder)
    if config.encoder is None and not weights:
        raise ConfigError(
            f"{run} has no vision encoder to export, and {target} has no place for its translators; name a run of an "
            "encoder stage, or the run's surrogate with --target."
        )
    _check_fit(checkpoint, config, target, decoder)
    return Source(checkpoint, config, target, decoder, KINDS.get(dtype) or _stored_dtype(decoder), weights)


def _check_fit(checkpoint: Checkpoint, config: RunConfig, target: str, decoder: DecoderFolder) -> None:
    """Raises ConfigError or CheckpointError if the run was not trained for the decoder."""
    surrogate = decoder.surrogate
    if surrogate is not None:
        check_manifest(checkpoint, {"target_hash": surrogate.target_hash, "family": surrogate.family})
        if config.lora is not None:
            raise ConfigError(f"{checkpoint.folder} was trained with LoRA on its target, and {decoder} is a surrogate.")
        return
    for check in compatibility(checkpoint, decoder):
        if check.fits is False:  # values that were not recorded cannot be compared
            raise ConfigError(
                f"{checkpoint.folder} cannot be exported on {target}: {check.what} is {check.here}, "
                f"trained with {check.trained_with}."
            )


def _trained_tensors(results: list[Checkpoint], decoder: DecoderFolder) -> dict[str, Span]:
    """Returns the trained tensors of several results; a later result replaces the tensors of earlier ones.

    Layers that only a surrogate has are left out unless the decoder is one; then they must fit its plan.
    """
    found: dict[str, Span] = {}
    for checkpoint in results:
        checkpoint.check_weights()
        named = checkpoint.weight_spans()
        if decoder.plan is None:
            named = {name: span for name, span in named.items() if not name.startswith(SURROGATE_ONLY)}
        elif any(name.startswith(SURROGATE_ONLY) for name in named):
            check_manifest(checkpoint, {"plan": decoder.plan.to_json()})
        found |= named
    return found


def _stored_dtype(decoder: DecoderFolder) -> torch.dtype:
    """Returns the number format of the decoder's embeddings, or float32 if an export cannot have that format."""
    stored = decoder.spans[decoder.family.embeddings].dtype
    return next((dtype for dtype in KINDS.values() if dtype_name(dtype) == stored), torch.float32)
