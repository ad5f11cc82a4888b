"""A run's weights on any decoder -> a Hugging Face folder that proves itself, or is not there.

Tensors stream from the decoder's shards and the run's weights into new shards; no model is held in memory for it.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from zero_ds.export import card, llava, remote_code
from zero_ds.export.proof import PROOFS, prove
from zero_ds.export.source import open_source
from zero_ds.export.text import texts
from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.runtime.files import check_vacant, new_folder
from zero_ds.runtime.safetensors import SHARD_BYTES, write_shards

logger = logging.getLogger(__name__)

FORMATS: dict[str, Any] = {"llava": llava, "remote-code": remote_code}
"""Name -> module with `refuse`, `tensors`, `loaded`, `expected`, `write`, USAGE and REMOTE_CODE."""


def export_model(
    run: str | Path,
    target: str | None,
    out: Path,
    *,
    form: str = "llava",
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    proof: str = "full",
    evaluations: list[Path] | None = None,
) -> dict[str, Any]:
    """Writes the new folder `out` and returns its proof, which is also its proof.json.

    run: run or commit folder; target: the decoder, by default the full model that the run was trained for; form: a name
    in FORMATS; dtype: float32, bfloat16, float16, or auto: as the decoder is stored; proof: see `proof.prove`;
    evaluations: results of `zero-ds eval` for the model card.

    Raises:
        ConfigError, CheckpointError: an existing `out`, a run or a decoder that is damaged or does not fit, a model
            that the format cannot express, a folder that differs from its source. Nothing is left behind then.
    """
    check_vacant(out)
    if form not in FORMATS:
        raise ConfigError(f"--format {form} is not known{did_you_mean(form, list(FORMATS))}")
    if proof not in PROOFS:
        raise ConfigError(f"--proof {proof} is not known; choose {' or '.join(PROOFS)}.")
    layout = FORMATS[form]
    measured = card.read_evaluations(evaluations or [])
    source = open_source(run, target, dtype)
    layout.refuse(source)
    words = texts(source)
    tensors = layout.tensors(source)
    _check_names({name: tensor.shape for name, tensor in tensors}, layout.expected(source, words))
    with new_folder(out, need=sum(tensor.size for _, tensor in tensors)) as folder:
        write_shards(tensors, folder, shard_bytes)
        layout.write(source, words, folder)
        result = {"format": form, **prove(proof, source, words, layout, folder)}
        (folder / "proof.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        text = card.card(source, layout.USAGE, out.resolve().name, form, result, measured)
        (folder / "README.md").write_text(text, encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o644)
    return result


def _check_names(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """What is written fills the class that will read it: nothing stays random, nothing is left over."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ConfigError(
                f"the model does not fit its format: {name} has shape {found.get(name)}, by the format's class "
                f"{expected.get(name)}; install the versions in constraints.txt."
            )


_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def shard_bytes(text: str) -> int:
    """`2GB`, `500MB`, `5GiB` -> bytes.

    Raises:
        ConfigError: anything else, or less than a megabyte.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*([KMG]I?)?B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1000**2:
        raise ConfigError(f"--shard-size {text} is no size of a file; write for example 2GB, at least 1MB.")
    return size
