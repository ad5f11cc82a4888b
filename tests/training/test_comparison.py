"""A checkpoint that differs from the live model is not published: saves with faults of one element each."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks, train_all
from places import GATHERED, ROOT
from safetensors.torch import load_file

from zero_ds.config.schema import RunConfig
from zero_ds.training.checkpoint import KEYS
from zero_ds.training.checkpoint.comparison import STRIDE, Comparison, _bits
from zero_ds.training.checkpoint.exchange import Cut, Piece


def engine_after_a_step(config: RunConfig) -> Any:
    from zero_ds.runtime import distributed
    from zero_ds.training import stages
    from zero_ds.training.deepspeed import ds_config
    from zero_ds.training.engine import Engine
    from zero_ds.training.setup import load_model, make_loader, seed_everything

    seed_everything(config.seed)
    ds = ds_config(config, distributed.world_size())
    model = load_model(config, ds)
    loader = make_loader(config, model)
    groups = stages.freeze_(model, config)
    model.train()
    engine = Engine(config, model, groups, 2, ds)
    engine.step(next(iter(loader.steps(0, 1))), 0, 10.0)
    return engine


# -- faults ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def altered_on_the_way(rank: int, number: int) -> Iterator[None]:
    """Changes one element that a rank sends in round `number`, or that rank 0 gets if it sends none."""
    from zero_ds.runtime import distributed

    exchange, calls = distributed.exchange, iter(range(10**6))

    def altered(sent: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
        if next(calls) != number:
            return exchange(sent, counts)
        full = [index for index, tensor in enumerate(sent) if len(tensor)]
        (sends,) = distributed.sum_integers([int(bool(full) and distributed.rank() == rank)])
        if sends and distributed.rank() == rank:
            sent = [changed(tensor) if index == full[0] else tensor for index, tensor in enumerate(sent)]
        got = exchange(sent, counts)
        return changed(got) if not sends and distributed.is_rank_zero() else got

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[len(tensor) // 2] += 1
        return tensor

    distributed.exchange = altered
    try:
        yield
    finally:
        distributed.exchange = exchange


@contextlib.contextmanager
def altered_in_memory(rank: int, tensor: torch.Tensor) -> Iterator[None]:
    """Changes the last bit of one element of a tensor of the model or the optimizer on one rank."""
    from zero_ds.runtime import distributed

    kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    bits = tensor.detach().flatten().view(kind)
    if distributed.rank() != rank or not len(bits):
        yield
        return
    bits[len(bits) // 2] += 1
    yield
    bits[len(bits) // 2] -= 1


@contextlib.contextmanager
def moved_on_the_way(number: int) -> Iterator[None]:
    """Moves all elements that rank 0 gets in round `number` by one, as a wrong order of the ranks' parts would."""
    from zero_ds.runtime import distributed

    exchange, calls = distributed.exchange, iter(range(10**6))

    def moved(sent: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
        got = exchange(sent, counts)
        return got.roll(1) if next(calls) == number and distributed.is_rank_zero() else got

    distributed.exchange = moved
    try:
        yield
    finally:
        distributed.exchange = exchange


def saves(configs: list[RunConfig]) -> list[dict[str, str]]:
    """For each configuration: fault -> the end of a save with that fault, and of one after it without."""
    from zero_ds.runtime import distributed

    distributed.initialize()
    return [saves_of(config) for config in configs]


def saves_of(config: RunConfig) -> dict[str, str]:
    from zero_ds.runtime import distributed
    from zero_ds.runtime.zero3 import held_part
    from zero_ds.training.checkpoint.save import save_checkpoint

    engine = engine_after_a_step(config)
    names = list(engine.named)
    chosen = names[len(names) // 2]
    first = names.index(chosen) * len(KEYS)
    parameter = engine.named[chosen]
    faults: dict[str, Any] = {}
    for rank in (0, 1):
        for number, key in enumerate(KEYS):
            faults[f"{key} from rank {rank}"] = altered_on_the_way(rank, first + number)
        faults[f"weights of rank {rank}"] = altered_in_memory(rank, held_part(parameter))
    faults |= {f"{key} in another order": moved_on_the_way(first + number) for number, key in enumerate(KEYS)}
    run, steps = Path(config.out), iter(range(1, 100))
    ends = {"chosen": chosen, "none": end_of(lambda: save_checkpoint(run, engine, {}, {"step": next(steps)}, 1))}
    for fault, context in faults.items():
        step = next(steps)
        with context:
            ends[fault] = end_of(lambda step=step: save_checkpoint(run, engine, {}, {"step": step}, 1))
        ends[f"after {fault}"] = end_of(lambda: save_checkpoint(run, engine, {}, {"step": next(steps)}, 1))
        if distributed.is_rank_zero():
            ends[f"left by {fault}"] = " ".join(sorted(path.name for path in run.iterdir() if "step" in path.name))
    ends["taken"] = end_of(lambda: save_after_a_takeover(engine, run, next(steps)))
    return ends


def save_after_a_takeover(engine: Any, run: Path, step: int) -> Path:
    from zero_ds.runtime import distributed, failure, lock
    from zero_ds.training.checkpoint.save import save_checkpoint

    failure.WATCH.folder = run
    if distributed.is_rank_zero():
        lock.FolderLock(run).take()
        (run / lock.FILE).write_text(json.dumps({"id": "another", "host": "elsewhere", "pid": 7}))
    try:
        return save_checkpoint(run, engine, {}, {"step": step}, 1)
    finally:
        assert failure.WATCH.folder is None and not (run / failure.FILE).exists()


def end_of(action: Callable[[], Path]) -> str:
    try:
        return action().name
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def test_a_single_altered_element_is_never_published(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    cases = [("zero0", "bf16"), ("zero2", "bf16"), ("zero2", "fp32"), (GATHERED, "bf16")]
    configs = [
        run_config("pretrain", tmp_path / str(number), zero=zero, precision=precision)
        for number, (zero, precision) in enumerate(cases)
    ]
    for config in configs:
        Path(config.out).mkdir()
    ranks = run_ranks(saves, 2, configs)
    assert all("is in use by process 7 on elsewhere" in ends["taken"] for ends in ranks[0])
    said = [[{k: v for k, v in e.items() if not k.startswith(("left", "taken"))} for e in rank] for rank in ranks]
    assert said[0] == said[1], "every rank says the same"
    for case, ends in zip(cases, ranks[0], strict=True):
        chosen, taken = ends.pop("chosen"), ends.pop("taken")
        assert taken.startswith("CheckpointError: step ") and "could not be saved" in taken
        assert ends.pop("none") == "step-000001"
        published = 1
        for fault in [name for name in ends if not name.startswith(("after", "left"))]:
            end = ends[fault]
            assert end.startswith("UnlikeLiveError: step ") and "is not saved: " in end, (case, fault, end)
            assert chosen in end and "earlier checkpoints are intact" in end, (case, fault, end)
            published += 2
            assert ends[f"after {fault}"] == f"step-{published:06d}"
            assert ends[f"left by {fault}"] == f"step-{published:06d}", "nothing half-written"


class Held:
    """A state of which one rank holds everything."""

    def __init__(self, size: int) -> None:
        self.tensors = {key: torch.randn(size) for key in KEYS}

    def span(self, parameter: torch.Tensor) -> tuple[int, int]:
        return 0, parameter.numel()

    def held(self, parameter: torch.Tensor, key: str) -> torch.Tensor:
        return self.tensors[key]

    def equals_live(self, parameter: torch.Tensor) -> bool:
        return True


@pytest.mark.parametrize("key", KEYS)
def test_elements_in_another_order_are_another_tensor(key: str) -> None:
    """Parts in the wrong order, as a wrong map from parameters to shards gathers them, have the right sum."""
    torch.manual_seed(0)
    parameter, state = torch.nn.Parameter(torch.zeros(40, 5)), Held(200)

    def verdict(pieces: Callable[[torch.Tensor], list[torch.Tensor]]) -> str | None:
        comparison = Comparison(state)  # type: ignore[arg-type]
        comparison.add("a.weight", parameter)
        for name in KEYS:
            start = 0
            for values in pieces(state.tensors[name]) if name == key else [state.tensors[name]]:
                comparison.add_piece(Piece(Cut("a.weight", name, start, start + len(values)), values))
                start += len(values)
        return comparison.verdict()

    changed = f"a.weight ({key}) was changed on its way to the rank that writes it"
    assert verdict(lambda whole: list(whole.split(60))) is None
    assert verdict(lambda whole: [whole[100:], whole[:100]]) == changed
    assert verdict(lambda whole: [whole.roll(1)]) == changed
    assert verdict(lambda whole: [whole.flip(0)]) == changed
    swapped = state.tensors[key].clone()
    swapped[[3, 150]] = swapped[[150, 3]]
    assert verdict(lambda whole: [swapped]) == changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_parts_add_up_to_that_of_the_whole(dtype: torch.dtype) -> None:
    whole, width = torch.randn(3 * STRIDE + 5).to(dtype), STRIDE // 2 + 1
    parts = [_bits(part, number * width) for number, part in enumerate(whole.split(width))]
    assert int(sum(parts)) == int(_bits(whole))
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    bits = whole.view(kind).tolist()
    assert int(_bits(whole)) == (sum(bit * place for place, bit in enumerate(bits, 1)) + 2**63) % 2**64 - 2**63


# -- a setting that DeepSpeed maps wrongly -----------------------------------------------------------------------------


def train_and_resume(configs: list[RunConfig]) -> list[str]:
    """Trains each run, sets its copy back to the middle, and trains that one to the end."""
    from zero_ds.runtime import distributed

    ends = train_all(configs)
    again = []
    for config in configs:
        run = Path(config.out)
        copy = run.with_name(f"{run.name} again")
        if distributed.is_rank_zero():
            shutil.copytree(run, copy)
            shutil.rmtree(copy / "step-000004")
            (copy / "latest").write_text("step-000002\n")
        distributed.barrier()
        again.append(config.model_copy(update={"out": str(copy)}))
    return ends + train_all(again)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow(reason="three ranks always run")), 3])
def test_round_robin_gradients_are_saved_as_they_were_trained(
    run_config: Callable[..., RunConfig], tmp_path: Path, ranks: int
) -> None:
    """LLaMA-Factory's ZeRO-2 file and the Trainer's documentation set them."""
    options = {"global_batch": 6, "max_steps": 4, "checkpoint": {"every_steps": 2, "keep": 9}}
    configs = {}
    for stage in ("zero1", "zero2", "zero2_offload"):
        ds = json.loads((ROOT / "ds_configs" / f"{stage}.json").read_text())
        ds["zero_optimization"]["round_robin_gradients"] = True
        path = tmp_path / f"{stage}.json"
        path.write_text(json.dumps(ds))
        configs[stage] = run_config("decoder", tmp_path / stage, zero=str(path), **options)
    configs["usual"] = run_config("decoder", tmp_path / "usual", zero="zero2", **options)
    ends = run_ranks(train_and_resume, ranks, list(configs.values()))
    assert ends == [["step-000004"] * 8] * ranks
    usual = load_file(tmp_path / "usual" / "step-000004" / "weights.safetensors")
    for stage in configs:
        for name in ("weights.safetensors", "resume/state.safetensors"):
            first, again = (tmp_path / f"{stage}{word}" / "step-000004" / name for word in ("", " again"))
            assert first.read_bytes() == again.read_bytes(), f"{stage}: resumed to the byte"
        ours = load_file(tmp_path / stage / "step-000004" / "weights.safetensors")
        assert list(ours) == list(usual)
        for name in [name for name in usual if not name.endswith("k_proj.bias")]:  # without effect: Adam adds up noise
            torch.testing.assert_close(ours[name], usual[name], rtol=1e-4, atol=1e-5, msg=f"{stage}: {name}")
