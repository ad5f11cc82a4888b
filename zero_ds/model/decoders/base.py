"""What the method needs to know of a decoder family: where its layers, norm and head are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of the parts of a decoder in its weights and in its module tree."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    backbone: str = "model"
    """Attribute of the causal LM that holds embeddings, layers and final norm."""
    layer_prefix: str = "model.layers."
    """Prefix of the layers' tensors; the layer's number follows."""
    embeddings: str = "model.embed_tokens.weight"
    """Tensor of the word embeddings, which is the head's as well where they are tied."""
    head: str = "lm_head.weight"
    """Tensor of the output head."""
    final_norm: str = "model.norm."
    """Prefix of the final norm's tensors."""
    towers: tuple[tuple[str, str], ...] = ()
    """For multimodal classes of this family: prefix of a text tensor in their weights and what the causal LM calls it.
    Where a folder's config.json has a text_config, only tensors with one of these prefixes belong to the decoder."""
    image_tokens: tuple[str, ...] = ()
    """Unused special tokens of the family's vocabularies, of which an export takes one as its image placeholder."""
    per_layer_config: tuple[str, ...] = ("layer_types",)
    """Config entries with one item a layer, cut like the layers."""
    attentions: tuple[str, ...] = ("sdpa", "flash_attention_2", "eager")
    """Attention implementations that compute what the family defines."""

    def layers(self, decoder: nn.Module) -> nn.ModuleList:
        return cast(nn.ModuleList, getattr(decoder, self.backbone).layers)

    def norm(self, decoder: nn.Module) -> nn.Module:
        return cast(nn.Module, getattr(decoder, self.backbone).norm)

    def hidden_states(
        self,
        decoder: nn.Module,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the decoder up to and with its final norm: (batch, seq, hidden) -> (batch, seq, hidden).

        position_ids: (batch, seq), only for rows that hold several samples, each from position 0 on; attention then
        stays inside of samples, whatever the attention_mask says.
        """
        backbone = getattr(decoder, self.backbone)
        if position_ids is None:
            output = backbone(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
            return cast(torch.Tensor, output.last_hidden_state)
        shape = inputs_embeds.shape
        if backbone.config._attn_implementation == "flash_attention_2":
            # transformers finds the samples of a row by their positions, but with flash attention in a single row only
            inputs_embeds, position_ids = inputs_embeds.flatten(0, 1).unsqueeze(0), position_ids.reshape(1, -1)
        output = backbone(inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False)
        return cast(torch.Tensor, output.last_hidden_state).reshape(shape)

    def logits(self, decoder: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """Final-normed hidden states (..., hidden) -> logits (..., vocabulary)."""
        scores = cast(Any, decoder).get_output_embeddings()(hidden_states)
        return self.capped(cast(Any, decoder).config, scores)

    def capped(self, config: Any, scores: torch.Tensor) -> torch.Tensor:
        """What the family makes of the head's product, element by element: soft-capping, where the config asks."""
        cap = getattr(config, "final_logit_softcapping", None)
        return scores if cap is None else torch.tanh(scores / cap) * cap

    def embedding_scale(self, decoder: nn.Module) -> float:
        """By how much the embedding module multiplies its weights."""
        return float(getattr(cast(Any, decoder).get_input_embeddings(), "embed_scale", 1.0))
