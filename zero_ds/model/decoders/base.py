"""Decoder families: where a decoder's layers, norm and head are, in its weights and in its module tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from zero_ds.model.attention import Sequences, is_flash


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of a decoder's parts. The defaults are those of Llama, which most families share."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    backbone: str = "model"
    """Path of the causal LM's module that holds embeddings, layers and final norm."""
    layer_list: str = "layers"
    """Path of the layers in the backbone."""
    last_norm: str = "norm"
    """Path of the final norm in the backbone."""
    layer_prefix: str = "model.layers."
    """Prefix of the layers' tensors; the layer's number follows."""
    embeddings: str = "model.embed_tokens.weight"
    """Tensor of the word embeddings, which is also the output head's where the two are tied."""
    head: str = "lm_head.weight"
    """Tensor of the output head."""
    final_norm: str = "model.norm."
    """Prefix of the final norm's tensors."""
    towers: tuple[tuple[str, str], ...] = ()
    """Prefixes of text tensors in the weights of the family's multimodal classes, each with the prefix that the causal
    LM has instead. If a folder's config.json has a text_config, only tensors with these prefixes belong to the
    decoder."""
    tower_in_class: str = ""
    """Prefix of the decoder's modules in transformers' multimodal class, which stands for `backbone`; empty without
    such a class."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Prefixes of tensors in published files, each with the prefix that the causal LM has instead. transformers makes
    the same change when it loads a folder."""
    image_tokens: tuple[str, ...] = ()
    """Unused special tokens of the family's vocabularies. An export uses one of them as its image placeholder."""
    per_layer_config: tuple[str, ...] | None = ("layer_types",)
    """Config entries with one item per layer, which are cut like the layers; None where `cut` finds them."""
    head_bias: bool = False
    """True if the output head has a bias."""
    score_factor: str = ""
    """Config entry that the head's scores are multiplied with; empty without one."""
    score_cap: str = "final_logit_softcapping"
    """Config entry with the bound of soft-capped scores; a config may lack it."""
    score_divides: bool = False
    """True if the scores are divided by that entry."""
    layer_outputs: int = 0
    """Number of items in the tuple that a layer returns; 0 for a layer that returns its hidden states alone."""
    counted_positions: bool = False
    """True if there is a table of positions, so that no sample can be longer than the config says."""
    packs: bool = True
    """True if rows can hold several samples, each of which sees only itself."""
    wrong_attentions: tuple[str, ...] = ()
    """Implementations of attention that do not compute the family's attention; eager takes their place."""

    def attention(self, name: str) -> str:
        """Returns the implementation of attention that the family uses where `name` is asked for."""
        return "eager" if name in self.wrong_attentions else name

    def inner(self, decoder: nn.Module) -> nn.Module:
        """Returns the backbone of a causal LM, or the module itself if it is a backbone already."""
        whole = self.backbone.split(".")
        for start in range(len(whole)):  # the library's base model is the first part of a longer path
            try:
                return decoder.get_submodule(".".join(whole[start:]))
            except AttributeError:
                continue
        return decoder

    def layers(self, decoder: nn.Module) -> nn.ModuleList:
        """Returns the decoder layers of a causal LM or a backbone."""
        return cast(nn.ModuleList, self.inner(decoder).get_submodule(self.layer_list))

    def replace_layers_(self, decoder: nn.Module, layers: nn.ModuleList) -> None:
        """Puts other layers in the place of the decoder's own."""
        self.inner(decoder).set_submodule(self.layer_list, layers)

    def norm(self, decoder: nn.Module) -> nn.Module:
        """Returns the final norm of a causal LM or a backbone."""
        return self.inner(decoder).get_submodule(self.last_norm)

    def replace_norm_(self, decoder: nn.Module, norm: nn.Module) -> None:
        """Puts another module in the place of the final norm."""
        self.inner(decoder).set_submodule(self.last_norm, norm)

    def hidden_states(
        self,
        decoder: nn.Module,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        sequences: Sequences | None = None,
    ) -> torch.Tensor:
        """Runs the decoder, including its final norm: (batch, seq, hidden) -> (batch, seq, hidden).

        attention_mask: (batch, seq), 1 at tokens; None where rows are full, or padded on the right alone: a token
        attends to nothing after it, so that padding there needs no mask.
        position_ids: (batch, seq), only for rows that hold several samples, each of which starts at position 0.
        Attention then stays inside the samples, and attention_mask is ignored.
        sequences: those of the batch, for flash attention, which without them asks the device in every layer.
        """
        backbone = cast(Any, self.inner(decoder))
        options: dict[str, Any] = {"use_cache": False}
        flash = is_flash(backbone.config._attn_implementation)
        if flash and sequences is not None:
            options |= {"cu_seq_lens_q": sequences.bounds, "cu_seq_lens_k": sequences.bounds}
            options |= {"max_length_q": sequences.longest, "max_length_k": sequences.longest}
            attention_mask = None
        shape = inputs_embeds.shape
        if position_ids is None:
            output = backbone(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options)
        else:
            if flash:  # transformers finds the samples of a row by their positions, but only if there is one row
                inputs_embeds, position_ids = inputs_embeds.flatten(0, 1).unsqueeze(0), position_ids.reshape(1, -1)
            output = backbone(inputs_embeds=inputs_embeds, position_ids=position_ids, **options)
        return cast(torch.Tensor, output.last_hidden_state).reshape(shape)

    def logits(self, decoder: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the output head: hidden states after the final norm (..., hidden) -> logits (..., vocabulary)."""
        scores = cast(Any, decoder).get_output_embeddings()(hidden_states)
        return self.capped(cast(Any, decoder).config, scores)

    def capped(self, config: Any, scores: torch.Tensor) -> torch.Tensor:
        """Scales and soft-caps the output head's scores, element by element, if the config asks for it."""
        if self.score_factor:
            factor = getattr(config, self.score_factor)
            scores = scores / factor if self.score_divides else scores * factor
        cap = getattr(config, self.score_cap, None)
        return scores if cap is None else torch.tanh(scores / cap) * cap

    def embedding_scale(self, decoder: nn.Module) -> float:
        """Returns the factor by which the embedding module multiplies its weights."""
        return float(getattr(cast(Any, decoder).get_input_embeddings(), "embed_scale", 1.0))
