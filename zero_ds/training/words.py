"""The words that image tokens are drawn to, from the answers of a run's data; and the words nearest to some images."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero_ds.config.schema import RunConfig
from zero_ds.data.formats import DataError
from zero_ds.data.images import image_name
from zero_ds.data.loader import Loader
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.model.word_space import WordSpace
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically
from zero_ds.training import stages
from zero_ds.training.checkpoint.checkpoint import find_checkpoint
from zero_ds.training.checkpoint.load import load_weights_
from zero_ds.training.folders import ModelFolders
from zero_ds.training.setup import load_model, make_loader
from zero_ds.trajectory.streaming import LayerFiles

logger = logging.getLogger(__name__)

SHOWN = 8
"""Number of images whose nearest words are shown, and of words of each."""


def make_word_space(
    config: RunConfig, model: VisionLanguageModel, loader: Loader, folders: ModelFolders
) -> WordSpace | None:
    """Returns the words of the answers with their embeddings; None in a run that does not use them.

    Only the rows of these words are read from the target's table. Every rank finds the same words.

    Raises:
        ConfigError: the answers about images hold fewer than two words.
    """
    if not stages.uses_words(config):
        return None
    counts, samples = answer_words(config, loader)
    files = LayerFiles.of(folders.target, torch.float32, torch.device("cpu"))
    rows = files.read_rows(folders.target.family.embeddings, list(counts))
    scale = files.family.embedding_scale(model.decoder)
    logger.info("image tokens are drawn to %d words of the answers to %d images", len(counts), samples)
    return WordSpace(counts, samples, rows, config.align, scale).to(distributed.device())


def answer_words(config: RunConfig, loader: Loader) -> tuple[dict[int, int], int]:
    """Returns in how many samples' answers each word occurs, by ascending token id, and the number of these samples.

    Samples at even distances are read (of a streamed source the first ones), and of these the ones with an image. The
    token that ends an answer is not a word.

    Raises:
        ConfigError: there are fewer than two words.
    """
    records, encoder = loader.records, loader.sample_encoder
    ends, found, samples = set(encoder.template.ends()), Counter[int](), 0
    count = min(len(records), config.align.samples)
    apart = np.linspace(0, len(records) - 1, count).astype(int).tolist()
    for index in range(count) if records.in_order else apart:
        if not records.images(index):
            continue
        try:
            encoded = encoder.tokens(records[index])
        except DataError:
            continue  # the run itself decides what such a sample means
        pairs = zip(encoded.input_ids, encoded.responses, strict=True)
        found.update({token for token, response in pairs if response >= 0} - ends)
        samples += 1
    if len(found) < 2:
        raise ConfigError(
            f"the answers to {samples} images in data.sources hold {len(found)} words, so image tokens have nothing to "
            "be drawn to; name data with images and answers or captions, or set align.weight=0."
        )
    common = found.most_common(config.align.words)
    return dict(sorted(common)), samples


# -- report ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest_words(config: RunConfig, count: int = SHOWN) -> list[dict[str, Any]]:
    """Returns the words nearest to the first images of a run's data, as its newest checkpoint sees them.

    An entry holds the sample's id, its image, the words with their probabilities, and the words of its answers by
    weight. Written into `words.json` of the run folder as well. A collective.

    Raises:
        ConfigError, CheckpointError, DataError: the run, or its data, cannot be read.
    """
    folders, out = ModelFolders.of(config), Path(config.out)
    model = load_model(config, {"zero_optimization": {"stage": 0}}, folders)
    loader = make_loader(config, model, folders=folders)
    space = make_word_space(config, model, loader, folders)
    assert space is not None
    load_weights_(model.named_targets(), find_checkpoint(out), skip=lambda name: stages.belongs_elsewhere(config, name))
    model.to(distributed.device()).eval()
    found: list[dict[str, Any]] = []
    for index in range(len(loader.records)):
        if len(found) == count:
            break
        if loader.records.images(index):
            found.append(_nearest(model, space, loader, index, count))
    if distributed.is_rank_zero():
        write_atomically(out / "words.json", json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    return found


def _nearest(model: VisionLanguageModel, space: WordSpace, loader: Loader, index: int, count: int) -> dict[str, Any]:
    encoder, sample = loader.sample_encoder, loader.records[index]
    features = model.image_features(encoder.pixels(sample, 1).to(distributed.device()))
    if model.boundary is not None:
        features = features[:, 1:-1]
    probabilities = space.log_probs(features).mean(0).exp()
    encoded = encoder.tokens(sample)
    labels = torch.tensor([encoded.labels], device=features.device)
    wanted = space.targets(labels, torch.zeros_like(labels), 1)[0]
    tokenizer = encoder.template.tokenizer

    def words(values: torch.Tensor) -> list[tuple[str, float]]:
        best = values.topk(min(count, len(values)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            (str(tokenizer.decode([int(space.ids[place])])), round(value, 4)) for place, value in pairs if value > 0
        ]

    return {
        "sample": sample.id,
        "image": image_name(sample.images[0]),
        "nearest": words(probabilities),
        "answers": words(wanted),
    }


def lines(found: list[dict[str, Any]]) -> list[str]:
    """Returns the lines for people about the words nearest to images; words of the answers are in capitals."""
    texts = []
    for entry in found:
        answers = {word for word, _ in entry["answers"]}
        words = [word.strip().upper() if word in answers else word.strip() for word, _ in entry["nearest"]]
        texts.append(f"{entry['sample']}: {', '.join(words)}")
    return texts
