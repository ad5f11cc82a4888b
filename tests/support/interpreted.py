"""Adds to Triton's interpreter (3.7) the functions that it lacks for Liger's kernels on a CPU.

Compiled kernels get a plain number as a float32 scalar, which the interpreter leaves as a Python float. Functions of
CUDA's libdevice have no body there, so rsqrt is replaced by that of the language, and tanh by its definition. The
kernels' own code is not changed.
"""

from __future__ import annotations

import os
from typing import Any


def complete_() -> None:
    """Completes the interpreter of this process, which must have been selected by the environment.

    Raises:
        RuntimeError: the interpreter is not selected.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton's interpreter is not selected; set TRITON_INTERPRET=1 before Triton is imported")
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    # looked up when a kernel runs, because the interpreter replaces functions of the language during that time
    def rsqrt(x: Any) -> Any:
        return tl.rsqrt(x)

    def tanh(x: Any) -> Any:
        return 2 * tl.sigmoid(2 * x) - 1

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = rsqrt
    geglu.tanh = tanh
