"""The model of training, evaluation and export: vision encoder + adapter + decoder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from zero_ds.config.schema import AdapterConfig, EncoderConfig
from zero_ds.data.samples import image_positions
from zero_ds.model import lora
from zero_ds.model.adapter import Adapter, Boundary, adapter_modules, belongs_to
from zero_ds.model.attention import Sequences
from zero_ds.model.decoders import Family
from zero_ds.model.encoders import EncoderFamily
from zero_ds.model.layer_plan import LayerPlan
from zero_ds.model.losses import Loss, Places, Predictions, next_token_losses, supervised_rows, total_loss

logger = logging.getLogger(__name__)


class Known(NamedTuple):
    """Facts about a batch that the host knows, and would otherwise have to ask the device for."""

    rows: Places | None = None
    """Indices of the positions that predict a label (`supervised_rows`): ((n,), (n,))."""
    image_places: Places | None = None
    """Indices of the image positions: ((n,), (n,))."""
    sequences: Sequences | None = None
    """Bounds of the samples, for flash attention."""


NamedParameters = list[tuple[str, nn.Parameter]]


class VisionLanguageModel(nn.Module):
    """A causal LM that sees: pixels -> vision encoder -> adapter -> image tokens among the word embeddings -> decoder.

    Without a vision encoder it is the decoder alone. model/adapter.py describes the modules between the two.
    """

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
        self.adapter_config = adapter_config or AdapterConfig()
        self.teacher: Any = None  # a distillation.Teacher, if the run distils
        self.word_space: Any = None  # a word_space.WordSpace, if the run draws image tokens to words
        self.loss_weights: Mapping[str, float] = {}  # of the terms that the run adds to the next-token loss
        if encoder is not None:
            assert encoder_family is not None and encoder_config is not None
            vision_width = encoder_family.vision_config(encoder).hidden_size
            decoder_width = cast(Any, decoder).config.get_text_config().hidden_size
            for name, module in adapter_modules(self.adapter_config, vision_width, decoder_width).items():
                setattr(self, name, module)
            self.tokens_per_image()  # which refuses squares that are larger than the grid of patches

    # -- parts ---------------------------------------------------------------------------------------------------------

    def parameters_of(self, part: str) -> NamedParameters:
        """Returns the parameters of a part under their names in weights files, in a fixed order.

        The names do not depend on which decoder is in use. A part that this model does not have is empty.

            part         names                  parameters
            encoder      encoder.*              the layers that feed the adapter; with `train_last_layers`, the last n
            adapter      adapter.*, boundary.*  the adapter, its boundary embeddings, and the encoder's norm where used
            aligner      aligner.*              the linear layer after an adapter of another width
            translator   translator.<i>.*       the surrogate's trainable layers, i = 0, 1, ...
            early        early.<layer>.*        the kept layers before the first translator
            decoder      decoder.*              the whole decoder, without LoRA
            lora         lora.*                 low-rank adapters of the decoder
        """
        parts = {
            "encoder": self._encoder_parameters,
            "adapter": self._adapter_parameters,
            "aligner": self._aligner_parameters,
            "translator": self._translator_parameters,
            "early": self._early_parameters,
            "decoder": self._decoder_parameters,
            "lora": self._lora_parameters,
        }
        return parts[part]()

    def _encoder_parameters(self) -> NamedParameters:
        if self.encoder is None:
            return []
        assert self.encoder_family is not None and self.encoder_config is not None
        used = self.encoder_family.used_layers(self.encoder, self.encoder_config.feature_layer)
        unused = set(self.encoder_family.layers(self.encoder)) - set(used)
        skipped = {p for layer in unused for p in layer.parameters()}
        skipped |= self.encoder_family.untrained(self.encoder)
        named = [(f"encoder.{n}", p) for n, p in self.encoder.named_parameters() if p not in skipped]
        last = self.encoder_config.train_last_layers
        if last is not None:  # the embeddings then stay frozen as well
            wanted = {p for layer in used[-last:] for p in layer.parameters()}
            named = [(n, p) for n, p in named if p in wanted]
        return named

    def _adapter_parameters(self) -> NamedParameters:
        named = [(n, p) for n, p in self.named_parameters() if belongs_to(n, "adapter", "boundary")]
        return named + self._norm_parameters()

    def _norm_parameters(self) -> NamedParameters:
        """Returns the encoder's norm on patch tokens, which trains in every stage, as in the reference.

        It therefore belongs to the adapter and not to the encoder.
        """
        if self.encoder is None or self.encoder_config is None or not self.encoder_config.patch_norm:
            return []
        assert self.encoder_family is not None
        wanted = set(self.encoder_family.norm(self.encoder).parameters())
        return [(f"encoder.{n}", p) for n, p in self.encoder.named_parameters() if p in wanted]

    def _aligner_parameters(self) -> NamedParameters:
        return [(n, p) for n, p in self.named_parameters() if belongs_to(n, "aligner")]

    def _translator_parameters(self) -> NamedParameters:
        return _numbered("translator", enumerate(self.translators()))

    def _early_parameters(self) -> NamedParameters:
        if self.plan is None:
            return []
        layers = self.family.layers(self.decoder)
        return _numbered("early", ((number, layers[number]) for number in self.plan.early))

    def _decoder_parameters(self) -> NamedParameters:
        return [(f"decoder.{name}", parameter) for name, parameter in lora.without(self.decoder)]

    def _lora_parameters(self) -> NamedParameters:
        return lora.named_parameters(self.decoder)

    def named_targets(self) -> dict[str, nn.Parameter]:
        """Returns every parameter that a weights file may name, by its name there."""
        named = {n: p for n, p in self.named_parameters() if not n.startswith("teacher.")}
        for part in ("translator", "early", "decoder", "lora"):
            named.update(self.parameters_of(part))
        return named

    def translators(self) -> list[nn.Module]:
        """Returns the surrogate's trainable layers; empty for a full model."""
        if self.plan is None:
            return []
        layers = self.family.layers(self.decoder)
        return [layers[number] for number in self.plan.translators]

    def tokens_per_image(self) -> int:
        """Returns the number of positions that an image (or a tile of one) takes in a sequence."""
        if self.encoder is None or self.encoder_family is None:
            return 0
        patches = self.encoder_family.tokens_per_image(self.encoder_family.vision_config(self.encoder))
        return self.adapter_config.image_tokens(patches)

    # -- forward -------------------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes images as decoder inputs: (images, 3, height, width) -> (images, tokens per image, hidden)."""
        assert self.encoder is not None and self.encoder_family is not None and self.adapter is not None
        assert self.encoder_config is not None
        trains = any(p.requires_grad for p in self.encoder.parameters())
        pixel_values = pixel_values.to(next(self.encoder.parameters()).dtype)
        # nothing before the encoder trains, so a frozen encoder needs no graph
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
        """Returns word embeddings with image features at the image positions: (batch, seq) -> (batch, seq, hidden).

        places: indices of the image positions, if they are known without waiting for the device.
        """
        images = image_positions(input_ids)
        embeddings = cast(Any, self.decoder).get_input_embeddings()(input_ids.masked_fill(images, 0))
        if pixel_values is None or self.encoder is None:
            return cast(torch.Tensor, embeddings)
        features = self.image_features(pixel_values).to(embeddings.dtype)
        places = places or images.nonzero(as_tuple=True)
        if not len(places[0]):  # the dummy image of a text-only batch: in the graph on every rank, without effect
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
        """Returns the decoder's hidden states after its final norm: (batch, seq, hidden). Arguments as in `forward`."""
        embeddings = self.embed(input_ids, pixel_values)
        return self.family.hidden_states(self.decoder, embeddings, attention_mask, position_ids)

    def masks_padding(self) -> bool:
        """Returns whether the decoder's attention gets a mask for padding on the right.

        Nothing attends to what comes after it, so no kernel needs one, and with one they are slower or repeat keys and
        values for every head. Eager attention adds a mask anyway.
        """
        return str(cast(Any, self.decoder).config._attn_implementation) == "eager"

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the output head: (..., hidden) after the final norm -> (..., vocabulary)."""
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
        known: tuple[Any, ...] = (),
    ) -> Loss:
        """Returns the loss of a micro-batch, summed over its supervised tokens.

            input_ids        (batch, seq)               token ids, IMAGE_TOKEN at image positions
            labels           (batch, seq)               token ids, IGNORE at positions without loss
            attention_mask   (batch, seq)               1 at tokens, 0 at padding, which is on the right
            pixel_values     (images, 3, height, width) images in the order of their tokens in the batch
            token_weights    (batch, seq)               factor for the next-token loss of each label
            position_ids     (batch, seq)               positions from 0 on in every sample, where rows hold several
            text_only        bool                       whether no rank has an image in this step
            known            `Known`, or its first items

        With `text_only`, the dummy image joins the loss instead of the embeddings, so that the backward pass ends at
        the first layer that learns. The `known` indices follow from labels and input_ids; callers that have these in
        host memory pass them, because computing them here would wait for the GPU.
        """
        rows, image_places, sequences = Known(*known)
        watching = self.teacher.watch(self) if self.teacher is not None else contextlib.nullcontext()
        embeddings = self.embed(input_ids, None if text_only else pixel_values, image_places)
        with watching as trace:
            mask = attention_mask if self.masks_padding() else None
            hidden = self.family.hidden_states(self.decoder, embeddings, mask, position_ids, sequences)
        rows = rows or supervised_rows(labels)
        logits = self.logits(hidden[rows])
        tokens = next_token_losses(logits, labels, rows)
        predictions = Predictions(hidden, logits, tokens, rows, labels, token_weights, attention_mask, position_ids)
        loss, terms = total_loss(predictions, self.loss_weights)
        if self.teacher is not None:
            loss = loss + self.teacher.loss(self, trace, predictions)
        if self.word_space is not None:
            words = self.word_space.token_losses(self, embeddings, input_ids, labels, position_ids, rows)
            loss = loss + self.word_space.config.weight * words.sum()
        if text_only and pixel_values is not None and self.encoder is not None:
            loss = loss + (0.0 * self.image_features(pixel_values)).sum()
        return Loss(loss, tokens.detach(), terms)


def _numbered(part: str, layers: Iterable[tuple[int, nn.Module]]) -> NamedParameters:
    """Returns the parameters of numbered layers under the names `<part>.<number>.*`."""
    return [
        (f"{part}.{number}.{name}", parameter)
        for number, layer in layers
        for name, parameter in layer.named_parameters()
    ]
