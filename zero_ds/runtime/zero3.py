"""Every hand that is laid on DeepSpeed's insides under ZeRO-3."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn


def zero_init() -> Any:
    """Context in which new modules are partitioned at once, if ZeRO-3 is active; else one without effect."""
    from transformers.integrations import deepspeed as integration

    if not integration.is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    # the config says the dtype; where one is passed, DeepSpeed 0.19 replaces it by bf16 on accelerators without fp16
    return deepspeed.zero.Init(config_dict_or_path=integration.deepspeed_config())


def partition_(module: nn.Module) -> None:
    """Partitions the parameters that still are whole on every rank, if ZeRO-3 is active."""
    from transformers.integrations import deepspeed as integration

    if integration.is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.zero.Init(module=module, config_dict_or_path=integration.deepspeed_config())


def gathered(parameters: Any, modifier_rank: int | None = None) -> Any:
    """Context in which ZeRO-3 parameters are whole (and, with modifier_rank 0, may be changed on all ranks alike)."""
    parameters = [p for p in parameters if hasattr(p, "ds_id")]
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
