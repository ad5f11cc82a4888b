"""What an export says and hears like training: tokenizer, placeholder of an image, chat template, end of an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_ds.config.schema import DataConfig
from zero_ds.data.conversations import PLACEHOLDER, STRFTIME, WRAPPERS, ChatTemplate, read_template
from zero_ds.export.source import Source
from zero_ds.grafting.tokenizers import for_templates_
from zero_ds.model.decoders import Family
from zero_ds.model.loading import load_tokenizer
from zero_ds.runtime.errors import ConfigError


@dataclass(frozen=True)
class Texts:
    """The text side of a processor."""

    tokenizer: Any
    """With the placeholder among its special tokens."""
    image_token: str
    template: str
    """The chat template of the export."""
    stops: tuple[int, ...]
    """Tokens that end an answer."""
    generation: dict[str, Any]
    """Content of generation_config.json."""

    @property
    def image_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))


def texts(source: Source) -> Texts:
    """Tokenizer and templates of a source.

    Raises:
        ConfigError: a tokenizer that cannot be loaded, no chat template, no token that could stand for an image.
    """
    data = source.config.data
    tokenizer = load_tokenizer(source.folder)
    token = placeholder_token(source.family, tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    own = read_template(data.chat_template)
    written = own or tokenizer.chat_template
    end = ChatTemplate(tokenizer, own).end_of_turn()
    generation = _generation(source.folder, source.text, end)
    stops = generation["eos_token_id"]
    if "eos_token" in written:  # what the target's template writes by that name stays
        written = f"{{%- set eos_token = {json.dumps(tokenizer.eos_token)} -%}}{written}"
    for_templates_(tokenizer, end)
    return Texts(tokenizer, token, chat_template(written, token, data), tuple(stops), generation)


def placeholder_token(family: Family, tokenizer: Any) -> str:
    """A special token of the target's vocabulary that stands for an image.

    Raises:
        ConfigError: the family names none that this vocabulary has.
    """
    vocabulary = tokenizer.get_vocab()
    for token in (PLACEHOLDER, *family.image_tokens):
        if token in vocabulary:
            return token
    raise ConfigError(
        f"the vocabulary has none of the {family.name} family's spare tokens "
        f"({', '.join(family.image_tokens) or 'none named'}); name one in families/{family.name}.py."
    )


def wrapper(data: DataConfig) -> tuple[str, str]:
    """The image prompt's text before the image, and between image and question."""
    text = WRAPPERS[0] if data.image_prompt != "off" else "{image}\n{question}"
    before, after = text.split("{image}")
    return before, after.split("{question}")[0]


def chat_template(own: str, image_token: str, data: DataConfig) -> str:
    """The target's template behind a few lines that turn contents with images into what training wrote.

    Contents are lists of image and text, or strings with `<image>`, as training's data and lmms-eval have them. In the
    first user's words one image before or behind the text becomes the fixed image prompt; others stay where they are. A
    system prompt is set as in training, the date of templates that write one is training's, and strings without an
    image stay as they are.
    """
    before, between = wrapper(data)
    token = json.dumps(image_token)
    system = ""
    if data.system_prompt is not None:
        system = (
            "{%- if not messages or messages[0].role != 'system' -%}"
            f"{{%- set ns.messages = [{{'role': 'system', 'content': {json.dumps(data.system_prompt)}}}] -%}}"
            "{%- endif -%}"
        )
    prompt = ""
    if data.image_prompt != "off":
        prompt = (
            f"{{%- if ns.first and pieces|length == 2 and (not pieces[0] or not pieces[1]) -%}}"
            f"{{%- set ns.text = {json.dumps(before)} + {token} + {json.dumps(between)} + pieces|join|trim -%}}"
            "{%- endif -%}"
        )
    return (
        ("{%- set enable_thinking = false -%}" if "enable_thinking" in own else "")
        + "{%- set ns = namespace(messages=[], text='', images='', first=true) -%}"
        + system
        + "{%- for message in messages -%}"
        # lists: images before the text, as in LLaVA's data
        "{%- set ns.text = '' -%}{%- set ns.images = '' -%}"
        "{%- if message.content is string -%}{%- set ns.text = message.content -%}"
        "{%- elif message.content is iterable -%}"
        "{%- for part in message.content -%}"
        f"{{%- if part.type == 'image' -%}}{{%- set ns.images = ns.images + {json.dumps(PLACEHOLDER)} -%}}"
        "{%- elif part.type == 'text' -%}{%- set ns.text = ns.text + part.text -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if ns.images -%}{%- set ns.text = ns.images + '\n' + ns.text -%}{%- endif -%}"
        "{%- endif -%}"
        "{%- if message.role == 'user' -%}"
        f"{{%- set pieces = ns.text.split({json.dumps(PLACEHOLDER)}) -%}}"
        f"{{%- set ns.text = pieces|join({token}) -%}}" + prompt + "{%- set ns.first = false -%}"
        "{%- endif -%}"
        # a message may have more than role and content, which stays
        "{%- set ns.messages = ns.messages + [dict(message, content=ns.text)] -%}"
        "{%- endfor -%}"
        "{%- set messages = ns.messages -%}" + (STRFTIME if "strftime_now" in own else "") + own
    )


def _generation(folder: Path, text: Any, end: int) -> dict[str, Any]:
    """The target's own settings of generation; what closes an answer in the chat template always ends it."""
    path = folder / "generation_config.json"
    settings: dict[str, Any] = {}
    if path.is_file():
        try:
            settings = {**json.loads(path.read_text(encoding="utf-8"))}
            settings.pop("_from_model_config", None)  # it is read from its own file from now on
        except (OSError, ValueError, TypeError, AttributeError):
            raise ConfigError(f"{path} is damaged; fetch the model again.") from None
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        if settings.get(name) is None and getattr(text, name, None) is not None:
            settings[name] = getattr(text, name)
    stops = settings.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(isinstance(token, int) for token in stops):
        raise ConfigError(f"{path} is damaged; fetch the model again.")
    settings["eos_token_id"] = stops if end in stops else [*stops, end]
    settings.setdefault("pad_token_id", settings["eos_token_id"][0])
    return settings
