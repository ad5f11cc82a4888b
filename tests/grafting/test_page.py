"""The page shows the answers of surrogate and graft side by side with their trajectories, and refuses bad requests."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from pace import scaled
from PIL import Image
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.data.conversations import Turn
from zero_ds.data.formats import DataError
from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.generate import Answerer
from zero_ds.grafting.named_model import LoadedModel, find_model, load_model
from zero_ds.grafting.page import ChatSession, bind, served
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.answers import draw

TOKENS = 6
QUESTION = "what color is it?"
PATIENT: dict[str, Any] = {"timeout": scaled(60)}


@pytest.fixture(scope="module")
def models(trained: Path, made: Callable[..., Path]) -> dict[str, LoadedModel]:
    run = str(trained / "encoder")
    graft = find_model(run, str(made("llama", tied=True)))
    return {"surrogate": load_model(find_model(run)), "grafted": load_model(graft)}


@pytest.fixture(scope="module")
def images(data: Path) -> list[Path]:
    return [data.parent / "images" / f"{number}.png" for number in range(2)]


@pytest.fixture(scope="module")
def address(models: dict[str, LoadedModel]) -> Iterator[str]:
    with bind("127.0.0.1", 0) as server, served(models, server, max_new_tokens=TOKENS) as running:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [server]}, daemon=True)
        thread.start()
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        running.should_exit = True
        thread.join(scaled(60))


@pytest.fixture
def visitor(address: str, tmp_path: Path) -> Client:
    return Client(address, verbose=False, analytics_enabled=False, download_files=str(tmp_path), httpx_kwargs=PATIENT)


def expected(loaded: LoadedModel, turns: list[Turn], images: list[Path]) -> str:
    return Answerer(loaded.model, loaded.encoder, max_new_tokens=TOKENS).reply(turns, [str(path) for path in images])


def said(messages: Any) -> list[str]:
    """Returns the assistant's texts in a chat on the page."""
    texts = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            texts.append(content if isinstance(content, str) else "".join(part["text"] for part in content))
    return texts


def asked(text: str, *files: Path) -> dict[str, Any]:
    return {"text": text, "files": [handle_file(file) for file in files]}


def test_both_models_answer_about_the_images(
    visitor: Client, models: dict[str, LoadedModel], images: list[Path]
) -> None:
    """Two images, then another question of the same visitor, get the answers of the terminal."""
    _, first, second, image = visitor.predict(asked(QUESTION, *images), "grafted", api_name="/ask")
    turns = [Turn("user", f"<image><image>\n{QUESTION}")]
    answers = {name: expected(loaded, turns, images) for name, loaded in models.items()}
    assert said(first) == [answers["surrogate"]] and said(second) == [answers["grafted"]]
    assert answers["surrogate"] != answers["grafted"]
    grafted = Image.open(image).convert("RGB")
    assert min(grafted.size) > 200

    _, first, _, _ = visitor.predict(asked("why?"), "surrogate", api_name="/ask")
    turns += [Turn("assistant", answers["surrogate"]), Turn("user", "why?")]
    assert said(first) == [answers["surrogate"], expected(models["surrogate"], turns, images)]
    other = Image.open(visitor.predict("grafted", api_name="/trajectory")).convert("RGB")
    assert other.size != grafted.size or np.abs(np.asarray(other, float) - np.asarray(grafted, float)).max() > 0

    *_, cleared, _, image = visitor.predict(api_name="/new")
    assert cleared == [] and image is None
    _, first, *_ = visitor.predict(asked(QUESTION), "grafted", api_name="/ask")
    assert said(first) == [expected(models["surrogate"], [Turn("user", QUESTION)], [])]


def test_what_the_page_refuses(
    visitor: Client, models: dict[str, LoadedModel], images: list[Path], tmp_path: Path
) -> None:
    """The page shows a sentence for each, and the conversation stays as it was."""
    (tmp_path / "none.png").write_text("not an image")
    with pytest.raises(AppError, match=r"^image none.png cannot be read: it is none of JPEG"):
        visitor.predict(asked(QUESTION, images[0], tmp_path / "none.png"), "grafted", api_name="/ask")
    (tmp_path / "text.txt").write_text("not an image")
    with pytest.raises(AppError, match=r"(?i)file type"):
        visitor.predict(asked(QUESTION, tmp_path / "text.txt"), "grafted", api_name="/ask")
    with pytest.raises(AppError, match="the question is empty"):
        visitor.predict(asked("  ", images[0]), "grafted", api_name="/ask")
    with pytest.raises(AppError, match="begin a new one"):
        visitor.predict(asked("why? " * 3000, images[0]), "grafted", api_name="/ask")
    _, first, second, _ = visitor.predict(asked(QUESTION), "grafted", api_name="/ask")
    turns = [Turn("user", QUESTION)]
    assert [said(first), said(second)] == [[expected(models[name], turns, [])] for name in ("surrogate", "grafted")]


def visit(models: dict[str, LoadedModel]) -> ChatSession:
    talks = {name: Conversation(loaded, max_new_tokens=TOKENS) for name, loaded in models.items()}
    return ChatSession(talks, threading.Lock())


def test_a_stopped_answer_leaves_both_models_ready_for_the_next_question(
    models: dict[str, LoadedModel], images: list[Path]
) -> None:
    """Both models have received the question and its image, also the one that had not begun to answer."""
    here = visit(models)
    answers = here.ask(QUESTION, [images[0]])
    while not (said_first := said(here.shown.get("surrogate", []))) or not said_first[0]:
        next(answers)
    answers.close()
    assert [len(messages) for messages in here.shown.values()] == [3, 2]
    asked_first = Turn("user", f"<image>\n{QUESTION}")
    for _ in here.ask("why?", []):
        pass
    for name, first in (("surrogate", said_first[0]), ("grafted", "")):
        turns = [asked_first, Turn("assistant", first), Turn("user", "why?")]
        assert said(here.shown[name])[-1] == expected(models[name], turns, images[:1])


def test_a_question_is_for_all_models_or_for_none(models: dict[str, LoadedModel], images: list[Path]) -> None:
    """One of the conversations is as long as the models read, the other is shorter."""
    here = visit(models)
    full = [Turn("user", "why? " * 350), Turn("assistant", "so")]
    here.conversations["grafted"].turns = list(full)
    with pytest.raises(DataError, match="begin a new one"):
        list(here.ask("why? " * 160, [images[0]]))
    assert [talk.turns for talk in here.conversations.values()] == [[], full] and here.shown == {}
    list(here.ask("why?", []))
    assert here.conversations["surrogate"].turns[0] == Turn("user", "why?")


def test_two_visitors_at_once(address: str, models: dict[str, LoadedModel], images: list[Path]) -> None:
    """Each visitor gets the answers to their own questions about their own images."""
    visitors = [Client(address, verbose=False, analytics_enabled=False, httpx_kwargs=PATIENT) for _ in range(2)]
    for question in (QUESTION, "why?"):
        files = [images[:1], images[1:]] if question == QUESTION else [[], []]
        jobs = [
            one.submit(asked(question, *mine), "grafted", api_name="/ask")
            for one, mine in zip(visitors, files, strict=True)
        ]
        found = [job.result(60)[2] for job in jobs]
    for messages, image in zip(found, images, strict=True):
        turns = [Turn("user", f"<image>\n{QUESTION}")]
        first = expected(models["grafted"], turns, [image])
        turns += [Turn("assistant", first), Turn("user", "why?")]
        assert said(messages) == [first, expected(models["grafted"], turns, [image])]


def stranger(address: str, visitor: Client, file: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the page's events for a question about a file that was named but not uploaded."""
    import httpx

    number = next(d["id"] for d in visitor.config["dependencies"] if d["api_name"] == "ask")
    payload = {"data": [{"text": QUESTION, "files": [file]}, "grafted", None], "session_hash": "stranger"}
    joined = httpx.post(f"{address}/gradio_api/queue/join", json={**payload, "fn_index": number}, **PATIENT)
    joined.raise_for_status()
    query = {"session_hash": "stranger"}
    with httpx.stream("GET", f"{address}/gradio_api/queue/data", params=query, **PATIENT) as lines:
        return [json.loads(line.removeprefix("data:")) for line in lines.iter_lines() if line.startswith("data:")]


def test_no_file_outside_of_the_uploads(address: str, visitor: Client, tmp_path: Path, data: Path) -> None:
    """A file is served neither by its address nor named as an upload, and the page answers to no other site's name."""
    import httpx

    secret = data.parent / "images" / "3.png"
    for path in (secret, Path("/etc/hostname"), Path(__file__), Path("constraints.txt").absolute()):
        assert httpx.get(f"{address}/gradio_api/file={path}", **PATIENT).status_code in (403, 404)
    for path in (str(secret), "http://192.0.2.1/3.png"):
        events = stranger(address, visitor, {"path": path, "meta": {"_type": "gradio.FileData"}})
        assert not next(event for event in events if event["msg"] == "process_completed")["success"]
        assert not [event for event in events if event["msg"] == "process_generating"]
    assert httpx.get(address, headers={"Host": "evil.example"}, **PATIENT).status_code == 400
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 403), (address, 200)):
        files = {"files": ("0.png", secret.read_bytes(), "image/png")}
        sent = httpx.post(f"{address}/gradio_api/upload", files=files, headers={"Origin": origin}, **PATIENT)
        assert sent.status_code == status, origin
    assert httpx.get(address, **PATIENT).status_code == 200
    assert visitor.config["analytics_enabled"] is False


def test_large_uploads(address: str, visitor: Client, tmp_path: Path) -> None:
    """A file of more than 64 MB is refused, and so is a small one whose pixels would fill the memory."""
    import httpx

    huge = {"files": ("huge.png", b"0" * (65 << 20), "image/png")}
    assert httpx.post(f"{address}/gradio_api/upload", files=huge, **PATIENT).status_code == 413
    Image.new("1", (20_000, 3_300)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 1 << 20
    with pytest.raises(AppError, match=r"^image bomb.png has 20000 x 3300 pixels; at most 64,000,000 are read"):
        visitor.predict(asked(QUESTION, tmp_path / "bomb.png"), "grafted", api_name="/ask")


def test_the_end_of_the_page_is_quiet(models: dict[str, LoadedModel], capfd: pytest.CaptureFixture[str]) -> None:
    """No traceback is logged, even if a browser is still connected to the stream of messages, which never ends."""
    import httpx

    with bind("127.0.0.1", 0) as server, served(models, server) as running:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [server]}, daemon=True)
        thread.start()
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        with httpx.stream("GET", f"{here}/gradio_api/heartbeat/stranger", **PATIENT) as stream:
            assert next(stream.iter_lines())
            running.should_exit = True
            thread.join(scaled(60))
    assert not thread.is_alive() and capfd.readouterr().err == ""


def test_the_trajectory_is_the_layers_own_prediction(models: dict[str, LoadedModel], images: list[Path]) -> None:
    """Compares it with one pass over prompt and answer in which the output of every layer is read by hand."""
    loaded = models["surrogate"]
    model, encoder = loaded.model, loaded.encoder
    talk = Conversation(loaded, max_new_tokens=TOKENS)
    with pytest.raises(DataError, match="ask something first"):
        talk.trajectory()
    talk.show(images[0])
    "".join(talk.ask(QUESTION))
    found = talk.trajectory()
    assert talk._last is not None
    prompt, answer = talk._last
    with torch.no_grad():
        embeddings = model.embed(torch.tensor([prompt + answer]), encoder.processor(Image.open(images[0])))
        decoder: Any = model.decoder
        states = decoder(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True).hidden_states[1:]
        rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        normed = [*(decoder.model.norm(state[0, rows]) for state in states[:-1]), states[-1][0, rows]]
        logs = torch.stack([decoder.lm_head(state).log_softmax(-1) for state in normed])
    kl = (logs.exp() * (logs - logs[-1])).sum(-1)
    np.testing.assert_allclose(found.divergences, kl.numpy(), rtol=1e-3, atol=1e-5)
    words = encoder.template.tokenizer
    assert found.predicted == tuple(tuple(words.decode([t]) for t in layer) for layer in logs.argmax(-1).tolist())
    assert found.tokens == tuple(words.decode([token]) for token in answer) == found.predicted[-1]
    assert found.translators == (1, 2) and kl[0].max() > 0.01
    assert draw(found, "a $ in the title").size[0] > 400
    again = "".join(talk.ask("why?"))  # reading a trajectory leaves the conversation as it was
    turns = [*talk.turns[:-1]]
    assert again == expected(loaded, turns, images[:1])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--port", "70000"], "--port 70000 is out of range"),
        (["--host", "192.0.2.1"], r"cannot listen on 192.0.2.1:\d+ \(.*\); choose another --port"),
        (["--image", "dog.png"], "--image is for the terminal"),
    ],
)
def test_command_line(options: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, ["chat", "model", "--page", *options])
    assert isinstance(done.exception, ConfigError)
    with pytest.raises(ConfigError, match=complaint):
        raise done.exception


def test_a_port_in_use_and_gradio_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = CliRunner().invoke(app, ["chat", "model", "--page", "--port", str(port)])
        assert f"cannot listen on 127.0.0.1:{port} (address already in use)" in str(done.exception)
    monkeypatch.setattr("zero_ds.grafting.page.importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["chat", "model", "--page"])
    assert str(done.exception) == "--page needs gradio, which is not installed; pip install 'zero_ds[page]'"


def test_a_page_that_others_reach_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with bind("127.0.0.1", 0), bind("localhost", 0):
        assert not caplog.records
    with bind("0.0.0.0", 0):
        assert "anyone who can reach this machine" in caplog.text
