"""Content of manifest.json: the run, the models and data it was trained with, and the versions that wrote it.

A new field is one entry in `Manifest`, one in the function that knows its value and, if it must be the same when a run
is resumed, one in `COMPARED`.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any, TypedDict

import zero_ds
from zero_ds import __version__
from zero_ds.config.schema import RunConfig
from zero_ds.model.layer_plan import LayerPlan
from zero_ds.model.loading import model_hash
from zero_ds.runtime.files import write_atomically
from zero_ds.training.folders import ModelFolders


class Manifest(TypedDict, total=False):
    """Fields of manifest.json, in the order in which they are written.

    Checkpoints of older versions lack some of them, so readers work on a plain dictionary and ask with `get`.
    """

    stage: str
    """Row of the stage table."""
    config: dict[str, Any]
    """Resolved configuration of the run."""
    fingerprint: str
    """Hash of the entries of the configuration that change the run's numbers (`RunConfig.fingerprint`)."""

    family: str
    """Name of the target's family."""
    target: str
    """Folder or hub id of the full language model, as the configuration names it."""
    target_hash: str
    """Hash of the full language model (`model_hash`)."""
    encoder_hash: str | None
    """Hash of the vision encoder that the run started from; None without one."""
    decoder_hash: str
    """Hash of the decoder that the run trained against: a surrogate or the target."""
    data_hash: str
    """Hash of the content of the data files."""
    precision: str
    """Type that the run computes in, as `bfloat16`."""
    starts: list[str | None]
    """SHA-256 of the weights that the run started from, in the order of `RunConfig.starts`."""
    plan: dict[str, Any] | None
    """LayerPlan of the surrogate; None for a run against the full model."""
    relies_on: dict[str, str]
    """Hashes of parts of the decoder that the trained weights depend on (`DecoderFolder.relied_on`)."""
    origin: dict[str, Any]
    """Origin of weights that no run of zero_ds trained: `layout`, and details needed to write that layout again."""

    step: int
    """Optimizer steps made so far."""
    versions: dict[str, str]
    """Versions of Python, zero_ds and the libraries that wrote the checkpoint."""
    weights_sha256: str
    """SHA-256 of the names and tensors of the weights, however they are spread over files (`content_sha256`). Where
    `weights_files` is missing, in results of older versions and of other programs: SHA-256 of weights.safetensors."""
    weights_files: dict[str, str]
    """SHA-256 of each file of weights, by its name."""


COMPARED = (
    "plan",
    "family",
    "target",
    "target_hash",
    "encoder_hash",
    "decoder_hash",
    "data_hash",
    "precision",
    "starts",
)
"""Fields of the manifest that must be the same when a run is resumed."""


def describe_run(config: RunConfig) -> Manifest:
    """Returns the fields that follow from the configuration alone."""
    return {"stage": config.stage, "config": config.model_dump(mode="json"), "fingerprint": config.fingerprint()}


def describe_models(config: RunConfig, plan: LayerPlan | None, folders: ModelFolders | None = None) -> Manifest:
    """Returns the fields about the models that the weights belong to, read from their folders.

    folders: those of `config`, if they have been opened already.

    Raises:
        ConfigError: a folder that does not exist, or a damaged file in one.
    """
    folders = folders or ModelFolders.of(config)
    return {
        "family": folders.target.family.name,
        "target": config.target,
        "target_hash": folders.target.hash(),
        "encoder_hash": model_hash(folders.encoder) if folders.encoder else None,
        "plan": plan.to_json() if plan else None,
        "relies_on": folders.decoder.relied_on,
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, zero_ds and the libraries that decide about the numbers in a file."""
    from importlib.metadata import version

    packages = ("torch", "deepspeed", "transformers")
    return {"zero_ds": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}


def code_hash() -> str:
    """Returns a hash of this package's source files, by which ranks notice that they run different code."""
    root = Path(zero_ds.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json into a checkpoint's folder, with the fields in the order of `Manifest`."""
    content: dict[str, Any] = dict(manifest)
    known = [name for name in Manifest.__annotations__ if name in content]
    others = [name for name in content if name not in known]
    ordered = {name: content[name] for name in (*known, *others)}
    write_atomically(folder / "manifest.json", json.dumps(ordered, indent=2) + "\n")
