"""How fast this machine is, so that no time limit of a test says more about the machine than about the code.

`PACE` is measured once a session, before any test, and handed to every worker and rank through the environment. Limits
are written as `scaled(seconds)`, with seconds that are several times what a quiet two-core machine of pace 1 needs: a
limit only ends what hangs. What a test proves, it proves by events and counts.

As a program (`python tests/support/pace.py`), it says what launch/test.sh will take here.
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
"""Seconds of `_work` on the machine of pace 1: two quiet cores with AVX2 alone."""
_MINUTES = {"default": 8.0, "slow tier": 8.0}
"""Minutes of the tests there, with three workers."""

RECORD = Path(__file__).parents[2] / ".pytest_cache" / "zero_ds.json"
"""What the last whole run took here, by tier: {"default": {"seconds": ..., "pace": ..., "tests": ...}}."""


def _work() -> float:
    """Seconds of what the tests are made of: interpreters that start and import, Python, and products of matrices."""
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
    """How many times the reference's time this machine needs now; at least 1. The median of three."""
    return max(1.0, sorted(_work() for _ in range(3))[1] / _REFERENCE)


if _NAME not in os.environ:
    os.environ[_NAME] = f"{measure():.2f}"
PACE = float(os.environ[_NAME])


def scaled(seconds: float) -> float:
    """A time limit for this machine."""
    return seconds * PACE


def last_run(tier: str) -> dict[str, float] | None:
    """What the last whole run of a tier took on this machine; None before the first."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))[tier]
        return {key: float(record[key]) for key in ("seconds", "pace", "tests")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_run(tier: str, seconds: float, tests: int) -> None:
    """Keeps what a whole run took, for the next estimate."""
    try:
        records = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        records = {}
    records[tier] = {"seconds": round(seconds, 1), "pace": PACE, "tests": tests}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def estimate(tier: str) -> str:
    """A sentence about a tier: minutes, and where they come from."""
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
