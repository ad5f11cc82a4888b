"""Decoder layers compiled by torch: fewer passes over memory, and less kept for the backward pass."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import torch
from torch import nn

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError

VARIANTS = 64
"""Ways in which one layer's code may be compiled: with and without gradient, trained and frozen, by kind of attention
and mask. torch stops at 8, and runs what is left as it is."""


def check(config: RunConfig) -> None:
    """Says what compiling lacks on this machine, before anything is loaded.

    Raises:
        ConfigError: there is no compiler, or other kernels stand where compiled code would.
    """
    if config.compile and config.kernels != "torch":
        raise ConfigError("kernels=liger and compile=true fuse the same operations; leave one of them out.")
    if config.compile and config.frozen_weights != "native":
        raise ConfigError("compile=true would keep the weights of frozen_weights=int8 whole; leave one of them out.")
    if config.compile and not _compiler():
        raise ConfigError("compile=true needs a C++ compiler, and none was found; install g++, or set compile=false.")


def _compiler() -> str | None:
    if torch.cuda.is_available():  # Triton compiles what starts its kernels
        return shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def compile_(layers: Iterable[nn.Module]) -> None:
    """Lets torch compile the forward of layers when they are first run, once for all that share their code.

    The shapes of batches may differ: what is compiled serves all of them. Hooks stay outside; activation checkpointing
    is compiled with its layer.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]
