"""The model folders of a run, opened once and passed on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zero_ds.config.schema import RunConfig
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.runtime.hub import local_folder
from zero_ds.training import stages


@dataclass(frozen=True)
class ModelFolders:
    """Folders of the models that a run is made of, fetched from the hub where needed."""

    target: DecoderFolder
    """Folder of the full language model."""
    decoder: DecoderFolder
    """Folder of the decoder that the run trains against: the surrogate or the target."""
    encoder: Path | None
    """Folder of the vision encoder; None in stages without images."""

    @classmethod
    def of(cls, config: RunConfig) -> ModelFolders:
        """Returns the folders that a configuration names. Without `surrogate`, the decoder is the target.

        Raises:
            ConfigError: a folder that does not exist and is not on the hub.
        """
        target = DecoderFolder(local_folder(config.target))
        decoder = target
        if stages.decoder_kind(config) == "surrogate" and config.surrogate:
            decoder = DecoderFolder(local_folder(config.surrogate))
        has_vision = config.encoder is not None and stages.has_vision(config)
        encoder = local_folder(config.encoder.path) if config.encoder is not None and has_vision else None
        return cls(target, decoder, encoder)
