"""A conversation streams the greedy answers to its questions, over turns and images, and survives a bad image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.data.conversations import Turn
from zero_ds.data.formats import DataError
from zero_ds.data.images import ImageError
from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.generate import Answerer
from zero_ds.grafting.named_model import LoadedModel, find_model, load_model
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import CheckpointError

QUESTIONS = ("what color is it?", "is there a circle on the left side?", "why?")


@pytest.fixture(scope="module")
def graft(trained: Path, made: Callable[..., Path]) -> LoadedModel:
    named = find_model(str(trained / "encoder"), str(made("llama", tied=True)))
    assert named.kind == "graft" and named.sees
    return load_model(named)


@pytest.fixture(scope="module")
def images(data: Path) -> list[str]:
    return [str(data.parent / "images" / f"{number}.png") for number in range(3)]


def greedy_answer(loaded: LoadedModel, turns: list[Turn], images: list[str], longest: int) -> str:
    """Returns the answer to the whole conversation, read from its beginning."""
    model, encoder = loaded.model, loaded.encoder
    answerer = Answerer(model, encoder, max_new_tokens=longest)
    return answerer.reply(turns, images)


def test_answers_are_the_greedy_ones_over_turns_and_images(graft: LoadedModel, images: list[str]) -> None:
    """Three questions, with images before the first and the second, are answered as if each conversation were new."""
    talk, turns, shown = Conversation(graft, max_new_tokens=9), [], []
    for question, new in zip(QUESTIONS, (images[:2], images[2:], []), strict=True):
        for path in new:
            talk.show(Image.open(path) if path == images[0] else path)
        shown += new
        placeholders = "<image>" * len(new) + "\n" if new else ""
        turns.append(Turn("user", placeholders + question))
        pieces = list(talk.ask(question))
        expected = greedy_answer(graft, turns, shown, 9)
        assert "".join(pieces) == expected
        turns.append(Turn("assistant", expected))
    assert talk.turns == turns and len(pieces) > 1


def test_a_later_question_reads_only_its_own_tokens(graft: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(graft, max_new_tokens=3)
    read: list[int] = []
    extend = talk._reader.extend

    def counted(cache: Any, rows: Any, features: Any = None) -> Any:
        read.append(len(rows[0]))
        return extend(cache, rows, features)

    monkeypatch.setattr(talk._reader, "extend", counted)
    first = "".join(talk.ask("describe the image briefly. " * 8))
    whole = read[0]
    read.clear()
    "".join(talk.ask("why?"))
    assert first and whole > 60 and sum(read) < whole / 2


def test_a_conversation_continues_after_a_stopped_answer(graft: LoadedModel) -> None:
    """The next answer builds on the words up to there."""
    talk = Conversation(graft, max_new_tokens=12)
    stream = talk.ask(QUESTIONS[0])
    said = next(stream)
    stream.close()
    assert talk.turns[-1] == Turn("assistant", said)
    answer = "".join(talk.ask("why?"))
    assert answer == greedy_answer(graft, talk.turns[:-1], [], 12)


def test_a_question_without_an_answer_stays_in_the_conversation(graft: LoadedModel, images: list[str]) -> None:
    """Templates do not accept two user turns in a row, so the first question gets an empty answer."""
    talk = Conversation(graft, max_new_tokens=4)
    talk.show(images[0])
    talk.ask(QUESTIONS[0]).close()  # type: ignore[attr-defined]
    answer = "".join(talk.ask("why?"))
    turns = [Turn("user", f"<image>\n{QUESTIONS[0]}"), Turn("assistant", ""), Turn("user", "why?")]
    assert talk.turns == [*turns, Turn("assistant", answer)]
    assert answer == greedy_answer(graft, turns, images[:1], 4)
    talk.show(images[1])
    talk.ask(QUESTIONS[0])
    talk.unask()  # its image waits for the next question
    "".join(talk.ask("what?"))
    assert talk.turns[4:5] == [Turn("user", "<image>\nwhat?")]


@pytest.mark.parametrize("kind", ["surrogate", "target"])
def test_plain_language_models_chat(kind: str, small: Path, made: Callable[..., Path]) -> None:
    folder = small if kind == "surrogate" else made("llama", tied=True)
    named = find_model(str(folder))
    assert named.kind == kind and not named.sees
    loaded = load_model(named)
    answer = "".join(Conversation(loaded, max_new_tokens=8, system="Be brief.").ask("what?"))
    assert answer == greedy_answer(loaded, [Turn("system", "Be brief."), Turn("user", "what?")], [], 8)
    with pytest.raises(ConfigError, match="no vision encoder"):
        Conversation(loaded).show("image.png")


def test_a_run_is_the_model_as_it_was_trained(trained: Path, small: Path) -> None:
    named = find_model(str(trained / "encoder"))
    assert (named.kind, named.folder) == ("trained", small)
    assert load_model(named).model.plan is not None
    known = named.identity()
    assert known["step"] == 2 and len(known["weights_sha256"]) == 64 and len(known["decoder_hash"]) == 34


@pytest.mark.parametrize("typed", ["<image>", "what is <image> here? <|im_end|>"])
def test_typed_placeholders_are_plain_text(graft: LoadedModel, typed: str) -> None:
    assert isinstance("".join(Conversation(graft, max_new_tokens=2).ask(typed)), str)


def test_wrong_requests_are_refused(graft: LoadedModel, made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1 token, not 0"):
        Conversation(graft, max_new_tokens=0)
    talk = Conversation(graft)
    with pytest.raises(DataError, match="the model reads 2048; begin a new one"):
        talk.ask("why? " * 3000)
    assert talk.turns == []
    with pytest.raises(ConfigError, match=r"is not a run.*leave out --target"):
        find_model(str(made("llama", tied=True)), "somewhere")
    with pytest.raises(ConfigError, match=r"model folder .* does not exist"):
        find_model(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="'org/model' is not a local folder and could not be fetched from the hub"):
        find_model("org/model")
    (tmp_path / "latest").write_text("step-000001")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_model(str(tmp_path))


def test_command(trained: Path, made: Callable[..., Path], images: list[str], tmp_path: Path) -> None:
    """Wrong images and unknown commands give one sentence, and the chat continues; /new starts a new one."""
    (tmp_path / "none.png").write_text("not an image")
    target = str(made("llama", tied=True))
    lines = [
        f"/image {tmp_path / 'none.png'}",
        "/dance",
        "/image",
        QUESTIONS[0],
        "/new",
        f"/image {images[0]}",
        QUESTIONS[0],
        "/quit",
        "no",
    ]
    command = ["chat", str(trained / "encoder"), "--target", target, "--image", images[0], "--max-new-tokens", "6"]
    result = CliRunner().invoke(app, [*command, "--dtype", "float32"], input="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    assert "none.png cannot be read" in result.stderr and "/dance is not known" in result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == 2 and answers[0] == answers[1] and answers[0]
    assert "/image names no file" in result.stderr
    for named, complaint in (
        (tmp_path / "none.png", "none.png cannot be read"),
        (tmp_path / "no.png", "no.png does not exist"),
    ):
        bad = CliRunner().invoke(app, ["chat", "nowhere", "--image", str(named)], input="why?\n")
        assert isinstance(bad.exception, ImageError) and complaint in str(bad.exception)
    blind = CliRunner().invoke(app, ["chat", target, "--image", images[0], "--dtype", "float32"], input="why?\n")
    assert isinstance(blind.exception, ConfigError) and "no vision encoder" in str(blind.exception)
    limit = CliRunner().invoke(app, ["chat", target, "--max-new-tokens", "0"])
    assert isinstance(limit.exception, ConfigError) and "at least 1 token" in str(limit.exception)


def test_half_precision_chats(trained: Path, made: Callable[..., Path], images: list[str]) -> None:
    loaded = load_model(find_model(str(trained / "encoder"), str(made("llama", tied=True))), dtype=torch.bfloat16)
    talk = Conversation(loaded, max_new_tokens=4)
    talk.show(images[0])
    assert "".join(talk.ask(QUESTIONS[0]))
