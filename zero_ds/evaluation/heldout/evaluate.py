"""Evaluates a model on held-out records: each question is asked about its own image and about another one.

The second condition is the control. A model that ignores the image answers the same way under both, so every
answer that is right with another image could be guessed. The replacement is a fixed derangement that depends only on
the images and the seed; it is the same for every model.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from zero_ds.data.conversations import PLACEHOLDER, Turn
from zero_ds.data.formats import DataError
from zero_ds.evaluation.heldout.records import EvaluationRecord, read_records
from zero_ds.evaluation.heldout.results import CONDITIONS, Evaluation, ItemResult, WordResult
from zero_ds.evaluation.heldout.scoring import first_choice
from zero_ds.grafting.compatibility import run_config
from zero_ds.grafting.generate import Answerer, Choice, Query, Reply
from zero_ds.grafting.load import load_graft, load_trained
from zero_ds.model.build import sample_encoder
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.precision import fast_dtype
from zero_ds.training.checkpoint.checkpoint import find_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordOptions:
    """How to evaluate a model on held-out records."""

    limit_images: int | None = None
    """Number of images to use, from the start of the file; None uses all of them."""
    batch_size: int = 64
    """Number of records per forward pass."""
    max_new_tokens: int = 24
    """Length limit of an answer, in tokens."""
    seed: int = 0
    """Seed of the derangement that assigns every image its control."""
    dtype: torch.dtype | None = None
    """Precision of the model; None takes bfloat16 where the device is fast at it, else float32."""
    accept: tuple[str, ...] = ()
    """Compatibility checks whose difference is accepted when the encoder is grafted."""


def evaluate_records(
    weights: Path, decoder: str, records: Path, name: str, options: RecordOptions | None = None
) -> Evaluation:
    """Evaluates a run's vision encoder in a language model, on a file of held-out records.

    weights: Folder of a run or of one of its checkpoints. decoder: Folder or hub id of the language model that the
    encoder is plugged into: its surrogate, or its target (the graft). name: Name of the model in tables and plots.

    Raises:
        ConfigError, CheckpointError: the run has no vision encoder, or does not fit the language model.
        DataError, ImageError: a record or an image cannot be used.
    """
    options = options or RecordOptions()
    dtype = options.dtype or fast_dtype()
    questions = read_records(records, limit_images=options.limit_images)
    checkpoint = find_checkpoint(weights)
    config = run_config(checkpoint)
    if config.encoder is None:
        raise ConfigError(f"{weights} has no vision encoder; name the run of a stage that has one, such as `encoder`.")
    folder = DecoderFolder(local_folder(decoder))
    if folder.is_surrogate:
        model = load_trained(weights, folder.path, dtype=dtype, attention="eager")
    else:
        model = load_graft(weights, folder.path, accept=options.accept, dtype=dtype, attention="eager")
    encode = sample_encoder(model, folder.path, local_folder(config.encoder.path), config.data)
    answerer = Answerer(model, encode, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens)
    setting = {"weights": str(checkpoint.folder), "decoder": decoder, "stage": config.stage}
    return evaluate(answerer, questions, name, seed=options.seed, setting=setting)


def evaluate(
    answerer: Answerer,
    records: Sequence[EvaluationRecord],
    name: str,
    *,
    features: Sequence[torch.Tensor] | None = None,
    seed: int = 0,
    setting: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Generates and scores an answer to every record under both conditions, with a model that is in memory.

    features: Result of `image_features`; computed here if None. setting: Entries that are added to the result's
    settings.

    Raises:
        DataError, ImageError: a record or an image cannot be used.
    """
    images = list(dict.fromkeys(record.image for record in records))
    control = shuffled_images(images, seed)
    started = time.monotonic()
    if features is None:
        features = image_features(answerer, records)
    assert len(features) == len(images), "the features are not those of the records' images"
    row = {image: number for number, image in enumerate(images)}
    cases = []
    for condition in CONDITIONS:
        for record in records:
            cases.append((record, condition, record.image if condition == "own" else control[record.image]))
    queries = [_query(record, row[shown]) for record, _, shown in cases]
    with tqdm(total=len(queries), desc=f"evaluating {name}", unit="answer", disable=None) as bar:
        replies = answerer.examine(queries, features, bar.update)
    seconds = time.monotonic() - started
    items = []
    for (record, condition, shown), reply in zip(cases, replies, strict=True):
        items.append(_score(record, condition, shown, reply))
    measured = {
        "root": str(_root(records[0])),
        "seed": seed,
        "max_new_tokens": answerer.max_new_tokens,
        "dtype": str(next(answerer.model.decoder.parameters()).dtype).removeprefix("torch."),
        "device": str(answerer.device),
        "records": len(records),
        "pictures": len(images),
        "seconds": round(seconds, 2),
        "answers_per_second": round(len(queries) / seconds, 2),
    }
    logger.info("%s: %d answers in %.0f s", name, len(queries), seconds)
    return Evaluation(name, tuple(items), {**measured, **(setting or {})})


def shuffled_images(images: Sequence[str], seed: int) -> dict[str, str]:
    """Assigns every image another one, each used once: the images in a seeded random order, rotated by one.

    Raises:
        DataError: there are fewer than two different images.
    """
    names = list(dict.fromkeys(images))
    if len(names) < 2:
        raise DataError(f"the control needs at least two images, not {len(names)}; evaluate on more records")
    random.Random(seed).shuffle(names)
    return dict(zip(names, [*names[1:], names[0]], strict=True))


def image_features(answerer: Answerer, records: Sequence[EvaluationRecord]) -> list[torch.Tensor]:
    """Computes the features of the records' images, in order of first appearance; each is (tokens, hidden).

    They depend only on the vision encoder and the adapter, so one list can be passed to `evaluate` for every decoder
    that shares both.
    """
    paths = list({record.image: str(record.path) for record in records}.values())
    with tqdm(total=len(paths), desc="encoding images", unit="image", disable=None) as bar:
        return answerer.features(paths, bar.update)


def _root(record: EvaluationRecord) -> Path:
    """Returns the folder that the path of the record's image is relative to."""
    return next(folder for folder in record.path.parents if (folder / record.image).resolve() == record.path)


def _query(record: EvaluationRecord, image: int) -> Query:
    """Builds the query about the image with features in row `image`."""
    choices = tuple(Choice(word.start, word.word, word.choices) for word in record.words)
    turns = (Turn("user", f"{PLACEHOLDER}\n{record.question}"),)
    return Query(record.id, turns, (image,), record.answer, choices)


def _score(record: EvaluationRecord, condition: str, shown: str, reply: Reply) -> ItemResult:
    """Scores a reply against the record's words."""
    words = []
    for word, log_probs in zip(record.words, reply.log_probs, strict=True):
        free = first_choice(reply.text, word.choices)
        most_probable = word.choices[int(np.argmax(log_probs))]
        words.append(
            WordResult(
                kind=word.kind,
                word=word.word,
                choices=word.choices,
                free=free,
                free_correct=free == word.word,
                log_probs=tuple(round(value, 5) for value in log_probs),
                forced_correct=most_probable == word.word,
            )
        )
    return ItemResult(
        id=record.id,
        record_kind=record.kind,
        condition=condition,
        image=record.image,
        shown=shown,
        question=record.question,
        answer=record.answer,
        generated=reply.text,
        words=tuple(words),
    )
