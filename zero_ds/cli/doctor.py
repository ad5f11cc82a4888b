"""`zero-ds doctor`: what would go wrong with a run, on each of its machines, before it starts."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.runtime.errors import ConfigError

if TYPE_CHECKING:
    from zero_ds.cluster.checks import Check


def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Recipe of the run: its folder, files, ZeRO config.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of the run as key=value.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Machines; without it, this one.")] = None,
    include: Annotated[str, typer.Option(help="As for launch/train.sh.")] = "",
    exclude: Annotated[str, typer.Option(help="As for launch/train.sh.")] = "",
    ssh_port: Annotated[
        int | None, typer.Option("--ssh_port", help="As for launch/train.sh.", min=1, max=65535)
    ] = None,
    master_addr: Annotated[str, typer.Option("--master_addr", help="As for launch/train.sh.")] = "",
    master_port: Annotated[
        int | None,
        typer.Option(
            "--master_port", help="Port that the run will use; left out, it takes a free one.", min=1, max=65535
        ),
    ] = None,
    shared: Annotated[
        Path | None, typer.Option(help="Folder that all machines must see; the run's, or runs/ without a recipe.")
    ] = None,
    min_disk: Annotated[float, typer.Option(help="GiB that must be free there.", min=0)] = 10.0,
    require: Annotated[list[str] | None, typer.Option(help="A variable that must be set; repeatable.")] = None,
    forward: Annotated[list[str] | None, typer.Option(help="As for launch/train.sh; repeatable.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Without a hostfile: all GPUs, or 2 CPU ranks.", min=1)] = None,
    launch: Annotated[
        bool, typer.Option("--launch/--no-launch", help="Also start ranks: bandwidth, and numbers against ZeRO-0.")
    ] = True,
) -> None:
    """Check every machine before a run: it answers, is like the others, and computes the same numbers."""
    from zero_ds.cluster import doctor as examination
    from zero_ds.cluster.checks import FAIL, Wanted
    from zero_ds.cluster.hostfile import THIS_MACHINE, Node, read_hostfile
    from zero_ds.cluster.machines import Cluster, files_of
    from zero_ds.cluster.probe import gpus
    from zero_ds.cluster.ssh import Ssh
    from zero_ds.config.loading import load_run

    if recipe is not None and "=" in recipe:
        raise ConfigError(f"'{recipe}' stands where the recipe should; name the recipe before its settings.")
    if hostfile is None and (include or exclude):
        raise ConfigError("--include and --exclude choose machines of a hostfile; name it with --hostfile.")
    if hostfile is not None and ranks is not None:
        raise ConfigError(f"--ranks is for this machine alone; set slots={ranks} in {hostfile}, or --include.")
    run = load_run(recipe, overrides) if recipe else None
    files = files_of(recipe, run) if recipe and run else ()
    options = ["--include", include, "--exclude", exclude, "--master_addr", master_addr]
    options += ["--hostfile", str(hostfile)] if hostfile else []
    for name, number in (("--ssh_port", ssh_port), ("--master_port", master_port)):
        options += [name, str(number)] if number is not None else []
    cluster = Cluster.of(options, forward or (), files)
    if cluster is None:
        count = ranks or (0 if os.environ.get("DS_ACCELERATOR") == "cpu" else len(gpus())) or 2
        nodes = read_hostfile(hostfile, include, exclude) if hostfile else [Node(THIS_MACHINE, tuple(range(count)))]
        cluster = Cluster(nodes, Ssh(local=True), port=master_port, named=tuple(forward or ()), files=files)
    place = shared or (Path(run.out) if run else Path("runs"))
    wanted = Wanted(
        shared=str(place.expanduser().absolute()),
        token=f".zero_ds-doctor-{uuid.uuid4().hex[:12]}",
        paths=tuple(examination.read_by(run)) if run else (),
        disk=min_disk,
        env=tuple(require or ()),
        port=master_port,
    )
    started = time.monotonic()
    found = examination.look(cluster, wanted)
    count = sum(len(node.slots) for node in cluster.nodes)
    print(f"{', '.join(cluster.hosts)}: {count} ranks, looked at in {time.monotonic() - started:.1f} s")
    _show(found)
    if not any(check.status == FAIL for check in found) and launch:
        print("starting the ranks", flush=True)
        tried = examination.try_ranks(cluster, run.zero if run else "zero3", run.nvme_path if run else None)
        _show(tried)
        found += tried
    if failed := [check.what for check in found if check.status == FAIL]:
        print(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}")
        raise typer.Exit(1)


def _show(found: list[Check]) -> None:
    for check in found:
        print(f"{check.status:>4}  {check.what:15}{check.found}")
        if check.remedy:
            print(f"{'':21}-> {check.remedy}", flush=True)
