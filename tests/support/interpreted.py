"""What Triton's interpreter (3.7) lacks for Liger's kernels on a CPU, put in where it is asked for.

Compiled kernels get a plain number as a float32 scalar, which the interpreter leaves a Python float; and functions of
CUDA's libdevice have no body there: rsqrt of the language itself stands in for one, tanh by its definition for another.
The kernels' own code is run as it is.
"""

from __future__ import annotations

import os
from typing import Any


def complete_() -> None:
    """Fits the interpreter of this process; it must have been chosen in the environment.

    Raises:
        RuntimeError: it was not.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton's interpreter is chosen by TRITON_INTERPRET=1, before Triton is imported")
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

    # the language's functions are looked up when a kernel runs: the interpreter exchanges them for that time
    def rsqrt(x: Any) -> Any:
        return tl.rsqrt(x)

    def tanh(x: Any) -> Any:
        return 2 * tl.sigmoid(2 * x) - 1

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = rsqrt
    geglu.tanh = tanh
