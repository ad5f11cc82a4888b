"""A step holds the same samples on any number of ranks and after any resume."""

from __future__ import annotations

import gc
import json
import signal
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from distributed_helper import run_ranks
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pace import scaled
from PIL import Image

from zero_ds.config.batches import fit_to_ranks
from zero_ds.config.schema import RunConfig, SourceConfig
from zero_ds.data.batches import collate
from zero_ds.data.conversations import IGNORE, IMAGE_TOKEN, ChatTemplate, Turn
from zero_ds.data.formats import DataError
from zero_ds.data.images import ImageProcessor
from zero_ds.data.loader import WINDOW, Loader, sample_order
from zero_ds.data.samples import EncodedSample, SampleEncoder, image_positions
from zero_ds.data.sources import Records, Sample
from zero_ds.runtime.errors import ConfigError

TEMPLATE = ChatTemplate(tiny.tokenizer())
PROCESSOR = ImageProcessor(tiny.IMAGE_SIZE, [0.5] * 3, [0.5] * 3)


def encoder(**changes: Any) -> SampleEncoder:
    return SampleEncoder(
        TEMPLATE,
        **{
            "supervise": "response",
            "processor": PROCESSOR,
            "tokens_per_image": tiny.TOKENS_PER_IMAGE,
            "system_prompt": "",
            **changes,
        },
    )


# -- which samples, in which order -------------------------------------------------------------------------------------


class Plain:
    """Replaces a SampleEncoder: sample n becomes the single token n."""

    processor = None
    tokens_per_image = 0

    def __call__(self, number: int) -> EncodedSample:
        return EncodedSample(str(number), [number], [number], [0], torch.zeros(0, 3, 0, 0))


def loader(samples: int, batch: int, *, micro: int, rank: int = 0, ranks: int = 1, seed: int = 0) -> Loader:
    return Loader(range(samples), Plain(), batch, micro, rank, ranks, pad_id=0, seed=seed)  # type: ignore[arg-type]


def drawn(stream: Loader, first: int, last: int) -> list[list[list[int]]]:
    """Returns sample numbers by step and micro-batch."""
    return [[batch.input_ids.flatten().tolist() for batch in step] for step in stream.steps(first, last)]


@given(
    samples=st.integers(1, 40),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    ranks=st.integers(1, 4),
    other_ranks=st.integers(1, 4),
    steps=st.integers(1, 4),
    first=st.integers(0, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_step_holds_the_same_samples_however_it_is_split(
    samples: int, micro: int, accumulation: int, ranks: int, other_ranks: int, steps: int, first: int, seed: int
) -> None:
    batch = micro * accumulation * ranks
    assume(batch % other_ranks == 0)

    def union(world: int, size: int) -> list[list[int]]:
        streams = [
            drawn(loader(samples, batch, micro=size, rank=r, ranks=world, seed=seed), first, first + steps)
            for r in range(world)
        ]
        for stream in streams:
            assert all(len(step) == batch // (size * world) for step in stream)
            assert all(len(micro_batch) == size for step in stream for micro_batch in step)
        return [[n for stream in streams for micro_batch in stream[s] for n in micro_batch] for s in range(steps)]

    one = union(1, batch)
    assert union(ranks, micro) == one
    assert union(other_ranks, batch // other_ranks) == one
    assert all(len(step) == batch for step in one)


@given(samples=st.integers(1, 20), batch=st.integers(1, 8), first=st.integers(0, 9), seed=st.integers(0, 5))
@settings(max_examples=30)
def test_resuming_continues_where_the_run_would_have_been(samples: int, batch: int, first: int, seed: int) -> None:
    whole = drawn(loader(samples, batch, micro=1, seed=seed), 0, first + 3)
    assert drawn(loader(samples, batch, micro=1, seed=seed), first, first + 3) == whole[first:]


def test_every_epoch_holds_every_sample_once_in_another_order() -> None:
    flat = [n for step in drawn(loader(12, 4, micro=2), 0, 9) for batch in step for n in batch]
    epochs = [flat[0:12], flat[12:24], flat[24:36]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] == list(range(12)), "the first epoch follows the files"
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(sample_order(12, 0, 1)) == epochs[1] != list(sample_order(12, 1, 1))


class Lengths(Sequence[int]):
    """Replaces Records: sample n has lengths[n] characters and no image."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        return index

    def size(self, index: int) -> int:
        return 4 * self.lengths[index]

    def images(self, index: int) -> int:
        return 0


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    batch=st.sampled_from([2, 4]),
    ranks=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
    data=st.data(),
)
@settings(max_examples=60)
def test_grouping_by_length_keeps_every_sample_once_on_any_number_of_ranks(
    lengths: list[int], batch: int, ranks: int, seed: int, data: st.DataObject
) -> None:
    def grouped(rank: int, ranks: int, grouping: str = "length") -> Loader:
        records: Any = Lengths(lengths)
        return Loader(
            records,
            Plain(),
            batch,
            1,
            rank,
            ranks,
            pad_id=0,
            seed=seed,
            grouping=grouping,  # type: ignore[arg-type]
        )

    steps = len(lengths) // batch
    first = data.draw(st.integers(0, steps))
    one = [[n for micro in step for n in micro] for step in drawn(grouped(0, 1), 0, steps)]
    streams = [drawn(grouped(rank, ranks), first, steps) for rank in range(ranks)]
    both = [[n for stream in streams for micro in stream[s] for n in micro] for s in range(steps - first)]
    assert both == one[first:]
    seen = [n for step in one for n in step]
    assert len(set(seen)) == len(seen) == steps * batch
    window = batch * WINDOW
    for start in range(0, len(seen), window):
        in_window = range(start, min(start + window, len(lengths)))
        assert set(seen[start : start + window]) <= set(in_window), "no sample leaves its window"
    plain = [[n for micro in step for n in micro] for step in drawn(grouped(0, 1, "off"), 0, steps)]

    def padding(order: list[list[int]]) -> int:
        return sum(max(lengths[n] for n in step) * batch for step in order)

    if len(lengths) % batch == 0:  # otherwise the two orders may drop different samples
        assert padding(one) <= padding(plain)


class Mixed(Lengths):
    """Replaces Records of which every third sample has an image."""

    def images(self, index: int) -> int:
        return int(index % 3 == 0)


def grouped_steps(
    records: Any, batch: int, first: int, last: int, seed: int = 0, grouping: Any = "length"
) -> list[list[int]]:
    stream = Loader(records, Plain(), batch, batch, 0, 1, 0, seed, grouping=grouping)  # type: ignore[arg-type]
    return [[n for micro in step for n in micro] for step in drawn(stream, first, last)]


@given(st.integers(1, 70), st.sampled_from([2, 4]), st.integers(0, 5), st.sampled_from(["length", "modality"]))
@settings(max_examples=40)
def test_grouped_epochs_hold_every_sample_once(samples: int, batch: int, seed: int, grouping: str) -> None:
    steps = -(-3 * samples // batch)
    records = Mixed([n * 37 % 50 + 1 for n in range(samples)])
    flat = [n for step in grouped_steps(records, batch, 0, steps, seed, grouping) for n in step]
    for epoch in range(3):
        assert sorted(flat[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_groups_match_steps_in_later_epochs() -> None:
    """With 1,040 samples in steps of 32, the second epoch begins in the middle of a step."""
    lengths = [n * 37 % 500 + 1 for n in range(1040)]

    def used(first: int, last: int) -> float:
        steps = grouped_steps(Lengths(lengths), 32, first, last)
        return sum(lengths[n] for step in steps for n in step) / sum(32 * max(lengths[n] for n in s) for s in steps)

    assert used(0, 32) > 0.86 and used(33, 64) > 0.86


def test_images_and_plain_text_share_no_batch() -> None:
    """Only one batch in a window of eight may hold both kinds, whereas grouping by length mixes them."""

    def mixed(grouping: str) -> list[int]:
        steps = grouped_steps(Mixed([n * 37 % 50 + 1 for n in range(512)]), 8, 0, 64, grouping=grouping)
        return [len({n % 3 == 0 for n in step}) - 1 for step in steps]

    assert all(sum(mixed("modality")[start : start + WINDOW]) <= 1 for start in range(0, 64, WINDOW))
    assert sum(mixed("length")) > 32


def test_grouping_counts_the_tiles_of_large_images(tmp_path: Path) -> None:
    sizes = {"flat": (128, 32), "small": (32, 32)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    talk = [("q?", "a.")]
    names = ["flat", "small"] * 8
    records = [tiny.record(f"{n}-{name}", talk, f"{name}.png") for n, name in enumerate(names)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    processor = ImageProcessor(tiny.IMAGE_SIZE, [0.5] * 3, [0.5] * 3, grid=((1, 2),))
    stream = Loader(
        Records([SourceConfig(path=str(tmp_path / "data.json"))]),
        encoder(processor=processor),
        4,
        4,
        0,
        1,
        pad_id=0,
        seed=0,
        grouping="length",
    )
    for (batch,) in stream.steps(0, 4):
        assert len({name.split("-")[1] for name in batch.ids}) == 1
        assert batch.attention_mask.all()


def layout_check(layouts: list[int]) -> str:
    """Compares the batches of all ranks, where rank r has layout `layouts[r]`; returns the error or "agreed"."""
    from zero_ds.runtime import distributed
    from zero_ds.training.metrics import StepCounts

    distributed.initialize()
    try:
        StepCounts(layout=layouts[distributed.rank()]).over_ranks().check_layout(7)
    except DataError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(
    ("layouts", "agree"), [([4, 4], True), ([65535, 65535], True), ([4, 5], False), ([0, 1], False)]
)
def test_ranks_that_disagree_on_batches_stop_before_the_step(layouts: list[int], agree: bool) -> None:
    outcomes = run_ranks(layout_check, 2, layouts)
    if agree:
        assert outcomes == ["agreed", "agreed"]
    else:
        assert all("planned step 7 differently" in outcome for outcome in outcomes)


@pytest.mark.parametrize("options", [{"packing": True}, {"grouping": "length"}, {}])
def test_a_rank_that_reads_other_data_has_another_layout(data: Path, options: dict[str, Any]) -> None:
    def layouts(rank: int, broken: bool) -> list[int]:
        """Returns the layout of every batch; with `broken`, the rank sees other lengths and cannot read sample 2."""
        records: Any = Records([SourceConfig(path=str(data))])
        if broken:
            records.size = lambda index: 4 * (9000 - index)
            read = records.__class__.__getitem__

            class UnreadableSample(records.__class__):  # type: ignore[misc]
                def __getitem__(self, index: int) -> Sample:
                    if index == 2:
                        raise DataError("sample 2: cannot be read now")
                    return read(self, index)  # type: ignore[no-any-return]

            records.__class__ = UnreadableSample
        stream = Loader(records, encoder(), 8, 1, rank, 2, pad_id=0, seed=0, skip_bad=True, **options)
        return [batch.layout for step in stream.steps(0, 1) for batch in step]

    assert len({*layouts(0, False), *layouts(1, False)}) == 1
    if options:
        assert layouts(0, False)[0] != layouts(1, True)[0]


def test_workers_yield_the_same_batches(data: Path) -> None:
    streams = []
    for workers in (0, 2):
        stream = Loader(
            Records([SourceConfig(path=str(data))]), encoder(), 4, 2, 0, 1, pad_id=0, seed=0, workers=workers
        )
        streams.append([batch for step in stream.steps(0, 3) for batch in step])
    for left, right in zip(*streams, strict=True):
        left, right = vars(left), vars(right)
        assert left.keys() == right.keys() and left["pixel_values"].dtype == torch.float32
        for key, value in left.items():
            same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
            assert same and type(value) is type(right[key]), key


def test_a_signal_to_all_processes_of_a_job_does_not_end_the_workers(data: Path) -> None:
    records = Records([SourceConfig(path=str(data))])
    others = psutil.Process().children()
    steps = Loader(records, encoder(), 4, 2, 0, 1, pad_id=0, seed=0, workers=2).steps(0, 12)
    for _ in range(2):  # both workers have begun
        next(steps)
    workers = [process for process in psutil.Process().children() if process not in others]
    assert len(workers) == 2
    for process in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            process.send_signal(number)
    assert len(list(steps)) == 10
    psutil.wait_procs(workers, timeout=scaled(20))
    assert not any(process.is_running() for process in workers), "workers end with the loader of their rank"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_ends_the_run_with_its_name(tmp_path: Path, workers: int) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    samples = [tiny.record("fine", [("q?", "a.")]), tiny.record("bad", [("q?", "a.")], "broken.png")]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    others = psutil.Process().children()
    stream = Loader(
        Records([SourceConfig(path=str(tmp_path / "data.json"))]),
        encoder(),
        1,
        1,
        0,
        1,
        pad_id=0,
        seed=0,
        workers=workers,
    )
    with pytest.raises(DataError) as caught:
        list(stream.steps(0, 2))
    assert "sample bad" in str(caught.value) and "broken.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert psutil.Process().children() == others, "the workers have ended, although the error still exists"


def test_a_skipped_sample_does_not_keep_its_step_in_memory(tmp_path: Path) -> None:
    """The traceback of its error once held the step in a reference cycle, and workers' memory grew by whole steps."""
    samples = [tiny.record("fine", [("q?", "a.")]), tiny.record("long", [("q? " * 300, "a.")])]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    records = Records([SourceConfig(path=str(tmp_path / "data.json"))])
    for packing in (False, True):
        stream = Loader(records, encoder(max_length=100), 2, 2, 0, 1, pad_id=0, seed=0, packing=packing)
        gc.collect()
        gc.disable()
        try:
            ((batch,),) = stream.steps(0, 1)
            assert len(batch.too_long) == 1
            tensor = weakref.ref(batch.input_ids)
            del batch
            assert tensor() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_samples_leave_their_places_empty(tmp_path: Path, workers: int) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    talk = [("q?", "a.")]
    samples = [tiny.record("fine", talk), tiny.record("bad", talk, "broken.png")]
    samples += [tiny.record("long", [("q? " * 300, "a.")]), tiny.record("sly", talk, "../x.png")]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    records = Records([SourceConfig(path=str(tmp_path / "data.json"))])
    stream = Loader(records, encoder(max_length=100), 4, 2, 0, 1, pad_id=0, seed=0, workers=workers, skip_bad=True)
    (first, second), *_ = stream.steps(0, 1)
    assert first.ids == ["fine"] and (len(first.skipped), len(first.too_long)) == (1, 0)
    assert "sample bad" in first.skipped[0] and "sample sly" in second.skipped[0]
    assert "sample long has no answer within 100 tokens" in second.too_long[0]
    assert second.input_ids.shape == (1, 1) and second.attention_mask.all()
    assert (second.labels == IGNORE).all() and not second.pixel_values.any()


def test_a_sample_that_is_too_long_does_not_end_the_run(tmp_path: Path) -> None:
    samples = [tiny.record("fine", [("q?", "a.")]), tiny.record("long", [("q? " * 300, "a.")])]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    records = Records([SourceConfig(path=str(tmp_path / "data.json"))])
    ((batch,),) = Loader(records, encoder(max_length=100), 2, 2, 0, 1, pad_id=0, seed=0).steps(0, 1)
    assert batch.ids == ["fine"] and len(batch.too_long) == 1


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "fitting"),
    [
        (8, 2, 2, 2),
        (6, 3, 1, 3),
        (4, 1, 4, 1),
        (8, 4, 4, 2),
        (8, 4, 8, 1),
        (24, 16, 2, 12),
        (10, 4, 1, 2),
        (7, 3, 1, 1),
    ],
)
def test_the_micro_batch_follows_the_ranks(batch: int, micro: int, ranks: int, fitting: int) -> None:
    config = RunConfig(stage="encoder", target="t", out="o", global_batch=batch, micro_batch=micro)
    assert fit_to_ranks(config, ranks) == config.model_copy(update={"micro_batch": fitting})
    with pytest.raises(
        ConfigError, match=rf"--ranks {batch}, or --include.*global_batch to a multiple of {batch + 1}\."
    ):
        fit_to_ranks(config, batch + 1)


# -- one sample --------------------------------------------------------------------------------------------------------


def test_a_sample_becomes_ids_labels_and_pixels(data: Path) -> None:
    sample = next(s for s in Records([SourceConfig(path=str(data))]) if s.images)
    encoded = encoder()(sample)
    assert encoded.id == sample.id
    assert len(encoded.pixels) == 1 and encoded.pixels[0].shape == (3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert encoded.input_ids.count(IMAGE_TOKEN) == tiny.TOKENS_PER_IMAGE
    words = TEMPLATE.tokenizer.decode([t for t in encoded.input_ids if t != IMAGE_TOKEN])
    assert "Based on the visual elements captured in this image of, " in words


@pytest.mark.parametrize(("prompt", "expected"), [(None, tiny.SYSTEM), ("Be kind.", "Be kind."), ("", "")])
def test_system_prompt(prompt: str | None, expected: str) -> None:
    turns = (Turn("user", "q?"), Turn("assistant", "a."))
    encode = encoder(system_prompt=prompt)
    shown = TEMPLATE.tokenizer.decode(encode(Sample("x", turns, ())).input_ids)
    assert shown.startswith(f"<|im_start|>system\n{expected}<|im_end|>")
    own = encode(Sample("x", (Turn("system", "Mine."), *turns), ())).input_ids
    assert TEMPLATE.tokenizer.decode(own).startswith("<|im_start|>system\nMine.<|im_end|>")


def test_an_image_that_was_cut_off_with_its_turn_is_not_encoded(data: Path) -> None:
    image = str(data.parent / "images" / "0.png")
    turns = (
        Turn("user", "q?"),
        Turn("assistant", "a."),
        Turn("user", "<image>" + "more " * 50),
        Turn("assistant", "b."),
    )
    encoded = encoder(max_length=60, image_prompt="off")(Sample("x", turns, (image,)))
    assert not len(encoded.pixels) and IMAGE_TOKEN not in encoded.input_ids


def test_a_sample_without_room_for_its_answer_is_an_error() -> None:
    sample = Sample("long", (Turn("user", "q? " * 100), Turn("assistant", "a.")), ())
    with pytest.raises(DataError, match=r"sample long has no answer within 50 tokens; raise data\.max_length"):
        encoder(max_length=50)(sample)


def test_an_image_in_a_stage_without_encoder_is_an_error(data: Path) -> None:
    sample = next(s for s in Records([SourceConfig(path=str(data))]) if s.images)
    with pytest.raises(DataError, match="has an image, but this stage has no vision encoder"):
        encoder(processor=None, tokens_per_image=0)(sample)


# -- one batch ---------------------------------------------------------------------------------------------------------


def test_collate_pads_on_the_right(data: Path) -> None:
    samples = [encoder()(sample) for sample in list(Records([SourceConfig(path=str(data))]))[:4]]
    assert len({len(s.input_ids) for s in samples}) > 1
    batch = collate(samples, pad_id=7, image_size=tiny.IMAGE_SIZE)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        assert batch.input_ids[row, :n].tolist() == sample.input_ids
        assert batch.labels[row, :n].tolist() == sample.labels
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        assert (batch.responses[row, n:] == -1).all()
        assert (batch.input_ids[row, n:] == 7).all() and (batch.labels[row, n:] == IGNORE).all()
    images = [image for sample in samples for image in sample.pixels]
    assert torch.equal(batch.pixel_values, torch.stack(images))
    assert int(image_positions(batch.input_ids).sum()) == len(images) * tiny.TOKENS_PER_IMAGE
    assert batch.ids == [s.id for s in samples]
    answers = [max(sample.responses) + 1 for sample in samples]
    assert max(answers) > 1, "one sample has several answers"
    numbers = batch.responses[batch.responses >= 0].unique()
    assert numbers.tolist() == list(range(sum(answers))), "answers are numbered consecutively over the batch"


def test_a_batch_of_text_alone_brings_one_blank_image() -> None:
    text = [Plain()(5)]
    assert torch.equal(
        collate(text, 0, tiny.IMAGE_SIZE).pixel_values, torch.zeros(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    )
    assert collate(text, 0, None).pixel_values is None


def test_a_batch_is_pinned_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's DataLoader passes lists of batches to `pin_memory`, which skips objects without a method of that name."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    batch = collate([Plain()(5)], 0, tiny.IMAGE_SIZE, skipped=["bad"])
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    (found,) = pin_memory([batch])
    assert found.ids == ["5"] and found.skipped == ("bad",)
    assert {id(tensor) for tensor in found.tensors().values()} == {id(tensor) for tensor in pinned}
    assert found.tensors().keys() == batch.tensors().keys()


# -- images without the image processor --------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_raw_images(data: Path, packing: bool, workers: int) -> None:
    """The loader gives images as they are in their files, with the tokens and labels of processed ones."""
    records = Records([SourceConfig(path=str(data))])
    options: dict[str, Any] = {"pad_id": 0, "seed": 0, "workers": workers, "packing": packing}
    plain, raw = (
        Loader(records, encoder(max_length=512), 4, 2, 0, 1, raw_images=raw, **options) for raw in (False, True)
    )
    seen = []
    for expected, found in zip(plain.steps(0, 2), raw.steps(0, 2), strict=True):
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
            assert other.pixel_values is None and one.images == ()
            assert int(image_positions(other.input_ids).sum()) == tiny.TOKENS_PER_IMAGE * len(other.images)
            seen += [image.tobytes() for image in other.images]
    files = [Image.open(path).convert("RGB") for path in sorted((data.parent / "images").glob("*.png"))]
    assert sorted(seen) == sorted(image.tobytes() for image in files)


def test_a_raw_image_that_cannot_be_read(data: Path, tmp_path: Path) -> None:
    record = {**json.loads(data.read_text())[0], "image": "gone.png"}
    (tmp_path / "data.json").write_text(json.dumps([{**record, "id": "a"}]))
    records = Records([SourceConfig(path=str(tmp_path / "data.json"))])
    broken = Loader(records, encoder(), 1, 1, 0, 1, pad_id=0, seed=0, raw_images=True)
    with pytest.raises(DataError, match=r"sample .*a.*gone\.png"):
        next(iter(broken.steps(0, 1)))
