"""Measures how saving scales with the ranks that write: seconds, and growth of host memory.

    python tools/bench/save_scaling.py --ranks 1 --ranks 2 --ranks 4 --out save-scaling.json

The state is that of ZeRO-2: every rank has all bf16 weights and its part of the master copies and moments. It is made
of random numbers, without a model, so that saving is measured and nothing else: moving tensors to the ranks that write
them, comparing them, hashing, writing, syncing. `training waits` is the time until training could go on; `complete`
that until the checkpoint is published. Growth is the largest increase of the ranks' resident memory, summed over ranks.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import report
import torch
import typer
from turns import Group, Turn

from zero_ds.runtime import distributed
from zero_ds.training.checkpoint import KEYS
from zero_ds.training.checkpoint.save import begin_saving
from zero_ds.training.checkpoint.shares import agree_on_shares

WAYS = {"rank 0 alone": (1, False), "all ranks": (99, False), "all ranks, beside": (99, True)}
"""Largest number of writers, and whether they write beside training."""


class State:
    """Master copies and moments, of which a rank holds a part of every parameter."""

    def __init__(self, named: dict[str, torch.nn.Parameter]) -> None:
        self._parts = {
            parameter: {key: self._part(parameter) + number for number, key in enumerate(KEYS)}
            for parameter in named.values()
        }

    def span(self, parameter: torch.nn.Parameter) -> tuple[int, int]:
        size, world = parameter.numel(), distributed.world_size()
        start, stop = (size * number // world for number in (distributed.rank(), distributed.rank() + 1))
        return start, stop - start

    def _part(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        start, count = self.span(parameter)
        return parameter.detach().flatten()[start : start + count].float()

    def held(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        return self._parts[parameter][key]

    def equals_live(self, parameter: torch.nn.Parameter) -> bool:
        return torch.equal(self._parts[parameter]["master"].bfloat16().float(), self._part(parameter))

    def steps(self) -> dict[str, int]:
        return {}

    def loss_scale(self) -> dict[str, float]:
        return {}


def saves(turn: Turn, parameters: int, tensors: int, out: str) -> None:
    """Saves in each way in turn, without end."""
    distributed.initialize()
    torch.manual_seed(0)
    shape = (parameters // tensors // 1024, 1024)
    named = {f"layer.{number}.weight": torch.nn.Parameter(torch.randn(shape).bfloat16()) for number in range(tensors)}
    engine: Any = SimpleNamespace(named=named, state=State(named))
    run = Path(out)
    while True:
        for writers, asynchronous in WAYS.values():
            shares = agree_on_shares(run, named, writers)
            turn.step()
            before = report.resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak, VmHWM
            began = time.perf_counter()
            saving = begin_saving(run, engine, {}, {"step": 1}, shares, asynchronous=asynchronous)
            if not asynchronous:
                saving.publish(keep=1)
            waited = time.perf_counter() - began
            if asynchronous:
                while distributed.max_over_ranks(saving.is_writing)[0]:
                    time.sleep(0.02)
                saving.publish(keep=1)
            turn.count(growth=max(0.0, report.resident() - before))
            if distributed.is_rank_zero():
                turn.count(waited=waited)
                shutil.rmtree(run / "step-000001")
            distributed.barrier()


def main(
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of ranks.")] = None,
    parameters: Annotated[int, typer.Option(help="Number of trained parameters, 14 bytes each.")] = 64 << 20,
    tensors: Annotated[int, typer.Option(help="Number of tensors.")] = 32,
    rounds: int = 3,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder on the disk to write to, made if it is missing (default: a temporary one)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure saves with several numbers of ranks."""
    rows: list[dict[str, Any]] = []
    for count in ranks or [1, 2, 4]:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            (Path(name) / "run").mkdir()
            arguments: dict[str, Any] = {"parameters": parameters, "tensors": tensors, "out": f"{name}/run"}
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            with Group(f"{count} ranks", saves, count, Path(name), **arguments) as group:
                for _ in range(rounds):
                    for way in WAYS:
                        before = dict(group.found[-1]["counted"]) if group.found else {}
                        done = group.turn(1)
                        of_turn = {key: number - before.get(key, 0.0) for key, number in done["counted"].items()}
                        found[way].append({"complete": done["seconds"], **of_turn})
        for way, turns in found.items():
            columns = {key: [of_turn[key] for of_turn in turns] for key in ("waited", "complete", "growth")}
            rows.append({"ranks": count, "way": way, **columns})
    gigabytes = 14 * parameters / 1e9
    cells = [
        [
            str(row["ranks"]),
            row["way"],
            report.spread(row["waited"]),
            report.spread(row["complete"]),
            report.median(row["growth"]) * 1024,
            gigabytes / report.median(row["complete"]),
        ]
        for row in rows
    ]
    header = ["ranks", f"{gigabytes:.2f} GB by", "training waits, s", "complete, s", "growth, MiB", "GB/s"]
    print(report.table(header, cells))
    report.write(out, {"parameters": parameters, "tensors": tensors, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
