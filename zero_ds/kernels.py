"""Faster ways to compute what a decoder layer computes: torch.compile.

The forward of modules is replaced in place; parameters, their names and hooks stay as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import torch
from torch import nn

from zero_ds.config import ConfigError

VARIANTS = 64
"""Ways in which one layer's code may be compiled: with and without gradient, trained and frozen, by attention type and
mask. torch gives up without a word after 8."""


def check_compiler() -> None:
    """Raises ConfigError if torch.compile would fail for want of a compiler."""
    if torch.cuda.is_available():
        found = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            found = get_cpp_compiler()
        except Exception:  # InvalidCxxCompiler, which has moved between versions
            found = None
    if not found:
        raise ConfigError("compile=true needs a C++ compiler, and none was found; install g++, or leave it out.")


def compile_(layers: Iterable[nn.Module]) -> None:
    """Lets torch compile the forward of layers when they are first run, once for all that share their code.

    The shapes of batches may differ: one compiled layer serves all lengths.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]
