"""Writes runs to export without training them: a checkpoint in which the weights of every trained part have changed."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pace import scaled
from safetensors.torch import save_file

from zero_ds.config.schema import RunConfig
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders.folder import family_of
from zero_ds.model.loading import model_hash
from zero_ds.training.checkpoint.manifest import describe_run
from zero_ds.training.stages import trained_parts


def write_run(config: RunConfig, decoder: Path, noise: float = 0.05) -> Path:
    """Writes `config.out` as a finished run of one step on `decoder`, in which every trained tensor has changed."""
    encoder, target = Path(config.encoder.path) if config.encoder else None, Path(config.target)
    model = build_model(
        ModelSpec(decoder, encoder, config.encoder, config.adapter, torch.float32, seed=1, lora=config.lora)
    )
    torch.manual_seed(2)
    tensors = {}
    for part in trained_parts(config):
        for name, parameter in model.parameters_of(part):
            tensors[name] = (parameter.detach() + noise * torch.randn_like(parameter)).contiguous()
    folder = Path(config.out) / "step-000001"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "weights.safetensors")
    manifest = {
        **describe_run(config),
        "family": family_of(target).name,
        "target": config.target,
        "target_hash": model_hash(target),
        "encoder_hash": model_hash(encoder) if encoder else None,
        "plan": model.plan.to_json() if model.plan else None,
        "step": 1,
        "versions": {},
        "weights_sha256": hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (Path(config.out) / "latest").write_text("step-000001\n")
    return Path(config.out)


def here(monkeypatch: pytest.MonkeyPatch, questions: int = 2, tokens: int = 6) -> None:
    """Runs proofs in this process and with fewer questions, because a new process spends its time on imports.

    Some tests do start a new process.
    """
    from zero_ds.export import fresh, proof

    @contextmanager
    def run(scratch: Path) -> Iterator[proof.Finish]:
        def finish() -> tuple[int, str]:
            finders = list(sys.meta_path)
            monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
            try:
                fresh.main(scratch)
            except Exception as error:
                return 1, f"{type(error).__name__}: {error}"
            finally:
                sys.meta_path[:] = finders
            return 0, ""

        yield finish

    monkeypatch.setattr(proof, "run_fresh", run)
    monkeypatch.setattr("zero_ds.export.fresh._RefuseZeroDs.find_spec", lambda *arguments: None)
    monkeypatch.setattr(proof, "QUESTIONS", proof.QUESTIONS[:questions])
    monkeypatch.setattr(proof, "TOKENS", tokens)


ALONE = """
import sys
class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "zero_ds":
            raise ImportError("zero_ds is not here")
sys.meta_path.insert(0, Refuse)
try:
    import zero_ds
    raise SystemExit("zero_ds can be imported")
except ImportError:
    pass
"""


def run_alone(script: str, folder: Path) -> str:
    """Runs a script in a new interpreter in which this package cannot be imported; returns its output."""
    import os

    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE + script],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=scaled(240),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
