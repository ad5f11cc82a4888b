"""Changes to the tokenizers of exports, so that other software reads prompts and texts as this package does."""

from __future__ import annotations

from typing import Any

_BEGINS = "begins_texts"
"""Key in an export's tokenizer_config.json: whether the tokenizer put a token before every text originally."""


def for_templates_(tokenizer: Any, end: int) -> None:
    """Adapts a tokenizer to prompts that its chat template has written, as software for Llava reads them.

    Such software (lmms-eval's `llava_hf`) tokenizes a written prompt without saying that it contains its special tokens
    already, so the tokenizer must not add the first one again. And it ends an answer at the tokenizer's end token, not
    at those in generation_config.json, so the end token becomes `end`, which closes a turn.
    """
    if tokenizer.num_special_tokens_to_add():
        tokenizer.init_kwargs[_BEGINS] = bool(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id])
        _set_first_token_(tokenizer, False)
    if tokenizer.eos_token_id != end:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)


def for_texts_(tokenizer: Any) -> None:
    """Lets an export's tokenizer begin texts as its base model's does, to measure texts without a chat template."""
    if tokenizer.init_kwargs.get(_BEGINS) is True:
        _set_first_token_(tokenizer, True)


def _set_first_token_(tokenizer: Any, begin: bool) -> None:
    """Sets whether the tokenizer puts its first token before every text; it never puts a last token after one."""
    tokenizer.add_bos_token = begin
    tokenizer.add_eos_token = False
    tokenizer.init_kwargs |= {"add_bos_token": begin, "add_eos_token": False}  # these are saved
