"""Log lines on the console. Imports the standard library alone, so that commands which compute nothing start fast."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def set_up_logging(level: int = logging.INFO) -> None:
    """Shows this package's log lines on stderr; of ranks other than 0 only warnings. The root logger is not changed."""
    rank = os.environ.get("RANK", "0")
    ranks = os.environ.get("WORLD_SIZE", "1")
    package = logging.getLogger("zero_ds")
    if not package.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "" if ranks == "1" else f"[rank {rank}] "
        handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
        package.addHandler(handler)
        package.propagate = False
    package.setLevel(level if rank == "0" else logging.WARNING)
    for noisy in ("DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*TORCH_CUDA_ARCH_LIST.*")


def duration(seconds: float) -> str:
    """Returns seconds as text: 75 as `1:15`, 4000 as `1:06:40`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
