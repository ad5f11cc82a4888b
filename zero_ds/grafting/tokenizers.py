"""Changes to the tokenizers of exports, so that other software reads prompts and texts as this package does."""

from __future__ import annotations

from typing import Any

_BEGINS = "begins_texts"
"""Key of an export's tokenizer_config.json: its texts began with a token before it was fitted to written prompts."""


def for_templates_(tokenizer: Any, end: int) -> None:
    """Fits a tokenizer to prompts that its chat template has written, as software for Llava reads them.

    Such software (lmms-eval's `llava_hf`) tokenises a written prompt without saying that its special tokens stand in
    it already, so the first one must not be put there twice. And it ends an answer at the tokenizer's own end, not at
    those of generation_config.json: that becomes `end`, the token which closes a turn.
    """
    if tokenizer.num_special_tokens_to_add():
        tokenizer.init_kwargs[_BEGINS] = bool(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id])
        _begin_(tokenizer, False)
    if tokenizer.eos_token_id != end:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)


def for_texts_(tokenizer: Any) -> None:
    """Lets an export's tokenizer begin texts as its base model's does, for measures on texts without a template."""
    if tokenizer.init_kwargs.get(_BEGINS) is True:
        _begin_(tokenizer, True)


def _begin_(tokenizer: Any, begin: bool) -> None:
    tokenizer.add_bos_token, tokenizer.add_eos_token = begin, False
    tokenizer.init_kwargs |= {"add_bos_token": begin, "add_eos_token": False}  # what is saved
