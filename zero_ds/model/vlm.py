"""The one model of training, evaluation and export: vision encoder + adapter + decoder."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zero_ds.config.schema import AdapterConfig, DataConfig, EncoderConfig, LoraConfig
from zero_ds.data.conversations import ChatTemplate, Supervision, read_template
from zero_ds.data.images import ImageProcessor
from zero_ds.data.samples import SampleEncoder, image_positions
from zero_ds.model import lora
from zero_ds.model.decoders import Family, family_of
from zero_ds.model.decoders.folder import load_complete, load_decoder
from zero_ds.model.encoders import EncoderFamily, encoder_of
from zero_ds.model.layer_plan import LayerPlan, read_surrogate
from zero_ds.model.losses import Loss, Places, next_token_losses, supervised_rows, weighted_sum
from zero_ds.runtime.zero3 import gathered, partition_

logger = logging.getLogger(__name__)

NamedParameters = list[tuple[str, nn.Parameter]]


class Boundary(nn.Module):
    """Learned start- and end-of-image embeddings. A module with a forward, so that ZeRO-3 gathers it when used."""

    def __init__(self, hidden_size: int, std: float) -> None:
        super().__init__()
        self.embeddings = nn.Embedding.from_pretrained(torch.empty(2, hidden_size).normal_(std=std), freeze=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(images, tokens, hidden) -> (images, tokens + 2, hidden)."""
        both = self.embeddings(torch.arange(2, device=features.device)).to(features.dtype)
        start, end = both.view(2, 1, 1, -1).expand(2, len(features), 1, -1)
        return torch.cat([start, features, end], dim=1)


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
        self.adapter: nn.Sequential | None = None
        self.aligner: nn.Linear | None = None
        self.teacher: Any = None  # a distill.Teacher, if the run distils
        if encoder is not None:
            assert encoder_family is not None and encoder_config is not None
            width = encoder_family.vision_config(encoder).hidden_size
            target = cast(Any, decoder).config.get_text_config().hidden_size
            hidden = (adapter_config.width if adapter_config else None) or target
            self.adapter = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            if adapter_config and adapter_config.boundary_tokens:
                self.boundary = Boundary(hidden, std=0.02)
            if adapter_config and adapter_config.width:
                self.aligner = nn.Linear(hidden, target)

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
            return [(n, p) for n, p in self.named_parameters() if n.startswith("aligner.")]
        if part == "decoder":
            return [(f"decoder.{name}", parameter) for name, parameter in lora.without(self.decoder)]
        if part == "lora":
            return lora.named_parameters(self.decoder)
        if part == "adapter":
            named = [(n, p) for n, p in self.named_parameters() if n.startswith(("adapter.", "boundary."))]
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


@dataclass(frozen=True)
class Assembly:
    """What `assemble` builds a model from."""

    decoder: Path
    encoder: Path | None = None
    encoder_config: EncoderConfig | None = None
    adapter_config: AdapterConfig | None = None
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    seed: int = 0
    """Of the random weights of adapter and LoRA."""
    lora: LoraConfig | None = None


def assemble(parts: Assembly) -> VisionLanguageModel:
    """Loads the parts from their folders. Under an active HfDeepSpeedConfig they go straight into ZeRO-3 partitions.

    Raises:
        ConfigError: a folder that is no model, an unknown family, weights that lack a tensor of the model.
    """
    family = family_of(parts.decoder)
    plan = read_surrogate(parts.decoder).plan if (parts.decoder / "surrogate.json").is_file() else None
    decoder = load_decoder(parts.decoder, dtype=parts.dtype, attention=parts.attention)
    encoder = encoder_family = None
    if parts.encoder is not None:
        encoder_family = encoder_of(parts.encoder)
        attention = "sdpa" if parts.attention == "flash_attention_2" else parts.attention
        encoder = load_complete(encoder_family.load, parts.encoder, dtype=parts.dtype, attn_implementation=attention)
    torch.manual_seed(parts.seed)  # loading draws random numbers under ZeRO-3, and none without
    model = VisionLanguageModel(
        decoder,
        family,
        plan=plan,
        encoder=encoder,
        encoder_family=encoder_family,
        encoder_config=parts.encoder_config,
        adapter_config=parts.adapter_config,
    )
    # new layers are drawn whole, on the CPU and in float32, so that a run starts alike under every ZeRO stage
    for module in (model.adapter, model.boundary, model.aligner):
        if module is not None:
            module.to(parts.dtype)
    if parts.lora is not None:
        lora.inject_(decoder, family, parts.lora, parts.dtype)
    partition_(model)
    without_dropout_(model)
    return model


def without_dropout_(model: nn.Module) -> None:
    """Switches off what some models' configs drop at random in training.

    The method drops nothing, and neither the state of a random generator is part of a commit nor a rank's own: with
    dropout a resumed run would be another one.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def sample_encoder(
    model: VisionLanguageModel,
    decoder: Path,
    encoder: Path | None,
    data: DataConfig,
    *,
    supervise: Supervision = "response",
    seed: int = 0,
) -> SampleEncoder:
    """Tokenizer, template and image processor as a run's data section words them: the same for training and answering.

    Raises:
        ConfigError: a chat template file that cannot be read.
    """
    from transformers import AutoTokenizer

    template = read_template(data.chat_template)
    processor = None
    if encoder is not None and model.encoder is not None and model.encoder_family is not None:
        size = model.encoder_family.vision_config(model.encoder).image_size
        processor = ImageProcessor.from_folder(encoder, size, data.image_grid)
    return SampleEncoder(
        template=ChatTemplate(AutoTokenizer.from_pretrained(decoder), template),
        supervise=supervise,
        processor=processor,
        tokens_per_image=model.tokens_per_image(),
        max_length=data.max_length,
        image_prompt=data.image_prompt,
        system_prompt=data.system_prompt,
        seed=seed,
    )


@torch.no_grad()
def match_embeddings_(model: VisionLanguageModel, pixel_values: torch.Tensor) -> float:
    """Scales the last layer of adapter or aligner so that image tokens have the standard deviation of word embeddings.

    Measured on `pixel_values`, the same on every rank. Returns the factor. A step of initialisation: the trained
    adapter is an ordinary Linear-GELU-Linear.
    """
    assert model.adapter is not None
    words = cast(Any, model.decoder).get_input_embeddings().weight
    last = model.aligner if model.aligner is not None else cast(nn.Linear, model.adapter[2])
    boundary, model.boundary = model.boundary, None
    try:
        # before the engine exists nobody gathers partitioned parameters for a forward pass
        parts = [model.encoder, model.adapter, model.aligner]
        with gathered([words, *(p for part in parts if part is not None for p in part.parameters())]):
            scale = model.family.embedding_scale(model.decoder)
            features = model.image_features(pixel_values.to(last.weight.device))  # of the gathered weights
            measured = scale * float(words.float().std()) / float(features.float().std())
    finally:
        model.boundary = boundary
    # three digits: what is left out depends on threads and kernels, and a start should not
    factor = float(f"{measured:.3g}")
    with gathered(list(last.parameters()), modifier_rank=0):
        last.weight.mul_(factor)
        last.bias.mul_(factor)
    return factor
