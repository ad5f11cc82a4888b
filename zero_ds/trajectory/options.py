"""The options of `measure_trajectory`, which can be checked before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.trajectory.metrics import METRICS

DTYPES = ("auto", "float32", "bfloat16")
"""Precisions of the forward passes; `auto` is bfloat16 where the device multiplies it fast."""


@dataclass(frozen=True)
class TrajectoryOptions:
    """How a trajectory is measured; the options of `zero-ds trajectory`."""

    samples: int = 300
    """Number of samples, chosen at random."""
    metric: str = "sequence"
    """Name of a metric in metrics.py."""
    greedy: bool = False
    """Lets the model read its own greedy answers instead of the data's (appendix A.1)."""
    stream_layers: bool = False
    """Reads the layers from the files one at a time, for models larger than the memory."""
    dtype: str = "auto"
    """float32, bfloat16, or auto: bfloat16 where the device multiplies it fast."""
    batch: int = 16
    """Number of samples per forward pass."""
    seed: int = 0
    """Seed of the choice of samples and of the bootstrap."""
    system_prompt: str | None = None
    """System message of every conversation; None for the chat template's own."""
    chat_template: str | None = None
    """File with a chat template; None for the model's own."""
    lookups: Path | None = None
    """File of questions whose answer is a word of the text before it (lookup.py), for a second curve."""

    def check(self) -> None:
        """Checks everything that can be checked without reading a file.

        Raises:
            ConfigError: an option out of its range, or two that exclude each other.
        """
        if self.metric not in METRICS:
            raise ConfigError(f"--metric {self.metric} is unknown{did_you_mean(self.metric, list(METRICS))}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype} is unknown{did_you_mean(self.dtype, list(DTYPES))}")
        for name, number in (("samples", self.samples), ("batch", self.batch)):
            if number < 1:
                raise ConfigError(f"--{name} {number} is too small; give at least 1.")
        if self.stream_layers and self.greedy:
            raise ConfigError("--greedy needs the whole model in memory to answer; leave out --stream-layers.")
        if self.lookups is not None and not self.lookups.is_file():
            raise ConfigError(f"--lookups {self.lookups} does not exist; name a file of questions.")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed} is negative; give 0 or more.")
