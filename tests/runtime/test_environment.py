"""Properties of the machine that are read without torch agree with torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zero_ds.runtime import distributed, precision
from zero_ds.runtime.environment import has_cuda, launched_ranks, launched_ranks_here
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
