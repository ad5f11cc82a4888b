"""`zero-ds quickstart`: the whole method on the model of the demo, as a chain of public commands."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.cli.demo import LLM
from zero_ds.cli.options import VerboseOption
from zero_ds.runtime.errors import ConfigError


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
    demo: Annotated[Path, typer.Option(help="Folder that `zero-ds demo` made.")] = Path("runs/demo"),
    steps_scale: Annotated[
        float, typer.Option(help="Factor on the training steps of every stage; 0.1 is a quick try.", min=0.001)
    ] = 1.0,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also train and evaluate the controls (see docs/method.md).")
    ] = False,
    replace: Annotated[
        str, typer.Option(help="Layers to replace, first:last; or `trajectory` for those that the trajectory proposes.")
    ] = "24:28",
    translators: Annotated[int, typer.Option(help="Number of translators in place of the replaced layers.", min=1)] = 1,
    images: Annotated[
        int, typer.Option("--pictures", help="Number of held-out images to evaluate on, of 500.", min=2)
    ] = 250,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of samples.", min=0)] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting key=value of every training run, such as zero=zero2; repeatable."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="First remove an earlier run in --out.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the whole method on a model of 135M parameters, from trajectory to report, on a CPU or a GPU.

    Finished steps are skipped when the same command is given again, so it may be interrupted at any time.
    launch/quickstart.sh also installs the project and makes the demo's data first.
    """
    from zero_ds.cluster.pipeline import Pipeline, start_fresh
    from zero_ds.cluster.quickstart import Quickstart

    if fresh:
        start_fresh(out)
    if not (demo / "data/train.json").is_file():
        raise ConfigError(f"{demo} holds no demo data; make them with: zero-ds demo --out {demo}")
    run = Quickstart(out, demo, str(LLM), replace, steps_scale, seed, translators, images, tuple(overrides or ()))
    steps = run.main_steps()
    if controls:
        steps += run.control_steps()
    steps.append(run.report_step(controls))
    Pipeline(out, steps, verbose=verbose).run()
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))["findings"]
    print("\n" + "\n".join(textwrap.fill(sentence, 100) for sentence in found) + "\n")
    print(f"Report: {out / 'report.html'}   TensorBoard: launch/tensorboard.sh {out}   Model: {out / 'export'}")
