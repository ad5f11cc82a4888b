"""`deterministic: true`: torch computes with deterministic algorithms alone, so that a run repeats bit for bit.

Without it a GPU adds numbers up in an order that differs from run to run: in attention's backward pass, in scattered
sums and in some matrix products. Losses then agree up to rounding. With it, the same settings give the same bits on the
same number of GPUs of the same kind, with the same versions; an operation that has no such algorithm is an error of
torch that names it.
"""

from __future__ import annotations

import os
from typing import Any

from zero_ds.config.schema import RunConfig

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS reads it when its first handle is made
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # transformers passes it on to flash attention's backward pass
}


def apply(config: RunConfig) -> None:
    """Switches deterministic algorithms on, before anything is computed, if the run asks for them."""
    if not config.deterministic:
        return
    import torch

    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # a help for debugging that costs time
    torch.backends.cudnn.benchmark = False
