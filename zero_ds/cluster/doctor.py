"""What would go wrong with a run, on each of its machines: looked at side by side, then tried by ranks."""

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
from zero_ds.cluster.environment import forwarded
from zero_ds.cluster.machines import Cluster, deepspeed_command
from zero_ds.cluster.probe import gpus
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError

RANKS_TIMEOUT = 240.0
"""Seconds that the ranks get for their tests; most of it is for loading libraries from a slow disk."""


def read_by(run: RunConfig) -> list[str]:
    """Local files and folders that a run reads; what may be a hub id is left out."""
    names = [run.target, run.surrogate, *run.starts, run.data.chat_template]
    names += [run.encoder.path if run.encoder else None]
    names += [name for source in run.data.sources for name in (source.path, source.root)]
    there = dict.fromkeys(name for name in names if name)
    return [n for n in there if n.startswith(("/", "~", ".")) or Path(n).exists() or n.count("/") != 1]


def look(cluster: Cluster, wanted: Wanted) -> list[Check]:
    """Everything that can be known without ranks; `wanted.shared` is an absolute path.

    Raises:
        ConfigError: the shared folder cannot be written by this machine.
    """
    sent = forwarded(os.environ, cluster.named)
    place = Path(wanted.shared)
    with _token(place, wanted.token):
        here, answers = cluster.look(
            shared=wanted.shared,
            token=wanted.token,
            paths=list(wanted.paths),
            disks=[wanted.shared, "/tmp"],
            env=list(wanted.env),
        )
        seen = {path.name.removeprefix(f"{wanted.token}.") for path in place.glob(f"{wanted.token}.*")}
    unseen = tuple(a.host for a in answers if a.content and a.content["wrote"] and a.host not in seen)
    found = checks.before_launch(here, answers, cluster.ssh)
    wanted = dataclasses.replace(wanted, missing_tokens=unseen)
    return found + (checks.of_machines(cluster.nodes, answers, wanted, sent) if here.content else [])


@contextmanager
def _token(place: Path, token: str) -> Iterator[None]:
    """A file that the machines look for; what they and this have made is removed."""
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / token).write_text(token)
    except OSError as error:
        raise ConfigError(f"nothing can be written into {place} ({error.strerror}); name another --shared.") from None
    try:
        yield
    finally:
        for path in place.glob(f"{token}*"):
            path.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()


def try_ranks(cluster: Cluster, zero: str, nvme_path: str | None = None) -> list[Check]:
    """All-reduce, and numbers against ZeRO-0, by ranks that are started as those of a run are.

    Raises:
        ConfigError: machines on which a run cannot start.
    """
    from zero_ds.cluster import selftest

    word = selftest.encode({"zero": zero, "precision": precision_of(zero), "nvme_path": nvme_path})
    options, environment = _local(cluster) if cluster.ssh.local else _remote(cluster)
    command = deepspeed_command(["--log_level", "warning", *options], [], "zero_ds.cluster.selftest", [word])
    command[0] = str(Path(sys.executable).with_name("deepspeed"))
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=RANKS_TIMEOUT)
    except subprocess.TimeoutExpired:
        said = f"no result in {RANKS_TIMEOUT:.0f} s; is the way between the machines open for all ports?"
    finally:
        _end(process)
        if not cluster.ssh.local:
            cluster.end()
            cluster.forget()
    lines = [line.split(selftest.MARK, 1)[1] for line in said.splitlines() if selftest.MARK in line]
    result: dict[str, Any] = json.loads(lines[0]) if lines else {}
    if not lines or "error" in result:
        why = result.get("error") or " | ".join(said.strip().splitlines()[-3:])[:600] or "they ended without a word"
        return [Check("ranks", FAIL, why, "see what they say; NCCL_DEBUG=INFO tells more of the network")]
    return judged(result, time.monotonic() - started)


def precision_of(zero: str) -> str:
    """In which numbers are compared: float32, unless the DeepSpeed JSON insists on bfloat16."""
    if not zero.endswith(".json"):
        return "fp32"
    try:
        section = json.loads(Path(zero).read_text(encoding="utf-8")).get("bf16", {})
        return "bf16" if section.get("enabled") is True else "fp32"
    except (OSError, ValueError, AttributeError):  # the ranks say what is wrong with it
        return "fp32"


def judged(result: dict[str, Any], seconds: float) -> list[Check]:
    """What ranks have measured (selftest.run), as lines of the table."""
    right, alike = result["sum_is_right"], result["alike"]
    size = f"{result['mebibytes']:.0f} MiB in {1000 * result['seconds']:.1f} ms"
    speed = f"{size}, {result['gigabytes_per_second']:.2f} GB/s bus bandwidth"
    losses = ", ".join(f"{a:.6f} and {b:.6f}" for a, b in zip(result["losses"], result["losses_zero0"], strict=True))
    gap = f"losses {losses}; gradient apart by {result['gradient_difference']:.1e}"
    if result["missing_gradients"]:
        gap += f"; no gradient of {result['missing_gradients'][0]}"
    return [
        Check("ranks", OK, f"{result['ranks']} on {result['device']}, {seconds:.0f} s with their start"),
        Check(
            "all-reduce",
            OK if right else FAIL,
            speed if right else f"the sum over {result['ranks']} ranks is wrong",
            "" if right else "look at the network's driver and the version of NCCL",
        ),
        Check(
            "numbers",
            OK if alike else FAIL,
            f"{result['zero']} beside zero0, {result['precision']}: {gap}",
            "" if alike else "take another zero=; this JSON trains wrongly with these versions of DeepSpeed and torch",
        ),
    ]


def _local(cluster: Cluster) -> tuple[list[str], dict[str, str]]:
    """Options of `deepspeed` and environment for ranks of this machine, as launch/train.sh has them."""
    from zero_ds.runtime.ports import free_port

    ranks = len(cluster.nodes[0].slots)
    environment = dict(os.environ)
    if not gpus():
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    port = str(cluster.port or free_port())
    return ["--hostfile", os.devnull, "--num_gpus", str(ranks), "--master_port", port], environment


def _remote(cluster: Cluster) -> tuple[list[str], dict[str, str]]:
    """The same for the machines of a hostfile, of which a copy is made beside the environment file."""
    more, environment, _ = cluster.prepare()
    hosts = Path(environment["DS_ENV_FILE"]).with_name("hostfile")
    hosts.write_text("".join(f"{node.host} slots={max(node.slots) + 1}\n" for node in cluster.nodes))
    only = "@".join(f"{node.host}:{','.join(map(str, node.slots))}" for node in cluster.nodes)
    port = ["--ssh_port", str(cluster.ssh.port)] if cluster.ssh.port else []
    return ["--hostfile", str(hosts), "--include", only, *port, *more], environment


def _end(process: subprocess.Popen[str]) -> None:
    """Ends what is left below a launch of this machine."""
    with contextlib.suppress(psutil.Error):
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.Error):
                each.kill()
    process.wait()
