"""Properties of the machine that are read without torch agree with torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import real_accelerator

from zero_ds.runtime import distributed, precision
from zero_ds.runtime.environment import accelerator, has_cuda, launched_ranks, launched_ranks_here
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.precision import CPU_FLAGS, _cpu_flags, bf16_is_fast, fast_dtype


def test_the_machine_is_what_torch_says() -> None:
    assert has_cuda() == torch.cuda.is_available()
    assert fast_dtype() is (torch.bfloat16 if bf16_is_fast() else torch.float32)
    if torch.cuda.is_available() or _cpu_flags(Path("/proc/cpuinfo")) is None:
        pytest.skip("the answer does not depend on CPU flags here")
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if None not in checks:
        assert bf16_is_fast() == any(check() for check in checks if check is not None)


@pytest.mark.parametrize(
    ("flags", "fast"), [("fpu avx512_bf16 sse", True), ("amx_tile", True), ("avx512_bf16x", False)]
)
def test_flags_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, fast: bool) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvmx flags\t: amx_tile\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: none\n")
    found = _cpu_flags(info)
    assert found is not None and any(flag in found for flag in CPU_FLAGS) is fast
    monkeypatch.setattr(precision, "has_cuda", lambda: False)
    monkeypatch.setattr(precision, "_cpu_flags", lambda path: found)
    assert bf16_is_fast() is fast


def test_a_machine_without_such_flags_asks_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cpu_flags(tmp_path / "none") is None
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: bf16\n")
    assert _cpu_flags(tmp_path / "arm") is None
    monkeypatch.setattr(precision, "has_cuda", lambda: False)
    monkeypatch.setattr(precision, "_cpu_flags", lambda path: None)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert bf16_is_fast()


class Gpu:
    """Pretends to this package and torch that the machine has one GPU of a compute capability."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: int = 8) -> None:
        monkeypatch.setattr("zero_ds.runtime.environment.has_nvidia_driver", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability))
        monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # emulated
        monkeypatch.delenv("DS_ACCELERATOR")
        monkeypatch.setattr(real_accelerator, "ds_accelerator", None)


def test_deepspeed_decides_which_device_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)
    assert (accelerator(), distributed.device()) == ("cuda", torch.device("cuda", 0))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (accelerator(), has_cuda(), distributed.device()) == ("cpu", False, torch.device("cpu"))
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(real_accelerator, "ds_accelerator", SimpleNamespace(device_name=lambda: "cpu"))
    assert not has_cuda(), "what DeepSpeed has chosen counts more than a variable that changed afterwards"
    assert distributed.device_bytes() > 0, "of the host: a GPU would be asked"


def test_a_device_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(ConfigError, match="DS_ACCELERATOR=xpu is not supported; set it to cuda or cpu"):
        accelerator()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        distributed.device()


@pytest.mark.parametrize(("capability", "fast"), [(7, False), (8, True), (9, True)])
def test_emulated_bf16_is_not_fast(monkeypatch: pytest.MonkeyPatch, capability: int, fast: bool) -> None:
    Gpu(monkeypatch, capability)
    assert bf16_is_fast() is fast


def test_ranks_are_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_ranks(), launched_ranks_here()) == (1, 1)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launched_ranks_here() == 16
    for name, ranks in (("LOCAL_WORLD_SIZE", "4"), ("LOCAL_SIZE", "8")):  # set by torchrun and by DeepSpeed
        monkeypatch.setenv(name, ranks)
        assert (launched_ranks(), launched_ranks_here()) == (16, int(ranks))
        assert launched_ranks_here() == distributed.local_world_size()
