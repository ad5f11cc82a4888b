"""A loss in the space of words: image tokens are drawn to the embeddings of the words of their answers.

This is an option beyond the paper. An image's mean token m predicts which words its answers hold, by

    p(w | image) = softmax over the words w of: scale * cosine(m, e_w - mean embedding)

where the words are the tokens of the data's answers. Its target is the distribution over the words of the answers about
this image in which each word weighs its inverse document frequency, log((N + 1) / n_w) for a word in n_w of N answers,
so that `is` and `the` hardly count. A penalty, the mean squared log of the size of an image token divided by that of a
word embedding, keeps image tokens at the size that the decoder knows. Both need the table of word embeddings alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from zero_ds.config.schema import AlignConfig
from zero_ds.data.conversations import IGNORE
from zero_ds.data.samples import image_positions
from zero_ds.model.losses import Loss, Places, supervised, supervised_rows
from zero_ds.model.vlm import Known, VisionLanguageModel


class WordSpace(nn.Module):
    """The words that image tokens are compared with, and the loss that compares them."""

    ids: torch.Tensor
    directions: torch.Tensor
    rarity: torch.Tensor

    def __init__(
        self, counts: Mapping[int, int], samples: int, embeddings: torch.Tensor, config: AlignConfig, scale: float = 1.0
    ) -> None:
        """Prepares the words.

        counts: number of samples in whose answers each token occurs, by ascending token id. samples: number of all
        these samples. embeddings: rows of the table of word embeddings, (words, hidden). scale: factor by which the
        embedding module multiplies its weights.
        """
        super().__init__()
        self.config = config
        embeddings = embeddings.float() * scale
        centred = embeddings - embeddings.mean(0)
        found = torch.tensor(list(counts.values()), dtype=torch.float32)
        self.register_buffer("ids", torch.tensor(list(counts)), persistent=False)
        self.register_buffer("directions", nn.functional.normalize(centred, dim=1), persistent=False)
        self.register_buffer("rarity", ((samples + 1) / found).log(), persistent=False)
        self.size = float(embeddings.square().mean().sqrt())
        """Root mean square of an element of a word embedding."""

    def log_probs(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the log probability of every word for each image: (images, tokens, hidden) -> (images, words)."""
        mean = nn.functional.normalize(features.float().mean(1), dim=1)
        return (self.config.scale * mean @ self.directions.float().T).log_softmax(1)

    def targets(self, labels: torch.Tensor, samples: torch.Tensor, count: int) -> torch.Tensor:
        """Returns the distribution over words that each sample's images should give: (samples, words).

        labels, samples: token ids, or IGNORE, and the number of each position's sample, (batch, seq). count: number of
        samples. The row of a sample without any of the words is zero.
        """
        flat, numbers = labels.flatten(), samples.flatten()
        places = torch.searchsorted(self.ids, flat).clamp_max(len(self.ids) - 1)
        known = (flat != IGNORE) & (self.ids[places] == flat)
        found = torch.zeros((count, len(self.ids)), device=labels.device)
        found[numbers[known], places[known]] = 1.0
        weighted = found * self.rarity.float()
        return weighted / weighted.sum(1, keepdim=True).clamp_min(1e-12)

    def size_penalty(self, features: torch.Tensor) -> torch.Tensor:
        """Returns how far the sizes of image tokens are from a word's: (images, tokens, hidden) -> (images,)."""
        squares = features.float().square().mean(2).clamp_min(1e-12)
        return (0.5 * squares.log() - torch.tensor(self.size, device=features.device).log()).square().mean(1)

    def token_losses(
        self,
        model: VisionLanguageModel,
        embeddings: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None,
        rows: Places | None = None,
    ) -> torch.Tensor:
        """Returns the loss of every supervised token, which is that of its sample's images: (n,), float32.

        embeddings: inputs of the decoder, with image features at the image positions, (batch, seq, hidden). Samples
        without an image have no loss. The sum is a sum over supervised tokens like every other loss, so it does not
        depend on how samples are split over micro-batches and ranks.
        """
        rows = rows or supervised_rows(labels)
        samples = _samples(input_ids, position_ids)
        places = image_positions(input_ids).nonzero(as_tuple=True)
        if not len(places[0]):
            return torch.zeros(len(rows[0]), device=embeddings.device)
        count, tokens = int(samples.max()) + 1, model.tokens_per_image()
        features = embeddings[places].unflatten(0, (-1, tokens))
        if model.boundary is not None:
            features = features[:, 1:-1]
        of_view = samples[places].view(-1, tokens)[:, 0]
        targets = self.targets(labels, samples, count)[of_view]
        losses = -(targets * self.log_probs(features)).sum(1) + self.config.spread * self.size_penalty(features)
        views = torch.bincount(of_view, minlength=count)
        of_sample = torch.zeros(count, device=losses.device).index_add(0, of_view, losses) / views.clamp_min(1)
        return of_sample[supervised(samples, rows)]


def _samples(input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Returns the number of the sample that each position belongs to: (batch, seq), int64."""
    if position_ids is None:
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return rows[:, None].expand_as(input_ids).contiguous()
    starts = position_ids == 0
    starts[:, 0] = True
    return starts.flatten().cumsum(0).view_as(input_ids) - 1


class WordSpaceModel(VisionLanguageModel):
    """Vision encoder and adapter without a decoder: of the language model there are only the word embeddings."""

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
        """Returns the loss in the space of words, summed over the supervised tokens. Arguments as in the base class."""
        rows, image_places, _ = Known(*known)
        embeddings = self.embed(input_ids, None if text_only else pixel_values, image_places)
        losses = cast(WordSpace, self.word_space).token_losses(self, embeddings, input_ids, labels, position_ids, rows)
        total = losses.sum() + 0.0 * embeddings[:, 0].float().sum()  # in the graph, also without an image
        if text_only and pixel_values is not None:
            total = total + (0.0 * self.image_features(pixel_values)).sum()
        return Loss(total, losses.detach())
