"""Runs over two machines, which are two loopback addresses served by a private sshd (loopback.py).

The tests cover DeepSpeed's own launcher over pdsh and ssh, faults of a machine, restarts, Ctrl-C and `zero-ds doctor`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks, train_all
from loopback import HOSTS, Machines, missing
from pace import scaled
from places import ROOT
from safetensors.torch import load_file
from typer.testing import CliRunner

from zero_ds.cli import main as cli
from zero_ds.cluster.ssh import Answer, Ssh
from zero_ds.config.schema import RunConfig
from zero_ds.runtime import failure
from zero_ds.training.checkpoint.checkpoint import find_checkpoint

ODD = """it's 100% "$HOME" `true` \\ ; & fine"""
"""A value with characters that every shell on the way to the ranks would interpret."""
SILENCE = round(scaled(12))
STEPS = 18
ARITHMETIC = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""Variables that are forwarded if they are set, so that all ranks round in the same way."""

MUST = os.environ.get("ZERO_DS_TEST_NODES") == "must"
"""Set by .ci/run: if set, these tests fail instead of being skipped on a machine without sshd."""
pytestmark = [
    pytest.mark.skipif(missing() is not None and not MUST, reason=missing() or ""),
    pytest.mark.timeout(1800),  # many launches, on machines that may be busy
]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    assert missing() is None, missing()
    both = Machines(tmp_path_factory.mktemp("ssh"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PDSH_SSH_ARGS_APPEND", both.ssh_options)
        patience = scaled(100)  # a busy machine is not a dead one
        patch.setenv("ZERO_DS_NODE_PATIENCE", str(patience))  # the launcher's
        patch.setattr("zero_ds.cluster.ssh.PATIENCE", patience)
        patch.setattr("zero_ds.cluster.doctor.RANKS_TIMEOUT", scaled(240))
        yield both
    both.stop()


# -- doctor ------------------------------------------------------------------------------------------------------------


def doctor(machines: Machines, *words: str) -> tuple[int, str]:
    """Runs `zero-ds doctor` with a new shared folder; returns its exit status and output."""
    shared = ("--shared", str(machines.folder / "shared"), "--min-disk", "0.001")
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        done = CliRunner().invoke(cli.app, ["doctor", "--hostfile", str(machines.hostfile), *shared, *words])
    finally:
        os.chdir(here)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def failed(said: str) -> list[str]:
    return re.findall(r"^FAIL  (.*?)  ", said, flags=re.MULTILINE)


def test_doctor_has_nothing_to_say_of_two_sound_machines(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ranks on both: bandwidth is measured, and ZeRO-3 computes the same as ZeRO-0.

    Machines are asked in parallel: every question waits until all machines are asked.
    """
    ask, ask_one = Ssh.ask, Ssh._ask
    asked: dict[Ssh, threading.Barrier] = {}

    def ask_all(self: Ssh, hosts: list[str], *words: Any, **options: Any) -> list[Answer]:
        # another Ssh object asks this machine meanwhile
        asked[self] = threading.Barrier(len(hosts), timeout=scaled(60))
        return ask(self, hosts, *words, **options)

    def together(self: Ssh, *words: Any) -> Answer:
        asked[self].wait()
        return ask_one(self, *words)

    monkeypatch.setattr(Ssh, "ask", ask_all)
    monkeypatch.setattr(Ssh, "_ask", together)
    status, said = doctor(machines, "--forward", "DS_ACCELERATOR")
    assert status == 0 and not failed(said), said
    for line in ("ssh            2 machines", "ranks          2 on cpu", "GB/s bus bandwidth"):
        assert line in said
    assert re.search(
        r"ok  numbers +zero3 compared with zero0, fp32: losses (\S+) and \1, .* apart by \d\.\de-0[5-9]", said
    ), said
    assert re.search(r"looked at in [\d.]+ s", said) and 2 in [barrier.parties for barrier in asked.values()]
    assert not (machines.folder / "shared").exists(), "the folder that it made for this check is gone"


FAULTS: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "no interpreter": (
        f'command="${{command//"{sys.executable}"/nowhere}}"',
        (),
        "interpreter",
        "127.0.0.3: .* cannot be run",
    ),
    "other version": ("PACKAGES", (), "packages", r"127.0.0.3: transformers 0\.0\.1, here \d"),
    "other commit": (
        "input='s#zero_ds/\\*\\*/\\*\\.py#zero_ds/*.py#'",
        (),
        "project",
        "127.0.0.3: commit .* its files differ",
    ),
    "folder not shared": ("input='s#/shared\"#/nowhere\"#'", (), "shared folder", "127.0.0.3: does not see what this"),
    "missing folder": (
        "input='s#/clip#/nowhere#g'",
        ("RECIPE",),
        "paths",
        "127.0.0.3: not found: .*/nowhere",
    ),
    "clock": ("input='s#time.time()}#time.time() + 100}#'", (), "clocks", "127.0.0.3: (99|100) s ahead"),
    "variable": ("", ("--require", "ZERO_DS_TEST_ON_ONE"), "environment", "127.0.0.3: ZERO_DS_TEST_ON_ONE not set"),
    "other recipe": (
        "input='s#hashlib.sha256(path.read#hashlib.md5(path.read#'",
        ("RECIPE",),
        "recipe",
        r"127.0.0.3: .*run\.yaml differs",
    ),
    "disk": ("", ("--min-disk", "1e9"), "disk", "127.0.0.2: .* GiB free in .*/shared, 1e\\+09 are needed"),
}
"""Fault -> bash lines on the second machine, options of doctor, the check that fails, and its message."""


@pytest.mark.parametrize("fault", FAULTS)
def test_doctor_finds(machines: Machines, run_config: Callable[..., RunConfig], tmp_path: Path, fault: str) -> None:
    lines, options, check, words = FAULTS[fault]
    if lines == "PACKAGES":
        other = tmp_path / "packages" / "transformers-0.0.1.dist-info"
        other.mkdir(parents=True)
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
        lines = f'command="${{command//PYTHONPATH=/PYTHONPATH={other.parent}:}}"'
    if options == ("RECIPE",):
        recipe = tmp_path / "run.yaml"
        recipe.write_text(run_config("pretrain", tmp_path / "run").dump())
        options = (str(recipe),)
    with machines.fault(lines):
        status, said = doctor(machines, *options, "--no-launch")
    assert status == 1
    assert failed(said) == [check], said
    assert re.search(rf"FAIL  {check} +{words}", said), said
    assert "-> " in said, "a remedy"


def test_doctor_names_a_machine_that_does_not_answer(machines: Machines, tmp_path: Path) -> None:
    lost = tmp_path / "hostfile"
    lost.write_text(machines.hostfile.read_text() + "127.0.0.4 slots=1\n")
    status, said = doctor(machines, "--hostfile", str(lost), "--no-launch")
    assert status == 1 and failed(said) == ["ssh"] and "127.0.0.4 does not answer: " in said, said
    assert "no answer in" not in said, "doctor has not waited for the time limit"


def test_doctor_names_a_machine_that_takes_too_long(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second machine sleeps until the test is over; only its time limit is shortened."""
    ask = Ssh._ask

    def impatient(self: Ssh, host: str, program: bytes, timeout: float) -> Answer:
        return ask(self, host, program, 4.0 if host == HOSTS[1] else timeout)

    monkeypatch.setattr(Ssh, "_ask", impatient)
    with machines.fault("exec sleep 3600"):
        status, said = doctor(machines, "--no-launch")
    for pid in machines.processes(HOSTS[1]):
        os.kill(pid, signal.SIGKILL)
    assert status == 1 and failed(said) == ["ssh"] and "127.0.0.3 does not answer: no answer in 4 s" in said, said


def test_doctor_finds_a_busy_port(machines: Machines) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.2", 0))
        server.listen()
        port = server.getsockname()[1]
        status, said = doctor(machines, "--master_port", str(port), "--no-launch")
    assert status == 1 and failed(said) == ["master port"], said
    assert f"127.0.0.2: port {port} cannot be used: Address already in use" in said


def test_doctor_warns_of_a_secret_that_stays_here(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    status, said = doctor(machines, "--no-launch")
    assert status == 0 and "warn  secrets        HF_TOKEN set here, not forwarded" in said
    status, said = doctor(machines, "--no-launch", "--forward", "HF_TOKEN", "--require", "HF_TOKEN")
    assert status == 0 and "secrets" not in said and "verysecret" not in said, said


# -- runs --------------------------------------------------------------------------------------------------------------


class Run:
    """A run of `launch/train.sh` over both machines."""

    def __init__(self, config: RunConfig, machines: Machines, *options: str) -> None:
        recipe = Path(config.out).with_suffix(".yaml")
        recipe.write_text(config.dump())
        forward = [word for name in ARITHMETIC if name in os.environ for word in ("--forward", name)]
        scripts = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "ZERO_DS_SILENCE": str(SILENCE),
            "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled here, and loading the compiler takes time
            "HF_TOKEN": "hf_verysecret",
            "MLFLOW_TRACKING_TOKEN": "ml_verysecret",  # DeepSpeed exports variables that begin with MLFLOW
            "ZERO_DS_ODD": ODD,
        }
        self.out, self.machines = Path(config.out), machines
        self.said = ""
        self.process = subprocess.Popen(
            [ROOT / "launch" / "train.sh", recipe, "--hostfile", machines.hostfile, *options, *forward],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def until(self, *words: str) -> str:
        """Reads output until a line contains one of the words; returns the line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if any(word in line for word in words):
                return line
        raise AssertionError(f"the run ended before it said '{words}':\n{self.said}")

    def end(self) -> int:
        rest, _ = self.process.communicate(timeout=scaled(900))
        self.said += rest
        return self.process.returncode

    def rank_on(self, host: str) -> int:
        """Returns the process id of the rank on a machine."""
        for pid in self.machines.processes(host):
            if "zero_ds.train\0--local_rank" in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
        raise AssertionError(f"no rank on {host}:\n{self.said}")


def left_of(run: Path) -> list[str]:
    """Returns the command lines of all processes that name a run folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(run) in words:
                found.append(words)
    return found


@pytest.fixture(scope="module")
def config(run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    folders = {name: tmp_path_factory.mktemp("nodes") for name in ("two", "one")}

    def make(stage: str, hosts: str) -> RunConfig:
        changes: dict[str, Any] = {"max_steps": STEPS}
        if hosts == "two":  # to have a checkpoint to continue from
            changes["checkpoint"] = {"every_steps": 3}
        if stage == "encoder":
            changes["init_from"] = [str(folders[hosts] / "pretrain")]
        return run_config(stage, folders[hosts] / stage, zero="zero3", **changes)

    return make


@pytest.fixture(scope="module")
def one_machine(config: Callable[..., RunConfig]) -> Iterator[Callable[[str], list[list[str]]]]:
    """Trains a stage with two ranks of one machine, without ssh and faults; returns its results. The first stage
    runs while others wait for a fault."""

    def train(stage: str) -> list[list[str]]:
        return run_ranks(train_all, 2, [config(stage, "one")], timeout=500)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(train, "pretrain")
        yield lambda stage: first.result() if stage == "pretrain" else pool.submit(train, stage).result()


def first_stage_is_there(config: Callable[..., RunConfig], machines: Machines) -> None:
    """Trains the first stage on two machines, unless the test of a killed rank has done it."""
    if not (Path(config("pretrain", "two").out) / "latest").exists():
        run = Run(config("pretrain", "two"), machines)
        assert run.end() == 0, run.said


def same(config: Callable[..., RunConfig], stage: str, one_machine: Callable[[str], list[list[str]]]) -> None:
    """Checks that weights and loss curves on two machines equal those on one."""
    assert one_machine(stage) == [[f"step-{STEPS:06d}"]] * 2
    two, one = (Path(config(stage, hosts).out) for hosts in ("two", "one"))
    curves = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (two, one)]
    assert [line["step"] for line in curves[0]] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in curves[0]] == pytest.approx([line["loss"] for line in curves[1]], rel=1e-5)
    ours, theirs = (load_file(find_checkpoint(out).folder / "weights.safetensors") for out in (two, one))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5)


def nothing_is_left(run: Run) -> None:
    left = [*left_of(run.out), *(pid for host in HOSTS for pid in run.machines.processes(host))]
    assert not left, f"{left}\n{run.said}"


def test_a_killed_rank_costs_a_restart_and_changes_nothing(
    machines: Machines, config: Callable[..., RunConfig], one_machine: Callable[[str], list[list[str]]]
) -> None:
    run = Run(config("pretrain", "two"), machines, "--max-restarts", "1", "--forward", "HF_TOKEN")
    run.until("saved checkpoint")
    rank = run.rank_on(HOSTS[1])
    environment = dict(e.split("=", 1) for e in Path(f"/proc/{rank}/environ").read_text().split("\0") if "=" in e)
    assert environment["ZERO_DS_ODD"] == ODD and environment["HF_TOKEN"] == "hf_verysecret"
    assert "MLFLOW_TRACKING_TOKEN" not in environment
    assert environment["WORLD_SIZE"] == "2" and environment["RANK"] == "1"
    assert len(left_of(run.out)) > 5 and not any("verysecret" in words for words in left_of(run.out)), "command lines"
    os.kill(rank, signal.SIGKILL)
    run.until("restart 1 of 1, from the last checkpoint")
    assert "zero-ds: the run failed: a rank ended without a word" in run.said
    assert run.end() == 0, run.said
    assert re.search(r"resumed .* after step \d+ of", run.said)
    assert "verysecret" not in run.said
    nothing_is_left(run)
    kept = Path.home() / ".cache/zero_ds/jobs"
    assert not (kept / environment["ZERO_DS_JOB"]).exists(), "no secret stays on a machine"
    same(config, "pretrain", one_machine)


def test_a_lost_machine_is_named_and_ctrl_c_ends_all_ranks(
    machines: Machines, config: Callable[..., RunConfig]
) -> None:
    """Everything on a machine stands still, its ssh connection as well: the run restarts. Ctrl-C then saves a
    checkpoint, and a second one ends all at once."""
    first_stage_is_there(config, machines)
    run = Run(config("encoder", "two"), machines, "--max-restarts", "2")
    run.until("saved checkpoint")
    options = " ".join(left_of(run.out))
    every, times = (
        int(found[1]) for word in ("Interval", "CountMax") if (found := re.search(rf"ServerAlive{word}=(\d+)", options))
    )
    assert every * times <= SILENCE, "ssh gives up on a machine before the ranks do"
    stopped = machines.processes(HOSTS[1], ssh=True)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    run.until("127.0.0.3: ssh exited with exit code 255")
    run.until("restart 1 of 2, from the last checkpoint")
    assert f"rank 1 has given no sign of life for {SILENCE} s" in run.said, run.said
    assert "(rank 1 runs on 127.0.0.3)" in run.said
    for pid in stopped:  # also the sshd processes, which do not belong to a run
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)

    run.until("saved checkpoint")
    assert machines.processes(HOSTS[0]) and machines.processes(HOSTS[1])
    run.process.send_signal(signal.SIGINT)
    assert run.end() != 0
    assert "the ranks write a checkpoint and stop after this step" in run.said and "run again to resume" in run.said
    assert "restart 2" not in run.said
    nothing_is_left(run)

    run = Run(config("encoder", "two"), machines, "--max-restarts", "2")
    run.until("127.0.0.3: ")  # its ranks are just starting
    for _ in range(2):
        run.process.send_signal(signal.SIGINT)
        time.sleep(scaled(0.3))  # so that the first one is being handled
    assert run.end() != 0 and "restart" not in run.said
    nothing_is_left(run)


@pytest.mark.slow(reason="another launch and two more runs; the first stage also proves equal weights after a restart")
def test_the_run_goes_on_to_the_same_weights(
    machines: Machines, config: Callable[..., RunConfig], one_machine: Callable[[str], list[list[str]]]
) -> None:
    """Continues the run of the test before, after its fault and its stops."""
    one_machine("pretrain")
    first_stage_is_there(config, machines)
    run = Run(config("encoder", "two"), machines)
    assert run.end() == 0, run.said
    nothing_is_left(run)
    same(config, "encoder", one_machine)


def test_what_a_restart_cannot_mend_is_not_tried_again(machines: Machines, config: Callable[..., RunConfig]) -> None:
    """A machine with other files is refused before anything starts; see test_failure.py for ranks."""
    with machines.fault("input='s#zero_ds/\\*\\*/\\*\\.py#zero_ds/*.py#'"):
        run = Run(config("encoder", "one"), machines, "--max-restarts", "3")
        assert run.end() == 2
    last = run.said.strip().splitlines()[-1]
    assert last.startswith("zero-ds: 127.0.0.3: commit ") and "bring every machine to the same git commit" in last
    assert "restart" not in run.said
    assert failure.read(run.out) is None
