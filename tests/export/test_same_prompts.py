"""One message, the same tokens wherever it is read: in training, in evaluation, in a chat, and in both exports.

docs/data.md has the table of which every cell is checked here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_helper
import pytest
import torch
from chat_templates import PUBLISHED
from PIL import Image

from zero_ds.config.schema import RunConfig, SourceConfig
from zero_ds.data.conversations import IGNORE, IMAGE_TOKEN, Turn
from zero_ds.data.sources import Records
from zero_ds.export import export_model
from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.generate import Answerer, Query
from zero_ds.grafting.named_model import LoadedModel, find_model, load_model

SHOW: dict[str, Any] = {"type": "image"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def said(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


SHAPES: dict[str, list[dict[str, Any]]] = {
    "text": [user("which shape?")],
    "text with white space": [user("\n\nLook:\n which?\n")],
    "text in parts": [user(text("Look: "), text("which shape?"))],
    "image, text": [user(SHOW, text("which shape?"))],
    "text, image": [user(text("which shape?"), SHOW)],
    "image, image, text": [user(SHOW, SHOW, text("which shape?"))],
    "text, image, text, image, text": [
        user(text("First:"), SHOW, text("Second:"), SHOW, text("which differs?")),
    ],
    "parts with white space": [user(text("First: \n"), SHOW, text("\n Second:"), SHOW, text(" which?"))],
    "image on a line before": [user("<image>\nwhich shape?")],
    "image on a line after": [user("which shape?\n<image>")],
    "image in the text": [user("is <image> a circle?")],
    "images in the text": [user("<image> or <image>\nwhich?")],
    "several turns": [user(SHOW, text("which shape?")), said("a circle"), user("sure?")],
    "an image later": [user("hello"), said("hi"), user(text("and "), SHOW, text(" this?"))],
    "a system message": [{"role": "system", "content": "Be brief."}, user(SHOW, text("which shape?"))],
}


class Reading:
    """A run, grafted and exported, and its data folder."""

    def __init__(self, root: Path, run: Path, target: str) -> None:
        self.root = root
        self.loaded: LoadedModel = load_model(find_model(str(run), target))
        self.images = [str(root / f"{name}.png") for name in "ab"]
        for number, path in enumerate(self.images):
            Image.new("RGB", (40, 40), (90 * number, 50, 0)).save(path)
        self._processors: dict[str, Any] = {}

    def shown(self, messages: list[dict[str, Any]]) -> list[str]:
        content = json.dumps(messages)
        return self.images[: content.count('"type": "image"') + content.count("<image>")]

    def sample(self, messages: list[dict[str, Any]]) -> Any:
        """Returns the messages with an answer, read from a data file."""
        path = self.root / "data.json"
        names = [Path(image).name for image in self.shown(messages)]
        path.write_text(json.dumps([{"id": "1", "images": names, "messages": [*messages, said("the blue one")]}]))
        return Records([SourceConfig(path=str(path))])[0]

    def training(self, messages: list[dict[str, Any]]) -> list[int]:
        encoded = self.loaded.encoder.tokens(self.sample(messages))
        last = max(encoded.responses)
        assert encoded.labels[encoded.responses.index(last)] != IGNORE
        return encoded.input_ids[: encoded.responses.index(last)]

    def evaluation(self, messages: list[dict[str, Any]]) -> list[int]:
        sample = self.sample(messages)
        answerer = Answerer(self.loaded.model, self.loaded.encoder)
        features = [torch.zeros(self.loaded.encoder.tokens_per_image, 1) for _ in sample.images]
        query = Query("1", sample.turns[:-1], tuple(range(len(features))))
        task = answerer._task(0, query, features)
        return [*task.head.ids, *task.tail]

    def chat(self, messages: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[int]:
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        talk, images = Conversation(self.loaded, system=system), iter(self.images)
        asked: list[list[int]] = []
        answers = iter(message["content"] for message in messages if message["role"] == "assistant")

        def answer(ids: list[int]) -> Any:
            asked.append(ids)
            talk.turns.append(Turn("assistant", next(answers, "")))
            return iter(())

        monkeypatch.setattr(talk, "_answer", answer)
        for message in messages:
            content = message["content"]
            if message["role"] != "user":
                continue
            if isinstance(content, list):
                talk.ask([{**part, "image": next(images)} if part == SHOW else part for part in content])
            elif content.startswith("<image>\n"):
                talk.show(next(images))
                talk.ask(content.removeprefix("<image>\n"))
            else:
                pieces = content.split("<image>")
                parts: list[dict[str, Any]] = [text(pieces[0])] if pieces[0] else []
                for piece in pieces[1:]:
                    parts += [{**SHOW, "image": next(images)}, *([text(piece)] if piece else [])]
                talk.ask(content if len(pieces) == 1 else parts)
        return asked[-1]

    def export(self, form: str, messages: list[dict[str, Any]]) -> list[int]:
        if form not in self._processors:
            from transformers import AutoProcessor

            self._processors[form] = AutoProcessor.from_pretrained(self.root / form, trust_remote_code=True)
        processor = self._processors[form]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [Image.open(path) for path in self.shown(messages)]
        ids = processor(text=prompt, images=images or None, return_tensors="pt")["input_ids"][0].tolist()
        image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        return [IMAGE_TOKEN if token == image else token for token in ids]

    def others(self, messages: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
        """Returns the tokens that every reader but training makes of the messages."""
        return {
            "evaluation": self.evaluation(messages),
            "chat": self.chat(messages, monkeypatch),
            "llava": self.export("llava", messages),
            "remote-code": self.export("remote-code", messages),
        }


def make(
    root: Path, made: Callable[..., Path], run_config: Callable[..., RunConfig], target: Path, data: dict[str, Any]
) -> Reading:
    config = run_config("decoder", root / "run", decoder="target", target=str(target), data={"max_length": 512, **data})
    run = export_helper.write_run(config, target)
    for form in ("llava", "remote-code"):
        export_model(run, None, root / form, form=form, proof="tensors")
    return Reading(root, run, str(target))


@pytest.fixture(scope="module", params=["fixed", "off"])
def reading(
    request: pytest.FixtureRequest,
    made: Callable[..., Path],
    run_config: Callable[..., RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Reading:
    root = tmp_path_factory.mktemp("same")
    data = {"image_prompt": request.param, "system_prompt": "Short."}
    return make(root, made, run_config, made("llama", tied=True), data)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_reader_sees_the_same_tokens(reading: Reading, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = SHAPES[shape]
    expected = reading.training(messages)
    assert expected.count(IMAGE_TOKEN) == len(reading.shown(messages)) * reading.loaded.encoder.tokens_per_image
    found = reading.others(messages, monkeypatch)
    assert found == dict.fromkeys(found, expected)


def test_interleaved_parts_stay_in_their_order(reading: Reading) -> None:
    """The case of a public report: no image moves, and no word gets or loses a blank."""
    ids = reading.training(SHAPES["text, image, text, image, text"])
    words = reading.loaded.encoder.template.tokenizer
    count = reading.loaded.encoder.tokens_per_image
    shown = words.decode([token for token in ids if token != IMAGE_TOKEN])
    assert "user\nFirst:Second:which differs?<|im_end|>" in shown
    first = ids.index(IMAGE_TOKEN)
    assert words.decode(ids[:first]).endswith("user\nFirst:")
    assert ids[first : first + count] == [IMAGE_TOKEN] * count
    assert words.decode(ids[first + count : ids.index(IMAGE_TOKEN, first + count)]) == "Second:"


@pytest.fixture(scope="module")
def thinking(
    made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Reading:
    """A run with Qwen3's template, whose empty thought is rendered before every answer, and a named template."""
    import shutil

    root = tmp_path_factory.mktemp("thinking")
    target = root / "target"
    shutil.copytree(made("qwen3", tied=True), target)
    template = PUBLISHED["Qwen3"].template
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "rag.jinja").write_text("{{ 'RAG' }}" + template, encoding="utf-8")
    return make(root, made, run_config, target, {})


@pytest.mark.parametrize("shape", list(SHAPES))
def test_answers_that_are_rendered_as_the_last_one(
    thinking: Reading, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = SHAPES[shape]
    expected = thinking.training(messages)
    answers = sum(message["role"] == "assistant" for message in messages)
    shown = thinking.loaded.encoder.template.tokenizer.decode([token for token in expected if token != IMAGE_TOKEN])
    assert shown.count("<think>\n\n</think>\n\n") == answers + 1
    found = thinking.others(messages, monkeypatch)
    assert found == dict.fromkeys(found, expected)


@pytest.mark.parametrize("form", ["llava", "remote-code"])
def test_named_templates_are_exported(thinking: Reading, form: str) -> None:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(thinking.root / form)
    assert set(words.chat_template) == {"default", "rag"}
    asked = [user("is <image> a circle?")]
    found = words.apply_chat_template(asked, chat_template="rag", tokenize=False, add_generation_prompt=True)
    assert found.startswith("RAG<|im_start|>user\nis <|image_pad|> a circle?<|im_end|>")


def test_a_surrogate_keeps_named_templates(thinking: Reading, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from zero_ds.model.layer_plan import Replaced
    from zero_ds.surrogate.build import build_surrogate

    build_surrogate(thinking.root / "target", [Replaced(1, 2)], tmp_path / "small")
    for folder in (thinking.root / "target", tmp_path / "small"):
        assert set(AutoTokenizer.from_pretrained(folder).chat_template) == {"default", "rag"}
