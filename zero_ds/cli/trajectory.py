"""`zero-ds trajectory`: from a model and texts to curves, transition layer and proposed surrogate."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zero_ds.runtime.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from zero_ds.trajectory.trajectory import Setting

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16")


def trajectory(
    model: Annotated[str, typer.Option(help="Folder or hub id of the language model.")],
    data: Annotated[Path, typer.Option(help="JSON file in LLaVA's format; samples with an image are skipped.")],
    out: Annotated[Path, typer.Option(help="New folder for trajectory.json, trajectory.png and trajectory.pdf.")],
    samples: Annotated[int, typer.Option(help="Number of samples, chosen at random.")] = 300,
    metric: Annotated[
        str,
        typer.Option(
            help="sequence: the paper's, over the probabilities of the true next tokens; vocabulary: KL over the "
            "vocabulary, averaged over positions."
        ),
    ] = "sequence",
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Read the model's own greedy answers instead of the data's (appendix A.1).")
    ] = False,
    stream_layers: Annotated[
        bool,
        typer.Option(
            "--stream-layers", help="Read one layer at a time from the files, for models larger than the memory."
        ),
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto, float32 or bfloat16; auto is bfloat16 where the device multiplies it fast.")
    ] = "auto",
    batch: Annotated[int, typer.Option(help="Samples per forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the samples and of the bootstrap.")] = 0,
    system_prompt: Annotated[
        str | None, typer.Option(help="System message of every conversation. Default: the chat template's own.")
    ] = None,
) -> None:
    """Find the layer where a language model's early phase ends, and the surrogate T(k, e) that follows from it.

    The model reads text conversations, and its prediction of the next token after every layer is compared with its
    final prediction (Eq. 1-4 of the paper). The curves of the samples spread in the early phase, then come together and
    fall; the layer where this happens is the transition point k. Replacing layers k..L-2 gives the surrogate, which
    `zero-ds surrogate` builds.
    """
    from zero_ds.trajectory.lens import METRICS

    if metric not in METRICS:
        raise ConfigError(f"--metric {metric} is unknown{did_you_mean(metric, list(METRICS))}")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown{did_you_mean(dtype, list(DTYPES))}")
    for name, number in (("samples", samples), ("batch", batch)):
        if number < 1:
            raise ConfigError(f"--{name} {number} is too small; give at least 1.")
    if stream_layers and greedy:
        raise ConfigError("--greedy lets the model answer, which needs all of it; leave out --stream-layers.")
    if seed < 0:
        raise ConfigError(f"--seed {seed} is negative; give 0 or more.")

    import torch

    from zero_ds.data.formats import DataError
    from zero_ds.model.decoders import family_of
    from zero_ds.model.loading import model_hash
    from zero_ds.runtime.hub import local_folder
    from zero_ds.runtime.precision import fast_dtype
    from zero_ds.trajectory.trajectory import Setting

    folder = local_folder(model)
    family_of(folder)  # a model that no family describes is refused before anything is read
    if not data.is_file():
        raise DataError(f"there is no data file {data}")
    precision = fast_dtype() if dtype == "auto" else getattr(torch, dtype)
    digest = hashlib.sha256()
    with data.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    setting = Setting(
        model=model,
        target_hash=model_hash(folder),
        data=str(data),
        data_hash=digest.hexdigest()[:32],
        metric=metric,
        dtype=str(precision).removeprefix("torch."),
        greedy=greedy,
        seed=seed,
        requested_samples=samples,
        system_prompt=system_prompt,
    )
    content = check_out(out, setting)
    if content is not None:
        logger.info("%s already holds the trajectory of this setting; nothing is computed", out)
    else:
        content = _measure(setting, folder, precision, batch, stream_layers, out)
    print(summary(content, out))


def check_out(out: Path, setting: Setting) -> dict[str, Any] | None:
    """Returns the content of an earlier trajectory.json of the same setting in `out`; None if the folder is free.

    Raises:
        ConfigError: `out` holds something else.
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
    if isinstance(content, dict) and setting.same(content):
        whole = {"transition", "proposed", "samples", "layers"} <= content.keys()
        if not whole or not all((out / f"trajectory.{kind}").is_file() for kind in ("png", "pdf")):
            raise ConfigError(f"--out {out} holds a damaged trajectory; remove it and run again.")
        return content
    other = "a trajectory of another setting" if isinstance(content, dict) else "something else"
    raise ConfigError(f"--out {out} already holds {other}; choose another or remove it.")


def _measure(
    setting: Setting, folder: Path, precision: Any, batch: int, stream_layers: bool, out: Path
) -> dict[str, Any]:
    """Loads the model, measures its curves, finds the transition, writes; returns the content of trajectory.json."""
    import torch

    from zero_ds.model.decoders import family_of
    from zero_ds.model.decoders.folder import load_decoder
    from zero_ds.trajectory.lens import check_lens, measure
    from zero_ds.trajectory.streaming import measure_streamed
    from zero_ds.trajectory.trajectory import Trajectory, answer_greedily, read_samples, write
    from zero_ds.trajectory.transition import find_transition

    family = family_of(folder)
    chosen, template = read_samples(
        folder,
        Path(setting.data),
        count=setting.requested_samples,
        seed=setting.seed,
        greedy=setting.greedy,
        system_prompt=setting.system_prompt,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metric = setting.metric
    if stream_layers:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        curves = measure_streamed(
            folder,
            chosen,
            metric=metric,
            batch_size=batch,
            dtype=precision,
            device=device,
            scratch=out.absolute().parent,
        )
    else:
        decoder = load_decoder(folder, dtype=precision).to(device).eval()
        check_lens(decoder, family, chosen[0])
        if setting.greedy:
            chosen = answer_greedily(decoder, template, chosen, batch_size=batch)
        curves = measure(decoder, family, chosen, metric=metric, batch_size=batch)
    ids = tuple(sample.id for sample in chosen)
    result = Trajectory(setting, ids, curves, find_transition(curves, seed=setting.seed))
    write(result, out)
    return result.to_json()


def summary(content: dict[str, Any], out: Path) -> str:
    """Returns the lines for people about a trajectory.json: layer, interval, surrogate, files."""
    transition, lines = content["transition"], []
    if transition["verdict"] == "clear":
        proposed = content["proposed"]
        lines.append(
            f"transition layer {transition['layer']} of {content['layers']} "
            f"(95 % interval {transition['low']} to {transition['high']}, {content['samples']} samples)"
        )
        lines.append(f"proposed   {proposed['name']}, replacing layers {proposed['replace']}")
    else:
        lines.append(f"no clear transition: {transition['reason']}")
    files = ", ".join(str(out / f"trajectory.{kind}") for kind in ("json", "png", "pdf"))
    lines.append(f"files      {files}")
    return "\n".join(lines)
