"""Measures the speed of this machine, by which the time limits of tests are scaled.

`PACE` is measured once per session, before any test, and passed to every worker and rank through the environment.
Limits are written as `scaled(seconds)`, with several times the seconds that a quiet two-core machine of pace 1 needs,
so that a limit ends only tests that hang. Tests prove things by events and counts, not by time.

As a program (`python tests/support/pace.py`), it estimates the duration of launch/test.sh on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy reads it; threads that wait for each other measure nothing

_NAME = "ZERO_DS_TEST_PACE"
_REFERENCE = 0.35
"""Seconds of `_work` on the reference machine, which has pace 1: two quiet cores of a Sapphire Rapids."""
_MINUTES = {"default": 12.0, "slow tier": 8.0}
"""Minutes of the tests on the reference machine, limited to AVX2, with three workers."""

RECORD = Path(__file__).parents[2] / ".pytest_cache" / "zero_ds.json"
"""Record of the last whole run on this machine: {"default": {"seconds": ..., "slowdown": ..., "tests": ...}, ...}."""


def _work() -> tuple[float, float]:
    """Does work like that of the tests: starting interpreters, imports, Python, matrix products.

    Returns the seconds that it took, and those of them in which a core computed.
    """
    import numpy as np

    started, before = time.perf_counter(), sum(os.times()[:4])
    for _ in range(2):
        subprocess.run([sys.executable, "-c", "import numpy, json, email, http.client"], check=True)
    matrix = np.ones((384, 384), dtype=np.float32)
    for _ in range(20):
        matrix = matrix @ matrix / 384
    total = 0
    for number in range(1_000_000):
        total += number % 7
    return time.perf_counter() - started, sum(os.times()[:4]) - before


def measure() -> tuple[float, float]:
    """Measures this machine now, by medians of three.

    Returns the pace (seconds relative to the reference machine's, at least 1), and the same for a whole run of the
    tests. On a busy machine the second is less: a single process that gets a third of a core shares it with others,
    while each of the three workers of the tests gets a share.
    """
    seconds, computing = (sorted(values)[1] for values in zip(*(_work() for _ in range(3)), strict=True))
    waits = max(1.0, seconds / computing)
    return max(1.0, seconds / _REFERENCE), computing / _REFERENCE * (2 + 2 * waits) / 4


if _NAME not in os.environ:
    os.environ[_NAME] = " ".join(f"{value:.2f}" for value in measure())
PACE, SLOWDOWN = map(float, os.environ[_NAME].split())


def scaled(seconds: float) -> float:
    """Returns a time limit in seconds for this machine, from seconds of pace 1."""
    return seconds * PACE


def last_run(tier: str) -> dict[str, float] | None:
    """Returns the record of the last whole run of a tier on this machine; None before the first one."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))[tier]
        return {key: float(record[key]) for key in ("seconds", "slowdown", "tests")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_run(tier: str, seconds: float, tests: int) -> None:
    """Records the duration of a whole run, from which the next one is estimated."""
    try:
        records = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        records = {}
    records[tier] = {"seconds": round(seconds, 1), "slowdown": SLOWDOWN, "tests": tests}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def estimate(tier: str) -> str:
    """Returns a sentence with the expected minutes of a tier, and the basis of the estimate."""
    speed = f"this machine now needs {SLOWDOWN:.1f} times the seconds of the quiet reference"
    whole = "the tests with the slow tier" if tier == "all" else "the tests"
    if last := last_run(tier):
        minutes = last["seconds"] / 60 * SLOWDOWN / last["slowdown"]
        return f"{whole} take about {minutes:.0f} minutes: the last time {last['seconds'] / 60:.1f}, and {speed}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    minutes = _MINUTES["default"] + (_MINUTES["slow tier"] if tier == "all" else 0.0)
    return f"{whole} take about {minutes * SLOWDOWN * 2 / min(cores, 4):.0f} minutes on {cores} cores: {speed}"


if __name__ == "__main__":
    print(estimate("all" if "--all" in sys.argv[1:] else "default"))
