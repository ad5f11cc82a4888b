"""Translators trained offline: hidden states, what the student computes, the result, and a run that was killed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import RunConfig
from zero_ds.data.demo import scenes
from zero_ds.model.build import ModelSpec, Modules, build_model
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.layer_plan import Replaced
from zero_ds.runtime.errors import ConfigError
from zero_ds.surrogate.build import build_surrogate
from zero_ds.surrogate.offline import samples, states
from zero_ds.surrogate.offline.corpus import Corpus
from zero_ds.surrogate.offline.states import StateStore, compute_states
from zero_ds.surrogate.offline.student import Student
from zero_ds.surrogate.offline.training_state import TrainingState
from zero_ds.surrogate.offline.translate import translate
from zero_ds.training.checkpoint.checkpoint import find_checkpoint
from zero_ds.training.checkpoint.load import load_weights_
from zero_ds.trajectory.streaming import LayerFiles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    rows = [tiny.record(f"t{i}", [scenes.scene_in_words(scenes.sample_scene(rng), rng)]) for i in range(24)]
    (folder / "text.json").write_text(json.dumps(rows))
    return folder / "text.json"


@pytest.fixture(scope="module")
def lookups(texts: Path) -> Path:
    rng = random.Random(1)
    rows = []
    for number in range(12):
        scene = scenes.sample_scene(rng)
        item = scenes.QUESTIONS["color"](scene, rng)
        word = {"kind": "color", "word": item.word, "start": len(item.prefix) + 1, "choices": list(item.choices)}
        asked = {"id": f"l{number}", "question": scenes.tell(scene, item.question)}
        rows.append({**asked, "answer": item.answer, "words": [word]})
    path = texts.with_name("lookups.json")
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def config(run_config: Callable[..., RunConfig], texts: Path, lookups: Path) -> Callable[..., RunConfig]:
    def make(out: Path, **changes: Any) -> RunConfig:
        base: dict[str, Any] = {
            "encoder": None,
            "data": {"sources": [{"path": str(texts)}], "max_length": 256, "system_prompt": ""},
            "translate": {"lookups": str(lookups), "held_out": 0.25, **changes.pop("translate", {})},
            "micro_batch": 3,
            "checkpoint": {"every_steps": 2},
        }
        return run_config(changes.pop("stage", "translator"), out, **{**base, **changes})

    return make


def corpus(count: int = 7) -> Corpus:
    rng = random.Random(0)
    ids = [[rng.randrange(3, 250) for _ in range(length)] for length in [2, 3, 17, 30, 8, 21, 12][:count]]
    return Corpus(tuple(ids), held_out=2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("ranges", [[Replaced(2, 4)], [Replaced(0, 1), Replaced(3, 4)], [Replaced(1, 4, 2)]])
def test_the_student_computes_what_the_surrogate_does(
    made: Callable[..., Path], tmp_path: Path, name: str, ranges: list[Replaced], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States on disk are the target's own; on them the late layers give the whole surrogate's logits."""
    monkeypatch.setattr(states, "SHARD_BYTES", 40 * 4 * tiny.HIDDEN)
    target = made(name, tied=True)
    build_surrogate(target, ranges, tmp_path / "small")
    store = StateStore(tmp_path / "states", corpus(), tiny.HIDDEN, torch.float32, torch.float32)
    assert len(store.shards) > 3
    (tmp_path / "states").mkdir()
    student = Student(tmp_path / "small", torch.float32, CPU)
    store.claim("x", student.wanted)
    compute_states(store, LayerFiles.of(target, torch.float32, CPU), batch_size=2)
    present = {path.parent.name for path in store.folder.glob("after-*/*")}
    assert present == {f"after-{number:03d}" for number in student.wanted}

    whole, small = (DecoderFolder(path).load(dtype=torch.float32).eval() for path in (target, tmp_path / "small"))
    text = max(range(7), key=lambda number: len(store.corpus.ids[number]))
    ids = torch.tensor([store.corpus.ids[text]])
    with torch.no_grad():
        theirs = whole(input_ids=ids, output_hidden_states=True)  # type: ignore[operator]
        expected = small(input_ids=ids).logits[0]  # type: ignore[operator]
        for number in student.wanted[:-1]:
            if number:  # some classes scale the embeddings in their first step
                torch.testing.assert_close(store.rows(number, text), theirs.hidden_states[number][0])
        goals = student.scores(student.norm(store.rows(student.plan.depth, text)))
        torch.testing.assert_close(goals, theirs.logits[0], rtol=1e-4, atol=1e-4)
        entered = store.rows(student.plan.first_replaced, text)[None]
        outputs, normed = student(entered, torch.ones_like(ids))
    assert len(outputs) == len(student.plan.translators)
    torch.testing.assert_close(student.scores(normed[0]), expected, rtol=1e-4, atol=1e-4)


def test_each_layer_is_read_once_and_only_late_ones_are_trained_on(
    made: Callable[..., Path], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds one layer of the target in memory at a time, however many shards there are; later the late layers alone."""
    monkeypatch.setattr(states, "SHARD_BYTES", 40 * 4 * tiny.HIDDEN)
    read: list[int] = []
    original = LayerFiles.read

    def watched(files: Any, name: str, rows: slice | None = None) -> torch.Tensor:
        if name.startswith("model.layers."):
            read.append(int(name.split(".")[2]))
        return original(files, name, rows)

    monkeypatch.setattr(LayerFiles, "read", watched)
    store = StateStore(tmp_path, corpus(), tiny.HIDDEN, torch.float32, torch.float32)
    store.claim("x", [1, 5])
    compute_states(store, LayerFiles.of(made("llama", tied=True), torch.float32, CPU), 2)
    assert len(store.shards) > 3 and read == [layer for layer in range(5) for _ in range(9)]
    read.clear()
    Student(small, torch.float32, CPU)
    assert set(read) == {1, 2, 3}, "the two translators and the last layer"


def test_states_are_shared_and_never_mixed_up(made: Callable[..., Path], tmp_path: Path) -> None:
    """Another plan computes only the layers that it lacks; other texts or another target are refused."""
    files = LayerFiles.of(made("llama", tied=True), torch.float32, CPU)
    first = StateStore(tmp_path, corpus(), tiny.HIDDEN, torch.float32, torch.bfloat16)
    first.claim("x", [2, 5])
    compute_states(first, files, 2)
    again = StateStore(tmp_path, corpus(), tiny.HIDDEN, torch.float32, torch.bfloat16)
    again.claim("x", [2, 3])
    assert again.steps(again.shards[0]) == {2}
    compute_states(again, files, 2)
    assert again.present(again.shards[0]) == {2, 3, 5}
    with pytest.raises(ConfigError, match=r"its texts is .* choose another translate\.states"):
        StateStore(tmp_path, corpus(6), tiny.HIDDEN, torch.float32, torch.bfloat16).claim("x", [2])
    with pytest.raises(ConfigError, match="its target_hash is 'x', and here it is 'y'"):
        StateStore(tmp_path, corpus(), tiny.HIDDEN, torch.float32, torch.bfloat16).claim("y", [2])


def test_a_full_disk_is_told_before_anything_is_computed(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StateStore(tmp_path, corpus(), tiny.HIDDEN, torch.float32, torch.float32)
    store.claim("x", [2])
    monkeypatch.setattr(states.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(ConfigError, match=r"hidden states of 93 tokens need .* lower translate\.tokens"):
        compute_states(store, LayerFiles.of(made("llama", tied=True), torch.float32, CPU), 2)
    assert not list(tmp_path.glob("after-*"))


class _Killed(BaseException):
    """Stands for SIGKILL: nothing may clean up after it."""


def test_killed_at_any_instant_the_result_is_the_same(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training makes better translators; a run that is killed at five instants ends with the same ones."""
    monkeypatch.setattr(states, "SHARD_BYTES", 300 * 4 * tiny.HIDDEN)
    expected = translate(config(tmp_path / "whole", max_steps=8))
    report = json.loads((expected / "translate.json").read_text())
    assert report["after"]["kl"] < 0.8 * report["before"]["kl"]
    assert report["after"]["hidden"] < report["before"]["hidden"]
    assert report["lookup"]["questions"] == 12 and 0 <= report["after"]["lookup"] <= 1
    assert report["texts"] == {"held-out": 6, "lookups": 12, "training": 18}

    killed = config(tmp_path / "killed", max_steps=8)
    replaced, renames = Path.replace, [0]
    for instant in (1, 3, 9, 20, 2):  # number of files that may still be written before the next kill
        limit = renames[0] + instant

        def dying(path: Path, target: Path, limit: int = limit) -> Path:
            renames[0] += 1
            if renames[0] >= limit:
                raise _Killed
            return replaced(path, target)

        monkeypatch.setattr(Path, "replace", dying)
        with pytest.raises(_Killed):
            translate(killed)
        (tmp_path / "killed.states" / "lock.json").unlink(missing_ok=True)
    monkeypatch.setattr(Path, "replace", replaced)
    found = translate(killed)
    for file in ("weights.safetensors", "translate.json"):
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file
    assert translate(killed) == found, "a finished run computes nothing"


def test_the_result_starts_a_later_stage(
    config: Callable[..., RunConfig], made: Callable[..., Path], small: Path, tmp_path: Path
) -> None:
    out = translate(config(tmp_path / "run", max_steps=2)).parent
    folder = DecoderFolder(small)
    decoder = folder.load(dtype=torch.float32)
    model = build_model(ModelSpec(Modules(decoder, folder.family), plan=folder.plan))
    loaded = load_weights_(model.named_targets(), find_checkpoint(out), skip=lambda name: False)
    assert loaded == {name for name in model.named_targets() if name.startswith("translator.")}
    manifest = find_checkpoint(out).manifest
    assert (
        manifest["stage"] == "translator" and manifest["target_hash"] == DecoderFolder(made("llama", tied=True)).hash()
    )
    again = translate(config(tmp_path / "again", max_steps=2, init_from=[str(out)]))
    first, second = (json.loads((place / "translate.json").read_text()) for place in (out / "step-000002", again))
    assert second["before"] == pytest.approx(first["after"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"stage": "pretrain"}, "stage pretrain trains adapter, translator; set stage=translator"),
        ({"surrogate": None}, "trains against a surrogate; set surrogate=FOLDER"),
        ({"translate": {"lookups": "missing.json"}}, r"missing\.json"),
        ({"translate": {"states": "/dev/null/x"}}, "cannot be made"),
    ],
)
def test_what_cannot_be_done_is_said(
    config: Callable[..., RunConfig], made: Callable[..., Path], tmp_path: Path, changes: Any, complaint: str
) -> None:
    if "stage" in changes:
        changes = {"encoder": {"path": str(made("clip"))}, **changes}
    with pytest.raises(ValueError, match=complaint):
        translate(config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_targets_own_texts(
    made: Callable[..., Path], tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command cuts the surrogate, lets the target write texts, and goes on with those that it has written."""
    monkeypatch.setattr(samples, "GROUP", 4)
    monkeypatch.setattr(samples, "QUESTION_TOKENS", 6)
    monkeypatch.setattr(samples, "ANSWER_TOKENS", 8)
    recipe = {
        "stage": "translator",
        "target": str(made("llama", tied=True)),
        "surrogate": str(tmp_path / "small"),
        "data": {"sources": [{"path": str(texts), "limit": 4}], "max_length": 256, "system_prompt": ""},
        "global_batch": 4,
        "max_steps": 2,
        "precision": "fp32",
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = ["translate", str(tmp_path / "recipe.yaml"), "--replace", "1:4", "--translators", "2", "--sample", "6"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "T(1,4)x2: 2 steps" in result.output and "before" in result.output
    written = sorted((tmp_path / "run.states").glob("samples-*.json"))
    assert [path.name for path in written] == ["samples-0-000000-4.json", "samples-0-000004-2.json"]
    assert all(record["conversations"][1]["value"] for path in written for record in json.loads(path.read_text()))
    stamp = written[0].stat().st_mtime_ns
    written[1].unlink()
    result = CliRunner().invoke(
        app, [*command, f"out={tmp_path / 'other'}", f"translate.states={tmp_path / 'run.states'}"]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert written[0].stat().st_mtime_ns == stamp and written[1].is_file()


def test_training_state_is_refused_if_it_is_damaged(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = config(tmp_path / "run", max_steps=4)
    (tmp_path / "run.states").mkdir()
    TrainingState.path(tmp_path / "run.states", run).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"cannot be used .* remove it to train from the beginning"):
        translate(run)
