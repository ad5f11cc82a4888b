"""Models by hub id: which files are fetched, and how pickled weights are converted. The hub is a folder here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from zero_ds.model.encoders import encoder_of
from zero_ds.model.loading import load_complete, model_hash
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.hub import local_folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder of repositories, from which a stand-in for the hub's client fetches into a cache by revision."""
    import huggingface_hub

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        fetched = tmp_path / "cache" / name / "snapshots" / "0123456789abcdef"
        fetched.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in (tmp_path / "hub" / name).glob(pattern):
                shutil.copy(file, fetched)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "hub"


def pickled(repository: Path, made: Callable[..., Path], content: Any) -> dict[str, torch.Tensor]:
    shutil.copytree(made("clip"), repository)
    tensors = load_file(repository / "model.safetensors")
    (repository / "model.safetensors").unlink()
    torch.save(content(tensors), repository / "pytorch_model.bin")
    return tensors


def test_weights_in_a_pickle_become_safetensors_once(hub: Path, made: Callable[..., Path]) -> None:
    """Older repositories have pickles; buffers that old versions stored with the weights are ignored."""
    ids = {"embeddings.position_ids": torch.arange(5)}
    tensors = pickled(hub / "openai" / "clip", made, lambda weights: {**weights, **ids})
    folder = local_folder("openai/clip")
    module = load_complete(encoder_of(folder).load, folder, dtype=torch.float32)
    assert tensors and all(torch.equal(module.state_dict()[name], tensor) for name, tensor in tensors.items())
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert local_folder("openai/clip") == folder and (folder / "model.safetensors").stat().st_mtime_ns == before
    assert model_hash(folder) and (folder / "preprocessor_config.json").is_file()


def test_a_repository_with_safetensors_is_used_as_it_is(hub: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("clip"), hub / "openai" / "new")
    (hub / "openai" / "new" / "pytorch_model.bin").write_bytes(b"nobody reads it")
    folder = local_folder("openai/new")
    assert folder.is_relative_to(tmp_path / "cache") and not (folder / "pytorch_model.bin").exists()


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_pickle_is_not_run(hub: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    pickled(hub / "some" / "body", made, lambda weights: {**weights, "more": Evil(tmp_path / "mark")})
    with pytest.raises(ConfigError, match=r"is refused: it names .*mkdir"):
        local_folder("some/body")
    pickled(hub / "some" / "list", made, lambda weights: list(weights.values()))
    with pytest.raises(ConfigError, match="holds more than tensors by name"):
        local_folder("some/list")
    assert not (tmp_path / "mark").exists()
    assert not [path for path in (tmp_path / "home" / "zero_ds").iterdir() if path.is_dir()]
