"""The texts that translators are trained and judged on: tokenized, and divided into shards of bounded size."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zero_ds.config.schema import RunConfig, SourceConfig
from zero_ds.data.conversations import NoChatTemplate, cut_turns
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.templates import load_template
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.lookup import Lookup

logger = logging.getLogger(__name__)

HELD_OUT, LOOKUPS, TRAINING = "held-out", "lookups", "training"
"""Groups of texts; no shard holds texts of two groups."""


@dataclass(frozen=True)
class Shard:
    """Texts whose hidden states are in one file per layer."""

    number: int
    texts: tuple[int, ...]
    """Numbers of the texts in the corpus, the longest first."""


@dataclass(frozen=True)
class Corpus:
    """All texts, the held-out ones first, then the questions, then those that are trained on."""

    ids: tuple[list[int], ...]
    """Token ids of every text."""
    held_out: int
    """Number of held-out texts."""
    lookups: tuple[Lookup, ...] = ()

    @cached_property
    def groups(self) -> dict[str, range]:
        """Numbers of the texts of each group."""
        first = self.held_out + len(self.lookups)
        return {
            HELD_OUT: range(self.held_out),
            LOOKUPS: range(self.held_out, first),
            TRAINING: range(first, len(self.ids)),
        }

    @cached_property
    def tokens(self) -> int:
        """Number of tokens of all texts."""
        return sum(len(text) for text in self.ids)

    def content(self) -> str:
        """Returns a hash of all tokens and of their division into texts and groups."""
        digest = hashlib.sha256(f"{self.held_out} {len(self.lookups)}".encode())
        for text in self.ids:
            digest.update(np.array([len(text), *text], dtype=np.int64).tobytes())
        return digest.hexdigest()[:32]

    def shards(self, tokens: int) -> list[Shard]:
        """Divides the texts into shards of at most `tokens` tokens, or of one text that is longer."""
        found: list[Shard] = []
        for numbers in self.groups.values():
            part: list[int] = []
            size = 0
            for number in numbers:
                if part and size + len(self.ids[number]) > tokens:
                    found.append(self._shard(len(found), part))
                    part, size = [], 0
                part.append(number)
                size += len(self.ids[number])
            if part:
                found.append(self._shard(len(found), part))
        return found

    def _shard(self, number: int, texts: Sequence[int]) -> Shard:
        return Shard(number, tuple(sorted(texts, key=lambda text: (-len(self.ids[text]), text))))


def text_encoder(config: RunConfig, target: DecoderFolder) -> SampleEncoder:
    """Returns what tokenizes the texts: the run's chat template, and samples no longer than the target can read.

    Raises:
        ConfigError: the target's tokenizer has no chat template, or does not fit the model.
    """
    text = target.text_config()
    template = load_template(target, config.data, config=text, learns=False)
    if isinstance(template, NoChatTemplate):
        raise ConfigError(f"the tokenizer in {target} has no chat template; name one in data.chat_template.")
    longest = min(config.data.max_length, getattr(text, "max_position_embeddings", None) or config.data.max_length)
    return SampleEncoder(
        template=template,
        supervise="full",
        max_length=longest,
        system_prompt=config.data.system_prompt,
        seed=config.seed,
        vocabulary=text.vocab_size,
    )


def read_corpus(
    config: RunConfig, encoder: SampleEncoder, written: Sequence[SourceConfig], lookups: Sequence[Lookup]
) -> Corpus:
    """Reads the texts of a run in a random order, until `translate.tokens` are reached; a streamed source in its own.

    written: data sets that are read in addition to `data.sources`. Samples with an image are skipped, and so are
    samples of which no answer fits.

    Raises:
        ConfigError: fewer than two texts, one to train on and one to judge by. DataError: damaged data.
    """
    records = Records((*config.data.sources, *written), skip_bad=config.data.bad_samples == "skip")
    texts: list[list[int]] = []
    tokens = images = unfit = 0
    mixed = np.random.default_rng(config.seed).permutation(len(records))
    for index in range(len(records)) if records.in_order else mixed.tolist():
        if config.translate.tokens is not None and tokens >= config.translate.tokens:
            break
        if records.images(index):
            images += 1
            continue
        encoded = cut_turns(encoder.turns(records[index]), encoder.max_length, encoder.encode)
        if encoded is None or len(encoded.input_ids) < 2:
            unfit += 1
            continue
        texts.append(encoded.input_ids)
        tokens += len(encoded.input_ids)
    if len(texts) < 2:
        raise ConfigError(
            f"the data holds {len(texts)} usable texts ({images} samples have an image, {unfit} do not fit into "
            f"{encoder.max_length} tokens); give at least two conversations without images."
        )
    logger.info("%d texts of %d tokens; %d samples have an image, %d do not fit", len(texts), tokens, images, unfit)
    held_out = min(len(texts) - 1, max(1, round(config.translate.held_out * len(texts))))
    asked = [lookup.input_ids for lookup in lookups]
    return Corpus((*texts[:held_out], *asked, *texts[held_out:]), held_out, tuple(lookups))
