"""The interface of a format of exported folders. `zero_ds.export.FORMATS` lists the formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from zero_ds.data import read_image
from zero_ds.export.source import Source
from zero_ds.export.text import TextSettings
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.safetensors import Tensor


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor of a model in memory, under its name in the exported folder."""

    name: str
    value: torch.Tensor
    exact: bool
    """Whether the folder holds exactly this value, rounded; otherwise it was computed in another order."""


class ExportFormat(Protocol):
    """A format: the models it can express, its names for their tensors, and the files that go with the weights."""

    @property
    def name(self) -> str:
        """Name on the command line."""

    @property
    def tag(self) -> str:
        """Tag of the format in a model card."""

    @property
    def usage(self) -> str:
        """Python code for the model card that loads the folder `{name}` and asks it.

        A model that sees is asked about an image on `{background}`.
        """

    @property
    def remote_code(self) -> bool:
        """True if the folder contains code of its own, so that it loads only with `trust_remote_code=True`."""

    def lacks(self, source: Source) -> str | None:
        """Returns the reason why the format cannot express a model; None if it can."""

    def tensors(self, source: Source) -> list[tuple[str, Tensor]]:
        """Returns the name and content of every tensor in the folder, in the order in which they are written.

        Raises:
            ConfigError, CheckpointError: weights that do not fit.
        """

    def loaded_tensors(self, source: Source, model: VisionLanguageModel) -> Iterator[LoadedTensor]:
        """Yields every tensor of the folder from a model that was loaded whole.

        This is a second way to the tensors of `tensors`, with which the proof compares them.
        """

    def expected_shapes(self, source: Source, texts: TextSettings) -> dict[str, tuple[int, ...]]:
        """Returns name and shape of every tensor of the class that will load the folder."""

    def write_files(self, source: Source, texts: TextSettings, folder: Path) -> None:
        """Writes every file that goes with the weights: config.json, processor, generation_config.json, code."""


IMAGE_READER = "read_image.py"
"""File of an exported folder with which training read its images."""


def write_image_reader(folder: Path) -> None:
    """Copies the code that reads images, which needs nothing of this package, into an exported folder."""
    (folder / IMAGE_READER).write_bytes(Path(read_image.__file__).read_bytes())
