"""The shell scripts parse and pass a linter, and train.sh prints the command that it would run."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pace
import pytest
from pace import scaled
from places import ROOT, SUPPORT

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"])
IDS = [str(path.relative_to(ROOT)) for path in SCRIPTS]
PROGRAMS = Path(sys.executable).parent
"""Folder of this environment's programs."""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=scaled(120))


@pytest.mark.parametrize("script", SCRIPTS, ids=IDS)
def test_script_parses_and_lints(script: Path) -> None:
    done = run("bash", "-n", script)
    assert done.returncode == 0, done.stderr
    done = run("shellcheck", "--shell=bash", "--external-sources", f"--source-path={ROOT / 'launch'}", script)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=IDS)
def test_script_can_be_started(script: Path) -> None:
    if script.name == "env.sh":
        return  # sourced by the others
    assert os.access(script, os.X_OK), f"chmod +x {script.relative_to(ROOT)}"
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name not in ("env.sh", "run")], ids=lambda s: s.name)
def test_script_explains_itself(script: Path) -> None:
    """--help prints the comment at the top, and does nothing else."""
    done = run(script, "--help")
    assert done.returncode == 0 and f"launch/{script.name}" in done.stdout, done.stdout + done.stderr
    assert "source" not in done.stdout


def command(*arguments: str) -> list[str]:
    """Returns the command that train.sh prints, as words."""
    done = run(ROOT / "launch" / "train.sh", *arguments, "-n")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("+ "))
    return line.removeprefix("+ ").split()


def test_train_starts_two_cpu_ranks_without_a_gpu() -> None:
    words = command("smollm2-135m/encoder", "zero=zero2", "optimizer.learning_rate=1e-4")
    assert words[0] == "deepspeed"
    module = words.index("--module")
    assert words[module:] == [
        "--module",
        "zero_ds.train",
        "smollm2-135m/encoder",
        "zero=zero2",
        "optimizer.learning_rate=1e-4",
    ]
    options = dict(zip(words[1:module:2], words[2:module:2], strict=True))
    assert options["--hostfile"] == "/dev/null"
    assert 1024 < int(options["--master_port"]) < 65536
    if not Path("/dev/nvidia0").exists():
        assert options["--num_gpus"] == "2"


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`gpus(3)`: this machine seems to have three GPUs, which nvidia-smi lists."""
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(count: int) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f'#!/bin/sh\nfor i in $(seq {count}); do echo "$((i - 1)), GPU-0$i, 143771, 143000, H200"; done\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


@pytest.mark.parametrize(
    ("count", "recipe", "settings", "ranks"),
    [
        (1, "smollm2-135m/encoder", (), None),
        (2, "smollm2-135m/encoder", (), None),
        (3, "smollm2-135m/encoder", (), "2"),
        (6, "smollm2-135m/translator", (), "4"),
        (8, "smollm2-135m/encoder", (), None),
        (8, "llama-3.1-8b/encoder", ("global_batch=12",), "6"),
        (7, "no/recipe", (), None),
    ],
)
def test_as_many_gpus_train_as_can_share_the_batch(
    gpus: Callable[[int], None], count: int, recipe: str, settings: tuple[str, ...], ranks: str | None
) -> None:
    gpus(count)
    words = command(recipe, *settings)
    assert (words[words.index("--num_gpus") + 1] if "--num_gpus" in words else None) == ranks


def test_devices_that_do_not_train_are_named(gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(3)
    done = run(ROOT / "launch" / "train.sh", "smollm2-135m/encoder", "-n")
    assert "2 of 3 devices train, because global_batch=8 is not a multiple of 3; set it to one" in done.stderr
    words = command("smollm2-135m/encoder", "--ranks", "3")
    assert words[words.index("--num_gpus") + 1] == "3", "asked for"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words = command("smollm2-135m/encoder", "global_batch=5")
    assert words[words.index("--num_gpus") + 1] == "1", "two CPU ranks cannot share five samples"


def test_what_is_printed_can_be_pasted_into_a_shell() -> None:
    odd = ["init_from=[a, b]", "data.system_prompt=it's $HOME & more"]
    done = run(ROOT / "launch" / "train.sh", "r", *odd, "-n")
    assert shlex.split(done.stdout.removeprefix("+ "))[-2:] == odd


def test_train_passes_the_launchers_options_on() -> None:
    words = command("r", "--hostfile", "hosts", "--include", "node1:0,1@node2", "--master_port", "1234", "seed=1")
    assert words[words.index("--hostfile") + 1] == "hosts"
    assert words[words.index("--include") + 1] == "node1:0,1@node2"
    assert words.count("--master_port") == 1 and "--num_gpus" not in words
    assert (
        command("r", "--hostfile=hosts", "--include=node1")[3:]
        == command(*("r", "--hostfile", "hosts", "--include", "node1"))[3:]
    ), "with = as well"
    words = command("r", "--ranks", "3")
    assert words[words.index("--num_gpus") + 1] == "3"


def test_what_goes_to_other_machines_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HF_HOME", "/caches"), ("HF_TOKEN", "hf_secret"), ("MINE", "my own"), ("OTHERS", "no")):
        monkeypatch.setenv(name, value)
    done = run(ROOT / "launch/train.sh", "r", "--hostfile", "hosts", "-n", "--max-restarts", "2", "--forward", "MINE")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    sent, withheld = last.removeprefix("forwarded to every node: ").split("; withheld, ")
    assert {"HF_HOME", "MINE", "PATH"} <= set(sent.split()) and "OTHERS" not in sent
    assert withheld == "because they look like secrets (name them with --forward): HF_TOKEN"
    assert not any(value in done.stdout for value in ("/caches", "hf_secret", "my own"))


def test_the_examples_can_be_used(tmp_path: Path) -> None:
    from zero_ds.cluster.environment import forwarded
    from zero_ds.cluster.hostfile import read_hostfile

    nodes = read_hostfile(ROOT / "launch/hostfile.example")
    assert len(nodes) == 16 and all(len(node.slots) == 8 for node in nodes)
    done = run("shellcheck", ROOT / "launch/env.example")
    assert done.returncode == 0, done.stdout
    # every variable in it, also those in comments, reaches the machines
    text = (ROOT / "launch/env.example").read_text()
    names = set(re.findall(r"^(?:# )?export (\w+)=", text, flags=re.MULTILINE)) - {"HF_TOKEN", "ZERO_DS_FORWARD"}
    assert len(names) > 10 and set(forwarded(dict.fromkeys(names, "x")).plain) == names


def test_slurm_writes_a_hostfile_and_calls_the_same_script(tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    done = subprocess.run(
        ["bash", ROOT / "launch/slurm.sbatch", "smollm2-135m/encoder", "--max-restarts", "2", "seed=1", "-n"],
        env={
            **os.environ,
            **job,
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "PATH": f"{scontrol.parent}:{PROGRAMS}:/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        timeout=scaled(120),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/hostfile-7").read_text() == "n1 slots=4\nn2 slots=4\n"
    assert "+ deepspeed --log_level warning --hostfile runs/hostfile-7 --module zero_ds.train" in done.stdout


def test_ci_does_not_let_the_tests_over_two_hosts_be_skipped(tmp_path: Path) -> None:
    """Without sshd, a plain run says what to install and skips; CI fails. (.ci/run sets the variable.)"""
    assert "ZERO_DS_TEST_NODES=must" in (ROOT / ".ci/run").read_text()
    code = (
        "import os, pytest, sys\n"
        f"sys.path.insert(0, {str(SUPPORT)!r})\n"
        "import loopback\n"
        "loopback.SBIN, os.environ['PATH'] = '', '/nowhere'\n"
        "for must in ('', 'must'):\n"
        "    os.environ['ZERO_DS_TEST_NODES'] = must\n"
        "    sys.modules.pop('test_nodes', None)\n"
        "    status = pytest.main(['-p', 'no:cacheprovider', '-rs', 'test_nodes.py', '-k', 'busy'])\n"
        "    print(f'status {int(status)}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        cwd=ROOT / "tests/end_to_end",
        capture_output=True,
        text=True,
        timeout=scaled(200),
    )
    plain, must, _ = done.stdout.split("status ")
    assert "install openssh-client, openssh-server, pdsh" in plain and "1 skipped" in plain, done.stdout + done.stderr
    assert must.startswith("0") and "AssertionError" in must and "1 skipped" not in must, done.stdout
    assert done.stdout.strip().endswith("status 1"), done.stdout


def test_two_runs_on_one_machine_do_not_share_a_port() -> None:
    first, second = command("r"), command("r")
    assert first[first.index("--master_port") + 1] != second[second.index("--master_port") + 1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "launch/train.sh RECIPE"),
        (("a", "b"), "one recipe at a time: a or b?"),
        (("a", "--frobnicate"), "unknown option --frobnicate"),
        (("a", "--hostfile"), "--hostfile needs a value"),
        (("a", "--ranks"), "--ranks needs a number"),
        (("a", "--ranks", "0"), "--ranks needs a number"),
        (("a", "--ranks", "a[$(touch /tmp/x)]"), "--ranks needs a number"),
        (("a", "--ranks", "2", "--hostfile", "h"), "--ranks is for this machine alone; set slots=2 in the hostfile"),
        (("a", "--include", "localhost:0"), "--include and --exclude choose GPUs, and this machine has none"),
        (("a", "--include", "localhost:0", "--ranks", "2"), "give one"),
        (("a", "--hostfile="), "--hostfile needs a value"),
        (("a", "--master_port", "abc"), "--master_port needs a port"),
        (("a", "--ssh_port", "99999"), "--ssh_port needs a port"),
        (("a", "--max-restarts", "many"), "--max-restarts needs a number"),
        (("a", "--forward"), "--forward needs the name of a variable"),
    ],
)
def test_train_refuses(arguments: tuple[str, ...], complaint: str) -> None:
    done = run(ROOT / "launch" / "train.sh", *arguments)
    assert done.returncode == 2
    assert complaint in done.stdout + done.stderr


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-m", "zero_ds.cli", "train", "smollm2-135m/encoder", f"out={tmp_path / 'run'}"],
            env={**environment, "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=scaled(120),
        )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("zero-ds: ")]
    assert lines == [
        f"zero-ds: the ranks cannot meet at 127.0.0.1:{port}: another program uses that port; "
        "choose a free one with --master_port."
    ]
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["failure.txt"], "the reason, and nothing else"


def test_a_slow_test_says_why_and_limits_follow_the_pace(request: pytest.FixtureRequest) -> None:
    """Applies the rules of tests/conftest.py to this test."""
    rules, item = sys.modules["conftest"], request.node
    for mark in (pytest.mark.slow, pytest.mark.slow("just so"), pytest.mark.slow(reason=" ")):
        item.own_markers[:] = [mark.mark]
        with pytest.raises(pytest.UsageError, match=r"a slow test needs a reason; mark it as slow\(reason=...\)"):
            rules.pytest_collection_modifyitems(request.config, [item])
    item.own_markers[:] = [pytest.mark.slow(reason="for the test").mark, pytest.mark.timeout(70).mark]
    rules.pytest_collection_modifyitems(request.config, [item])
    skipped = item.get_closest_marker("skip")
    assert request.config.getoption("--all") or skipped.kwargs["reason"] == "slow tier (--all): for the test"
    assert item.get_closest_marker("timeout").args == (scaled(70),)


def test_the_estimate_follows_the_last_run_and_the_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "RECORD", tmp_path / "cache" / "record.json")
    monkeypatch.setattr(pace, "SLOWDOWN", 2.0)
    assert re.match(r"the tests take about \d+ minutes on \d+ cores: .* needs 2.0 times", pace.estimate("default"))
    pace.note_run("default", 480.0, 2700)
    pace.note_run("all", 900.0, 2712)
    monkeypatch.setattr(pace, "SLOWDOWN", 3.0)
    assert pace.estimate("default").startswith("the tests take about 12 minutes: the last time 8.0")
    speed, slowdown = pace.measure()
    assert speed >= 1 and slowdown > 0
