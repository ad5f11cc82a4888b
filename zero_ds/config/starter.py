"""Writes recipes for a user's own model and data: one file of common settings, and one for each stage of the paper."""

from __future__ import annotations

import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from zero_ds.config.loading import load_run
from zero_ds.runtime.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names of the folder in runs/, which also appears in the recipes."""
STEPS = 100
"""Smallest number of optimizer steps for which a global batch is chosen."""


class _Purpose(NamedTuple):
    text: str
    uses_surrogate: bool


_PURPOSES = {
    "pretrain": _Purpose("Stage 1: adapter and translator, against the surrogate. Text helps the translator.", True),
    "encoder": _Purpose("Stage 2: vision encoder and adapter, against the frozen surrogate, before the graft.", True),
    "decoder": _Purpose("Stage 3, optional: the full language model, from the grafted encoder on.", False),
}
STAGES = tuple(_PURPOSES)
"""Stages of the paper, in their order."""


@dataclass(frozen=True)
class Starter:
    """Facts that a user knows at the beginning; the rest follows from the recipes of the stages."""

    name: str
    """Name of the project: its results go to runs/NAME."""
    target: str
    """Folder or hub id of the language model."""
    encoder: str
    """Folder or hub id of the vision encoder."""
    data: str
    """Data file, folder, hub id, or name of a registered data set."""
    registered: bool = False
    """Whether `data` is the name of a registered data set."""
    images: str | None = None
    """Folder or archive of the images; None: the folder of the data file."""
    replace: str | None = None
    """Layers that the surrogate replaces, `first:last`; None: those that the trajectory proposes."""
    samples: int | None = None
    """Number of samples of the data, from which global batches follow; None: it is not known."""
    ranks: int = 1
    """Number of GPUs or CPU ranks."""
    micro_batch: int = 1
    """Samples per rank and pass."""
    zero: str = "zero3"
    """Name of a file in ds_configs/."""
    precision: str = "auto"
    """Number format, as in a recipe."""

    @property
    def surrogate(self) -> str:
        """Folder of the surrogate."""
        cut = "surrogate" if self.replace is None else f"T{self.replace.replace(':', '-')}"
        return f"runs/{self.name}/{cut}"

    def global_batch(self, stage: str) -> int:
        """Returns the paper's global batch, or a smaller power of two if the data would give fewer than STEPS steps."""
        batch = load_run(f"llama-3.1-8b/{stage}").global_batch
        while self.samples is not None and batch > max(self.ranks, 1) and self.samples // batch < STEPS:
            batch //= 2
        return batch

    def files(self) -> dict[str, str]:
        """Returns the text of each recipe, by the name of its file."""
        return {"common.yaml": self._common(), **{f"{stage}.yaml": self._stage(stage) for stage in STAGES}}

    def _common(self) -> str:
        source: dict[str, Any] = {"name" if self.registered else "path": self.data}
        if self.images is not None:
            source["root"] = self.images
        return "\n".join(
            [
                f"# Settings of all stages of {self.name}. Every key is explained in docs/configs.md; what is not set",
                "# here has the paper's value (zero_ds/config/recipes/stages).",
                _yaml({"target": self.target}),
                "encoder:",
                f"  {_yaml({'path': self.encoder})}",
                "  # feature_layer: -2           # hidden states for the adapter; -1 is the last layer",
                "data:",
                "  sources:                      # several are mixed; look at samples: zero-ds data show RECIPE 0 1 2",
                *(f"    {'- ' if first else '  '}{line}" for first, line in _numbered(_yaml(source))),
                "  # max_length: 2048            # longest sample in tokens",
                '  # system_prompt: ""           # instead of the chat template\'s own',
                f"{_yaml({'micro_batch': self.micro_batch}):30}  # samples per rank and pass, as many as memory allows",
                f"{_yaml({'zero': self.zero}):30}  # a file of ds_configs/, or your own DeepSpeed JSON",
                f"{_yaml({'precision': self.precision}):30}  # auto, bf16, fp16 or fp32",
                "",
            ]
        )

    def _stage(self, stage: str) -> str:
        before = STAGES[: STAGES.index(stage)]
        settings: dict[str, Any] = {}
        if _PURPOSES[stage].uses_surrogate:
            settings["surrogate"] = self.surrogate
        if before:
            settings["init_from"] = [f"runs/{self.name}/{one}" for one in before]
        settings["global_batch"] = self.global_batch(stage)
        settings["out"] = f"runs/{self.name}/{stage}"
        lines = [f"# {_PURPOSES[stage].text}", f"extends: [stages/{stage}, common.yaml]", _yaml(settings)]
        return "\n".join([*lines, "# epochs: 1", "# optimizer: {learning_rate: 1e-4}", ""])


def write(starter: Starter, folder: Path) -> list[Path]:
    """Writes the recipes into a new folder, all or none, after each of them has been read back; returns their paths.

    Raises:
        ConfigError: the name or a value cannot be used, or the folder is there already.
    """
    if not NAME.fullmatch(starter.name):
        raise ConfigError(f"'{starter.name}' is not a name for a folder; use letters, digits, dots, - and _.")
    if folder.exists():
        raise ConfigError(f"{folder} is there already; choose another folder, or remove it first.")
    made = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        made.mkdir(parents=True)
        for name, text in starter.files().items():
            (made / name).write_text(text, encoding="utf-8")
        for stage in STAGES:
            load_run(str(made / f"{stage}.yaml"))
        made.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return [folder / name for name in starter.files()]


def _yaml(values: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    return text.rstrip("\n")


def _numbered(text: str) -> list[tuple[bool, str]]:
    return [(number == 0, line) for number, line in enumerate(text.splitlines())]
