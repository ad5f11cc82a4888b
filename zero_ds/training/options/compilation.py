"""`compile=true`: torch compiles the decoder layers, for fewer passes over memory and fewer kept activations."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import torch
from torch import nn

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError

VARIANTS = 64
"""Number of ways in which a layer's code may be compiled: with and without gradient, trained and frozen, by kind of
attention and mask. torch stops after 8 of its own accord, and runs all others uncompiled."""


def check(config: RunConfig) -> None:
    """Checks, before anything is loaded, that layers can be compiled on this machine.

    Raises:
        ConfigError: no compiler is installed, or another option replaces the code that would be compiled.
    """
    if config.compile and config.kernels != "torch":
        raise ConfigError("kernels=liger and compile=true fuse the same operations; leave one of them out.")
    if config.compile and config.frozen_weights != "native":
        raise ConfigError("compile=true would keep the weights of frozen_weights=int8 whole; leave one of them out.")
    if config.compile and not _compiler():
        raise ConfigError("compile=true needs a C++ compiler, and none was found; install g++, or set compile=false.")


def _compiler() -> str | None:
    """Returns the path of a compiler that torch can use; None if there is none."""
    if torch.cuda.is_available():  # Triton compiles the code that starts its kernels
        return shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def compile_(layers: Iterable[nn.Module]) -> None:
    """Lets torch compile the forward of these layers on first use, once for all layers that share their code.

    The compiled code serves batches of any shape. Hooks stay outside of it; activation checkpointing is compiled with
    its layer.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]
