"""The loss in the space of words: its targets, its sum over samples, and a model that has only word embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from zero_ds.config.schema import AdapterConfig, AlignConfig, DataConfig, EncoderConfig, SourceConfig
from zero_ds.data.conversations import IGNORE
from zero_ds.data.loader import Loader
from zero_ds.data.sources import Records
from zero_ds.model.build import ModelSpec, build_model, sample_encoder
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.losses import supervised_rows
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.model.word_space import WordSpace

HIDDEN = tiny.HIDDEN


def space(**settings: Any) -> WordSpace:
    generator = torch.Generator().manual_seed(3)
    counts = {5: 1, 7: 4, 9: 8, 20: 2}
    return WordSpace(counts, 8, torch.randn(4, HIDDEN, generator=generator), AlignConfig(**settings))


def built(
    made: Callable[..., Path], decoder: str, *, boundary: bool = False, whole: bool = False
) -> VisionLanguageModel:
    clip = made("clip")
    return build_model(
        ModelSpec(
            made(decoder, tied=True),
            clip,
            EncoderConfig(path=str(clip)),
            AdapterConfig(boundary_tokens=boundary),
            seed=1,
            words_only=not whole,
        )
    )


def test_targets_weigh_rare_words_more() -> None:
    """Each word counts once in a sample, by log((N + 1) / n); tokens outside of the words do not count."""
    labels = torch.tensor([[IGNORE, 7, 7, 20, 11], [9, IGNORE, 11, 11, 11], [11, IGNORE, 11, 11, 11]])
    samples = torch.arange(3)[:, None].expand(3, 5)
    found = space().targets(labels, samples, 3)
    frequent, rare = math.log(9 / 4), math.log(9 / 2)
    expected = torch.tensor([[0, frequent, 0, rare], [0, 0, 1, 0], [0, 0, 0, 0]])
    expected[0] /= frequent + rare
    torch.testing.assert_close(found, expected)


def test_words_of_the_right_size_and_direction_have_little_loss() -> None:
    words = space()
    right = words.directions[[1]] * words.size * HIDDEN**0.5
    assert float(words.size_penalty(right[None])) < 1e-10
    assert words.log_probs(right[None])[0].argmax() == 1
    assert float(words.size_penalty(10 * right[None])) == pytest.approx(math.log(10) ** 2)


@pytest.mark.parametrize("boundary", [False, True])
def test_the_sum_does_not_depend_on_the_split(made: Callable[..., Path], data: Path, boundary: bool) -> None:
    """Micro-batches of one, of four, and packed rows give the same loss and the same gradient of the adapter."""
    model = built(made, "llama", boundary=boundary)
    encode = sample_encoder(model, made("llama", tied=True), made("clip"), DataConfig(system_prompt="", max_length=512))
    records = Records([SourceConfig(path=str(data))])
    counts: dict[int, int] = {}
    for index in range(len(records)):
        for token in sorted(set(encode.tokens(records[index]).input_ids)):
            counts[token] = counts.get(token, 0) + 1
    counts = {token: counts[token] for token in sorted(counts) if token >= 3}
    table: torch.Tensor = model.decoder.get_input_embeddings().weight  # type: ignore[operator]
    model.word_space = WordSpace(counts, len(records), table[list(counts)], AlignConfig())
    model.requires_grad_(False)
    assert model.adapter is not None
    model.adapter.requires_grad_(True)
    results = []
    for micro_batch, packing in ((1, False), (8, False), (8, True)):
        loader = Loader(records, encode, 8, micro_batch, 0, 1, pad_id=0, seed=0, packing=packing)
        (batches,) = loader.steps(0, 1)
        model.zero_grad()
        outcomes = [model(**batch.inputs()) for batch in batches]
        total = torch.stack([outcome.total for outcome in outcomes]).sum()
        total.backward()
        rows = sum(len(supervised_rows(batch.labels)[0]) for batch in batches)
        assert sum(len(outcome.tokens) for outcome in outcomes) == rows
        gradient = torch.cat([p.grad.flatten() for p in model.adapter.parameters() if p.grad is not None])
        results.append((total.detach(), gradient))
    assert float(results[0][0]) > 1 and float(results[0][1].norm()) > 1e-3
    for total, gradient in results[1:]:
        torch.testing.assert_close(total, results[0][0])
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.VARIANTS])
def test_only_the_word_embeddings_are_loaded(
    made: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model without a decoder embeds texts and images as the whole model does, with one tensor of the target."""
    whole = built(made, family, whole=True)
    read: list[str] = []
    original = DecoderFolder.class_tensor
    monkeypatch.setattr(DecoderFolder, "class_tensor", lambda folder, name: read.append(name) or original(folder, name))
    monkeypatch.setattr(DecoderFolder, "load", lambda *_, **__: pytest.fail("the decoder was loaded"))
    model = built(made, family)
    assert read == [DecoderFolder(made(family, tied=True)).family.embeddings]
    assert [name for name, p in model.decoder.named_parameters() if p.numel()] == [model.family.embeddings]
    ids = torch.tensor([[5, 6, 7, *[-200] * 4]])
    from zero_ds.data.conversations import IMAGE_TOKEN

    ids[ids == -200] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.embed(ids, pixels), whole.embed(ids, pixels))
    assert {name for name in model.named_targets() if name.startswith(("adapter", "encoder"))}
