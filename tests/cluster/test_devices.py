"""The devices of a run on one machine are those that CUDA would show; the doctor looks at the same ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pace import scaled
from places import ROOT

from zero_ds.cluster import probe
from zero_ds.cluster.devices import Devices, devices_here, seen_as
from zero_ds.runtime.environment import DEVICES, take_devices
from zero_ds.runtime.errors import ConfigError

LISTED = """\
0, GPU-aaaa-0, 81559, 81000, NVIDIA H100
1, GPU-aaab-1, 81559, 40000, NVIDIA H100
2, GPU-bbbb-2, [N/A], [N/A], NVIDIA GB10
3, GPU-cccc-3, [Not Supported], [N/A], NVIDIA A30, half
"""
FOUR: list[dict[str, Any]] = [
    {"index": 0, "uuid": "GPU-aaaa-0", "name": "NVIDIA H100", "total": 81559, "free": 81000},
    {"index": 1, "uuid": "GPU-aaab-1", "name": "NVIDIA H100", "total": 81559, "free": 40000},
    {"index": 2, "uuid": "GPU-bbbb-2", "name": "NVIDIA GB10", "total": None, "free": None},
    {"index": 3, "uuid": "GPU-cccc-3", "name": "NVIDIA A30, half", "total": None, "free": None},
]
MIG = "MIG-1c2f3a4b-5d6e-7f80-9a0b-c1d2e3f40516"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an nvidia-smi that lists four GPUs first on PATH, and returns its folder."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'E'\n{LISTED}E\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program.parent


@pytest.mark.usefixtures("smi")
def test_every_gpu_is_listed_also_one_whose_memory_is_not_known() -> None:
    assert probe.gpus() == FOUR


@pytest.mark.parametrize(
    ("visible", "ranks", "expected"),
    [
        (None, None, Devices(4, ("0", "1", "2", "3"))),
        (None, 2, Devices(2, ("0", "1"))),
        ("2,3", 2, Devices(2, ("2", "3"))),
        ("3, 1", None, Devices(2, ("3", "1"))),
        ("3,1", 1, Devices(1, ("3",))),
        ("GPU-bbbb-2,GPU-cccc", None, Devices(2, ("GPU-bbbb-2", "GPU-cccc"))),
        (f"{MIG},{MIG[:-1]}7", 2, Devices(2, (MIG, f"{MIG[:-1]}7"))),
        ("1,-1,2", None, Devices(1, ("1",))),
        ("", None, Devices(2)),
        ("-1", 3, Devices(3)),
        ("NoDevFiles", None, Devices(2)),
    ],
)
def test_devices_of_a_run(visible: str | None, ranks: int | None, expected: Devices) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert devices_here(ranks, environment, FOUR) == expected
    assert devices_here(ranks, {**environment, "DS_ACCELERATOR": "cpu"}, FOUR) == Devices(ranks or 2)


@pytest.mark.parametrize(
    ("visible", "ranks", "complaint"),
    [
        ("4", None, "CUDA_VISIBLE_DEVICES=4 names 4, and nvidia-smi lists GPU 0, 1, 2, 3"),
        ("GPU-aaa", None, "names GPU-aaa, and nvidia-smi lists"),
        ("gpu0", None, "names gpu0"),
        ("1,1", None, "names 1 twice"),
        ("0,GPU-aaaa", None, "names GPU 0 twice, as 0 and GPU-aaaa"),
        ("GPU-bbbb-2,02", None, "names GPU 2 twice, as GPU-bbbb-2 and 02"),
        ("2,3", 3, "3 ranks need as many GPUs, and CUDA_VISIBLE_DEVICES=2,3 shows 2; lower --ranks"),
        (None, 5, "5 ranks need as many GPUs, and this machine has 4"),
    ],
)
def test_devices_that_are_not_there(visible: str | None, ranks: int | None, complaint: str) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    with pytest.raises(ConfigError) as caught:
        devices_here(ranks, environment, FOUR)
    assert complaint in str(caught.value)
    assert devices_here(ranks, {}, []).names == (), "a machine without GPUs"


def train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Lets train.sh print its command."""
    left_out = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    path = f"{os.environ['PATH'].split(':')[0]}:{Path(sys.executable).parent}:/usr/bin:/bin"
    return subprocess.run(
        [ROOT / "launch/train.sh", "r", "--master_port", "1234", "-n", *arguments],
        env={**inherited, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=scaled(60),
    )


@pytest.mark.usefixtures("smi")
def test_the_launcher_gets_the_number_and_the_ranks_the_names() -> None:
    found = train("--ranks", "2", CUDA_VISIBLE_DEVICES="2,3")
    assert found.stdout.startswith("+ env -u CUDA_VISIBLE_DEVICES ZERO_DS_DEVICES=2,3 deepspeed "), found.stderr
    assert {"--num_gpus", "2"} <= set(found.stdout.split())
    assert f"ZERO_DS_DEVICES={MIG} deepspeed" in train(CUDA_VISIBLE_DEVICES=MIG).stdout
    plain = train("--ranks", "2").stdout
    assert "+ deepspeed" in plain and "--num_gpus 2" in plain
    assert "--num_gpus" not in train().stdout, "DeepSpeed takes all of them"
    refused = train("--ranks", "3", CUDA_VISIBLE_DEVICES="2,3")
    assert refused.returncode == 2 and "zero-ds: 3 ranks need as many GPUs" in refused.stderr


def test_a_rank_sees_the_devices_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    take_devices()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv(DEVICES, "GPU-bbbb-2,GPU-cccc-3")
    take_devices()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb-2,GPU-cccc-3" and DEVICES not in os.environ


@pytest.mark.usefixtures("smi")
def test_the_doctor_looks_at_the_devices_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from zero_ds.cli.doctor import _this_machine
    from zero_ds.cluster.checks import Machine, _device_trouble
    from zero_ds.cluster.doctor import _launch_here

    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    cluster = _this_machine(None, "", "", None, 1234, (), ())
    assert cluster.devices == ("2", "1") and cluster.nodes[0].slots == (0, 1)
    machine = Machine("localhost", {"devices": seen_as(cluster.devices, FOUR)}, 0.0)
    assert _device_trouble(machine, (0,)) == "", "memory that is not known is not missing"
    assert _device_trouble(machine, (0, 1)) == "localhost: GPU 1 has 40000 of 81559 MiB free"
    options, environment = _launch_here(cluster)
    assert options[-4:] == ["--num_gpus", "2", "--master_port", "1234"]
    assert environment[DEVICES] == "2,1" and "CUDA_VISIBLE_DEVICES" not in environment
    assert [device["name"] for device in seen_as([MIG], FOUR)] == [MIG]


def test_home_in_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    from zero_ds.cli.main import _with_home

    monkeypatch.setenv("HOME", "/me")
    words = ["--out=~/x", "--out=~", "out=~/x", "--set=a=~/x", "--out=~x", "~/x"]
    assert [_with_home(word) for word in words] == ["--out=/me/x", "--out=/me", *words[2:]]
