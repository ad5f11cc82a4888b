"""What an export is made of: a run's weights over the files of decoder and encoder; the decoder is never loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zero_ds.config.schema import EncoderConfig, LoraConfig, RunConfig
from zero_ds.export.tensors import as_dtype, in_memory, merged, read
from zero_ds.grafting.graft import compatibility, run_config
from zero_ds.model.adapter import adapter_shapes
from zero_ds.model.decoders import Family, family_of
from zero_ds.model.decoders.folder import decoder_spans, expected_shapes, text_config
from zero_ds.model.encoders import EncoderFamily, encoder_of
from zero_ds.model.layer_plan import LayerPlan, SurrogateInfo, read_surrogate
from zero_ds.model.loading import load_complete
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.safetensors import Span, Tensor, dtype_name, spans
from zero_ds.training.checkpoint.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_hash,
    check_manifest,
    find_checkpoint,
)
from zero_ds.training.stages import SURROGATE_ONLY

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that an export can have, by the names of the command line."""
_LORA = re.compile(r"lora\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass
class Source:
    """A run on a decoder, as it is exported."""

    commit: Checkpoint
    config: RunConfig
    target: str
    """The decoder as the user named it."""
    folder: Path
    """Where it lies."""
    dtype: torch.dtype
    surrogate: SurrogateInfo | None
    """Of a decoder that is a surrogate."""
    weights: dict[str, Span]
    """What the run and the results it started from trained, later ones winning, by the names in weights files."""

    @property
    def encoder_config(self) -> EncoderConfig:
        assert self.config.encoder is not None
        return self.config.encoder

    @cached_property
    def encoder_folder(self) -> Path:
        return local_folder(self.encoder_config.path)

    @cached_property
    def encoder_family(self) -> EncoderFamily:
        return encoder_of(self.encoder_folder)

    @cached_property
    def family(self) -> Family:
        return family_of(self.folder)

    @cached_property
    def text(self) -> Any:
        """The decoder's config."""
        return text_config(self.folder)

    @property
    def plan(self) -> LayerPlan | None:
        return self.surrogate.plan if self.surrogate else None

    def plain_configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The decoder's config and the encoder's as dictionaries of what an export says of them.

        Where they lay on this machine is not among it.
        """
        dtype = str(self.dtype).removeprefix("torch.")
        text, vision = ({**config.to_dict(), "dtype": dtype} for config in (self.text, self.vision))
        for config in (text, vision):
            for name in ("_name_or_path", "_model_name_or_path"):
                config.pop(name, None)
        return text, vision

    @cached_property
    def encoder(self) -> nn.Module:
        """The encoder with the weights it began with. It is small beside a decoder, and stays in memory."""
        return load_complete(self.encoder_family.load, self.encoder_folder, dtype=self.dtype)

    @property
    def vision(self) -> Any:
        """The encoder's config."""
        return self.encoder_family.vision_config(self.encoder)

    @property
    def tokens_per_image(self) -> int:
        """Image tokens of one view of a picture, boundary embeddings included."""
        return self.encoder_family.tokens_per_image(self.vision) + 2 * self.config.adapter.boundary_tokens

    # -- tensors -------------------------------------------------------------------------------------------------------

    def decoder_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the decoder under the causal LM's names; no head where it is tied to the embeddings.

        Raises:
            ConfigError, CheckpointError: damaged files of the decoder, weights that do not fit it.
        """
        files = decoder_spans(self.folder)
        names = expected_shapes(self.folder)  # of tied models without the head, which some store nevertheless
        bases = {name: files[name] for name in names}
        trained: set[str] = set()
        for name, span in self.weights.items():
            place = self._place(name)
            if place is None:
                continue
            if place not in bases:
                raise CheckpointError(
                    f"{span.file} holds {name}, which {self.target} has not; it was made for another."
                )
            if bases[place].shape != span.shape:
                raise CheckpointError(
                    f"{name} in {span.file} has shape {span.shape}, in {self.target} {bases[place].shape}."
                )
            bases[place] = span
            trained.add(place)
        result: dict[str, Tensor] = {name: as_dtype(span, self.dtype) for name, span in bases.items()}
        lora = self.config.lora
        for module, sides in self.lora().items():
            name = f"{module}.weight"
            if lora is None or name not in bases or set(sides) != {"A", "B"}:
                raise CheckpointError(f"{self.commit.folder} holds LoRA of {module}, which does not fit {self.target}.")
            result[name] = merged(bases[name], sides["A"], sides["B"], scaling(lora), self.dtype)
        return result

    def lora(self) -> dict[str, dict[str, Span]]:
        """Module of the decoder -> its LoRA weights, by side: A (rank, in) and B (out, rank)."""
        found: dict[str, dict[str, Span]] = {}
        for name, span in self.weights.items():
            if match := _LORA.fullmatch(name):
                found.setdefault(match["module"], {})[match["side"]] = span
        return found

    def _place(self, name: str) -> str | None:
        """The decoder's name of a trained tensor; None for one of another part."""
        part, _, rest = name.partition(".")
        if part == "decoder":
            return rest
        if self.plan is None or f"{part}." not in SURROGATE_ONLY:
            return None
        number, _, inner = rest.partition(".")
        layers = self.plan.translators if part == "translator" else range(self.plan.surrogate_depth)
        if not number.isdecimal() or int(number) >= len(layers):
            return name  # which no decoder has
        return f"{self.family.layer_prefix}{layers[int(number)]}.{inner}"

    def encoder_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the encoder under its names in memory.

        Raises:
            CheckpointError: trained weights that do not fit it.
        """
        result: dict[str, Tensor] = {n: in_memory(t, self.dtype) for n, t in self.encoder.state_dict().items()}
        for name, span in self.weights.items():
            if not name.startswith("encoder."):
                continue
            place = name.removeprefix("encoder.")
            if place not in result or result[place].shape != span.shape:
                raise CheckpointError(f"{name} in {span.file} does not fit the encoder in {self.encoder_folder}.")
            result[place] = as_dtype(span, self.dtype)
        return result

    def adapter_spans(self) -> dict[str, Span]:
        """What stands between encoder and decoder: `adapter.*`, and where configured `boundary.*` and `aligner.*`.

        Raises:
            ConfigError: a tensor that no result holds or that has another shape.
        """
        shapes = adapter_shapes(self.config.adapter, self.vision.hidden_size, self.text.hidden_size)
        for name, shape in shapes.items():
            if name not in self.weights:
                raise ConfigError(f"{self.commit.folder} holds no {name}; name a run of a later stage.")
            if self.weights[name].shape != shape:
                raise ConfigError(f"{name} of {self.commit.folder} has shape {self.weights[name].shape}, not {shape}.")
        return {name: self.weights[name] for name in shapes}

    def adapter_in_memory(self) -> dict[str, torch.Tensor]:
        return {name: read(span) for name, span in self.adapter_spans().items()}


def scaling(lora: LoraConfig) -> float:
    """By how much PEFT multiplies B A."""
    return lora.alpha / lora.rank


def open_source(run: str | Path, target: str | None, dtype: str = "auto") -> Source:
    """Finds and checks everything that an export reads; nothing large is read but for the hashes of the run's weights.

    target: any decoder that the run fits: its full model, or its surrogate; None: the full model it was trained for.
    dtype: a name in KINDS; auto: what the decoder is stored in.

    Raises:
        ConfigError, CheckpointError: a run that is not finished or damaged, a decoder it was not trained for.
    """
    commit = find_checkpoint(run)
    config = run_config(commit)
    if config.encoder is None:
        raise ConfigError(f"{run} has no vision encoder to export.")
    if dtype not in (*KINDS, "auto"):
        raise ConfigError(f"--dtype {dtype} is not known; choose {', '.join(KINDS)} or auto.")
    target = target or config.target
    folder = local_folder(target)
    surrogate = read_surrogate(folder) if (folder / "surrogate.json").is_file() else None
    weights = _weights([*(find_checkpoint(path) for path in config.starts), commit], surrogate)
    if surrogate is not None:
        check_manifest(commit, {"target_hash": surrogate.target_hash, "family": surrogate.family})
        if config.lora is not None:
            raise ConfigError(f"{commit.folder} was trained with LoRA on its target, and {folder} is a surrogate.")
    else:
        for check in compatibility(commit, folder):
            if check.fits is False:  # what was not recorded cannot be compared
                raise ConfigError(
                    f"{commit.folder} cannot be exported on {target}: {check.what} is {check.here}, "
                    f"trained with {check.trained_with}."
                )
    kind = KINDS.get(dtype) or _stored(folder)
    return Source(commit, config, target, folder, kind, surrogate, weights)


def _weights(commits: list[Checkpoint], surrogate: SurrogateInfo | None) -> dict[str, Span]:
    """Trained tensors of several results, later ones winning; translators only where the decoder has them."""
    found: dict[str, Span] = {}
    for commit in commits:
        path = commit.folder / "weights.safetensors"
        check_hash(path, str(commit.manifest.get("weights_sha256")))
        named = spans(path)
        if surrogate is None:
            named = {name: span for name, span in named.items() if not name.startswith(SURROGATE_ONLY)}
        elif any(name.startswith(SURROGATE_ONLY) for name in named):
            check_manifest(commit, {"plan": surrogate.plan.to_json()})
        found |= named
    return found


def _stored(folder: Path) -> torch.dtype:
    """The type in which a decoder's embeddings are stored, as far as an export can have it."""
    stored = decoder_spans(folder)[family_of(folder).embeddings].dtype
    return next((dtype for dtype in KINDS.values() if dtype_name(dtype) == stored), torch.float32)
