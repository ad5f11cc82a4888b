"""Exports a run on any decoder as a Hugging Face folder that is compared with its source before it appears.

Tensors are streamed from the decoder's shards and the run's weights into new shards; no model is loaded to be written.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from zero_ds.export.alone import LanguageModelFormat
from zero_ds.export.card import model_card, read_evaluations
from zero_ds.export.formats import ExportFormat
from zero_ds.export.llava import LlavaFormat
from zero_ds.export.proof import PROOFS, prove
from zero_ds.export.remote_code import RemoteCodeFormat
from zero_ds.export.source import Source, open_source
from zero_ds.export.tensors import check_range
from zero_ds.export.text import text_settings
from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.runtime.files import check_vacant, new_folder
from zero_ds.runtime.safetensors import SHARD_BYTES, write_shards

logger = logging.getLogger(__name__)

FORMATS: dict[str, ExportFormat] = {layout.name: layout for layout in (LlavaFormat(), RemoteCodeFormat())}
"""Formats of exported folders with a vision encoder, by their names on the command line."""
LANGUAGE_MODEL: ExportFormat = LanguageModelFormat()
"""Format of a run without one."""


def export_model(
    run: str | Path,
    target: str | None,
    out: Path,
    *,
    form: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    proof: str = "full",
    evaluations: list[Path] | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Writes a run on a decoder into the new folder `out`; returns the proof, which is also in its proof.json.

    run: run or checkpoint folder; target: folder or hub id of the decoder, None means the full model that the run was
    trained for; form: a name in FORMATS, that of LANGUAGE_MODEL, or auto for the first that can express the model;
    shard_bytes: largest size of a weights file; proof: `full` or `tensors`, see `proof.prove`; evaluations: results of
    `zero-ds eval` for the model card; reading: `dtype` and `chat_template`, as `open_source` takes them.

    Raises:
        ConfigError, CheckpointError: `out` exists, the run or the decoder is damaged, the two do not fit, the format
            cannot express the model, or the written folder differs from its source. No folder is left then.
    """
    check_vacant(out)
    known = [*FORMATS, LANGUAGE_MODEL.name, "auto"]
    if form not in known:
        raise ConfigError(f"--format {form} is not known{did_you_mean(form, known)}")
    if proof not in PROOFS:
        raise ConfigError(f"--proof {proof} is not known; choose {' or '.join(PROOFS)}.")
    measured = read_evaluations(evaluations or [])
    source = open_source(run, target, **reading)
    if source.decoder.own_code:
        raise ConfigError(
            f"{source.decoder} needs code of its own ({source.decoder.own_code[0].name}), which no format can take "
            "along; use it with `zero-ds chat` and `zero-ds eval`."
        )
    layout = _choose_format(form, source)
    texts = text_settings(source)
    tensors = layout.tensors(source)
    check_range(tensors)
    _check_shapes({name: tensor.shape for name, tensor in tensors}, layout.expected_shapes(source, texts))
    with new_folder(out, need=sum(tensor.size for _, tensor in tensors)) as folder:
        write_shards(tensors, folder, shard_bytes)
        layout.write_files(source, texts, folder)
        result = {"format": layout.name, **prove(proof, source, texts, layout, folder)}
        (folder / "proof.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        card = model_card(source, layout, out.resolve().name, result, measured)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o644)
    return result


def _choose_format(form: str, source: Source) -> ExportFormat:
    """Returns the format called `form`; for `auto` the first in FORMATS that can express the model.

    Raises:
        ConfigError: the format cannot express the model; names one that can.
    """
    if not source.sees:
        if form not in (LANGUAGE_MODEL.name, "auto"):
            raise ConfigError(f"this run has no vision encoder; use --format {LANGUAGE_MODEL.name}.")
        return LANGUAGE_MODEL
    reasons = {name: layout.lacks(source) for name, layout in FORMATS.items()}
    fitting = next(name for name, reason in reasons.items() if reason is None)  # remote-code always does
    if form == LANGUAGE_MODEL.name:
        raise ConfigError(f"this run has a vision encoder; use --format {fitting}.")
    if form == "auto":
        for name, reason in reasons.items():
            if reason is not None:
                logger.info("the export is not %s (%s) but %s", name, reason, fitting)
        return FORMATS[fitting]
    if reasons[form] is not None:
        raise ConfigError(f"{reasons[form]}; use --format {fitting}.")
    return FORMATS[form]


def _check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises ConfigError unless the tensors fill the class that will load the folder: none is missing or left over."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ConfigError(
                f"the model does not fit its format: {name} has shape {found.get(name)}, and in the format's class "
                f"{expected.get(name)}; install the versions in constraints.txt, or, if the model's code has changed, "
                "change that class as well."
            )


_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def shard_bytes(text: str) -> int:
    """Returns a size such as `2GB`, `500MB` or `5GiB` in bytes.

    Raises:
        ConfigError: the text is not a size, or less than a megabyte.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*([KMG]I?)?B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1000**2:
        raise ConfigError(f"--shard-size {text} is not a file size of at least 1MB; write for example 2GB.")
    return size
