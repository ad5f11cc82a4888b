"""Packed rows do not depend on ranks, keep their samples apart, and give the losses and gradients of padded rows."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from distributed_helper import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import apart, engine_run

from zero_ds.config.schema import AdapterConfig, DataConfig, EncoderConfig, RunConfig, SourceConfig
from zero_ds.data.batches import collate, collate_rows, pack_rows
from zero_ds.data.conversations import IGNORE, IMAGE_TOKEN
from zero_ds.data.loader import Loader
from zero_ds.data.samples import EncodedSample
from zero_ds.data.sources import Records
from zero_ds.model.attention import Sequences
from zero_ds.model.build import ModelSpec, build_model, sample_encoder
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.decoders.base import Family
from zero_ds.training.setup import load_model, make_loader

LIMIT = 100


@given(st.lists(st.integers(0, 150), max_size=60), st.integers(1, 8))
@settings(max_examples=200)
def test_packing_keeps_every_sample_once_within_the_limit(lengths: list[int], multiple: int) -> None:
    rows = pack_rows(lengths, LIMIT, multiple)
    assert sorted(n for row in rows for n in row) == [n for n, length in enumerate(lengths) if length]
    assert len(rows) % multiple == 0 and rows
    totals = [sum(lengths[n] for n in row) for row in rows]
    assert all(total <= LIMIT or len(row) == 1 for total, row in zip(totals, rows, strict=True))
    assert totals == sorted(totals, reverse=True)
    assert rows == pack_rows(lengths, LIMIT, multiple)
    if max(lengths, default=0) <= LIMIT:  # first-fit decreasing needs at most 11/9 of the best number of rows, plus one
        best = max(1, -(-sum(lengths) // LIMIT))
        assert len(rows) <= -(-int(11 / 9 * 2 * best + 1) // multiple) * multiple


def encoded(seed: int, lengths: list[int], images: list[int]) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, (length, shown) in enumerate(zip(lengths, images, strict=True)):
        ids = torch.randint(4, 60, (length,), generator=generator).tolist()
        for place in range(shown):
            first = 1 + place * (tiny.TOKENS_PER_IMAGE + 1)
            ids[first : first + tiny.TOKENS_PER_IMAGE] = [IMAGE_TOKEN] * tiny.TOKENS_PER_IMAGE
        samples.append(
            EncodedSample(
                input_ids=ids,
                labels=[i if n >= length - 5 else IGNORE for n, i in enumerate(ids)],
                responses=[0 if n >= length - 5 else -1 for n in range(length)],
                pixels=torch.randn(shown, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=generator),
                id=str(number),
            )
        )
    return samples


def test_rows_restart_positions_and_predict_nothing_across_samples() -> None:
    samples = encoded(0, [6, 9, 7], [0, 0, 0])
    samples[1] = replace(samples[1], labels=samples[1].input_ids)  # all tokens supervised
    batch = collate_rows([samples[:2], samples[2:]], pad_id=0, image_size=None)
    assert batch.position_ids.tolist() == [[*range(6), *range(9)], [*range(7), *range(8)]]
    assert batch.attention_mask.tolist() == [[1] * 15, [1] * 7 + [0] * 8]
    assert batch.labels[0, 6] == IGNORE and batch.labels[0, 7] == samples[1].input_ids[1]
    assert batch.responses.max() == 2 and batch.lengths.tolist() == [6, 9, 7]


KINDS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")


def family_attentions(kind: str) -> list[str]:
    known = (family for family in FAMILIES.values() if {kind, f"{kind}_text"} & set(family.model_types))
    return sorted({next(known).attention("sdpa"), "eager"})


@pytest.mark.parametrize(("kind", "attention"), [(k, a) for k in KINDS for a in family_attentions(k)])
def test_samples_of_a_row_do_not_see_each_other(made: Callable[..., Path], kind: str, attention: str) -> None:
    """Hidden states in a packed row equal those of the sample alone to 1e-5 in float32."""
    model = build_model(ModelSpec(made(kind, tied=True), attention=attention)).eval()
    samples = encoded(1, [30, 11, 47, 5, 20], [0] * 5)
    packed = collate_rows([samples[:2], samples[2:]], 0, None)
    with torch.no_grad():
        together = model.hidden_states(packed.input_ids, packed.attention_mask, None, packed.position_ids)
        flat = together[packed.attention_mask.bool()].split([30, 11, 47, 5, 20])
        for sample, found in zip(samples, flat, strict=True):
            alone = collate([sample], 0, None)
            expected = model.hidden_states(alone.input_ids, alone.attention_mask)[0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Backbone(torch.nn.Module):
    """Records the shape of its input in place of a decoder, because flash attention itself needs a GPU."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=attention)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, **options: Any) -> Any:
        self.seen.append(tuple(position_ids.shape))
        return SimpleNamespace(last_hidden_state=inputs_embeds * position_ids.unsqueeze(-1))


def test_bounds_of_sequences() -> None:
    samples = encoded(0, [6, 9, 7, 9], [0] * 4)
    padded = collate(samples, 0, None)
    assert (
        padded.sequence_bounds().tolist() == [0, 6, 9, 18, 25, 27, 36] and padded.sequence_bounds().dtype == torch.int32
    )
    packed = collate_rows([samples[:2], samples[2:3], []], 0, None)
    assert packed.sequence_bounds().tolist() == [0, 6, 15, 22, 30, 45]
    assert collate([], 0, None).sequence_bounds().tolist() == [0, 1]


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Stands for a kernel with variable lengths: (positions, heads, size), causal within each sequence."""
    assert options["causal"] and options["cu_seqlens_q"] is options["cu_seqlens_k"]
    lengths = options["cu_seqlens_q"].diff().tolist()
    assert options["max_seqlen_q"] == options["max_seqlen_k"] == max(lengths)
    parts = []
    for q, k, v in zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True):
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return torch.cat(parts, dim=1).transpose(0, 1)


@pytest.mark.parametrize("rows", ["one", "padded", "packed"])
def test_flash_attention_is_told_the_lengths(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    """The loss and the gradient are those of sdpa, and no layer asks the device where samples begin."""
    from transformers import modeling_flash_attention_utils as library

    def asks(*arguments: Any, **options: Any) -> None:
        raise AssertionError("this waits for the device in every layer")

    model = build_model(ModelSpec(made("llama", tied=True))).train()
    samples = encoded(1, [30, 11, 47, 5], [0] * 4)
    batches = {
        "one": collate(samples[:1], 0, None),
        "padded": collate(samples, 0, None),
        "packed": collate_rows([samples[:2], samples[2:]], 0, None),
    }
    batch = batches[rows]
    bounds = batch.sequence_bounds()
    sequences = Sequences(bounds, int(bounds.diff().max()))
    everything: dict[str, bool] = defaultdict(lambda: True)
    keep = functools.partial(library._process_flash_attention_kwargs, supports_mapping=everything)
    kernels = ((asks, flash, asks, asks, asks), (keep, asks))
    monkeypatch.setattr(library, "lazy_import_flash_attention", lambda name: kernels)
    monkeypatch.setattr(library, "_is_packed_sequence", asks)
    monkeypatch.setattr(library, "_upad_input", asks)
    found = []
    for attention in ("sdpa", "flash_attention_2"):
        model.decoder.config._attn_implementation = attention  # type: ignore[union-attr]
        loss = model(**batch.inputs(), known=(None, None, sequences)).total
        model.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_sdpa_gets_no_mask_for_padding(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing attends to padding on the right, so that rows of unequal lengths take the causal kernel."""
    model = build_model(ModelSpec(made("llama", tied=True))).eval()
    batch = collate(encoded(1, [30, 11, 47], [0] * 3), 0, None)
    model.decoder.set_attn_implementation("eager")  # type: ignore[operator]
    with_mask = model(**batch.inputs())
    model.decoder.set_attn_implementation("sdpa")  # type: ignore[operator]
    attend, causal = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        causal.append(options["is_causal"] and options["attn_mask"] is None)
        return attend(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    torch.testing.assert_close(model(**batch.inputs()), with_mask, rtol=1e-5, atol=1e-5)
    assert causal == [True] * tiny.LAYERS


def test_flash_attention_gets_one_row() -> None:
    """With flash attention, transformers separates packed samples by their positions, but only within a single row."""
    embeddings, positions = torch.randn(3, 7, 4), torch.arange(7).expand(3, 7)
    found = []
    for attention, shape in (("sdpa", (3, 7)), ("flash_attention_2", (1, 21))):
        decoder = torch.nn.Module()
        decoder.model = backbone = Backbone(attention)
        found.append(Family(name="any", model_types=()).hidden_states(decoder, embeddings, None, positions))
        assert backbone.seen == [shape]
    assert torch.equal(*found)


# -- losses and gradients ----------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {"padded": {}, "grouped": {"grouping": "length"}, "packed": {"packing": True}}


@pytest.mark.parametrize(
    "stage",
    [
        "pretrain",
        pytest.param("encoder", marks=pytest.mark.slow(reason="the other two stages always run")),
        "decoder",
    ],
)
def test_padded_grouped_and_packed_have_one_loss_and_one_gradient(
    run_config: Callable[..., RunConfig], data: Path, stage: str
) -> None:
    """Compares a step over eight samples in float32, two without an image. Packed and grouped rows agree to 1e-6."""
    base = {"sources": [{"path": str(data)}], "max_length": 160, "system_prompt": ""}

    def config(way: str, micro: int, **changes: Any) -> RunConfig:
        return run_config(stage, data={**base, **WAYS[way]}, global_batch=8, micro_batch=micro, **changes)

    cases = {
        (way, zero, micro, ranks): config(way, micro, zero=zero)
        for ranks in (1, 2)
        for way, zero, micro in (
            ("padded", "zero2", 1),
            ("padded", "zero2", 4),
            ("grouped", "zero2", 4),
            ("packed", "zero2", 1),
            ("packed", "zero3", 1),
            ("packed", "zero3", 2),
        )
    }
    found: dict[Any, Any] = {}
    for ranks in (1, 2):
        mine = [case for case in cases if case[3] == ranks]
        for rank in run_ranks(engine_run, ranks, [cases[case] for case in mine]):
            found.update(zip(mine, rank, strict=True))
    one = found["padded", "zero2", 1, 1]["steps"][0]
    names = sorted(one["gradients"])
    expected = torch.cat([one["gradients"][name].flatten() for name in names])
    for case, run in found.items():
        step = run["steps"][0]
        whole = torch.cat([step["gradients"][name].flatten() for name in names])
        assert apart(whole, expected) < (2e-6 if case[0] != "padded" else 5e-6), case
        assert step["loss"] == pytest.approx(one["loss"], rel=1e-6), case


@pytest.mark.parametrize("order", [0.0, 0.5])
def test_steps_of_more_and_of_fewer_passes(run_config: Callable[..., RunConfig], tmp_path: Path, order: float) -> None:
    """Short and long samples alternate, so steps differ in their number of passes. Also tested with dynamic loss."""
    short = [tiny.record(f"s{n}", [("Which?", "The star.")]) for n in range(8)]
    long = [tiny.record(f"l{n}", [("Which is it? " * 8, "It is the star. " * 4)]) for n in range(8)]
    (tmp_path / "data.json").write_text(json.dumps((short + long) * 4))
    base = {"sources": [{"path": str(tmp_path / "data.json")}], "max_length": 200, "system_prompt": ""}
    configs = [
        run_config("pretrain", data={**base, "packing": packing}, global_batch=8, dynamic_loss={"order": order})
        for packing in (False, True)
    ]
    loader = make_loader(configs[1], load_model(configs[1], {"zero_optimization": {}}), 1)
    assert len({len(step) for step in loader.steps(0, 2)}) == 2
    ((padded, packed),) = run_ranks(engine_run, 1, configs)
    for expected, found in zip(padded["steps"][:2], packed["steps"][:2], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4)


@pytest.fixture
def stream(made: Callable[..., Path], data: Path) -> Callable[..., Loader]:
    target = made("llama", tied=True)
    encoder = run = None
    records = Records([SourceConfig(path=str(data))])

    def make(rank: int, ranks: int, micro: int = 1, batch: int = 8) -> Loader:
        nonlocal encoder, run
        if encoder is None:
            clip = made("clip")
            model = build_model(
                ModelSpec(
                    target, encoder=clip, encoder_config=EncoderConfig(path=str(clip)), adapter_config=AdapterConfig()
                )
            )
            encoder = sample_encoder(model, target, clip, DataConfig(max_length=160, system_prompt=""))
        return Loader(records, encoder, batch, micro, rank, ranks, 0, 3, packing=True)

    return make


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_ranks_share_the_rows_of_a_step(stream: Callable[..., Loader], ranks: int, micro: int) -> None:
    steps = [list(stream(rank, ranks, micro, batch=12).steps(0, 3)) for rank in range(ranks)]
    alone = [sorted(n for b in step for n in b.ids) for step in stream(0, 1, batch=12).steps(0, 3)]
    for number in range(3):
        held = [step[number] for step in steps]
        assert len({len(batches) for batches in held}) == 1, "every rank makes the same number of forward passes"
        assert sorted(n for batches in held for b in batches for n in b.ids) == alone[number]
        for batches in held:
            for batch in batches:
                images = (batch.input_ids == IMAGE_TOKEN).sum() // tiny.TOKENS_PER_IMAGE
                assert len(batch.pixel_values) == max(1, images)
    again = [next(stream(rank, ranks, micro, batch=12).steps(2, 3)) for rank in range(ranks)]
    assert [[b.ids for b in batches] for batches in again] == [[b.ids for b in step[2]] for step in steps]
