"""`zero-ds trajectory`: from a model and texts to curves, transition layer and proposed surrogate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zero_ds.cli.options import ChatTemplateOption, TrustRemoteCodeOption
from zero_ds.trajectory.metrics import METRICS

METRIC_HELP = "; ".join(f"{name}: {metric.description}" for name, metric in METRICS.items()) + "."


def trajectory(
    model: Annotated[str, typer.Option(help="Folder or hub id of the language model.")],
    data: Annotated[Path, typer.Option(help="JSON file in LLaVA's format; samples with an image are skipped.")],
    out: Annotated[Path, typer.Option(help="New folder for trajectory.json, trajectory.png and trajectory.pdf.")],
    samples: Annotated[int, typer.Option(help="Number of samples, chosen at random.")] = 300,
    metric: Annotated[
        str,
        typer.Option(help=METRIC_HELP),
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
    chat_template: ChatTemplateOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    lookups: Annotated[
        Path | None,
        typer.Option(
            help="Questions whose answer is a word of the text before it: layers that look words up are kept as well."
        ),
    ] = None,
) -> None:
    """Find the layer where a language model's early phase ends, and the surrogate T(k, e) that follows from it.

    The model reads text conversations, and its prediction of the next token after every layer is compared with its
    final prediction (Eq. 1-4 of the paper). The curves of the samples spread in the early phase, then come together and
    fall; the layer where this happens is the transition layer k. Replacing layers k..L-2 gives the surrogate, which
    `zero-ds surrogate` builds.
    """
    from zero_ds.trajectory.options import TrajectoryOptions

    options = TrajectoryOptions(
        samples, metric, greedy, stream_layers, dtype, batch, seed, system_prompt, chat_template, lookups
    )
    options.check()  # before torch is loaded
    from zero_ds.trajectory.measure import measure_trajectory

    print(summary(measure_trajectory(model, data, out, options), out))


def summary(content: dict[str, Any], out: Path) -> str:
    """Returns the lines for people about a trajectory.json: layer, interval, surrogate, files."""
    transition, lines = content["transition"], []
    lookup = content.get("lookup")
    if lookup:
        sure = f"(95 % interval {lookup['low']} to {lookup['high']})" if lookup["verdict"] == "clear" else "(uncertain)"
        where = "unknown" if lookup["layer"] is None else f"done from layer {lookup['layer']} on"
        lines.append(f"look-up    {where} {sure}: {lookup['reason']}")
        lines.append(
            f"           the model itself finds {lookup['model']:.0%} of {lookup['questions']} words, chance "
            f"{lookup['chance']:.0%}"
        )
    if transition["verdict"] == "clear":
        proposed = content["proposed"]
        lines.append(
            f"transition layer {transition['layer']} of {content['layers']} "
            f"(95 % interval {transition['low']} to {transition['high']}, {content['samples']} samples)"
        )
        if proposed:
            lines.append(f"proposed   {proposed['name']}, replacing layers {proposed['replace']}")
        else:
            lines.append("proposed   nothing: by the look-up curve no late layers can be replaced")
    else:
        lines.append(f"no clear transition: {transition['reason']}")
    files = ", ".join(str(out / f"trajectory.{kind}") for kind in ("json", "png", "pdf"))
    lines.append(f"files      {files}")
    return "\n".join(lines)
