"""Chat templates in use: all ends of an answer, embeddings for every token, and a check at the start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_helper
import pytest
import tiny
import torch
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.resume import fingerprint
from zero_ds.config.schema import DataConfig, RunConfig
from zero_ds.data.conversations import ConversationError, NoChatTemplate, Turn
from zero_ds.export.source import open_source
from zero_ds.export.text import text_settings
from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.generate import Answerer
from zero_ds.grafting.named_model import find_model, load_model
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.templates import answer_ends, load_template
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.preview import Preview
from zero_ds.training.setup import make_loader
from zero_ds.trajectory.texts import TokenSample, answer_greedily

BLANK = (
    "{% for m in messages %}{% if m['role']=='user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + m['content'] + 'END\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = BLANK.replace("END", "<|eot|>")


@pytest.fixture
def folder(made: Callable[..., Path], tmp_path: Path) -> Path:
    """Returns a copy of the tiny Llama, which a test may change."""
    shutil.copytree(made("llama", tied=True), tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **entries}), encoding="utf-8")


# -- all ends of an answer ---------------------------------------------------------------------------------------------


def test_ends_come_from_the_files_and_from_the_template(folder: Path) -> None:
    words = DecoderFolder(folder).tokenizer()
    end, other = words.convert_tokens_to_ids("<|im_end|>"), words.convert_tokens_to_ids("<reponame>")
    config = DecoderFolder(folder).text_config()

    def ends() -> tuple[int, ...]:
        return load_template(DecoderFolder(folder), DataConfig(), config=config).ends()

    change(folder / "generation_config.json", eos_token_id=[0, other])
    assert answer_ends(folder) == (0, other) and ends() == (0, other, end)
    change(folder / "generation_config.json", eos_token_id=other)
    assert ends() == (other, end)
    change(folder / "generation_config.json", eos_token_id=None)
    config.eos_token_id = [0, end]
    assert ends() == (0, end)
    (folder / "generation_config.json").unlink()
    assert answer_ends(folder) == () and ends() == (0, end)
    for damaged in ("{", '{"eos_token_id": ["a"]}', "[]"):
        (folder / "generation_config.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"generation_config\.json is damaged; fetch the model again"):
            answer_ends(folder)


def test_every_reader_ends_at_every_end(
    folder: Path, run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token that the model says first is declared another end in the model's files, as Llama-3 names several."""
    question = [Turn("user", "what?")]
    plain = load_model(find_model(str(folder)))
    prompt = plain.encoder.encode(question, generate=True).input_ids
    with torch.no_grad():
        first = int(plain.model.decoder(torch.tensor([prompt])).logits[0, -1].argmax())
    assert Answerer(plain.model, plain.encoder, max_new_tokens=4).reply(question)
    change(folder / "generation_config.json", eos_token_id=[0, first])

    loaded = load_model(find_model(str(folder)))
    template = loaded.encoder.template
    assert first in template.ends() and template.end_of_turn() in template.ends()
    assert Answerer(loaded.model, loaded.encoder, max_new_tokens=4).reply(question) == ""
    talk = Conversation(loaded, max_new_tokens=4)
    assert list(talk.ask("what?")) == [] and talk._last == (prompt, [first])
    greedy = answer_greedily(loaded.model.decoder, template, [TokenSample("1", prompt)], batch_size=1)
    assert greedy[0].input_ids == [*prompt, first]

    config = run_config("decoder", tmp_path / "run", decoder="target", target=str(folder))
    loader = make_loader(config, loaded.model)
    preview = Preview(
        config.model_copy(update={"preview": config.preview.model_copy(update={"every_steps": 1})}), loader
    )
    monkeypatch.setattr(preview, "_generate", lambda model: [[7, first, 9]] * len(preview.samples))
    shown = preview.answers(loaded.model)
    assert shown and all(answer.answer == template.tokenizer.decode([7]).strip() for answer in shown)

    run = export_helper.write_run(config, folder)
    texts = text_settings(open_source(run, None))
    assert list(texts.stops) == texts.generation["eos_token_id"] == list(template.ends())


def test_vllm_and_the_text_harness_end_at_every_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from zero_ds.evaluation.suites.lm_eval import HFLM, Decoder
    from zero_ds.grafting.engines import vllm

    change(folder / "generation_config.json", eos_token_id=[0, 5])
    loaded = load_model(find_model(str(folder)))
    answerer = vllm.VllmAnswerer.__new__(vllm.VllmAnswerer)
    Answerer.__init__(answerer, loaded.model, loaded.encoder)
    answerer._served = None  # type: ignore[assignment]
    asked: list[Any] = []
    monkeypatch.setattr(vllm, "generate", lambda *arguments: asked.append(arguments[-1]) or [[7, 5, 9]])
    reply = answerer.reply([Turn("user", "what?")])
    words = loaded.encoder.template.tokenizer
    end = words.convert_tokens_to_ids("<|im_end|>")
    assert list(asked[0]) == [0, 5, end] and reply == words.decode([7]).strip()

    lm = Decoder(pretrained=loaded.model.decoder, tokenizer=words)
    lm.encoder = loaded.encoder
    monkeypatch.setattr(HFLM, "_model_generate", lambda self, context, **options: asked.append(options))
    lm._model_generate(torch.zeros(1, 1), max_length=3, stop=["\n"])
    assert asked[1]["eos_token_id"] == [0, 5, end]


# -- the tokenizer and the model ---------------------------------------------------------------------------------------


def test_tokens_without_an_embedding_are_refused_at_the_start(
    folder: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    before = load_model(find_model(str(folder))).model
    run = run_config("decoder", tmp_path / "run", decoder="target", target=str(folder))
    written = export_helper.write_run(run, folder)
    words = DecoderFolder(folder).tokenizer()
    words.add_special_tokens({"additional_special_tokens": [*words.extra_special_tokens, "<image_soft_token>"]})
    words.save_pretrained(folder)
    load_model(find_model(str(folder)))  # Gemma-3's text models have such a token, which no text becomes
    words.add_tokens(["glorbnak"])
    words.save_pretrained(folder)
    said = r"none for token \d+, 'glorbnak'; they do not belong together"
    for begin in (
        lambda: make_loader(run, before),
        lambda: load_model(find_model(str(folder))),
        lambda: load_model(find_model(str(written), str(folder))),
        lambda: text_settings(open_source(written, None)),
    ):
        with pytest.raises(ConfigError, match=said):
            begin()


# -- the check at the start --------------------------------------------------------------------------------------------


def test_a_template_that_cannot_be_learned_is_refused_at_the_start(
    folder: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """A run refuses it before its first step; chat, evaluation and export refuse it as well."""
    model = load_model(find_model(str(folder))).model
    good = run_config("decoder", tmp_path / "run", decoder="target", target=str(folder))
    written = export_helper.write_run(good, folder)
    path = tmp_path / "no-end.jinja"
    path.write_text(NO_END)
    bad = good.model_copy(update={"data": good.data.model_copy(update={"chat_template": str(path)})})
    for begin in (
        lambda: make_loader(bad, model),
        lambda: load_model(find_model(str(written), str(folder), str(path))),
        lambda: text_settings(open_source(written, None, chat_template=str(path))),
    ):
        with pytest.raises(ConfigError, match=r"without a special token, but with '<\|eot\|>'; give another template"):
            begin()
    change(folder / "generation_config.json", eos_token_id=None)
    change(folder / "config.json", eos_token_id=None)
    with pytest.raises(ConversationError, match="without a special token"):
        Conversation(load_model(find_model(str(folder), None, str(path))))


def test_a_blank_before_the_end_mark_reaches_the_export(
    folder: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = tmp_path / "blank.jinja"
    path.write_text(BLANK.replace("END", " <|im_end|>"))
    config = run_config("decoder", tmp_path / "run", decoder="target", target=str(folder))
    written = export_helper.write_run(config, folder)
    graft = load_model(find_model(str(written), str(folder), str(path)))
    turns = [Turn("user", "what?"), Turn("assistant", "red"), Turn("user", "why?")]
    ours = graft.encoder.encode(graft.encoder.with_system(turns), generate=True).input_ids
    texts = text_settings(open_source(written, None, chat_template=str(path)))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    shown = texts.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "red <|im_end|>" in shown and texts.tokenizer(shown).input_ids == ours


# -- models without a template -----------------------------------------------------------------------------------------


@pytest.fixture
def base(folder: Path) -> Path:
    (folder / "chat_template.jinja").unlink()
    return folder


def test_a_base_model_is_loaded_for_plain_text(base: Path) -> None:
    loaded = load_model(find_model(str(base)))
    template = loaded.encoder.template
    assert isinstance(template, NoChatTemplate) and template.tokenizer("what?").input_ids
    assert template.ends() == (2,)
    for begin in (lambda: loaded.encoder.encode([Turn("user", "what?")], generate=True), template.end_of_turn):
        with pytest.raises(ConversationError, match=r"no chat template; give one with .* or --chat-template FILE"):
            begin()


def test_a_file_gives_a_base_model_a_template(base: Path, tmp_path: Path, data: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(tiny.TEMPLATE)
    talk = Conversation(load_model(find_model(str(base), None, str(path))), max_new_tokens=3)
    assert isinstance("".join(talk.ask("what?")), str)
    runner = CliRunner()
    result = runner.invoke(app, ["data", "check", str(data), "--model", str(base), "--workers", "0"])
    assert isinstance(result.exception, ValueError) and "--chat-template FILE" in str(result.exception)
    command = ["data", "check", str(data), "--model", str(base), "--chat-template", str(path), "--workers", "0"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0 and "tokens" in result.output, result.output


@pytest.mark.parametrize("command", ["chat", "eval", "export"])
def test_commands_take_a_template(base: Path, command: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.jinja")
    words = {"chat": [str(base)], "eval": [str(base), "--suite", "text"], "export": [str(base), "--out", "x"]}[command]
    result = CliRunner().invoke(app, [command, *words, "--chat-template", missing])
    if command == "export":
        return  # fails earlier, because the folder is not a run; test_same_prompts.py exports with a template
    assert isinstance(result.exception, ConfigError) and "missing.jinja cannot be read" in str(result.exception)


@pytest.mark.parametrize(
    ("words", "template"),
    [
        (["MODEL", "--suite", "text"], False),
        (["MODEL", "--chat-template", "--suite", "text"], True),
        (["--chat-template", "MODEL", "--suite", "text"], True),
        (["MODEL", "--suite", "text", "--chat-template"], True),
        (["MODEL", "--chat-template", "own.jinja", "--suite", "text"], "own.jinja"),
    ],
)
def test_eval_takes_the_option_with_or_without_a_file(
    words: list[str], template: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zero_ds.evaluation.suites import harness
    from zero_ds.grafting import named_model

    found: list[Any] = []

    def find(*arguments: Any) -> None:
        found.append(arguments)
        raise ConfigError("far enough")

    monkeypatch.setattr(named_model, "find_model", find)
    monkeypatch.setattr(harness, "select_suites", lambda *arguments: [])
    result = CliRunner().invoke(app, ["eval", *words])
    assert str(result.exception) == "far enough", result.output
    assert found == [("MODEL", None, template if isinstance(template, str) else None)]


# -- prompts of the text harness ---------------------------------------------------------------------------------------


def test_the_text_harness_asks_as_the_run_does(
    made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Prompts have the run's template, system prompt and date, and no thoughts."""
    pytest.importorskip("lm_eval")
    from zero_ds.evaluation.suites.lm_eval import RunPrompts

    path = tmp_path / "template.jinja"
    path.write_text("{{ strftime_now('%d %b %Y') }}{% if enable_thinking %}THINK{% endif %}\n" + tiny.TEMPLATE)
    target = made("llama", tied=True)
    data = {"max_length": 512, "system_prompt": "Short.", "chat_template": str(path)}
    config = run_config("decoder", tmp_path / "run", decoder="target", data=data)
    encoder = load_model(find_model(str(export_helper.write_run(config, target)), str(target))).encoder
    prompts = RunPrompts()
    prompts.encoder = encoder
    turns = [Turn("user", "1 + 1?"), Turn("assistant", "2"), Turn("user", "2 + 2?")]
    history = [{"role": turn.role, "content": turn.text} for turn in turns]
    shown = prompts.apply_chat_template(history)
    assert shown.startswith("26 Jul 2024<|im_start|>system\nShort.<|im_end|>")
    words = encoder.template.tokenizer
    asked = encoder.encode(encoder.with_system(turns), generate=True).input_ids
    assert words(shown, add_special_tokens=False).input_ids == asked
    told = [{"role": "system", "content": "Add."}, *history]
    assert "system\nAdd.<|im_end|>" in prompts.apply_chat_template(told)
    begun = prompts.apply_chat_template([*history, {"role": "assistant", "content": "It is"}], False)
    assert begun == shown + "It is"
    assert prompts.chat_template(True) == path.read_text() and prompts.chat_template(False) is None


# -- runs of before ----------------------------------------------------------------------------------------------------


def test_runs_without_special_tokens_keep_their_fingerprint(run_config: Callable[..., RunConfig]) -> None:
    content = run_config("encoder").model_dump(mode="json")
    assert content["data"]["special_tokens"] == []
    before = fingerprint(content)
    content["data"]["special_tokens"] = ["<loc*>"]
    assert fingerprint(content) != before
