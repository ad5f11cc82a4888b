"""The one model of training, evaluation and export: vision encoder + adapter + decoder."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, cast

import torch
from torch import nn

from zero_ds.config.schema import AdapterConfig, EncoderConfig
from zero_ds.data.samples import image_positions
from zero_ds.model import lora
from zero_ds.model.adapter import Adapter, Boundary, adapter_modules, belongs_to
from zero_ds.model.decoders import Family
from zero_ds.model.encoders import EncoderFamily
from zero_ds.model.layer_plan import LayerPlan
from zero_ds.model.losses import Loss, Places, next_token_losses, supervised_rows, weighted_sum

logger = logging.getLogger(__name__)

NamedParameters = list[tuple[str, nn.Parameter]]


class VisionLanguageModel(nn.Module):
    """encoder: pixels -> patch features; adapter: Linear, GELU, Linear to the decoder's width; decoder: causal LM."""

    def __init__(
        self,
        decoder: nn.Module,
        family: Family,
        *,
        plan: LayerPlan | None = None,
        encoder: nn.Module | None = None,
        encoder_family: EncoderFamily | None = None,
        encoder_config: EncoderConfig | None = None,
        adapter_config: AdapterConfig | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.family = family
        self.plan = plan
        self.encoder = encoder
        self.encoder_family = encoder_family
        self.encoder_config = encoder_config
        self.boundary: Boundary | None = None
        self.adapter: Adapter | None = None
        self.aligner: nn.Linear | None = None
        self.teacher: Any = None  # a distill.Teacher, if the run distils
        if encoder is not None:
            assert encoder_family is not None and encoder_config is not None
            vision_width = encoder_family.vision_config(encoder).hidden_size
            decoder_width = cast(Any, decoder).config.get_text_config().hidden_size
            for name, module in adapter_modules(adapter_config or AdapterConfig(), vision_width, decoder_width).items():
                setattr(self, name, module)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def parameters_of(self, part: str) -> NamedParameters:
        """Parameters of a part under their names in weights files, which do not depend on which decoder is in use.

        encoder: the layers that feed the adapter (the last n where configured, then without the embeddings), and its
        norm where used; adapter: with the boundary embeddings; aligner: behind an adapter of another width; translator:
        `translator.<i>.*`; early: `early.<layer>.*`, the kept layers before the first translator; decoder: `decoder.*`;
        lora: `lora.*`.
        """
        if part == "early" and self.plan is not None:
            early = list(self.family.layers(self.decoder))[: self.plan.translators[0]]
            return [(f"early.{i}.{name}", p) for i, layer in enumerate(early) for name, p in layer.named_parameters()]
        if part == "translator":
            return [
                (f"translator.{i}.{name}", parameter)
                for i, layer in enumerate(self.translators())
                for name, parameter in layer.named_parameters()
            ]
        if part == "aligner":
            return [(n, p) for n, p in self.named_parameters() if belongs_to(n, "aligner")]
        if part == "decoder":
            return [(f"decoder.{name}", parameter) for name, parameter in lora.without(self.decoder)]
        if part == "lora":
            return lora.named_parameters(self.decoder)
        if part == "adapter":
            named = [(n, p) for n, p in self.named_parameters() if belongs_to(n, "adapter", "boundary")]
            return named + self._norm_parameters()
        if part != "encoder" or self.encoder is None or self.encoder_family is None or self.encoder_config is None:
            return []
        used = self.encoder_family.used_layers(self.encoder, self.encoder_config.feature_layer)
        unused = set(self.encoder_family.layers(self.encoder)) - set(used)
        skipped = {p for layer in unused for p in layer.parameters()}
        skipped |= set(self.encoder_family.norm(self.encoder).parameters())
        named = [(f"encoder.{n}", p) for n, p in self.encoder.named_parameters() if p not in skipped]
        last = self.encoder_config.train_last_layers
        if last is not None:
            wanted = {p for layer in used[-last:] for p in layer.parameters()}
            named = [(n, p) for n, p in named if p in wanted]
        return named

    def _norm_parameters(self) -> NamedParameters:
        """The encoder's norm on patch tokens belongs to the adapter: it trains in every stage, as in the reference."""
        if self.encoder is None or self.encoder_config is None or not self.encoder_config.patch_norm:
            return []
        assert self.encoder_family is not None
        wanted = set(self.encoder_family.norm(self.encoder).parameters())
        return [(f"encoder.{n}", p) for n, p in self.encoder.named_parameters() if p in wanted]

    def named_targets(self) -> dict[str, nn.Parameter]:
        """Every parameter that a weights file may name."""
        named = {n: p for n, p in self.named_parameters() if not n.startswith("teacher.")}
        for part in ("translator", "early", "decoder", "lora"):
            named.update(self.parameters_of(part))
        return named

    def translators(self) -> list[nn.Module]:
        if self.plan is None:
            return []
        layers = self.family.layers(self.decoder)
        return [layers[number] for number in self.plan.translators]

    def tokens_per_image(self) -> int:
        if self.encoder is None or self.encoder_family is None:
            return 0
        patches = self.encoder_family.tokens_per_image(self.encoder_family.vision_config(self.encoder))
        return patches + (2 if self.boundary is not None else 0)

    # -- forward -------------------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) -> (images, tokens per image, hidden), at the decoder's width."""
        assert self.encoder is not None and self.encoder_family is not None and self.adapter is not None
        assert self.encoder_config is not None
        trains = any(p.requires_grad for p in self.encoder.parameters())
        pixel_values = pixel_values.to(next(self.encoder.parameters()).dtype)
        # nothing before a frozen encoder trains: no graph is kept for it
        with contextlib.nullcontext() if trains else torch.no_grad():
            patches = self.encoder_family.features(
                self.encoder, pixel_values, self.encoder_config.feature_layer, self.encoder_config.patch_norm
            )
        features = cast(torch.Tensor, self.adapter(patches))
        if self.boundary is not None:
            features = cast(torch.Tensor, self.boundary(features))
        return cast(torch.Tensor, self.aligner(features)) if self.aligner is not None else features

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, places: Places | None = None
    ) -> torch.Tensor:
        """Word embeddings with image features at the image positions: (batch, seq) -> (batch, seq, hidden).

        places: indices of the image positions, where they are known without asking the device.
        """
        images = image_positions(input_ids)
        embeddings = cast(Any, self.decoder).get_input_embeddings()(input_ids.masked_fill(images, 0))
        if pixel_values is None or self.encoder is None:
            return cast(torch.Tensor, embeddings)
        features = self.image_features(pixel_values).to(embeddings.dtype)
        places = places or images.nonzero(as_tuple=True)
        if not len(places[0]):  # the dummy picture of a text-only batch: in the graph on every rank, without effect
            return cast(torch.Tensor, embeddings + (0.0 * features).sum())
        features = features.flatten(0, 1)
        if len(places[0]) != len(features):
            raise ValueError(f"{len(places[0])} image positions for {len(features)} image features")
        return cast(torch.Tensor, embeddings.index_put(places, features))

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `forward` up to the decoder's final norm: -> (batch, seq, hidden)."""
        embeddings = self.embed(input_ids, pixel_values)
        return self.family.hidden_states(self.decoder, embeddings, attention_mask, position_ids)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.family.logits(self.decoder, hidden_states)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        text_only: bool = False,
        rows: Places | None = None,
        image_places: Places | None = None,
    ) -> Loss:
        """Loss summed over the supervised tokens of a micro-batch.

        input_ids, labels, attention_mask: (batch, seq); pixel_values: (images, 3, height, width), in the order in which
        their tokens stand in the batch; token_weights: (batch, seq), a factor for the next-token loss of each label;
        position_ids: (batch, seq), where rows hold several samples: each starts at 0; text_only: no rank has a picture,
        so that the dummy picture may join the loss instead of the embeddings, and the backward pass ends where the
        first layer learns; rows, image_places: what `supervised_rows` and `image_positions` say of labels and
        input_ids, as indices: given by whoever has these in host memory, for a GPU would have to be waited for.
        """
        watching = self.teacher.watch(self) if self.teacher is not None else contextlib.nullcontext()
        embeddings = self.embed(input_ids, None if text_only else pixel_values, image_places)
        with watching as watched:
            hidden = self.family.hidden_states(self.decoder, embeddings, attention_mask, position_ids)
        rows = rows or supervised_rows(labels)
        logits = self.logits(hidden[rows])
        tokens = next_token_losses(logits, labels, rows)
        loss = weighted_sum(tokens, rows, token_weights)
        if self.teacher is not None:
            counted = attention_mask if position_ids is None else attention_mask * (position_ids > 0)
            loss = loss + self.teacher.loss(self, watched, logits, tokens, labels, rows, counted, token_weights)
        if text_only and pixel_values is not None and self.encoder is not None:
            loss = loss + (0.0 * self.image_features(pixel_values)).sum()
        return Loss(loss, tokens.detach())
