"""The content of a checkpoint, and how one is found and checked.

    RUN/config.yaml                     resolved configuration; next to it deepspeed.json, as DeepSpeed got it
    RUN/latest                          name of the newest complete checkpoint
    RUN/step-000200/weights.safetensors trainable parameters only, in the training precision
    RUN/step-000200/manifest.json       stage, base models with hashes, LayerPlan, step, versions (`Manifest`)
    RUN/step-000200/resume/state.safetensors   fp32 master copy and both Adam moments of each trainable parameter
    RUN/step-000200/resume/progress.json       step, counts and loss scale (`Progress`)

Where several ranks write (shares.py), each has files of its own: weights-00001-of-00004.safetensors, ..., and the
same in resume/. Manifest and progress list the files. All code that reads weights or state asks `Checkpoint` for them.

Results of other programs (foreign.py) have the same layout without `resume/`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from zero_ds.config.loading import validate
from zero_ds.config.schema import AdapterConfig
from zero_ds.model.adapter import belongs_to
from zero_ds.model.loading import HASH_VERSION
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import open_regular
from zero_ds.runtime.safetensors import Span, TensorFiles, joint_spans, spans
from zero_ds.training.checkpoint.shares import file_names

FOLDER_NAME = re.compile(r"step-(\d{6,})")
"""Name of a checkpoint's folder, with its step."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read, or does not fit its reader."""

    may_pass = False
    """Whether the next attempt may succeed without anybody's help."""


class Progress(TypedDict, total=False):
    """Fields of resume/progress.json."""

    step: int
    """Optimizer steps made so far."""
    skipped: int
    """Samples that could not be used so far, over all ranks."""
    too_long: int
    """Samples so far without an answer within the length limit, over all ranks."""
    optimizer_steps: dict[str, int]
    """Adam's step count of each trained part; larger or smaller than `step` where a run continued another."""
    loss_scale: dict[str, float]
    """State of fp16's dynamic loss scale; empty in other precisions."""
    validation_loss: float
    """Held-out loss after these steps, where it was measured."""
    state_files: dict[str, str]
    """SHA-256 of each file of state, by its name."""
    state_sha256: str
    """SHA-256 of state.safetensors, in checkpoints of older versions, which had this one file."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    """Folder of the checkpoint, `RUN/step-N`."""
    manifest: dict[str, Any]
    """Content of manifest.json; `Manifest` documents its fields, of which older versions lack some."""

    @property
    def step(self) -> int:
        """Number of optimizer steps made before it was saved."""
        return int(self.manifest["step"])

    @property
    def weights_sha256(self) -> str:
        """SHA-256 that identifies the weights (`Manifest`)."""
        return str(self.manifest.get("weights_sha256"))

    def adapter(self) -> str | None:
        """Returns the kind of the adapter whose tensors it holds, in words; None if it holds none or does not say.

        Kinds whose tensors have the same names and shapes would be read in place of each other without an error.

        Raises:
            CheckpointError: a damaged file. ConfigError: the manifest holds no valid configuration.
        """
        config = self.manifest.get("config")
        stated = config.get("adapter") if isinstance(config, dict) else None
        if not isinstance(stated, dict) or not any(belongs_to(name, "adapter") for name in self.weight_spans()):
            return None
        return validate(AdapterConfig, stated, what=f"manifest of {self.folder}").described

    def weights_files(self) -> dict[Path, str]:
        """Returns the files of the trained weights, in order, each with the SHA-256 that it had when it was saved.

        Raises:
            CheckpointError: the manifest is damaged.
        """
        return _files(self.folder, "weights", self.manifest, self.folder / "manifest.json")

    def state_files(self) -> dict[Path, str]:
        """Returns the files of master copies and moments, in order, each with its SHA-256.

        Raises:
            CheckpointError: resume/progress.json is missing or damaged.
        """
        resume = self.folder / "resume"
        return _files(resume, "state", self.progress(), resume / "progress.json")

    def weight_spans(self) -> dict[str, Span]:
        """Returns the places of the weights by name, from the headers of their files.

        Raises:
            CheckpointError: a file is missing, truncated or not a safetensors file.
        """
        for path in (files := self.weights_files()):
            try:
                spans(path)
            except ConfigError:
                raise CheckpointError(
                    f"{path} is missing or damaged; use another checkpoint, or write it again with zero-ds consolidate."
                ) from None
        return joint_spans(files)

    def open_weights(self) -> TensorFiles:
        """Returns the weights, to be opened with `with`; they are not compared with their hashes.

        Raises:
            CheckpointError: as `weights_files`.
        """
        return TensorFiles(self.weights_files())

    def progress(self) -> Progress:
        """Returns the content of resume/progress.json.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        path = self.folder / "resume" / "progress.json"
        try:
            content: Progress = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint.") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} is damaged: it is not a JSON object; use another checkpoint.")
        for field in ("optimizer_steps", "loss_scale"):
            counts = content.get(field)
            if not isinstance(counts, dict) or not all(type(count) in (int, float) for count in counts.values()):
                raise CheckpointError(f"{path} is damaged: its {field} are {counts!r}; use another checkpoint.")
        return content

    def check_weights(self) -> None:
        """Compares the weights with the manifest's hashes.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        for path, expected in self.weights_files().items():
            check_hash(path, expected)

    def weights(self) -> dict[str, torch.Tensor]:
        """Loads all trained weights, after comparing them with the manifest's hash.

        Raises:
            CheckpointError: as `check_weights`.
        """
        from safetensors.torch import load_file

        self.check_weights()
        return {name: tensor for path in self.weights_files() for name, tensor in load_file(path).items()}

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Loads the weights whose names start with `prefix`; the names in the result do not."""
        return {n.removeprefix(prefix): t for n, t in self.weights().items() if n.startswith(prefix)}


def find_checkpoint(path: str | Path) -> Checkpoint:
    """Returns the checkpoint in a checkpoint's own folder, or the newest one of a run folder.

    Raises:
        CheckpointError: the folder is neither, or its manifest cannot be read.
    """
    folder = Path(path)
    latest = folder / "latest"
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not FOLDER_NAME.fullmatch(name):
            raise CheckpointError(f"{latest} does not name a checkpoint; write the name of a step-* folder into it.")
        folder = folder / name
    file = folder / "manifest.json"
    if not file.is_file():
        raise CheckpointError(f"{path} holds no checkpoint (manifest.json is missing); {_where_else(Path(path))}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        int(manifest["step"])
        dict(manifest.get("relies_on") or {})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); use another checkpoint.") from None
    return Checkpoint(folder, manifest)


def newest_complete(run: Path) -> Checkpoint | None:
    """Returns the newest checkpoint in a run folder, whatever `latest` says; None if there is none.

    Raises:
        CheckpointError: its manifest cannot be read.
    """
    folders = [path for path in run.glob("step-*") if FOLDER_NAME.fullmatch(path.name)]
    complete = [path for path in folders if (path / "manifest.json").is_file()]
    newest = max(complete, key=lambda path: int(path.name.removeprefix("step-")), default=None)
    return find_checkpoint(newest) if newest else None


def _where_else(path: Path) -> str:
    """Returns the end of a message about a folder that names no checkpoint."""
    newest = newest_complete(path) if path.is_dir() else None
    if newest is None:
        return "did the run finish?"
    if (path / "latest").is_file():
        return f"{path / 'latest'} names another than {newest.folder.name}, the newest there: write that into it."
    return f"{path / 'latest'} is lost: write {newest.folder.name} into it, the newest there."


def _files(folder: Path, kind: str, content: Mapping[str, Any], described: Path) -> dict[Path, str]:
    """Returns the files of weights or of state, in order, with their hashes.

    kind: `weights` or `state`. content: content of the file `described`. Names follow from the number of files, so that
    a manifest cannot lead anywhere else.

    Raises:
        CheckpointError: the content lists other names.
    """
    listed = content.get(f"{kind}_files")
    if listed is None:
        return {folder / f"{kind}.safetensors": str(content.get(f"{kind}_sha256"))}
    names = file_names(kind, len(listed)) if isinstance(listed, dict) else []
    if not names or set(listed) != set(names):
        raise CheckpointError(f"{described} is damaged: its {kind}_files are {listed!r}; use another checkpoint.")
    return {folder / name: str(listed[name]) for name in names}


def check_hash(path: Path, expected: str) -> None:
    """Compares a file's SHA-256 with the one recorded when it was written.

    Raises:
        CheckpointError: the file is missing, or its content is another.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; use another checkpoint.") from None
    if digest.hexdigest() != expected:
        raise CheckpointError(f"{path} is damaged: its content has changed since it was saved; use another checkpoint.")


def check_manifest(checkpoint: Checkpoint, expected: dict[str, Any], allow: Iterable[str] = ()) -> None:
    """Compares fields of a checkpoint's manifest with the values that a reader needs.

    allow: fields whose difference does not matter.

    Raises:
        ConfigError: a field differs; names it and both values.
    """
    allowed = set(allow)
    for key, value in expected.items():
        stated = checkpoint.manifest.get(key)
        if stated == value or key in allowed:
            continue
        if key.endswith("_hash") and _taken_differently(stated, value):
            raise ConfigError(
                f"{checkpoint.folder} cannot be compared: of its {key} {stated} and the expected {value}, one was "
                "taken by an early version of zero_ds in another way; make both with the same version."
            )
        raise ConfigError(f"{checkpoint.folder} does not fit: its {key} is {stated!r}, and here it is {value!r}.")


def _taken_differently(one: Any, other: Any) -> bool:
    """Returns whether two model hashes cannot be compared because they sampled the files in different ways."""
    ways = {str(value).startswith(HASH_VERSION) for value in (one, other) if value}
    return len(ways) == 2
