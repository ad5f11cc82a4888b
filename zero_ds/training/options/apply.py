"""Optional behaviour of a run, one file each: whether it is possible here, and how it is applied to the model.

int8.py         frozen decoder layers in 8 bits                                 frozen_weights=int8
liger.py        fused kernels in the decoder                                    kernels=liger
recompute.py    activation checkpointing of decoder layers                      activation_checkpointing=...
fallback.py     more of it, once, where memory has run out all the same         activation_checkpointing=auto
determinism.py  deterministic algorithms alone, before anything is computed     deterministic=true
compilation.py  decoder layers compiled by torch; applied by the engine, which  compile=true
                knows the layers that ZeRO-3 has put hooks into
sharding.py     which of them a DeepSpeed JSON rules out
"""

from __future__ import annotations

from typing import Any

from zero_ds.config.schema import RunConfig
from zero_ds.model.attention import check_attention
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.training.options import compilation, int8, liger, recompute


def check_options(config: RunConfig) -> None:
    """Checks, before anything is loaded, that this machine supports the options.

    `stage_of` and `ds_config` refuse options that the stage or the DeepSpeed JSON rules out, because they are also
    called for runs that are only planned.

    Raises:
        ConfigError: two options exclude each other, or a library, a compiler or a GPU is missing.
    """
    check_attention(config.attention, trains=True)
    compilation.check(config)
    liger.check(config)


def apply_options_(model: VisionLanguageModel, config: RunConfig, ds: dict[str, Any]) -> None:
    """Applies the options of a run to its model, in which the parts that train are marked. A collective.

    ds: resolved DeepSpeed configuration of the run.

    Raises:
        ConfigError: an option that this model does not support.
    """
    if config.frozen_weights == "int8":
        int8.apply_(model)
    if config.kernels == "liger":
        liger.fuse_(model.decoder)
    recompute.checkpoint_activations_(model, config, ds)
