"""Runs a command, and prints its duration and its peak memory.

    python tools/bench/peak.py zero-ds surrogate --target MODEL --replace 17:30 --out runs/small

The peak is the largest resident set of the command or one of its children as counted by the kernel, which includes
pages of mapped files.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    started = time.monotonic()
    status = subprocess.call(sys.argv[1:])
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1 << 20)
    print(f"seconds {seconds:.1f}   peak RSS {peak:.2f} GiB   exit status {status}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
