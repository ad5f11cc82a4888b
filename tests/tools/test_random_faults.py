"""tools/random_faults.py: its clock jumps, and a run among its faults ends like an undisturbed one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT

sys.path[:0] = [str(ROOT / "tools")]

import random_faults  # noqa: E402


def test_the_clock_of_a_job_jumps_and_no_other(tmp_path: Path) -> None:
    clock = random_faults.Clock(tmp_path)
    if not clock.works:
        pytest.skip("a C compiler is not installed")
    command = [sys.executable, "-c", "import time; print(time.time(), time.monotonic())"]

    def asked() -> tuple[float, float]:
        said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **clock.environment()})
        now, monotonic = map(float, said.stdout.split())
        return now, monotonic

    for shift in (86400, -3600, 0):
        clock.jump(shift)
        before, (now, monotonic), after = time.monotonic(), asked(), time.monotonic()
        assert shift - 60 < now - time.time() < shift + 60
        assert before < monotonic < after, "silence is measured by a clock that does not jump"


@pytest.mark.slow(reason="minutes of faults; the kinds of fault have tests of their own")
@pytest.mark.timeout(1200)
def test_a_run_among_faults_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools" / "random_faults.py", "--minutes", "1", "--work", tmp_path / "faults"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "as undisturbed" in done.stdout and "PROBLEM" not in done.stdout
