"""Loads and checks the chat template of a model, with its tokenizer and all ends of an answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from zero_ds.config.schema import DataConfig
from zero_ds.data.conversations import ChatTemplate, NoChatTemplate, read_template
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.loading import load_tokenizer
from zero_ds.runtime.errors import ConfigError

MEDIA = re.compile("image|vision|video|audio")
"""Names of special tokens that stand for something other than text, for which a language model has no embeddings."""


def load_template(
    folder: DecoderFolder | Path, data: DataConfig, *, config: Any = None, learns: bool = True
) -> ChatTemplate:
    """Loads the chat template with which a model is trained and asked; every command does it here.

    folder: folder of the tokenizer; it may be an export, whose class belongs to no decoder family. data: the run's data
    section, which may name another template. config: transformers' config of the decoder. learns: whether a run
    trained, or trains, on conversations of this template. If so, `ChatTemplate.check` compares prompts with training.

    Raises:
        ConfigError: the tokenizer or the template cannot be read, they do not fit the model, or a run's template cannot
            be learned.
    """
    path = folder.path if isinstance(folder, DecoderFolder) else folder
    tokenizer = folder.tokenizer() if isinstance(folder, DecoderFolder) else load_tokenizer(folder)
    if config is not None:
        check_vocabulary(tokenizer, config.vocab_size, path)
    own, stops = read_template(data.chat_template), answer_ends(path, config)
    if own is None and not tokenizer.chat_template and not learns:
        return NoChatTemplate(tokenizer, stops)
    template = ChatTemplate(tokenizer, own, special_tokens=data.special_tokens, stops=stops, learns=learns)
    if learns:
        template.check(system=data.system_prompt)
    return template


def check_vocabulary(tokenizer: Any, embeddings: int, folder: Path) -> None:
    """Checks that the model has an embedding for every token.

    Special tokens that stand for images and the like are allowed to have none, as in Gemma-3's text models: no text
    becomes such a token.

    Raises:
        ConfigError: a token without an embedding.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for name, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if number >= embeddings and not (name in special and MEDIA.search(name)):
            raise ConfigError(
                f"the tokenizer in {folder} has {len(tokenizer)} tokens and the model {embeddings} embeddings, so none "
                f"for token {number}, {name!r}; they do not belong together, so fetch the model again or enlarge its "
                "embeddings."
            )


def generation_settings(folder: Path) -> dict[str, Any]:
    """Returns the content of a folder's generation_config.json; empty if there is none.

    Raises:
        ConfigError: a damaged file.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        settings = {**json.loads(path.read_text(encoding="utf-8"))}
        stops = settings.get("eos_token_id")
        valid = all(isinstance(token, int) for token in (stops if isinstance(stops, list) else [stops or 0]))
    except (OSError, ValueError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ConfigError(f"{path} is damaged; fetch the model again.")
    return settings


def answer_ends(folder: Path, config: Any = None) -> tuple[int, ...]:
    """Returns the tokens that end an answer according to a model's files, which may name several.

    config: transformers' config of the decoder, which is asked if generation_config.json names none.

    Raises:
        ConfigError: a damaged generation_config.json.
    """
    stops = generation_settings(folder).get("eos_token_id")
    if stops is None:
        stops = getattr(config, "eos_token_id", None)
    if stops is None:
        return ()
    return tuple(stops) if isinstance(stops, list | tuple) else (stops,)
