"""Number formats: which of them a device computes fast."""

from __future__ import annotations

import torch


def fast_dtype() -> torch.dtype:
    """Returns bf16 on GPUs since Ampere and on CPUs with AVX512-BF16 or AMX, float32 elsewhere."""
    return torch.bfloat16 if _computes_bf16_fast() else torch.float32


def _computes_bf16_fast() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # not public, so they may be missing
        supported = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return True
    return False
