"""A run that runs out of memory under `activation_checkpointing: auto` goes on with more recomputation, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks

from zero_ds.config.schema import RunConfig
from zero_ds.training.monitor import read_metrics
from zero_ds.training.options.fallback import FILE, NoMemoryError, is_out_of_memory, more_recomputation_if_out_of_memory


def attempts(configs: list[RunConfig]) -> list[tuple[str, int]]:
    """Trains where memory suffices after step 2 only with all layers recomputed; returns each end and their number."""
    from zero_ds.training import train as module
    from zero_ds.training.engine import Engine
    from zero_ds.training.options.recompute import recomputed_layers

    step, counts = Engine.step, []

    def limited(self: Engine, batches: Any, number: int, *rest: Any) -> Any:
        count, depth = recomputed_layers(self.model)
        counts.append(count)
        if number >= 2 and count < depth:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, batches, number, *rest)

    ends = []
    for config in configs:
        Engine.step = limited if config.out.endswith("limited") else step  # type: ignore[method-assign]
        try:
            ends.append((module.train(config).name, counts[-1] if counts else 0))
        except NoMemoryError as error:
            assert error.may_pass
            ends.append((str(error), counts[-1]))
    return ends


def test_the_next_attempt_recomputes_all_and_goes_on(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"activation_checkpointing": "auto", "max_steps": 4, "checkpoint": {"every_steps": 2}}
    config, plain = (run_config("pretrain", tmp_path / name, **settings) for name in ("limited", "plain"))
    [[first, second, _]] = run_ranks(attempts, 1, [config, config, plain])
    said = (
        "memory ran out with 0 of 4 decoder layers recomputed; the next attempt, from the last checkpoint, recomputes"
    )
    assert first == (f"{said} all of them.", 0) and (tmp_path / "limited" / FILE).is_file()
    assert second == ("step-000004", 4)
    losses = [[step["loss"] for step in read_metrics(tmp_path / name)] for name in ("limited", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4


@pytest.mark.parametrize(
    ("setting", "recomputed", "remedy"),
    [
        ("auto", 4, "set a smaller micro_batch .it is 1. or another zero="),
        (False, 0, "set activation_checkpointing=auto, a smaller micro_batch"),
        (True, 4, "set a smaller micro_batch"),
    ],
)
def test_where_no_more_can_be_recomputed_the_remedy_is_named(
    run_config: Callable[..., RunConfig], tmp_path: Path, setting: Any, recomputed: int, remedy: str
) -> None:
    config = run_config("pretrain", tmp_path, activation_checkpointing=setting)
    with (
        pytest.raises(NoMemoryError, match=remedy) as caught,
        more_recomputation_if_out_of_memory(config, 1, recomputed, 4),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert not caught.value.may_pass and not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("HIP"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("unable to mmap 1024 bytes from file <memory>: Cannot allocate memory (12)"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
    ],
)
def test_errors_that_mean_no_memory(run_config: Callable[..., RunConfig], error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    kind = NoMemoryError if expected else type(error)
    with (
        pytest.raises(kind),
        more_recomputation_if_out_of_memory(run_config("pretrain", activation_checkpointing=True), 1, 0, 4),
    ):
        raise error


def bits(configs: list[RunConfig]) -> list[list[float]]:
    from zero_ds.training.train import train

    losses = []
    for config in configs:
        train(config)
        losses.append([step["loss"] for step in read_metrics(Path(config.out))])
    assert torch.are_deterministic_algorithms_enabled()
    return losses


def test_a_deterministic_run_trains_and_repeats(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Every operation of a run has a deterministic algorithm, at least on the CPU."""
    runs = [run_config("decoder", tmp_path / str(n), deterministic=True, max_steps=2, zero="zero3") for n in range(2)]
    [losses] = run_ranks(bits, 1, runs)
    assert losses[0] == losses[1] and len(losses[0]) == 2
