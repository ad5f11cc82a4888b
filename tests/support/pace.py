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

_NAME = "ZERO_DS_TEST_PACE"
_REFERENCE = 0.45
"""Seconds of `_work` on the reference machine, which has pace 1: two quiet cores with AVX2 and no AVX-512."""
_MINUTES = {"default": 12.0, "slow tier": 8.0}
"""Minutes of the tests on the reference machine, with three workers."""

RECORD = Path(__file__).parents[2] / ".pytest_cache" / "zero_ds.json"
"""Record of the last whole run on this machine, by tier: {"default": {"seconds": ..., "pace": ..., "tests": ...}}."""


def _work() -> float:
    """Returns the seconds of work like that of the tests: starting interpreters, imports, Python, matrix products."""
    import numpy as np

    started = time.perf_counter()
    for _ in range(2):
        subprocess.run([sys.executable, "-c", "import numpy, json, email, http.client"], check=True)
    matrix = np.ones((384, 384), dtype=np.float32)
    for _ in range(20):
        matrix = matrix @ matrix / 384
    total = 0
    for number in range(1_000_000):
        total += number % 7
    return time.perf_counter() - started


def measure() -> float:
    """Returns this machine's current time relative to the reference machine's; the median of three, at least 1."""
    return max(1.0, sorted(_work() for _ in range(3))[1] / _REFERENCE)


if _NAME not in os.environ:
    os.environ[_NAME] = f"{measure():.2f}"
PACE = float(os.environ[_NAME])


def scaled(seconds: float) -> float:
    """Returns a time limit in seconds for this machine, from seconds of pace 1."""
    return seconds * PACE


def last_run(tier: str) -> dict[str, float] | None:
    """Returns the record of the last whole run of a tier on this machine; None before the first one."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))[tier]
        return {key: float(record[key]) for key in ("seconds", "pace", "tests")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_run(tier: str, seconds: float, tests: int) -> None:
    """Records the duration of a whole run, from which the next one is estimated."""
    try:
        records = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        records = {}
    records[tier] = {"seconds": round(seconds, 1), "pace": PACE, "tests": tests}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def estimate(tier: str) -> str:
    """Returns a sentence with the expected minutes of a tier, and the basis of the estimate."""
    speed = f"this machine needs {PACE:.1f} times the reference's seconds"
    whole = "the tests with the slow tier" if tier == "all" else "the tests"
    if last := last_run(tier):
        minutes = last["seconds"] / 60 * PACE / last["pace"]
        return f"{whole} take about {minutes:.0f} minutes: the last time {last['seconds'] / 60:.1f}, and {speed}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    minutes = _MINUTES["default"] + (_MINUTES["slow tier"] if tier == "all" else 0.0)
    return f"{whole} take about {minutes * PACE * 2 / min(cores, 4):.0f} minutes on {cores} cores: {speed}"


if __name__ == "__main__":
    print(estimate("all" if "--all" in sys.argv[1:] else "default"))
