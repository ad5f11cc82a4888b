"""Distillation: which part learns from which loss. References use the whole target, without the module's shortcuts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks, train_all

from zero_ds.config.schema import DistillConfig, EncoderConfig, RunConfig, SourceConfig
from zero_ds.data.conversations import IGNORE
from zero_ds.data.loader import Loader
from zero_ds.data.sources import Records
from zero_ds.model.build import ModelSpec, build_model, sample_encoder
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.distillation import Teacher
from zero_ds.model.layer_plan import Replaced
from zero_ds.model.losses import hidden_distillation_sum, logit_distillation_sum, next_token_sum, supervised_rows
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.surrogate.build import build_surrogate
from zero_ds.training import stages

RANGES = {
    "T(2,4)": [Replaced(2, 4)],
    "T(1,1)+T(3,4)": [Replaced(1, 1), Replaced(3, 4)],
    "T(1,4)x2": [Replaced(1, 4, 2)],
    "T(0,5)x3": [Replaced(0, 5, 3)],
}


@pytest.fixture(scope="module")
def surrogates(made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Replaced]], Path]:
    root = tmp_path_factory.mktemp("surrogates")

    def build(ranges: list[Replaced]) -> Path:
        out = root / "+".join(f"{r.first}-{r.last}x{r.translators}" for r in ranges)
        if not out.exists():
            build_surrogate(made("llama", tied=True), ranges, out)
        return out

    return build


def assembled(made: Callable[..., Path], decoder: Path, distill: DistillConfig | None = None) -> VisionLanguageModel:
    """Builds a model that is always the same with the same decoder; its adapter is the same with every decoder."""
    clip = made("clip")
    model = build_model(ModelSpec(decoder, clip, EncoderConfig(path=str(clip)), seed=1))
    for layer in model.translators():  # as after some training, because an exact copy of a layer would be too easy
        generator = torch.Generator().manual_seed(7)
        for parameter in layer.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    if distill is not None:
        model.teacher = Teacher(model, made("llama", tied=True), distill, torch.float32)
    return model


def batch(made: Callable[..., Path], model: VisionLanguageModel, data: Path) -> dict[str, torch.Tensor]:
    """Returns a batch of four samples of unequal length, one of them without an image."""
    from zero_ds.config.schema import DataConfig

    encode = sample_encoder(model, made("llama", tied=True), made("clip"), DataConfig(system_prompt=""))
    loader = Loader(Records([SourceConfig(path=str(data))]), encode, 4, 4, 0, 1, pad_id=0, seed=0)
    ((found,),) = loader.steps(0, 1)
    return found.inputs()


def gradients(model: VisionLanguageModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_targets().items() if p.grad is not None}


def freeze(model: VisionLanguageModel, stage: str = "pretrain") -> None:
    base: dict[str, Any] = {"target": "t", "surrogate": "s", "encoder": {"path": "c"}, "out": "o"}
    stages.freeze_(model, RunConfig.model_validate({**base, "stage": stage}))
    model.train()


def reference(
    made: Callable[..., Path], model: VisionLanguageModel, inputs: dict[str, torch.Tensor], logits: float, hidden: float
) -> torch.Tensor:
    """Returns the distillation loss alone, from a run of the whole target on the same embeddings."""
    target = assembled(made, made("llama", tied=True))
    rows = supervised_rows(inputs["labels"])
    embeddings = model.embed(inputs["input_ids"], inputs["pixel_values"]).detach()
    inner: dict[str, Any] = {
        "attention_mask": inputs["attention_mask"],
        "output_hidden_states": True,
        "use_cache": False,
    }
    with torch.no_grad():
        theirs = target.decoder.model(inputs_embeds=embeddings, **inner)  # type: ignore[operator, union-attr]
        goal = target.logits(theirs.last_hidden_state[rows])
    ours = model.decoder.model(inputs_embeds=embeddings, **inner)  # type: ignore[operator, union-attr]
    total = logits * logit_distillation_sum(model.logits(ours.last_hidden_state[rows]), goal)
    assert model.plan is not None
    for number, index in enumerate(model.plan.translators):
        last = model.plan.replaced_by(number)[1]
        # entry n of hidden_states is what enters layer n; the last one is normed, so it is left out of these plans
        term = hidden_distillation_sum(
            ours.hidden_states[index + 1], theirs.hidden_states[last + 1], inputs["attention_mask"]
        )
        total = total + hidden * term
    return total


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


CASES = [
    pytest.param(ranges, *weights, id=f"{name} {weights}")
    for name, ranges in RANGES.items()
    for weights in [(1.0, 0.0, 0.0), (0.5, 2.0, 0.0), (1.0, 0.5, 0.25), (1.0, 0.0, 1.0)]
    if not (weights[1] and ranges[-1].last == 5)  # transformers norms the last hidden state: no reference for it
]


@pytest.mark.parametrize("stage", ["pretrain", "translator"])
@pytest.mark.parametrize(("ranges", "logits", "hidden", "share"), CASES)
def test_adapter_and_translators_each_get_their_own_loss(
    made: Callable[..., Path],
    surrogates: Callable[[list[Replaced]], Path],
    data: Path,
    ranges: list[Replaced],
    logits: float,
    hidden: float,
    share: float,
    stage: str,
) -> None:
    """The adapter gets the plain loss, translators `share` of it plus the distillation loss, other parts nothing.

    Where nothing before the translators trains, their layers run only once, which must not change the result.
    """
    small = surrogates(ranges)
    plain = assembled(made, small)
    model = assembled(made, small, DistillConfig(logits=logits, hidden=hidden, next_token=share))
    inputs = batch(made, model, data)
    for either in (plain, model):
        freeze(either, stage)
    usual = gradients(plain, plain(**inputs).total)
    loss = model(**inputs).total
    ours = gradients(model, loss)
    extra = gradients(plain, reference(made, plain, inputs, logits, hidden))
    assert set(ours) == set(usual)
    for name, gradient in usual.items():
        if name.startswith("adapter."):
            assert close(ours[name], gradient), name
        elif name.startswith("translator."):
            assert close(ours[name], share * gradient + extra[name]), name
    trained = {n for part in stages.STAGES[stage].trains for n, _ in model.parameters_of(part)}
    layers = {n for n in ours if n.startswith("decoder.")}
    assert {n for n in ours if n.startswith(("adapter.", "translator."))} == trained
    assert {int(n.split(".")[3]) for n in layers} == set(model.plan.translators), "kept layers get no gradient"  # type: ignore[union-attr]
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    # the term that takes back has a gradient and no value, so the logged loss is next-token loss plus divergences
    value = plain(**inputs).total + reference(made, plain, inputs, logits, hidden)
    torch.testing.assert_close(loss, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "translator"])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_target_runs_in_one_step_of_n(
    made: Callable[..., Path], surrogates: Callable[[list[Replaced]], Path], data: Path, share: float, stage: str
) -> None:
    """Counts the loss n times in that step; in the others translators get their share of the next-token loss alone."""
    small = surrogates([Replaced(1, 1), Replaced(3, 4)])
    plain = assembled(made, small)
    model = assembled(made, small, DistillConfig(logits=1.0, hidden=0.5, next_token=share, every=3))
    inputs = batch(made, model, data)
    for either in (plain, model):
        freeze(either, stage)
    usual = gradients(plain, plain(**inputs).total)
    extra = gradients(plain, reference(made, plain, inputs, 1.0, 0.5))
    runs = [0]
    layer = next(iter(model.teacher.replaced.values()))
    layer.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    for step, due in ((0, True), (1, False), (2, False), (3, True)):
        model.teacher.begin(step)
        runs[0] = 0
        loss = model(**inputs).total
        ours = gradients(model, loss)
        assert runs[0] == int(due)
        for name, gradient in usual.items():
            if name.startswith("adapter."):
                assert close(ours[name], gradient), name
            elif name.startswith("translator."):
                expected = share * gradient + (3 * extra[name] if due else 0)
                assert (ours[name] - expected).norm() <= 1e-5 * gradient.norm() + 1e-5 * extra[name].norm(), name
        if not due:
            torch.testing.assert_close(loss, plain(**inputs).total)


def test_a_share_of_the_positions(
    made: Callable[..., Path], surrogates: Callable[[list[Replaced]], Path], data: Path
) -> None:
    """Other tokens are chosen in every step, and the mean over steps is the loss at all of them."""
    small = surrogates([Replaced(2, 4)])
    whole = assembled(made, small, DistillConfig(logits=1.0))
    model = assembled(made, small, DistillConfig(logits=1.0, positions=0.25))
    plain = assembled(made, small)
    inputs = batch(made, model, data)
    with torch.no_grad():
        base, full = float(plain(**inputs).total), float(whole(**inputs).total)
        found = []
        for step in range(40):
            model.teacher.begin(step)
            found.append(float(model(**inputs).total) - base)
    assert len(set(found)) > 20
    assert sum(found) / 40 == pytest.approx(full - base, rel=0.15)


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_a_translator_that_does_what_its_layer_did_has_nothing_to_learn(
    made: Callable[..., Path], surrogates: Callable[[list[Replaced]], Path], data: Path, layer: int
) -> None:
    small = surrogates([Replaced(layer, layer)])
    clip = made("clip")

    def build() -> VisionLanguageModel:
        return build_model(ModelSpec(small, clip, EncoderConfig(path=str(clip)), seed=1))

    plain, model = build(), build()
    model.teacher = Teacher(
        model, made("llama", tied=True), DistillConfig(logits=1, hidden=1, next_token=0), torch.float32
    )
    inputs = batch(made, model, data)
    freeze(model)
    with torch.no_grad():
        hidden = plain.hidden_states(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])
        rows = supervised_rows(inputs["labels"])
        expected = next_token_sum(plain.logits(hidden[rows]), inputs["labels"], rows)
    # the divergence is zero, and the share of the next-token loss that is taken back has no value
    loss = model(**inputs).total
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    usual = gradients(plain, plain(**inputs).total)
    ours = gradients(model, loss)
    for name in ours:
        if name.startswith("translator."):
            assert ours[name].norm() < 1e-4 * usual[name].norm(), name


def test_the_teacher_is_not_part_of_the_model(
    made: Callable[..., Path], surrogates: Callable[[list[Replaced]], Path]
) -> None:
    small = surrogates([Replaced(2, 4)])
    plain, model = assembled(made, small), assembled(made, small, DistillConfig(logits=1))
    assert set(model.named_targets()) == set(plain.named_targets())
    for part in ("encoder", "adapter", "translator", "decoder"):
        assert [n for n, _ in model.parameters_of(part)] == [n for n, _ in plain.parameters_of(part)]
    own = sum(p.numel() for p in model.teacher.parameters())
    layer = sum(p.numel() for p in model.translators()[0].parameters())
    assert own == 3 * layer, "only the replaced layers are loaded"
    model.train()
    assert not model.teacher.training


def test_distilling_with_every_zero_stage(
    run_config: Callable[..., RunConfig], tmp_path: Path, surrogates: Callable[[list[Replaced]], Path]
) -> None:
    """Layers may run twice in a forward pass under partitioning, activation checkpointing and two ranks."""
    kinds = {
        "zero2": "zero2",
        "zero3": "zero3",
        "zero3 again": "zero3",
        "zero2 rarely": "zero2",
        "zero3 rarely": "zero3",
    }
    configs = [
        run_config(
            "pretrain",
            tmp_path / kind,
            zero=zero,
            activation_checkpointing=kind != "zero3 again",
            surrogate=str(surrogates([Replaced(2, 4)])),
            distill={
                "logits": 1.0,
                "hidden": 0.5,
                "next_token": 0.0,
                **({"every": 2, "positions": 0.5} if "rarely" in kind else {}),
            },
            max_steps=3,
        )
        for kind, zero in kinds.items()
    ]
    wrong = run_config("decoder", tmp_path / "wrong", distill={"logits": 1.0})
    first, second = run_ranks(train_all, 2, [*configs, wrong])
    assert first == second
    assert first[:5] == ["step-000003"] * 5
    assert "distill.* needs a surrogate to distil into" in first[5]
    losses = {
        kind: [json.loads(line)["loss"] for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        for kind in kinds
    }
    assert losses["zero3"] == pytest.approx(losses["zero2"], rel=1e-4)
    assert losses["zero3 again"] == pytest.approx(losses["zero2"], rel=1e-4)
    assert losses["zero3 rarely"] == pytest.approx(losses["zero2 rarely"], rel=1e-4)
    assert losses["zero2"][2] < losses["zero2"][0]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3-multimodal"])
def test_the_teacher_is_the_target_in_every_family(made: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """With every family's layer types, scaled embeddings and capped logits, the loss is the divergence."""
    target = made(family, tied=True)
    build_surrogate(target, [Replaced(1, 3)], tmp_path / "small")
    model = build_model(ModelSpec(tmp_path / "small"))
    model.teacher = Teacher(model, target, DistillConfig(logits=1.0), torch.float32)
    ids = torch.arange(60).view(3, 20) * 7 % 250
    labels = ids.masked_fill(torch.arange(20) < 8, IGNORE)
    mask = torch.ones_like(ids)
    rows = supervised_rows(labels)
    with torch.no_grad():
        loss = model(ids, labels, mask).total
        mine = model.logits(model.hidden_states(ids, mask)[rows])
        theirs = DecoderFolder(target).load(dtype=torch.float32).eval()(input_ids=ids, attention_mask=mask).logits[rows]
        expected = next_token_sum(mine, labels, rows) + logit_distillation_sum(mine, theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert logit_distillation_sum(mine, theirs) > 1, "surrogate and target differ"
