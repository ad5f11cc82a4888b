"""Samples -> micro-batches, in an order that depends on seed and epoch only, from any position on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch.utils.data import DataLoader, Dataset

from zero_ds.config import ConfigError, RunConfig
from zero_ds.data.conversations import (
    IGNORE,
    IMAGE_TOKEN,
    ChatTemplate,
    ConversationError,
    Encoded,
    Turn,
    cut_turns,
    image_prompt,
)
from zero_ds.data.formats import DataError, TooLongError
from zero_ds.data.images import ImageError, ImageProcessor, open_image
from zero_ds.data.sources import Records, Sample

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
INPUTS = ("input_ids", "labels", "attention_mask", "pixel_values", "token_weights")
"""Entries of a batch that the model's forward pass takes."""


@dataclass(frozen=True)
class SampleEncoder:
    """One sample -> token ids, labels and pixel values; shared by training, evaluation and chat."""

    template: ChatTemplate
    supervise: Literal["response", "special_tokens"]
    processor: ImageProcessor | None = None
    tokens_per_image: int = 0
    max_length: int = 2048
    image_prompt: Literal["fixed", "random", "off"] = "fixed"
    system_prompt: str | None = None
    seed: int = 0

    def turns(self, sample: Sample) -> list[Turn]:
        """The sample's turns with system prompt and image wrapper as configured."""
        turns = list(sample.turns)
        if self.system_prompt is not None and turns[0].role != "system":
            turns.insert(0, Turn("system", self.system_prompt))
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", image_prompt(turns[first].text, self.image_prompt, sample.id, self.seed))
        return turns

    def encode(self, turns: Sequence[Turn], generate: bool = False) -> Encoded:
        return self.template.encode(
            turns, tokens_per_image=self.tokens_per_image, supervise=self.supervise, generate=generate
        )

    def pixels(self, sample: Sample) -> list[torch.Tensor]:
        if sample.images and self.processor is None:
            raise DataError(
                f"sample {sample.id} has an image, but this stage has no vision encoder; drop image samples"
            )
        try:
            return [self.processor(open_image(path)) for path in sample.images] if self.processor else []
        except ImageError as error:
            raise DataError(f"sample {sample.id}: {error}") from None

    def tokens(self, sample: Sample) -> Encoded:
        """The sample as ids and labels, cut to whole turns within max_length.

        Raises:
            TooLongError: nothing that carries a label fits. DataError: the chat template refuses the sample.
        """
        try:
            encoded = cut_turns(self.turns(sample), self.max_length, self.encode)
        except ConversationError as error:
            raise DataError(f"sample {sample.id}: {error}") from None
        if encoded is None:
            raise TooLongError(
                f"sample {sample.id} has no answer within {self.max_length} tokens; raise data.max_length"
            )
        return encoded

    def __call__(self, sample: Sample) -> dict[str, Any]:
        """-> input_ids, labels, responses (lists of int), pixels (list of (3, size, size)), id.

        Raises:
            TooLongError, DataError: as `tokens`, or a picture that cannot be read.
        """
        encoded = self.tokens(sample)
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "responses": encoded.responses,
            "pixels": self.pixels(sample)[: encoded.images],
            "id": sample.id,
        }


def collate(samples: Sequence[dict[str, Any]], pad_id: int, image_size: int | None) -> Batch:
    """Pads to the longest sample; no sample at all gives one row of one token without a label.

    Returns input_ids, labels, responses, attention_mask: (batch, seq), responses numbered through the batch;
    pixel_values: (max(images, 1), 3, size, size), one blank picture where the batch has none, because every rank runs
    the encoder exactly once a micro-batch; ids.
    """
    blank = {"input_ids": [pad_id], "labels": [IGNORE], "responses": [-1], "pixels": [], "id": "nothing"}
    samples = samples or [blank]
    length = max(len(sample["input_ids"]) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_id)
    labels = torch.full((len(samples), length), IGNORE)
    responses = torch.full((len(samples), length), -1)
    mask = torch.zeros((len(samples), length), dtype=torch.long)
    numbered = 0
    for row, sample in enumerate(samples):
        n = len(sample["input_ids"])
        input_ids[row, :n] = torch.tensor(sample["input_ids"])
        labels[row, :n] = torch.tensor(sample["labels"])
        mask[row, :n] = 1
        own = torch.tensor(sample["responses"])
        responses[row, :n] = torch.where(own >= 0, own + numbered, own)
        numbered += int(own.max()) + 1
    batch: Batch = {
        "input_ids": input_ids,
        "labels": labels,
        "responses": responses,
        "attention_mask": mask,
        "ids": [sample["id"] for sample in samples],
    }
    if image_size is not None:
        pictures = [picture for sample in samples for picture in sample["pixels"]]
        batch["pixel_values"] = torch.stack(pictures) if pictures else torch.zeros(1, 3, image_size, image_size)
    return batch


def sample_order(n: int, seed: int, epoch: int) -> Sequence[int]:
    """Order of the samples in an epoch: as they stand in the first (pre-shuffled data), permuted from then on."""
    if epoch == 0:
        return range(n)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return cast(Sequence[int], torch.randperm(n, generator=generator).numpy())  # 8 bytes a sample; a list has 36


WINDOW = 8
"""Global batches in which samples are grouped by length: more saves little padding, and ties batches to lengths."""


def group_by_length(window: Sequence[int], length: Callable[[int], int], batch: int, seed: int) -> list[int]:
    """Reorders one window of samples so that those of like length share a batch; the batches come in random order.

    A batch that the window does not fill stays last, so that batches begin where they began before. Pure function of
    its arguments, whatever the number of ranks.
    """
    ranked = sorted(window, key=length)
    batches = [ranked[start : start + batch] for start in range(0, len(ranked), batch)]
    whole = [b for b in batches if len(b) == batch]
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    return [sample for group in [*(whole[i] for i in order), *batches[len(whole) :]] for sample in group]


class _Samples(Dataset[dict[str, Any] | DataError]):
    """Position in the whole run -> encoded sample; holds no state, so any position can be the first.

    A bad sample comes out as its error, which the loader raises: a worker process would wrap it in its own traceback.
    """

    def __init__(self, records: Records, encoder: SampleEncoder, seed: int, grouped: int | None = None) -> None:
        """`grouped`: the global batch within which samples shall be of like length, None for the plain order."""
        self.records, self.encoder, self.seed, self.grouped = records, encoder, seed, grouped
        self._order: tuple[int, Sequence[int]] = (-1, [])
        self._window: tuple[tuple[int, int], list[int]] = ((-1, -1), [])

    def __getitem__(self, position: int) -> dict[str, Any] | DataError:
        try:
            return self.encoder(self.records[self.index(position)])
        except DataError as error:
            return error

    def index(self, position: int) -> int:
        """Which sample stands at a position of the run."""
        epoch, place = divmod(position, len(self.records))
        if self._order[0] != epoch:
            self._order = (epoch, sample_order(len(self.records), self.seed, epoch))
        if self.grouped is None:
            return int(self._order[1][place])
        number, inside = divmod(place, self.grouped * WINDOW)
        if self._window[0] != (epoch, number):
            window = self._order[1][place - inside : place - inside + self.grouped * WINDOW]
            seed = (self.seed * 1_000_003 + epoch) * 1_000_003 + number
            self._window = ((epoch, number), group_by_length(window, self._length, self.grouped, seed % 2**63))
        return int(self._window[1][inside])

    def _length(self, index: int) -> int:
        """About how many tokens a sample has: four characters a token, and its image tokens."""
        return self.records.size(index) // 4 + self.encoder.tokens_per_image * self.records.images(index)


@dataclass(frozen=True)
class Loader:
    """Micro-batches of one rank.

    Sample `step * global_batch + i` of the run belongs to the same step whatever the number of ranks: rank r takes the
    samples i with i // (global_batch / world_size) == r, in `accumulation` micro-batches.
    """

    records: Records
    encoder: SampleEncoder
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    pad_id: int
    seed: int
    workers: int = 0
    group_by_length: bool = False
    skip_bad: bool = False
    """Leave out samples that cannot be used, instead of ending the run."""

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.world_size)

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """Yields the micro-batches of step first, first + 1, ..., last - 1.

        A batch's `skipped` and `too_long` say what is wrong with the samples that it lacks.

        Raises:
            DataError: a sample that cannot be used, unless bad ones are skipped.
        """
        share = self.global_batch // self.world_size
        positions = [
            [step * self.global_batch + self.rank * share + m * self.micro_batch + i for i in range(self.micro_batch)]
            for step in range(first, last)
            for m in range(self.accumulation)
        ]
        size = self.encoder.processor.size if self.encoder.processor else None

        def batch_of(samples: list[Any]) -> Batch | DataError:
            wrong = [sample for sample in samples if isinstance(sample, DataError)]
            skipped = [error for error in wrong if not isinstance(error, TooLongError)]
            if skipped and not self.skip_bad:
                return skipped[0]
            batch = collate([sample for sample in samples if isinstance(sample, dict)], self.pad_id, size)
            batch["skipped"] = [str(error) for error in skipped]
            batch["too_long"] = [str(error) for error in wrong if isinstance(error, TooLongError)]
            return batch

        stream = iter(
            DataLoader(
                _Samples(self.records, self.encoder, self.seed, self.global_batch if self.group_by_length else None),
                batch_sampler=positions,
                collate_fn=batch_of,
                num_workers=self.workers,
                multiprocessing_context="fork" if self.workers else None,
                pin_memory=torch.cuda.is_available(),
            )
        )
        for _ in range(first, last):
            batches = [next(stream) for _ in range(self.accumulation)]
            for batch in batches:
                if isinstance(batch, DataError):
                    raise batch
            yield batches


def image_positions(input_ids: torch.Tensor) -> torch.Tensor:
    """Mask of the image tokens, (batch, seq)."""
    return input_ids == IMAGE_TOKEN


def check_batches(config: RunConfig, world_size: int) -> int:
    """Accumulation steps of a run.

    Raises:
        ConfigError: the global batch is no multiple of micro batch x ranks.
    """
    per_pass = config.micro_batch * world_size
    if config.global_batch % per_pass:
        raise ConfigError(
            f"global_batch={config.global_batch} is no multiple of micro_batch={config.micro_batch} x {world_size} "
            f"ranks; set global_batch to a multiple of {per_pass}."
        )
    return config.global_batch // per_pass
