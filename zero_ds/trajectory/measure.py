"""`measure_trajectory`: model + text -> curves, transition layer, proposed surrogate, files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zero_ds.data.conversations import ChatTemplate, read_template
from zero_ds.data.formats import DataError
from zero_ds.data.samples import SampleEncoder
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import new_folder
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.precision import fast_dtype
from zero_ds.trajectory.curves import Setting, Trajectory
from zero_ds.trajectory.lens import Lens, ResidentLens, check_lens
from zero_ds.trajectory.lookup import Lookup, read_lookups
from zero_ds.trajectory.metrics import METRICS
from zero_ds.trajectory.options import TrajectoryOptions
from zero_ds.trajectory.plot import plot
from zero_ds.trajectory.probe import measure_lookups
from zero_ds.trajectory.resident import last_states_resident, measure_resident
from zero_ds.trajectory.streaming import last_states_streamed, lens_of_files, measure_streamed
from zero_ds.trajectory.texts import MAX_TOKENS, answer_greedily, read_samples
from zero_ds.trajectory.transition import find_transition

logger = logging.getLogger(__name__)

MAX_LOOKUPS = 400
"""Largest number of questions that are asked, chosen at random."""


def measure_trajectory(model: str, data: Path, out: Path, options: TrajectoryOptions | None = None) -> dict[str, Any]:
    """Measures a model's trajectory and writes trajectory.json, .png and .pdf; returns the content of trajectory.json.

    Computes nothing if `out` already holds the trajectory of the same model, data and options.

    Args:
        model: folder or hub id.
        data: JSON file in LLaVA's format, of which conversations without images are read.
        out: folder for the results: new, empty, or that of an earlier call with the same arguments.

    Raises:
        ConfigError: an option, the model or `out` cannot be used.
        DataError: the data file is missing or damaged.
    """
    options = options or TrajectoryOptions()
    options.check()
    folder = DecoderFolder(local_folder(model))
    _ = folder.family  # a model that no family describes is refused before anything is read
    if not data.is_file():
        raise DataError(f"data file {data} does not exist")
    setting = Setting(
        model=model,
        target_hash=folder.hash(),
        data=str(data),
        data_hash=_file_hash(data),
        metric=options.metric,
        dtype=str(dtype_of(options)).removeprefix("torch."),
        greedy=options.greedy,
        seed=options.seed,
        requested_samples=options.samples,
        system_prompt=options.system_prompt,
        template_hash=_text_hash(read_template(options.chat_template)),
        lookups_hash=None if options.lookups is None else _file_hash(options.lookups),
    )
    earlier = read_earlier(out, setting)
    if earlier is not None:
        logger.info("%s already holds the trajectory of this setting; nothing is computed", out)
        return earlier
    trajectory = _measure(folder, setting, options, out)
    write(trajectory, out)
    return trajectory.to_json()


def dtype_of(options: TrajectoryOptions) -> torch.dtype:
    """Returns the precision of the forward passes."""
    if options.dtype == "auto":
        return fast_dtype()
    return torch.float32 if options.dtype == "float32" else torch.bfloat16


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:32]


def _text_hash(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:32]


def read_earlier(out: Path, setting: Setting) -> dict[str, Any] | None:
    """Returns the content of an earlier trajectory.json of the same setting in `out`; None if `out` is free.

    Raises:
        ConfigError: `out` holds something else, or cannot be created.
    """
    if out.is_dir() and not any(out.iterdir()):
        return None
    if not out.exists():
        above = next(folder for folder in out.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ConfigError(f"--out {out} cannot be made below {above}; choose another.")
        return None
    try:
        content = json.loads((out / "trajectory.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"--out {out} already holds something else; choose another or remove it.")
    if not setting.same(content):
        raise ConfigError(f"--out {out} already holds a trajectory of another setting; choose another or remove it.")
    complete = {"transition", "proposed", "samples", "layers"} <= content.keys()
    if not complete or not all((out / f"trajectory.{kind}").is_file() for kind in ("png", "pdf")):
        raise ConfigError(f"--out {out} holds a damaged trajectory; remove it and run again.")
    return content


def _measure(folder: DecoderFolder, setting: Setting, options: TrajectoryOptions, out: Path) -> Trajectory:
    """Reads the texts, runs the model on them, and finds the transition layer."""
    chosen, template = read_samples(
        folder,
        Path(setting.data),
        count=options.samples,
        seed=options.seed,
        greedy=options.greedy,
        system_prompt=options.system_prompt,
        chat_template=options.chat_template,
    )
    lookups = _lookups(folder, options, template) if options.lookups is not None else []
    dtype = dtype_of(options)
    device = distributed.device()
    metric = METRICS[options.metric]
    states: Callable[[list[list[int]]], Iterable[torch.Tensor]]
    if options.stream_layers:
        scratch = out.absolute().parent
        scratch.mkdir(parents=True, exist_ok=True)
        curves = measure_streamed(
            folder, chosen, metric=metric, batch_size=options.batch, dtype=dtype, device=device, scratch=scratch
        )
        lens: Lens = lens_of_files(folder, dtype, device)
        states = partial(last_states_streamed, folder, batch_size=options.batch, dtype=dtype, device=device)
    else:
        decoder = folder.load(dtype=dtype).to(device).eval()
        check_lens(decoder, folder.family, chosen[0])
        if options.greedy:
            chosen = answer_greedily(decoder, template, chosen, batch_size=options.batch)
        curves = measure_resident(decoder, folder.family, chosen, metric=metric, batch_size=options.batch)
        lens = ResidentLens(decoder, folder.family)
        states = partial(last_states_resident, decoder, folder.family, batch_size=options.batch)
    curve = None
    if lookups:
        texts = [lookup.input_ids for lookup in lookups]
        with torch.inference_mode():
            curve = measure_lookups(
                lambda: iter(states(texts)),
                lookups,
                lambda last: lens.logits(last.to(device, dtype)),
                str(setting.lookups_hash),
                options.seed,
            )
    ids = tuple(sample.id for sample in chosen)
    return Trajectory(setting, ids, curves, find_transition(curves, seed=options.seed), curve)


def _lookups(folder: DecoderFolder, options: TrajectoryOptions, template: ChatTemplate) -> list[Lookup]:
    """Reads the questions of a second curve."""
    assert options.lookups is not None
    longest = min(MAX_TOKENS, getattr(folder.text_config(), "max_position_embeddings", None) or MAX_TOKENS)
    encoder = SampleEncoder(template, "full", max_length=longest, system_prompt=options.system_prompt)
    return read_lookups(options.lookups, encoder, count=MAX_LOOKUPS, seed=options.seed)


def write(trajectory: Trajectory, out: Path) -> None:
    """Writes trajectory.json, .png and .pdf to the new folder `out`, all at once."""
    with new_folder(out) as folder:
        text = json.dumps(trajectory.to_json(), indent=1)
        (folder / "trajectory.json").write_text(text + "\n", encoding="utf-8")
        plot(trajectory, folder)
