"""`kernels=liger`: Liger's fused RMSNorm, rotary embedding, and SwiGLU or GeGLU in the decoder."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, cast

from torch import nn

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.environment import has_cuda
from zero_ds.runtime.errors import ConfigError

ROTATE = "apply_rotary_pos_emb"
"""Name of the function that rotates queries and keys, in the module of every model in transformers."""


def check(config: RunConfig) -> None:
    """Checks, before anything is loaded, that a run's kernels work on this machine.

    Raises:
        ConfigError: Liger is not installed, or there is neither a GPU nor Triton's interpreter.
    """
    if config.kernels == "torch":
        return
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "kernels=liger needs liger-kernel, which is not installed; with a GPU: pip install 'zero_ds[kernels]', "
            "else kernels=torch."
        )
    if not has_cuda() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("kernels=liger needs a GPU, and there is none here; set kernels=torch.")


def fuse_(decoder: nn.Module) -> None:
    """Puts Liger's kernels into the layers and the final norm of this decoder, and of no other model in the process.

    Parameters keep their names, and hooks stay on their modules.

    Raises:
        ConfigError: Liger does not know the model, or its kernels compute something else.
    """
    from liger_kernel import transformers as liger

    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it warns that kernels for Ascend chips do not load
    config = cast(Any, decoder).config
    apply = getattr(liger, f"apply_liger_kernel_to_{config.model_type}", None)
    if apply is None:
        raise ConfigError(f"Liger has no kernels for model_type '{config.model_type}'; set kernels=torch.")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    fused = ("silu", "swish") if "swiglu" in inspect.signature(apply).parameters else ("gelu_pytorch_tanh",)
    if activation not in fused:  # Liger does not look at the activation of a model that exists already
        raise ConfigError(f"Liger's kernel computes {fused[0]}, and this decoder {activation}; set kernels=torch.")
    modeling = vars(sys.modules[type(decoder).__module__])
    before = dict(modeling)
    try:
        apply(model=decoder, cross_entropy=False, fused_linear_cross_entropy=False)
        rotate = modeling[ROTATE]
    finally:
        modeling.update(before)  # undoes what Liger replaced for all other models of this class
    if not _rotate_with(decoder, rotate):
        raise ConfigError("no attention of this decoder rotates as Liger does; set kernels=torch.")


def _rotate_with(decoder: nn.Module, rotate: Callable[..., Any]) -> int:
    """Lets the attention modules of this decoder call `rotate` under the global name `ROTATE`; returns their number."""
    found = 0
    for module in decoder.modules():
        forward = cast(FunctionType, type(module).forward)
        if ROTATE in forward.__code__.co_names:
            names = {**forward.__globals__, ROTATE: rotate}
            own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(own, module)
            found += 1
    return found
