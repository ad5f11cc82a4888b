"""Loads the result of a run on a decoder: on the surrogate it was trained with, or grafted into the full model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from zero_ds.grafting.compatibility import compatibility, refuse_differences, run_config
from zero_ds.model import lora
from zero_ds.model.adapter import missing_tensors
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.hub import local_folder
from zero_ds.training.checkpoint.checkpoint import CheckpointError, find_checkpoint
from zero_ds.training.checkpoint.load import load_weights_
from zero_ds.training.checkpoint.peft_folder import is_peft_folder
from zero_ds.training.stages import SURROGATE_ONLY


def load_trained(
    weights: str | Path,
    decoder: str | Path | DecoderFolder,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    earlier: list[Path] | None = None,
) -> VisionLanguageModel:
    """Loads encoder and adapter of a run on a decoder, with the run's translators if that is a surrogate.

    weights: run or checkpoint folder; decoder: folder or hub id of the run's surrogate or of its target; earlier:
    folders of the results that the run started from, if they are no longer where the run found them. These supply all
    weights that the run itself did not train.

    Raises:
        ConfigError, CheckpointError: weights that do not fit the decoder; the message names the tensor or the field.
    """
    checkpoint = find_checkpoint(weights)
    config = run_config(checkpoint)
    folder = _decoder_folder(decoder)
    if config.lora is not None and folder.is_surrogate:
        raise ConfigError(f"{checkpoint.folder} was trained with LoRA on its target, and {folder} is a surrogate.")
    model = build_model(
        ModelSpec(
            decoder=folder,
            encoder=local_folder(config.encoder.path) if config.encoder else None,
            encoder_config=config.encoder,
            adapter_config=config.adapter,
            dtype=dtype,
            attention=attention,
            lora=config.lora,
        )
    )

    def has_no_place(name: str) -> bool:
        return not folder.is_surrogate and name.startswith(SURROGATE_ONLY)

    loaded: set[str] = set()
    starts = [Path(path) for path in config.starts] if earlier is None else earlier
    for start in [*starts, checkpoint.folder]:
        if is_peft_folder(start):
            continue  # the run has gone on training all adapters in it
        loaded |= load_weights_(model.named_targets(), find_checkpoint(start), skip=has_no_place)
    if missing := missing_tensors(model, loaded):
        raise CheckpointError(
            f"neither {checkpoint.folder} nor a result that it started from holds {missing[0]}, which this model has; "
            "open it with the version of zero_ds that trained it."
        )
    if config.lora is not None:
        lora.merge_(model.decoder)
    return model.eval()


def load_graft(
    weights: str | Path, target: str | Path | DecoderFolder, *, accept: Iterable[str] = (), **options: Any
) -> VisionLanguageModel:
    """Loads the full model with the trained encoder, if the two are compatible (without the thorough checks).

    accept: names of checks (`compatibility.ACCEPTABLE`) whose difference is accepted; options: as `load_trained`.

    Raises:
        ConfigError, CheckpointError: weights that were trained for another model; the message names the difference.
    """
    checkpoint = find_checkpoint(weights)
    folder = _decoder_folder(target)
    refuse_differences(checkpoint, target, compatibility(checkpoint, folder), accept)
    return load_trained(weights, folder, **options)


def _decoder_folder(decoder: str | Path | DecoderFolder) -> DecoderFolder:
    return decoder if isinstance(decoder, DecoderFolder) else DecoderFolder(local_folder(str(decoder)))
