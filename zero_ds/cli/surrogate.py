"""`zero-ds surrogate`: a small model cut from a full one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.cli.options import ChatTemplateOption, TrustRemoteCodeOption
from zero_ds.runtime.errors import ConfigError


def surrogate(
    out: Annotated[Path, typer.Option(help="Folder of the surrogate: a new one, or with --report an existing one.")],
    target: Annotated[
        str | None,
        typer.Option(help="Full model: folder or hub id. Default: the model that an existing --out was cut from."),
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(help="Layers to replace, first:last, both included. May be given several times."),
    ] = None,
    from_trajectory: Annotated[
        Path | None, typer.Option(help="Folder of `zero-ds trajectory`, whose proposal is used.")
    ] = None,
    translators: Annotated[
        int, typer.Option(help="Number of trainable layers that take the place of each range.", min=1)
    ] = 1,
    translator: Annotated[
        str, typer.Option(help="Translators: copy (of the layer), or dense (its experts replaced by one network).")
    ] = "copy",
    translator_width: Annotated[
        int | None, typer.Option(help="With --translator dense: number of units of that network.", min=1)
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Print a report and write it to report.json: parameters, bytes, cost of a step, hashes."
        ),
    ] = False,
    kl: Annotated[
        Path | None,
        typer.Option(help="With --report: text data on which the predictions are compared with the target's."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="With --kl: also compare with the translators of this run.")
    ] = None,
    samples: Annotated[int, typer.Option(help="With --kl: number of samples, chosen at random.", min=1)] = 64,
    chat_template: ChatTemplateOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Cut a surrogate: keep early and last layers, replace the range between them by trainable translators.

    The result is an ordinary Hugging Face folder. Tensors are streamed from file to file; no model is loaded.

    Example: zero-ds surrogate --target meta-llama/Llama-3.1-8B-Instruct --replace 17:30 --out runs/T17-30
    """
    from zero_ds.model.decoders.folder import DecoderFolder
    from zero_ds.model.layer_plan import Replaced, dense_width
    from zero_ds.runtime.hub import local_folder
    from zero_ds.surrogate.build import build_surrogate
    from zero_ds.surrogate.report import Comparison, lines, write_report
    from zero_ds.trajectory.curves import proposed_range

    if kl is not None and not report:
        raise ConfigError("--kl is part of the report; add --report.")
    if weights is not None and kl is None:
        raise ConfigError("--weights are compared on text; add --kl FILE.")
    if chat_template is not None and kl is None:
        raise ConfigError("--chat-template belongs to the text of a comparison; add --kl FILE.")
    units = dense_width(translator, translator_width)
    existing = DecoderFolder(out).surrogate
    builds = bool(replace or from_trajectory) or not report or existing is None
    if builds and bool(replace) == bool(from_trajectory):
        raise ConfigError("say what to replace: either --replace first:last or --from-trajectory FOLDER.")
    if target is None and builds:
        raise ConfigError("say which model to cut: --target FOLDER_OR_ID.")
    whole = DecoderFolder(local_folder(target or (existing.target if existing else "")))
    # the text is read before the surrogate is cut, so that nothing is written if it cannot be used
    comparison = None
    if kl is not None:
        comparison = Comparison.read(whole, kl, count=samples, weights=weights, chat_template=chat_template)
    if builds:
        ranges = [proposed_range(from_trajectory, whole.path)] if from_trajectory else list(replace or ())
        replaced = [Replaced.parse(text, translators) for text in ranges]
        info = build_surrogate(whole, replaced, out, dense_width=units)
        if existing is not None:
            print(f"{out} holds the surrogate {info.plan} already.")
        else:
            share = info.kept_parameters / info.target_parameters
            print(
                f"{info.plan}: {info.plan.surrogate_depth} of {info.plan.depth} layers, {info.kept_parameters:,} of "
                f"{info.target_parameters:,} parameters ({share:.0%}), translators at {info.plan.translators} -> {out}"
            )
    if report:
        print("\n".join(lines(write_report(out, whole, comparison))))
