"""The text side of an export: tokenizer, image token, chat template, and the tokens that end an answer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from zero_ds.config.schema import DataConfig
from zero_ds.data.conversations import PLACEHOLDER, STRFTIME, WRAPPERS, ChatTemplate
from zero_ds.export.source import Source
from zero_ds.grafting.tokenizers import for_templates_
from zero_ds.model.decoders import Family
from zero_ds.model.templates import generation_settings, load_template
from zero_ds.runtime.errors import ConfigError


@dataclass(frozen=True)
class TextSettings:
    """Everything that turns conversations into tokens and back, as an export contains it."""

    tokenizer: Any
    """Tokenizer, with the image token among its special tokens."""
    image_token: str | None
    """Token that stands for an image in a prompt; None if the model does not see."""
    template: str | dict[str, str]
    """Chat template of the export, or several by name, of which `default` is the run's."""
    stops: tuple[int, ...]
    """Tokens that end an answer."""
    generation: dict[str, Any]
    """Content of generation_config.json."""

    @property
    def image_token_id(self) -> int:
        """Id of the image token."""
        assert self.image_token is not None
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))


def text_settings(source: Source) -> TextSettings:
    """Makes the text side of an export.

    Raises:
        ConfigError: as `load_template`, or no token can stand for an image.
    """
    data = source.config.data
    template = load_template(source.decoder, data, config=source.text)
    tokenizer = template.tokenizer
    image_token = find_image_token(source.decoder.family, tokenizer) if source.sees else None
    if image_token is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    named = dict(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else {}
    named["default"] = template.source
    for name, own in named.items():
        as_last = _closing(template) if name == "default" else None
        named[name] = chat_template(_with_end_token(own, tokenizer), image_token, data, as_last)
    stops, generation = template.ends(), generation_settings(source.decoder.path)
    generation = _generation_config(generation, source.text, stops)
    for_templates_(tokenizer, template.end_of_turn())
    tokenizer.chat_template = named if len(named) > 1 else named["default"]
    return TextSettings(tokenizer, image_token, tokenizer.chat_template, stops, generation)


def _with_end_token(template: str, tokenizer: Any) -> str:
    """Returns a template that keeps writing the tokenizer's end token, which the export changes."""
    if "eos_token" not in template:
        return template
    return f"{{%- set eos_token = {json.dumps(tokenizer.eos_token)} -%}}{template}"


def _closing(template: ChatTemplate) -> str | None:
    """Returns the template's text after a last answer, if training renders every answer as the last one."""
    return template.closing if template.each_as_last else None


def find_image_token(family: Family, tokenizer: Any) -> str:
    """Returns a special token of the decoder's vocabulary that can stand for an image.

    Raises:
        ConfigError: the family names no such token that is in this vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    for token in (PLACEHOLDER, *family.image_tokens):
        if token in vocabulary:
            return token
    spare = [token for token in _special_tokens(tokenizer) if token in vocabulary and _SPARE.search(token)]
    if spare and family.per_layer_config is None:  # of a registered family the tokens are known
        return min(spare, key=lambda token: (not re.search("ima?ge?", token), vocabulary[token]))
    raise ConfigError(
        f"the vocabulary has none of the {family.name} family's spare tokens "
        f"({', '.join(family.image_tokens) or 'it names none'}); name one in zero_ds/model/decoders/."
    )


_SPARE = re.compile(r"image|unused|reserved|reponame|control_\d|extra_\d|SPECIAL_\d|place.?holder|vision_pad|\bdummy")
"""Names that vocabularies give to special tokens of images, and to those without a use."""


def _special_tokens(tokenizer: Any) -> list[str]:
    """Returns every token that the tokenizer's own file marks as special."""
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def image_prompt(data: DataConfig) -> tuple[str, str]:
    """Returns the text that training writes before an image, and the text between image and question."""
    prompt = WRAPPERS[0] if data.image_prompt != "off" else "{image}\n{question}"
    before, after = prompt.split("{image}")
    between, _ = after.split("{question}")
    return before, between


# Jinja code that puts a message's images and text into one string, `ns.text`, in their order. `<image>` stands for an
# image.
_JOIN_CONTENTS = """
{%- set ns.text = '' -%}
{%- if message.content is string -%}
    {%- set ns.text = message.content -%}
{%- elif message.content is iterable -%}
    {%- for part in message.content -%}
        {%- if part.type == 'image' -%}
            {%- set ns.text = ns.text + PLACEHOLDER -%}
        {%- elif part.type == 'text' -%}
            {%- set ns.text = ns.text + part.text -%}
        {%- endif -%}
    {%- endfor -%}
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
{%- set ns = namespace(messages=[], text='', first=true) -%}
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


# Jinja code that renders every answer as the last one of its conversation, as training does where the template treats
# the last one differently. The template is a macro. What comes after an answer is taken from a conversation in which a
# word stands for that answer, without its end, which is written already.
_EACH_AS_LAST = """
{%- set parts = namespace(text='', last=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' or loop.last -%}
        {%- set asks = add_generation_prompt and loop.last -%}
        {%- if parts.last < 0 -%}
            {%- set parts.text = own(messages[:loop.index], asks) -%}
        {%- else -%}
            {%- set word = [dict(messages[parts.last], content='zqlastqz')] -%}
            {%- set turns = messages[:parts.last] + word + messages[parts.last + 1:loop.index] -%}
            {%- set parts.text = parts.text + own(turns, asks).split('zqlastqz')[1][CLOSING_LENGTH:] -%}
        {%- endif -%}
        {%- if message.role == 'assistant' -%}
            {%- set parts.last = loop.index0 -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{{- parts.text -}}
"""


def _one_line(code: str) -> str:
    """Returns Jinja code without the line breaks and indentation that make it readable."""
    return "".join(line.strip() for line in code.splitlines())


def _each_as_last(own: str, closing: str) -> str:
    """Returns a template that renders every answer as the template `own` renders the last one.

    closing: what `own` writes after a last answer.
    """
    begin, end = "{%- macro own(messages, add_generation_prompt) %}{{ '' }}", "{{ '' }}{% endmacro -%}"
    macro = begin + own.removesuffix("\n") + end
    return macro + _one_line(_EACH_AS_LAST).replace("CLOSING_LENGTH", str(len(closing)))


# The same where no message has images: only the system message is added.
_ADD_SYSTEM = """
{%- set ns = namespace(messages=[]) -%}
SET_SYSTEM
{%- set messages = ns.messages + messages -%}
"""


def chat_template(own: str, image_token: str | None, data: DataConfig, closing: str | None = None) -> str:
    """Returns the decoder's template `own` after a few lines that convert messages with images to those of training.

    A message's content is a list of images and text, which keep their order, or a string with `<image>`, as training's
    data and lmms-eval have them. image_token: None for a model that does not see, whose messages stay as they are.
    closing: if every answer is rendered as the last one, what `own` writes after it.

    In the first user's message, one image before or after the text gets the fixed image prompt around it; other
    images stay where they are, and so do strings without an image. The system prompt is that of training, and so is the
    date in templates that write one.
    """
    before, between = image_prompt(data)
    template = _CONVERT_MESSAGES if image_token is not None else _ADD_SYSTEM
    template = template.replace("JOIN_CONTENTS", _JOIN_CONTENTS)
    template = template.replace("WRAP_IMAGE", "" if data.image_prompt == "off" else _WRAP_IMAGE)
    template = template.replace("SET_SYSTEM", "" if data.system_prompt is None else _SET_SYSTEM)
    one_line = _one_line(template)
    values = {
        "SYSTEM_PROMPT": json.dumps(data.system_prompt),
        "PLACEHOLDER": json.dumps(PLACEHOLDER),
        "IMAGE_TOKEN": json.dumps(image_token),
        "BEFORE": json.dumps(before),
        "BETWEEN": json.dumps(between),
    }
    one_line = re.sub("|".join(values), lambda match: values[match[0]], one_line)
    if "enable_thinking" in own:
        one_line = "{%- set enable_thinking = false -%}" + one_line
    dated = STRFTIME if "strftime_now" in own else ""
    return one_line + dated + (own if closing is None else _each_as_last(own, closing))


def _generation_config(settings: dict[str, Any], text: Any, stops: tuple[int, ...]) -> dict[str, Any]:
    """Returns the content of the decoder's generation_config.json with all tokens that end an answer."""
    settings = dict(settings)
    settings.pop("_from_model_config", None)  # the export has a file of its own
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        if settings.get(name) is None and getattr(text, name, None) is not None:
            settings[name] = getattr(text, name)
    settings["eos_token_id"] = list(stops)
    settings.setdefault("pad_token_id", settings["eos_token_id"][0])
    return settings
