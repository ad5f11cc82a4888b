"""What a training step costs by count: PyTorch's own FLOP counter over meta tensors, no weights needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode


def encoder_step_flops(folder: Path, *, batch: int, length: int, supervised: int) -> int:
    """FLOPs of the decoder in one encoder-stage step: forward, and backward to its input through frozen weights.

    folder: model folder, of which the config is read; batch x length tokens, of which `supervised` get logits.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        decoder = cast(Any, AutoModelForCausalLM).from_config(config, attn_implementation="eager").requires_grad_(False)
        embeddings = torch.zeros(batch, length, config.get_text_config().hidden_size, requires_grad=True)
        mask = torch.ones(batch, length, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter:
            hidden = decoder.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
            logits = decoder.lm_head(hidden.flatten(0, 1)[:supervised])
            logits.sum().backward()
    return int(counter.get_total_flops())
