"""Texts that the target writes itself: a question where a user's turn begins, and then its answer to it.

Written in groups, each into a file of its own with its own seed, so that a run that was killed goes on with the group
it was at. The files are in LLaVA's format, and any run can use them as data.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import Turn
from zero_ds.data.samples import SampleEncoder
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically
from zero_ds.trajectory.batching import progress
from zero_ds.trajectory.texts import TokenSample, generate_answers

logger = logging.getLogger(__name__)

GROUP = 64
"""Number of conversations in a file."""
QUESTION_TOKENS = 96
"""Largest number of tokens of a question."""
ANSWER_TOKENS = 160
"""Largest number of tokens of an answer."""


def write_samples(
    target: DecoderFolder, encoder: SampleEncoder, folder: Path, *, count: int, seed: int, dtype: Any, device: Any
) -> list[SourceConfig]:
    """Lets the target write `count` conversations into files in `folder`, as far as they are not there yet.

    The whole target is in memory, if anything is missing. Returns the files as data sets.

    Raises:
        ConfigError: it wrote nothing that can be used.
    """
    if not count:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        folder / f"samples-{seed}-{start:06d}-{min(GROUP, count - start)}.json" for start in range(0, count, GROUP)
    ]
    missing = [file for file in files if not file.is_file()]
    if missing:
        decoder = target.load(dtype=dtype).to(device).eval()
        with progress(GROUP * len(missing), "writing texts", "text") as bar:
            for number, file in enumerate(files):
                if file not in missing:
                    continue
                wanted = min(GROUP, count - number * GROUP)
                torch.manual_seed(seed * 1_000_003 + number)
                records = _write_group(decoder, encoder, wanted, file.stem)
                write_atomically(file, json.dumps(records, ensure_ascii=False, indent=0) + "\n")
                bar.update(wanted)
        del decoder
    used = [file for file in files if json.loads(file.read_text(encoding="utf-8"))]
    if not used:
        raise ConfigError(f"{target} writes no conversations of its own that can be used; give data.sources instead.")
    return [SourceConfig(path=str(file)) for file in used]


def _write_group(decoder: nn.Module, encoder: SampleEncoder, count: int, name: str) -> list[dict[str, Any]]:
    """Returns conversations in LLaVA's format. Empty questions and answers are left out."""
    template = encoder.template
    opening = _opening(encoder)
    asked = generate_answers(
        decoder,
        template,
        [TokenSample(str(number), opening) for number in range(count)],
        batch_size=count,
        tokens=QUESTION_TOKENS,
        sampled=True,
    )
    questions = [template.spoken(sample.input_ids[len(opening) :]).strip() for sample in asked]
    prompts = [
        (question, encoder.encode(encoder.with_system([Turn("user", question)]), generate=True).input_ids)
        for question in questions
        if question
    ]
    prompts = [(question, ids) for question, ids in prompts if len(ids) + ANSWER_TOKENS <= encoder.max_length]
    if not prompts:
        return []
    answered = generate_answers(
        decoder,
        template,
        [TokenSample(str(number), ids) for number, (_, ids) in enumerate(prompts)],
        batch_size=len(prompts),
        tokens=ANSWER_TOKENS,
        sampled=True,
    )
    records = []
    for number, ((question, ids), sample) in enumerate(zip(prompts, answered, strict=True)):
        answer = template.spoken(sample.input_ids[len(ids) :]).strip()
        if answer:
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{name}-{number}", "conversations": turns})
    return records


def _opening(encoder: SampleEncoder) -> list[int]:
    """Returns the tokens of a prompt before the user's first word."""
    texts = ("What is it?", "Name one of them.")
    encoded = [encoder.encode(encoder.with_system([Turn("user", text)]), generate=True).input_ids for text in texts]
    opening: list[int] = []
    for first, second in zip(*encoded, strict=False):
        if first != second:
            break
        opening.append(first)
    if not opening:
        raise ConfigError("the chat template begins with the user's own words, so no question can be written after it.")
    return opening
