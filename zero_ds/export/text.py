"""The text side of an export: tokenizer, image token, chat template, and the tokens that end an answer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from zero_ds.config.schema import DataConfig
from zero_ds.data.conversations import PLACEHOLDER, STRFTIME, WRAPPERS, ChatTemplate, read_template
from zero_ds.export.source import Source
from zero_ds.grafting.tokenizers import for_templates_
from zero_ds.model.decoders import Family
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.runtime.errors import ConfigError


@dataclass(frozen=True)
class TextSettings:
    """Everything that turns conversations into tokens and back, as an export contains it."""

    tokenizer: Any
    """Tokenizer, with the image token among its special tokens."""
    image_token: str
    """Token that stands for an image in a prompt."""
    template: str
    """Chat template of the export."""
    stops: tuple[int, ...]
    """Tokens that end an answer."""
    generation: dict[str, Any]
    """Content of generation_config.json."""

    @property
    def image_token_id(self) -> int:
        """Id of the image token."""
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))


def text_settings(source: Source) -> TextSettings:
    """Makes the text side of an export.

    Raises:
        ConfigError: the tokenizer cannot be loaded or has no chat template, or no token can stand for an image.
    """
    data = source.config.data
    tokenizer = source.decoder.tokenizer()
    image_token = find_image_token(source.decoder.family, tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    run_template = read_template(data.chat_template)
    template = run_template or tokenizer.chat_template
    end = ChatTemplate(tokenizer, run_template).end_of_turn()
    generation = _generation_config(source.decoder, source.text, end)
    stops = tuple(generation["eos_token_id"])
    if "eos_token" in template:  # the template keeps writing this token, although the tokenizer's end token changes
        template = f"{{%- set eos_token = {json.dumps(tokenizer.eos_token)} -%}}{template}"
    for_templates_(tokenizer, end)
    return TextSettings(tokenizer, image_token, chat_template(template, image_token, data), stops, generation)


def find_image_token(family: Family, tokenizer: Any) -> str:
    """Returns a special token of the decoder's vocabulary that can stand for an image.

    Raises:
        ConfigError: the family names no such token that is in this vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    for token in (PLACEHOLDER, *family.image_tokens):
        if token in vocabulary:
            return token
    raise ConfigError(
        f"the vocabulary has none of the {family.name} family's spare tokens "
        f"({', '.join(family.image_tokens) or 'it names none'}); name one in zero_ds/model/decoders/."
    )


def image_prompt(data: DataConfig) -> tuple[str, str]:
    """Returns the text that training writes before an image, and the text between image and question."""
    prompt = WRAPPERS[0] if data.image_prompt != "off" else "{image}\n{question}"
    before, after = prompt.split("{image}")
    between, _ = after.split("{question}")
    return before, between


# Jinja code that puts a message's images and text into one string, `ns.text`, in which `<image>` stands for an image.
# Of a list of contents the images come first, as in LLaVA's data.
_JOIN_CONTENTS = """
{%- set ns.text = '' -%}
{%- set ns.images = '' -%}
{%- if message.content is string -%}
    {%- set ns.text = message.content -%}
{%- elif message.content is iterable -%}
    {%- for part in message.content -%}
        {%- if part.type == 'image' -%}
            {%- set ns.images = ns.images + PLACEHOLDER -%}
        {%- elif part.type == 'text' -%}
            {%- set ns.text = ns.text + part.text -%}
        {%- endif -%}
    {%- endfor -%}
    {%- if ns.images -%}
        {%- set ns.text = ns.images + NEWLINE + ns.text -%}
    {%- endif -%}
{%- endif -%}
"""

# Jinja code that writes the image prompt of training around an image before or after the first user's text.
_WRAP_IMAGE = """
{%- if ns.first and pieces|length == 2 and (not pieces[0] or not pieces[1]) -%}
    {%- set ns.text = BEFORE + IMAGE_TOKEN + BETWEEN + pieces|join|trim -%}
{%- endif -%}
"""

# Jinja code that sets the system message of training, if a conversation has none of its own.
_SET_SYSTEM = """
{%- if not messages or messages[0].role != 'system' -%}
    {%- set ns.messages = [{'role': 'system', 'content': SYSTEM_PROMPT}] -%}
{%- endif -%}
"""

# Jinja code in front of the decoder's own template. A message may have more fields than role and content; they stay.
_CONVERT_MESSAGES = """
{%- set ns = namespace(messages=[], text='', images='', first=true) -%}
SET_SYSTEM
{%- for message in messages -%}
    JOIN_CONTENTS
    {%- if message.role == 'user' -%}
        {%- set pieces = ns.text.split(PLACEHOLDER) -%}
        {%- set ns.text = pieces|join(IMAGE_TOKEN) -%}
        WRAP_IMAGE
        {%- set ns.first = false -%}
    {%- endif -%}
    {%- set ns.messages = ns.messages + [dict(message, content=ns.text)] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""


def chat_template(own: str, image_token: str, data: DataConfig) -> str:
    """Returns the decoder's template `own` after a few lines that convert messages with images to those of training.

    A message's content is a list of images and text, or a string with `<image>`, as training's data and lmms-eval have
    them. In the first user's message, one image before or after the text gets the fixed image prompt around it; other
    images stay where they are, and so do strings without an image. The system prompt is that of training, and so is the
    date in templates that write one.
    """
    before, between = image_prompt(data)
    template = _CONVERT_MESSAGES.replace("JOIN_CONTENTS", _JOIN_CONTENTS)
    template = template.replace("WRAP_IMAGE", "" if data.image_prompt == "off" else _WRAP_IMAGE)
    template = template.replace("SET_SYSTEM", "" if data.system_prompt is None else _SET_SYSTEM)
    one_line = "".join(line.strip() for line in template.splitlines())
    values = {
        "SYSTEM_PROMPT": json.dumps(data.system_prompt),
        "PLACEHOLDER": json.dumps(PLACEHOLDER),
        "IMAGE_TOKEN": json.dumps(image_token),
        "BEFORE": json.dumps(before),
        "BETWEEN": json.dumps(between),
        "NEWLINE": "'\n'",
    }
    one_line = re.sub("|".join(values), lambda match: values[match[0]], one_line)
    if "enable_thinking" in own:
        one_line = "{%- set enable_thinking = false -%}" + one_line
    return one_line + (STRFTIME if "strftime_now" in own else "") + own


def _generation_config(decoder: DecoderFolder, text: Any, end: int) -> dict[str, Any]:
    """Returns the decoder's own generation_config.json, in which `end`, which closes a turn, also ends an answer."""
    path = decoder.path / "generation_config.json"
    settings: dict[str, Any] = {}
    if path.is_file():
        try:
            settings = {**json.loads(path.read_text(encoding="utf-8"))}
            settings.pop("_from_model_config", None)  # the export has a file of its own
        except (OSError, ValueError, TypeError, AttributeError):
            raise ConfigError(f"{path} is damaged; fetch the model again.") from None
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        if settings.get(name) is None and getattr(text, name, None) is not None:
            settings[name] = getattr(text, name)
    stops = settings.get("eos_token_id")
    if stops is None:
        stops = []
    elif not isinstance(stops, list):
        stops = [stops]
    if not all(isinstance(token, int) for token in stops):
        raise ConfigError(f"{path} is damaged; fetch the model again.")
    settings["eos_token_id"] = stops if end in stops else [*stops, end]
    settings.setdefault("pad_token_id", settings["eos_token_id"][0])
    return settings
