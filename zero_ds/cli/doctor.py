"""`zero-ds doctor`: faults that would end a run, found on each of its machines before it starts."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.cli.options import complete_recipe
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import home_path

if TYPE_CHECKING:
    from zero_ds.cluster.checks import Check
    from zero_ds.cluster.machines import Cluster


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Recipe of the run: its folder, the files it reads, its ZeRO config.", autocompletion=complete_recipe
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of the run as key=value, such as zero=zero2.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Machines of the run, one `NAME slots=GPUS` a line. Default: this machine.")
    ] = None,
    include: Annotated[
        str, typer.Option(help="Machines and devices of the hostfile to use, such as 'node1:0,1@node2'.")
    ] = "",
    exclude: Annotated[str, typer.Option(help="Machines and devices of the hostfile to leave out.")] = "",
    ssh_port: Annotated[
        int | None, typer.Option("--ssh_port", help="Port of ssh on the machines.", min=1, max=65535)
    ] = None,
    master_addr: Annotated[
        str, typer.Option("--master_addr", help="Address where the ranks meet. Default: the first machine.")
    ] = "",
    master_port: Annotated[
        int | None,
        typer.Option("--master_port", help="Port where the ranks meet. Default: a free one.", min=1, max=65535),
    ] = None,
    shared: Annotated[
        Path | None,
        typer.Option(help="Folder that all machines must see. Default: the run's folder, or runs/ without a recipe."),
    ] = None,
    min_disk: Annotated[float, typer.Option(help="GiB that must be free in that folder.", min=0)] = 10.0,
    require: Annotated[
        list[str] | None, typer.Option(help="Name of a variable that must be set on every machine; repeatable.")
    ] = None,
    forward: Annotated[
        list[str] | None,
        typer.Option(help="Name of one more variable to forward to the machines, such as a secret; repeatable."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Without a hostfile: number of ranks. Default: all GPUs, or 2 CPU ranks.", min=1)
    ] = None,
    launch: Annotated[
        bool,
        typer.Option(
            "--launch/--no-launch", help="Also start ranks: measure their network, and compare ZeRO with ZeRO-0."
        ),
    ] = True,
) -> None:
    """Check every machine before a run: it answers, matches the others, and computes the same numbers.

    Prints one line for each check, with a remedy if it fails. The exit status is 1 if a check fails.

    Example: zero-ds doctor llama-3.1-70b/encoder --hostfile hostfile --require HF_TOKEN --forward HF_TOKEN
    """
    from zero_ds.cluster import doctor as examination
    from zero_ds.cluster.checks import FAIL, Wanted
    from zero_ds.cluster.machines import Cluster, files_of
    from zero_ds.config.loading import load_run

    if recipe is not None and "=" in recipe:
        raise ConfigError(f"'{recipe}' is in the place of the recipe; name the recipe before its settings.")
    if hostfile is None and (include or exclude):
        raise ConfigError("--include and --exclude choose machines of a hostfile; name it with --hostfile.")
    if hostfile is not None and ranks is not None:
        raise ConfigError(f"--ranks is for this machine alone; set slots={ranks} in {hostfile}, or --include.")
    run = load_run(recipe, overrides) if recipe else None
    files = files_of(recipe, run) if recipe and run else ()
    options = ["--include", include, "--exclude", exclude, "--master_addr", master_addr]
    for name, value in (("--hostfile", hostfile), ("--ssh_port", ssh_port), ("--master_port", master_port)):
        if value is not None:
            options += [name, str(value)]
    cluster = Cluster.of(options, forward or (), files)
    if cluster is None:
        cluster = _this_machine(hostfile, include, exclude, ranks, master_port, forward or (), files)
    place = shared or (Path(run.out) if run else Path("runs"))
    wanted = Wanted(
        shared=str(home_path(place).absolute()),
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
    if launch and not any(check.status == FAIL for check in found):
        print("starting the ranks", flush=True)
        tried = examination.try_ranks(cluster, run.zero if run else "zero3", run.nvme_path if run else None)
        _show(tried)
        found += tried
    failed = [check.what for check in found if check.status == FAIL]
    if failed:
        print(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}")
        raise typer.Exit(1)


def _this_machine(
    hostfile: Path | None,
    include: str,
    exclude: str,
    ranks: int | None,
    master_port: int | None,
    forward: Sequence[str],
    files: Sequence[str],
) -> Cluster:
    """Returns this machine as a cluster of one, if no hostfile exists or if it names no other machine."""
    from zero_ds.cluster.devices import devices_here
    from zero_ds.cluster.hostfile import THIS_MACHINE, Node, read_hostfile
    from zero_ds.cluster.machines import Cluster
    from zero_ds.cluster.probe import gpus
    from zero_ds.cluster.ssh import Ssh

    devices: tuple[str, ...] = ()
    if hostfile is not None:
        nodes = read_hostfile(hostfile, include, exclude)
    else:
        here = devices_here(ranks, os.environ, gpus())
        nodes, devices = [Node(THIS_MACHINE, tuple(range(here.ranks)))], here.names
    return Cluster(nodes, Ssh(local=True), port=master_port, named=tuple(forward), files=tuple(files), devices=devices)


def _show(found: list[Check]) -> None:
    for check in found:
        print(f"{check.status:>4}  {check.what:15}{check.found}")
        if check.remedy:
            print(f"{'':21}-> {check.remedy}", flush=True)
