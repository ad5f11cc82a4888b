"""Number formats: which of them a device computes fast."""

from __future__ import annotations

import torch


def fast_dtype() -> torch.dtype:
    """bf16 on GPUs since Ampere and on CPUs with AVX512-BF16 or AMX, float32 elsewhere."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return (
        torch.bfloat16 if capable() or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)() else torch.float32
    )
