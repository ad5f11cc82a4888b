"""`zero-ds pipeline`: the whole method for a model of the recipes, as a chain of public commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.cli.options import VerboseOption
from zero_ds.runtime.errors import ConfigError


def pipeline(
    model: Annotated[
        str,
        typer.Argument(help="Folder of recipes: smollm2-135m, llama-3.1-8b, or the path of your own (zero-ds init)."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of every training stage as key=value, such as zero=zero2.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of all results. Default: runs/MODEL.")] = None,
    replace: Annotated[
        str | None,
        typer.Option(
            help="Layers to replace, first:last; or `trajectory` for those that it proposes. Default: the layers that "
            "the recipes name."
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts for the trajectory. Default: the first data of the first stage.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of texts that the trajectory reads.", min=1)] = 300,
    hostfile: Annotated[
        Path | None, typer.Option(help="Machines for the training stages, one `NAME slots=GPUS` a line.")
    ] = None,
    include: Annotated[
        str | None, typer.Option(help="Machines and devices of the hostfile to use, such as 'node1:0,1@node2'.")
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Machines and devices of the hostfile to leave out.")] = None,
    master_addr: Annotated[
        str | None, typer.Option("--master_addr", help="Address where the ranks meet. Default: the first machine.")
    ] = None,
    master_port: Annotated[
        int | None, typer.Option("--master_port", help="Port where the ranks meet. Default: a free one.")
    ] = None,
    ssh_port: Annotated[int | None, typer.Option("--ssh_port", help="Port of ssh on the machines.")] = None,
    forward: Annotated[
        list[str] | None,
        typer.Option(help="Name of one more variable to forward to the machines, such as a secret; repeatable."),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(help="Restarts of a stage from its last checkpoint after a rank or machine has died.", min=0)
    ] = 0,
    ranks: Annotated[
        int | None, typer.Option(help="Without a hostfile: number of GPUs, or of CPU ranks, to train on.", min=1)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="First remove an earlier run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("-n", "--dry-run", help="Print the commands that would run, and stop.")
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the whole method for one model: trajectory, surrogate, training stages, export.

    Finished steps are skipped, and an interrupted training stage resumes from its last checkpoint, when the same
    command is given again. Training uses all machines of the hostfile; the other steps run on this one.

    Example: zero-ds pipeline llama-3.1-8b --hostfile hostfile --max-restarts 3
    """
    from zero_ds.cluster.pipeline import Pipeline, start_fresh
    from zero_ds.cluster.route import Route

    options: dict[str, object] = {
        "--hostfile": hostfile,
        "--include": include,
        "--exclude": exclude,
        "--master_addr": master_addr,
        "--master_port": master_port,
        "--ssh_port": ssh_port,
        "--ranks": ranks,
        "--max-restarts": max_restarts or None,
    }
    launch_options = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    for name in forward or ():
        launch_options += ["--forward", name]
    folder = out or Path("runs") / Path(model).name
    route = Route(model, folder, tuple(overrides or ()), tuple(launch_options), replace, texts, samples)
    steps = route.steps()
    if dry_run:
        for step in steps:
            for command in step.commands:
                print(f"+ {shlex.join(command)}")
        return
    if not Path("launch/train.sh").is_file():
        raise ConfigError(f"launch/train.sh is not in {Path.cwd()}; go to the folder of the project first (cd).")
    if hostfile is not None:
        from zero_ds.cluster.hostfile import read_hostfile

        read_hostfile(hostfile, include or "", exclude or "")  # refuses a faulty one now instead of hours later
    if fresh:
        start_fresh(folder)
    Pipeline(folder, steps, verbose=verbose).run()
    print(f"Model: {folder / 'export'}   TensorBoard: launch/tensorboard.sh {folder}")
