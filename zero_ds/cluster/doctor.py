"""`zero-ds doctor`: faults of the machines of a run, found by asking each of them and then by starting ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from zero_ds.cluster import checks
from zero_ds.cluster.checks import FAIL, OK, Check, Wanted
from zero_ds.cluster.devices import seen_as
from zero_ds.cluster.environment import forwarded
from zero_ds.cluster.machines import Cluster, deepspeed_command
from zero_ds.cluster.probe import gpus
from zero_ds.config.schema import RunConfig
from zero_ds.data.archives import split_root
from zero_ds.runtime.environment import DEVICES
from zero_ds.runtime.errors import ConfigError

RANKS_TIMEOUT = 240.0
"""Seconds that the ranks get for their tests; most of it is for loading libraries from a slow disk."""
TOO_LATE = f"no result in {RANKS_TIMEOUT:.0f} s; are all ports open between the machines?"


def read_by(run: RunConfig) -> list[str]:
    """Returns the local files and folders that a run reads, without names that may be ids of the hub."""
    names = [run.target, run.surrogate, *run.starts, run.data.chat_template, run.data.prepared]
    if run.encoder is not None:
        names.append(run.encoder.path)
    for source in (*run.data.sources, *run.validation.sources):
        root = source.root
        archive = split_root(root) if root else None
        if archive:  # the folder, because several archives have a pattern
            root = str(Path(archive[0]).parent)
        names += [source.path, root]
    distinct = dict.fromkeys(name for name in names if name)
    return [name for name in distinct if _is_local(name)]


def _is_local(name: str) -> bool:
    """Returns whether a name is surely a path: ids of the hub have the form `owner/name`."""
    return name.startswith(("/", "~", ".")) or Path(name).exists() or name.count("/") != 1


def look(cluster: Cluster, wanted: Wanted) -> list[Check]:
    """Returns every check that needs no ranks.

    wanted: its `shared` folder is an absolute path.

    Raises:
        ConfigError: this machine cannot write into the shared folder.
    """
    sent = forwarded(os.environ, cluster.named)
    shared = Path(wanted.shared)
    with _token(shared, wanted.token):
        here, answers = cluster.look(
            shared=wanted.shared,
            token=wanted.token,
            paths=list(wanted.paths),
            disks=[wanted.shared, "/tmp"],
            env=list(wanted.env),
        )
        seen = {path.name.removeprefix(f"{wanted.token}.") for path in shared.glob(f"{wanted.token}.*")}
    wrote = [answer.host for answer in answers if answer.content and answer.content["wrote"]]
    wanted = dataclasses.replace(wanted, missing_tokens=tuple(host for host in wrote if host not in seen))
    if cluster.devices and answers[0].content:
        answers[0].content["devices"] = seen_as(cluster.devices, answers[0].content["devices"])
    found = checks.before_launch(here, answers, cluster.ssh)
    if here.content is not None:
        found += checks.of_machines(cluster.nodes, answers, wanted, sent)
    return found


@contextmanager
def _token(folder: Path, token: str) -> Iterator[None]:
    """Writes a file for the machines to look for; at the end removes it, the machines' own, and folders made for it."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).write_text(token)
    except OSError as error:
        raise ConfigError(f"nothing can be written into {folder} ({error.strerror}); name another --shared.") from None
    try:
        yield
    finally:
        for path in folder.glob(f"{token}*"):
            path.unlink(missing_ok=True)
        for place in made:
            with contextlib.suppress(OSError):  # not empty: something else has written into it meanwhile
                place.rmdir()


def try_ranks(cluster: Cluster, zero: str, nvme_path: str | None = None) -> list[Check]:
    """Starts ranks as a run would, and checks the network and the numbers that they compute (selftest.py).

    zero, nvme_path: as in a recipe.

    Raises:
        ConfigError: a run cannot start on the machines.
    """
    from zero_ds.cluster import selftest

    request = selftest.encode({"zero": zero, "precision": precision_of(zero), "nvme_path": nvme_path})
    options, environment = _launch_here(cluster) if cluster.ssh.local else _launch_on_machines(cluster)
    command = deepspeed_command(["--log_level", "warning", *options], [], "zero_ds.cluster.selftest", [request])
    command[0] = str(Path(sys.executable).with_name("deepspeed"))
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=RANKS_TIMEOUT)
    except subprocess.TimeoutExpired:
        output = TOO_LATE
    finally:
        _kill_tree(process)
        if not cluster.ssh.local:
            cluster.end()
            cluster.forget()
    return _verdict(output, time.monotonic() - started)


def _verdict(output: str, seconds: float) -> list[Check]:
    """Returns the checks that follow from the output of the ranks; `seconds` is the time that they took."""
    from zero_ds.cluster import selftest

    lines = [line.split(selftest.MARK, 1)[1] for line in output.splitlines() if selftest.MARK in line]
    result: dict[str, Any] = json.loads(lines[0]) if lines else {}
    if lines and "error" not in result:
        return judged(result, seconds)
    if "error" in result:
        return [Check("ranks", FAIL, result["error"], "correct that setting; a run would be refused as well")]
    if output == TOO_LATE:
        remedy = "open all ports between the machines; NCCL_DEBUG=INFO tells more about the network"
        return [Check("ranks", FAIL, output, remedy)]
    last_lines = " | ".join(output.strip().splitlines()[-3:])[:600]
    return [Check("ranks", FAIL, last_lines or "they ended without a word", "read their output")]


def precision_of(zero: str) -> str:
    """Returns the precision in which numbers are compared: fp32, unless the DeepSpeed JSON insists on another one."""
    if not zero.endswith(".json"):
        return "fp32"
    try:
        content = json.loads(Path(zero).read_text(encoding="utf-8-sig"))
        insisted = [name for name in ("bf16", "fp16") if content.get(name, {}).get("enabled") is True]
    except (OSError, ValueError, AttributeError):  # the ranks report the fault
        return "fp32"
    return insisted[0] if insisted else "fp32"


def judged(result: dict[str, Any], seconds: float) -> list[Check]:
    """Returns the measurements of the ranks (`selftest.run`) as lines of the table."""
    ranks = Check("ranks", OK, f"{result['ranks']} on {result['device']}, {seconds:.0f} s with their start")
    return [ranks, _all_reduce_check(result), _numbers_check(result)]


def _all_reduce_check(result: dict[str, Any]) -> Check:
    if not result["sum_is_right"]:
        wrong = f"the sum over {result['ranks']} ranks is wrong"
        return Check("all-reduce", FAIL, wrong, "check the network driver and the version of NCCL")
    size = f"{result['mebibytes']:.0f} MiB in {1000 * result['seconds']:.1f} ms"
    return Check("all-reduce", OK, f"{size}, {result['gigabytes_per_second']:.2f} GB/s bus bandwidth")


def _numbers_check(result: dict[str, Any]) -> Check:
    pairs = zip(result["losses"], result["losses_zero0"], strict=True)
    losses = ", ".join(f"{ours:.6f} and {reference:.6f}" for ours, reference in pairs)
    found = f"{result['zero']} compared with zero0, {result['precision']}: losses {losses}; "
    found += f"gradient apart by {result['gradient_difference']:.1e}"
    if result["missing_gradients"]:
        found += f"; no gradient of {result['missing_gradients'][0]}"
    if result["agrees"]:
        return Check("numbers", OK, found)
    remedy = "take another zero=; this JSON trains wrongly with these versions of DeepSpeed and torch"
    return Check("numbers", FAIL, found, remedy)


def _launch_here(cluster: Cluster) -> tuple[list[str], dict[str, str]]:
    """Returns options of `deepspeed` and environment for ranks on this machine, as launch/train.sh sets them."""
    from zero_ds.runtime.ports import free_port

    slots = cluster.nodes[0].slots
    ranks = len(slots)
    environment = dict(os.environ)
    if gpus() and environment.get("DS_ACCELERATOR") != "cpu":
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        environment[DEVICES] = ",".join(cluster.devices or map(str, slots))
    else:
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    port = str(cluster.port or free_port())
    return ["--hostfile", os.devnull, "--num_gpus", str(ranks), "--master_port", port], environment


def _launch_on_machines(cluster: Cluster) -> tuple[list[str], dict[str, str]]:
    """Returns options of `deepspeed` and environment for ranks on the machines of a hostfile.

    They name a copy of the hostfile, next to the environment file, that holds the chosen machines alone.
    """
    more, environment, _ = cluster.prepare()
    hostfile = Path(environment["DS_ENV_FILE"]).with_name("hostfile")
    hostfile.write_text("".join(f"{node.host} slots={max(node.slots) + 1}\n" for node in cluster.nodes))
    included = "@".join(f"{node.host}:{','.join(map(str, node.slots))}" for node in cluster.nodes)
    options = ["--hostfile", str(hostfile), "--include", included]
    if cluster.ssh.port:
        options += ["--ssh_port", str(cluster.ssh.port)]
    return [*options, *more], environment


def _kill_tree(process: subprocess.Popen[str]) -> None:
    """Kills a process and everything below it, on this machine."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(process.pid)
        for each in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.Error):
                each.kill()
    process.wait()
