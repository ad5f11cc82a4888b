"""`zero-ds surrogate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.config import ConfigError, SourceConfig

if TYPE_CHECKING:
    from zero_ds.lens import TokenSample


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
    from zero_ds.hub import local_folder
    from zero_ds.surrogate import Replaced, build_surrogate, read_surrogate

    if kl is not None and not report:
        raise ConfigError("--kl is part of the report; add --report.")
    if weights is not None and kl is None:
        raise ConfigError("--weights are compared on text; add --kl FILE.")
    there = (out / "surrogate.json").is_file()
    if not replace and not from_trajectory and report and there:
        folder = local_folder(target or read_surrogate(out).target)
    else:
        if bool(replace) == bool(from_trajectory):
            raise ConfigError("say what to replace: either --replace first:last or --from-trajectory FOLDER.")
        if target is None:
            raise ConfigError("say which model to cut: --target FOLDER_OR_ID.")
        folder = local_folder(target)
        ranges = [_proposal(from_trajectory)] if from_trajectory else list(replace or ())
        wanted = [Replaced.parse(text, translators) for text in ranges]
        if there and sorted(read_surrogate(out).plan.replaced) == sorted(wanted):
            print(f"{out} holds the surrogate {read_surrogate(out).plan} already.")
        else:
            info = build_surrogate(folder, wanted, out)
            share = info.kept_parameters / info.target_parameters
            print(
                f"{info.plan}: {info.plan.surrogate_depth} of {info.plan.depth} layers, {info.kept_parameters:,} of "
                f"{info.target_parameters:,} parameters ({share:.0%}), translators at {info.plan.translators} -> {out}"
            )
    if report:
        _report(out, folder, kl, weights, samples)


def _report(out: Path, target: Path, kl: Path | None, weights: Path | None, samples: int) -> None:
    from zero_ds.audit import audit, divergence, lines, with_divergences
    from zero_ds.engine import fast_dtype
    from zero_ds.files import write_atomically

    content = audit(out, target)
    if kl is not None:
        chosen = _samples(target, kl, samples)
        runs = [None] if weights is None else [None, weights]
        content = with_divergences(
            content, [divergence(out, target, chosen, weights=run, dtype=fast_dtype()) for run in runs]
        )
    write_atomically(out / "report.json", json.dumps(content, indent=2) + "\n")
    print("\n".join(lines(content)))


def _samples(target: Path, data: Path, count: int) -> list[TokenSample]:
    from transformers import AutoTokenizer

    from zero_ds.data.conversations import ChatTemplate
    from zero_ds.data.loader import SampleEncoder
    from zero_ds.data.sources import Records
    from zero_ds.trajectory import MAX_TOKENS, choose_samples

    template = ChatTemplate(AutoTokenizer.from_pretrained(target))
    encoder = SampleEncoder(template, "response", max_length=MAX_TOKENS)
    return choose_samples(Records([SourceConfig(path=str(data))]), encoder, count=count, seed=0)


def _proposal(folder: Path) -> str:
    path = folder / "trajectory.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{folder} holds no readable trajectory.json; run `zero-ds trajectory` first.") from None
    proposed = content.get("proposed")
    if not proposed:
        raise ConfigError(f"{path} proposes no layers: {content.get('transition', {}).get('verdict')}; give --replace.")
    return str(proposed["replace"])
