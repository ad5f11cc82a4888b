"""`zero-ds pipeline`: the whole route for a model of the recipes, as a chain of public commands."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.cluster.pipeline import Pipeline, Step, start_fresh
from zero_ds.config.loading import load_run, recipe_names
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError, did_you_mean

COMMIT = 900.0
"""Seconds that ranks on many machines get for the step they are in and a commit, once asked to stop."""
OWN = ("out", "surrogate", "init_from", "continue_from")
"""Entries of a run that the pipeline sets itself."""


def pipeline(
    model: Annotated[str, typer.Argument(help="Folder of recipes, such as smollm2-135m or llama-3.1-8b.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for every training stage.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; runs/MODEL if left out.")] = None,
    replace: Annotated[
        str | None,
        typer.Option(help="Layers to replace, first:last, or `trajectory`; left out, those that the recipes name."),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts for the trajectory; left out, the first data of the first stage.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Texts that the trajectory reads.", min=1)] = 300,
    hostfile: Annotated[Path | None, typer.Option(help="Machines for the training stages.")] = None,
    include: Annotated[str | None, typer.Option(help="As for launch/train.sh.")] = None,
    exclude: Annotated[str | None, typer.Option(help="As for launch/train.sh.")] = None,
    master_addr: Annotated[str | None, typer.Option("--master_addr", help="As for launch/train.sh.")] = None,
    master_port: Annotated[int | None, typer.Option("--master_port", help="As for launch/train.sh.")] = None,
    ssh_port: Annotated[int | None, typer.Option("--ssh_port", help="As for launch/train.sh.")] = None,
    forward: Annotated[list[str] | None, typer.Option(help="As for launch/train.sh; repeatable.")] = None,
    max_restarts: Annotated[int, typer.Option(help="As for launch/train.sh, for each stage.", min=0)] = 0,
    ranks: Annotated[int | None, typer.Option(help="As for launch/train.sh.", min=1)] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove an earlier run in --out first.")] = False,
    dry_run: Annotated[bool, typer.Option("-n", "--dry-run", help="Print what would run, and stop.")] = False,
) -> None:
    """Trajectory, surrogate, training stages, export: what is finished is skipped, what was interrupted goes on."""
    options: list[str] = []
    for name, value in (
        *(("--hostfile", hostfile), ("--include", include), ("--exclude", exclude), ("--master_addr", master_addr)),
        *(("--master_port", master_port), ("--ssh_port", ssh_port), ("--ranks", ranks)),
        *(("--max-restarts", max_restarts or None), *(("--forward", name) for name in forward or ())),
    ):
        options += [name, str(value)] if value is not None else []
    folder = out or Path("runs") / model
    steps = plan(model, folder, tuple(overrides or ()), tuple(options), replace, texts, samples)
    if dry_run:
        for step in steps:
            print(*(f"+ {shlex.join(command)}" for command in step.commands), sep="\n")
        return
    if not Path("launch/train.sh").is_file():
        raise ConfigError(f"there is no launch/train.sh in {Path.cwd()}; go to the folder of the project first (cd).")
    if hostfile is not None:
        from zero_ds.cluster.hostfile import read_hostfile

        read_hostfile(hostfile, include or "", exclude or "")  # what is wrong with it ends it here, not hours later
    if fresh:
        start_fresh(folder)
    Pipeline(folder, steps).run()
    print(f"Model: {folder / 'export'}   TensorBoard: launch/tensorboard.sh {folder}")


def plan(
    model: str,
    out: Path,
    overrides: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    replace: str | None = None,
    texts: Path | None = None,
    samples: int = 300,
) -> list[Step]:
    """The steps from a model's recipes; `options` are those of launch/train.sh.

    Raises:
        ConfigError: no such model, a setting that the pipeline makes itself, no texts for the trajectory, no range.
    """
    for override in overrides:
        if (key := override.partition("=")[0]) in OWN:
            raise ConfigError(f"the pipeline sets {key} itself; choose the folder of all results with --out.")
    chain = chain_of(model, overrides)
    first, last = next(iter(chain.values())), list(chain.values())[-1]
    named = next(run.surrogate for run in chain.values() if run.surrogate)
    layers = replace or _named_layers(named) or "trajectory"
    if replace and layers != "trajectory":
        from zero_ds.model.layer_plan import Replaced

        Replaced.parse(layers)  # what is no range ends it here
    surrogate = out / ("surrogate" if layers == "trajectory" else f"T{layers.replace(':', '-')}")
    cut = ("--from-trajectory", str(out / "trajectory")) if layers == "trajectory" else ("--replace", layers)
    if texts is None and not first.data.sources:
        raise ConfigError("the first stage names no data; say which texts the trajectory reads: --texts FILE.")
    read = str(texts or first.data.sources[0].path)
    target = first.target
    steps = [
        _ours(
            "trajectory",
            out / "trajectory/trajectory.json",
            ("trajectory", "--model", target, "--data", read, "--samples", str(samples)),
            ("--out", str(out / "trajectory")),
        ),
        _ours(
            "surrogate",
            surrogate / "surrogate.json",
            ("surrogate", "--target", target, *cut, "--out", str(surrogate)),
        ),
    ]
    by_out = {run.out: name for name, run in chain.items()}
    for name, run in chain.items():
        starts = ", ".join(str(out / by_out.get(start, start)) for start in run.init_from)
        settings = [f"out={out / name}", f"init_from=[{starts}]", *overrides]
        settings += [f"surrogate={surrogate}"] if run.surrogate else []
        command = ("bash", "launch/train.sh", f"{model}/{name}", *settings)
        patience = COMMIT if "--hostfile" in options else None
        done = (out / name / "latest",)
        # other machines are no other run
        steps.append(Step(name, ((*command, *options),), 600.0, done, same=(command,), patience=patience))
    steps.append(
        _ours(
            "export",
            out / "export/proof.json",
            ("export", "--weights", str(out / list(chain)[-1]), "--target", target, "--out", str(out / "export")),
            ("--dtype", "bfloat16" if last.precision == "bf16" else "float32"),
        )
    )
    return steps


def chain_of(model: str, overrides: tuple[str, ...] = ()) -> dict[str, RunConfig]:
    """The training stages of a model up to `decoder`, by the recipe's name, each after those that it starts from.

    Raises:
        ConfigError: no recipes for such a model.
    """
    models = {name.partition("/")[0] for name in recipe_names()}
    if model not in models:
        raise ConfigError(f"there are no recipes for a model '{model}'{did_you_mean(model, sorted(models))}")
    recipes = [name for name in recipe_names() if name.startswith(f"{model}/")]
    by_out = {load_run(name).out: name for name in recipes}
    chain: dict[str, RunConfig] = {}

    def add(recipe: str) -> None:
        run = load_run(recipe, list(overrides))
        for start in run.init_from:
            if start in by_out and by_out[start].partition("/")[2] not in chain:
                add(by_out[start])
        chain[recipe.partition("/")[2]] = run

    add(f"{model}/decoder")
    return chain


def _named_layers(surrogate: str) -> str | None:
    """`17:30` of a folder T17-30, as the recipes name their surrogates."""
    found = re.fullmatch(r"T(\d+)-(\d+)", Path(surrogate).name)
    return f"{found[1]}:{found[2]}" if found else None


def _ours(name: str, produces: Path, *words: tuple[str, ...]) -> Step:
    command = (sys.executable, "-m", "zero_ds.cli", *(word for group in words for word in group))
    return Step(name, (command,), 60.0, (produces,))
