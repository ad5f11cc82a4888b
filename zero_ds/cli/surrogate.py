"""`zero-ds surrogate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.runtime.errors import ConfigError

if TYPE_CHECKING:
    from zero_ds.trajectory.texts import TokenSample


def surrogate(
    out: Annotated[Path, typer.Option(help="Folder of the surrogate; new, unless it is only reported on.")],
    target: Annotated[
        str | None, typer.Option(help="Full model: folder or hub id; left out, the one an existing --out was cut from.")
    ] = None,
    replace: Annotated[
        list[str] | None, typer.Option(help="Layers to replace, first:last, both included; may be given several times.")
    ] = None,
    from_trajectory: Annotated[
        Path | None, typer.Option(help="Folder of `zero-ds trajectory`, whose proposal is taken.")
    ] = None,
    translators: Annotated[int, typer.Option(help="Trainable layers that take the place of each range.", min=1)] = 1,
    report: Annotated[
        bool,
        typer.Option("--report", help="Print and write report.json: parameters, bytes, cost of a step, hashes."),
    ] = False,
    kl: Annotated[
        Path | None,
        typer.Option(help="With --report: text data, on which predictions are compared with the target's."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="With --kl: also compare with the translators of this run.")
    ] = None,
    samples: Annotated[int, typer.Option(help="With --kl: samples, chosen at random.", min=1)] = 64,
) -> None:
    """Cut a surrogate: keep early and last layers, replace the range between by trainable translators.

    The result is an ordinary Hugging Face folder. Tensors are streamed from file to file; no model is loaded.
    """
    from zero_ds.model.decoders.folder import decoder_spans
    from zero_ds.model.layer_plan import LayerPlan, Replaced, read_surrogate
    from zero_ds.model.loading import model_hash
    from zero_ds.runtime.hub import local_folder
    from zero_ds.surrogate.build import build_surrogate
    from zero_ds.trajectory.curves import proposed_range
    from zero_ds.trajectory.texts import read_samples

    if kl is not None and not report:
        raise ConfigError("--kl is part of the report; add --report.")
    if weights is not None and kl is None:
        raise ConfigError("--weights are compared on text; add --kl FILE.")
    there = read_surrogate(out) if (out / "surrogate.json").is_file() else None
    only_report = report and there is not None and not replace and not from_trajectory
    if not only_report and bool(replace) == bool(from_trajectory):
        raise ConfigError("say what to replace: either --replace first:last or --from-trajectory FOLDER.")
    if target is None and not only_report:
        raise ConfigError("say which model to cut: --target FOLDER_OR_ID.")
    folder = local_folder(target or (there.target if there else ""))
    # everything that can be wrong is looked at before anything is written
    chosen = read_samples(folder, kl, count=samples, seed=0)[0] if kl is not None else []
    if not only_report:
        ranges = [proposed_range(from_trajectory, folder)] if from_trajectory else list(replace or ())
        wanted = [Replaced.parse(text, translators) for text in ranges]
        if there is not None:
            same = there.target_hash == model_hash(folder, like=there.target_hash)
            if not same or there.plan != LayerPlan(there.plan.depth, tuple(wanted)):
                raise ConfigError(
                    f"{out} holds another surrogate, {there.plan} of {there.target}; choose another --out."
                )
            decoder_spans(out)
            print(f"{out} holds the surrogate {there.plan} already.")
        else:
            info = build_surrogate(folder, wanted, out)
            share = info.kept_parameters / info.target_parameters
            print(
                f"{info.plan}: {info.plan.surrogate_depth} of {info.plan.depth} layers, {info.kept_parameters:,} of "
                f"{info.target_parameters:,} parameters ({share:.0%}), translators at {info.plan.translators} -> {out}"
            )
    if report:
        _report(out, folder, chosen, weights)


def _report(out: Path, target: Path, chosen: list[TokenSample], weights: Path | None) -> None:
    from zero_ds.runtime.files import write_atomically
    from zero_ds.runtime.precision import fast_dtype
    from zero_ds.surrogate.report import audit, check_weights, divergence, lines, with_divergences

    content = audit(out, target)
    if weights is not None:
        check_weights(weights, out)
    if chosen:
        runs = [None] if weights is None else [None, weights]
        found = [divergence(out, target, chosen, weights=run, dtype=fast_dtype()) for run in runs]
        content = with_divergences(content, found)
    write_atomically(out / "report.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    print("\n".join(lines(content)))
