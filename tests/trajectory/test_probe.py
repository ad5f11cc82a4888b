"""The look-up curve: a probe on synthetic states, the rule on synthetic curves, and the command on a tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.data.demo import scenes
from zero_ds.trajectory.curves import Setting, Trajectory
from zero_ds.trajectory.lookup import Lookup
from zero_ds.trajectory.probe import LookupCurve, find_lookup, measure_lookups, probe
from zero_ds.trajectory.transition import find_transition

CHOICES = (3, 5, 8, 11)


def questions(count: int, seed: int = 0) -> list[Lookup]:
    rng = np.random.default_rng(seed)
    return [Lookup(f"q{i}", "color", [1, 2], CHOICES, int(rng.integers(4))) for i in range(count)]


def states(lookups: list[Lookup], strength: float, hidden: int = 24, seed: int = 1) -> torch.Tensor:
    """Returns noise with, in its middle, the direction of each question's word."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4, hidden, generator=generator)
    noise = torch.randn(len(lookups), hidden, generator=generator)
    return 100 + noise + strength * directions[[lookup.answer for lookup in lookups]]


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    lookups = questions(200)
    assert probe(states(lookups, 3.0), lookups).mean() > 0.95
    assert abs(probe(states(lookups, 0.0), lookups).mean() - 0.25) < 0.1


def test_only_a_questions_own_choices_count() -> None:
    """Two kinds of questions with words of their own: the probe never answers with a word of the other kind."""
    first = questions(60)
    second = [Lookup(lookup.id, "shape", [1], (20, 30), lookup.answer % 2) for lookup in questions(60, seed=2)]
    found = probe(states([*first, *second], 0.0), [*first, *second])
    assert found[60:].mean() > 0.35, "half of two choices is chance"


@pytest.mark.parametrize("layer", [1, 5, 17, 23])
def test_the_layer_after_which_words_are_there(layer: int) -> None:
    """30 layers; the word is there from the output of `layer - 1` on, so layers from `layer` on are not needed."""
    lookups = questions(160)
    curve = measure_lookups(
        lambda: (states(lookups, 3.0 if number >= layer - 1 else 0.0, seed=number) for number in range(30)),
        lookups,
        lambda last: torch.zeros(len(last), 12).index_fill(1, torch.tensor([3]), 1.0),
        "hash",
        0,
    )
    assert (curve.layer, curve.verdict) == (layer, "clear")
    assert curve.low is not None and curve.high is not None and curve.low <= layer <= curve.high
    assert curve.chance == 0.25 and curve.questions == 160 and len(curve.curve) == 30
    assert curve.model == np.mean([lookup.answer == 0 for lookup in lookups])


def test_a_slow_rise_is_done_at_nine_tenths() -> None:
    """From chance to all in layers 10 to 20: nine tenths of the gain are there after layer 19."""
    shares = np.clip((np.arange(30) - 9.7) / 10, 0, 1) * 0.75 + 0.25
    draws = np.random.default_rng(0).random((2000, 1))
    layer, low, high, verdict, _ = find_lookup(draws < shares, 0.25)
    assert layer == 20 and verdict == "clear" and low is not None and high is not None and low <= 20 <= high


@pytest.mark.parametrize(
    ("share", "count", "reason"),
    [(0.25, 400, "nothing is looked up: at most"), (0.9, 39, "39 questions are too few")],
)
def test_what_cannot_be_said(share: float, count: int, reason: str) -> None:
    found = np.random.default_rng(1).random((count, 20)) < share
    layer, _, _, verdict, why = find_lookup(found, 0.25)
    assert layer is None and verdict == "uncertain" and why.startswith(reason)


def test_the_proposal_keeps_the_layers_that_look_up(made: Callable[..., Path], tmp_path: Path) -> None:
    """Language converges from layer 12 on and look-ups are done from 15 on: T(15,22) of 24 layers."""
    rng = np.random.default_rng(0)
    curves = np.where(np.arange(24) < 12, 2.0, 0.3) + 0.05 * rng.normal(size=(30, 24))
    curves[:, :12] += 0.3 * rng.normal(size=(30, 1))
    curves[:, -1] = 0
    setting = Setting("m", "t", "d", "h", "sequence", "float32", False, 0, 300, None)
    transition = find_transition(curves)
    assert transition.layer == 12 and transition.verdict == "clear", transition

    def proposed(layer: int | None, verdict: str = "clear") -> str | None:
        lookup = LookupCurve(layer, layer, layer, verdict, "why.", 0.9, 0.25, 100, "x", (0.0,) * 24)  # type: ignore[arg-type]
        plan = Trajectory(setting, tuple("abc"), curves, transition, lookup).plan
        return str(plan) if plan else None

    assert str(Trajectory(setting, tuple("abc"), curves, transition).plan) == "T(12,22)"
    assert proposed(15) == "T(15,22)"
    assert proposed(5) == "T(12,22)"
    assert proposed(23) is None and proposed(None, "uncertain") is None
    content = Trajectory(setting, tuple("abc"), curves, transition).to_json()
    assert "lookup" not in content and "lookups_hash" not in content, "files without questions are as they were"
    assert setting.same(content)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_command_measures_both_curves(made: Callable[..., Path], tmp_path: Path, streamed: bool) -> None:
    rng = random.Random(1)
    asked, texts = [], []
    for number in range(48):
        scene = scenes.sample_scene(rng)
        item = scenes.QUESTIONS["color"](scene, rng)
        word = {"kind": "color", "word": item.word, "start": len(item.prefix) + 1, "choices": list(item.choices)}
        question = scenes.tell(scene, item.question)
        asked.append({"id": f"l{number}", "question": question, "answer": item.answer, "words": [word]})
        texts.append(tiny.record(f"t{number}", [(question, item.answer)]))
    (tmp_path / "lookups.json").write_text(json.dumps(asked))
    (tmp_path / "data.json").write_text(json.dumps(texts[:9]))
    command = ["trajectory", "--model", str(made("gemma3", tied=True)), "--data", str(tmp_path / "data.json")]
    command += ["--dtype", "float32", "--lookups", str(tmp_path / "lookups.json"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, *(["--stream-layers"] if streamed else [])])
    assert result.exit_code == 0, (result.output, result.exception)
    content = json.loads((tmp_path / "out" / "trajectory.json").read_text())
    lookup = content["lookup"]
    assert len(lookup["curve"]) == tiny.LAYERS and 40 <= lookup["questions"] <= 48
    assert lookup["data_hash"] == content["lookups_hash"] and 0 <= lookup["model"] <= 1
    assert "look-up" in result.output
    again = CliRunner().invoke(app, [*command, *(["--stream-layers"] if streamed else [])])
    assert again.exit_code == 0
