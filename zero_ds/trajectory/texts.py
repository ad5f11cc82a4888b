"""Chooses the texts that a trajectory is measured on, and lets the model answer questions greedily where asked.

Source: section 1.1 of the paper; appendix A.1 for greedy answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from zero_ds.config.schema import DataConfig, SourceConfig
from zero_ds.data.conversations import ChatTemplate, NoChatTemplate, cut_turns
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records, Sample
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.decoders.shrink import position_limit
from zero_ds.model.templates import load_template
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.batching import batches, padded, progress

logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
"""Largest number of tokens of a sample; a longer one loses whole turns from its end."""
ANSWER_TOKENS = 128
"""Largest number of tokens of a greedy answer."""


@dataclass(frozen=True)
class TokenSample:
    """A conversation as the token ids that the model reads."""

    id: str
    input_ids: list[int]


def read_samples(
    model: DecoderFolder | Path,
    data: Path,
    *,
    count: int,
    seed: int,
    greedy: bool = False,
    system_prompt: str | None = None,
    chat_template: str | None = None,
) -> tuple[list[TokenSample], ChatTemplate]:
    """Returns text samples of a data file, tokenized for the model, and the model's chat template.

    See `choose_samples` for which samples these are; `greedy` asks for questions only. chat_template: file with a
    template in place of the model's own.

    Raises:
        ConfigError: no tokenizer, no chat template, token ids that the model does not have, no usable sample.
        DataError: a damaged data file.
    """
    folder = DecoderFolder.of(model)
    config = folder.text_config()
    longest = min(MAX_TOKENS, position_limit(config) or MAX_TOKENS)
    template = load_template(folder, DataConfig(chat_template=chat_template), config=config, learns=False)
    if isinstance(template, NoChatTemplate):
        raise ConfigError(
            f"the tokenizer in {folder} has no chat template; give one with --chat-template FILE, or an "
            "instruction-tuned model."
        )
    encoder = SampleEncoder(template, "response", max_length=longest, system_prompt=system_prompt)
    records = Records([SourceConfig(path=str(data))], remedy="repair or remove them")
    chosen = choose_samples(records, encoder, count=count, seed=seed, questions_only=greedy)
    return chosen, template


def choose_samples(
    records: Records, encoder: SampleEncoder, *, count: int, seed: int, questions_only: bool = False
) -> list[TokenSample]:
    """Returns `count` text samples chosen at random, or all there are.

    Samples with an image are skipped, as are those too long for an answer. With `questions_only` a sample ends where
    the first answer begins (greedy feeding, appendix A.1).

    Raises:
        ConfigError: no text-only sample fits.
    """
    chosen: list[TokenSample] = []
    with_image = unfit = 0
    for index in np.random.default_rng(seed).permutation(len(records)).tolist():
        if len(chosen) == count:
            break
        if records.images(index):
            with_image += 1
            continue
        sample = records[index]
        input_ids = _question(sample, encoder) if questions_only else _conversation(sample, encoder)
        if len(input_ids) < 2:
            unfit += 1
            continue
        chosen.append(TokenSample(sample.id, input_ids))
    if not chosen:
        raise ConfigError(
            f"the data holds no usable text sample ({with_image} have an image, {unfit} no question and answer within "
            f"{encoder.max_length} tokens); give conversations without images."
        )
    if len(chosen) < count:
        logger.info(
            "%d samples instead of %d: %d have an image, %d are too long", len(chosen), count, with_image, unfit
        )
    return chosen


def _conversation(sample: Sample, encoder: SampleEncoder) -> list[int]:
    """Returns the token ids of as many turns as fit; empty if no answer does."""
    encoded = cut_turns(encoder.turns(sample), encoder.max_length, encoder.encode)
    return encoded.input_ids if encoded else []


def _question(sample: Sample, encoder: SampleEncoder) -> list[int]:
    """Returns the token ids up to the first answer; empty if nothing is asked or no room is left for an answer."""
    turns = encoder.turns(sample)
    first_answer = next(number for number, turn in enumerate(turns) if turn.role == "assistant")
    asked = turns[:first_answer]
    if all(turn.role != "user" for turn in asked):
        return []
    input_ids = encoder.encode(asked, generate=True).input_ids
    return input_ids if len(input_ids) <= encoder.max_length - ANSWER_TOKENS else []


def answer_greedily(
    decoder: nn.Module, template: ChatTemplate, questions: Sequence[TokenSample], *, batch_size: int
) -> list[TokenSample]:
    """Returns the questions, each followed by the model's own greedy answer of at most 128 tokens (appendix A.1)."""
    return generate_answers(decoder, template, questions, batch_size=batch_size, tokens=ANSWER_TOKENS)


def generate_answers(
    decoder: nn.Module,
    template: ChatTemplate,
    questions: Sequence[TokenSample],
    *,
    batch_size: int,
    tokens: int,
    sampled: bool = False,
) -> list[TokenSample]:
    """Returns the questions, each followed by what the model writes after it, with the end of the turn if it comes.

    tokens: largest number of tokens that are written. sampled: draw every token from the model's distribution instead
    of taking the most probable one.
    """
    from transformers import GenerationConfig

    model = cast(Any, decoder)
    ends = list(template.ends())
    choice: dict[str, Any] = {"do_sample": True, "top_k": 0} if sampled else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=tokens, eos_token_id=ends, pad_token_id=ends[0], **choice)
    kept, model.generation_config = model.generation_config, settings  # else the model's own would fill the gaps
    answered: dict[int, TokenSample] = {}
    try:
        with torch.inference_mode(), progress(len(questions), "answering", "sample") as bar:
            for rows in batches([len(question.input_ids) for question in questions], batch_size):
                input_ids, mask = padded([questions[row].input_ids for row in rows], model.device, left=True)
                output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
                for place, row in enumerate(rows):
                    answer = output[place, input_ids.shape[1] :].tolist()
                    end = next((place for place, token in enumerate(answer, 1) if token in ends), len(answer))
                    answered[row] = TokenSample(questions[row].id, questions[row].input_ids + answer[:end])
                bar.update(len(rows))
    finally:
        model.generation_config = kept
    return [answered[row] for row in range(len(questions))]
