"""Runs the parts of gpu.sh one after another, each in a process of its own, and prints one table.

Loads no torch, so that all of the GPU's memory belongs to the part that runs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import report
import typer

MARKS = {True: "ok", False: "FAILED", None: "-"}


@dataclass(frozen=True)
class Budget:
    """Seconds of a part."""

    least: float
    """Seconds without which it is not started."""
    most: float
    """Seconds after which it is ended."""


BUDGETS = {
    "nccl": Budget(10, 40),
    "configs": Budget(40, 150),
    "kernels": Budget(30, 110),
    "memory": Budget(30, 70),
    "encoder-8b": Budget(35, 75),
    "peer-encoder-8b": Budget(35, 75),
    "encoder-70b": Budget(50, 110),
    "peer-encoder-70b": Budget(15, 30),
}
"""Parts that run by default, in this order. The most of all of them together is about the whole time, because most
parts end early."""
OTHER = Budget(35, 110)
"""Seconds of a part that is asked for by name."""
NAME = re.compile(r"(peer-)?(encoder|pretrain|decoder)-(3b|8b|70b)")
"""Names of parts that are not in `BUDGETS`."""
GRACE = 8.0
"""Seconds between the time at which a part begins nothing else and its end by force."""


def run_part(command: Sequence[str], rows: Path, log: Path, seconds: float) -> list[dict[str, Any]]:
    """Runs a part in a process group of its own, and ends it after `seconds`; returns the rows that it has written."""
    rows.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    found = _read(rows)
    failed = any(row["ok"] is False for row in found)
    if status is None:
        found.append(_row("time", f"ended after {seconds:.0f} s", False))
    elif status and not failed:
        found.append(_row("process", f"ended with status {status}; see {log}", False))
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the processes of a part that still run."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM:
            time.sleep(0.1)
    process.wait()


def _read(rows: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a file, or nothing if there is none."""
    if not rows.is_file():
        return []
    lines = rows.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _row(check: str, answer: str, ok: bool | None) -> dict[str, Any]:
    return {"check": check, "answer": answer, "ok": ok, "figures": {}}


def run_parts(
    parts: Sequence[str],
    out: Path,
    minutes: float,
    command: Callable[[str, Path, float], Sequence[str]],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Runs parts while there is time; returns their rows, each with the name of its part.

    command: returns the command of a part from its name, the file for its rows, and the seconds in which it may begin
    something.
    """
    deadline = clock() + 60 * minutes
    table: list[dict[str, Any]] = []
    for part in parts:
        budget, left = BUDGETS.get(part, OTHER), deadline - clock()
        started = clock()
        if left < budget.least:
            found = [_row("-", f"skipped: needs {budget.least:.0f} s, and {max(0.0, left):.0f} s are left", None)]
        else:
            seconds = min(budget.most, left)
            rows = out / f"{part}.jsonl"
            print(f"{part}: up to {seconds:.0f} s ...", file=sys.stderr, flush=True)
            found = run_part(command(part, rows, max(1.0, seconds - GRACE)), rows, out / f"{part}.log", seconds)
        spent = clock() - started
        for row in found:
            table.append({"part": part, **row})
            print(f"{part}: {MARKS[row['ok']]}: {row['check']}: {row['answer']}", file=sys.stderr, flush=True)
        print(f"{part}: {spent:.0f} s", file=sys.stderr, flush=True)
    return table


def main(
    out: Annotated[Path, typer.Argument(help="Folder for results and logs.")],
    parts: Annotated[list[str] | None, typer.Argument(help="Parts to run; default: all.")] = None,
    minutes: Annotated[float, typer.Option(help="Time for all parts.")] = 10.0,
    small: Annotated[
        bool, typer.Option("--small", help="Tiny models in place of the real shapes, also on a CPU.")
    ] = False,
    setting: Annotated[list[str] | None, typer.Option(help="key=value of measured recipes; repeatable.")] = None,
) -> None:
    """Check and measure one GPU."""
    for part in parts or ():
        if part not in BUDGETS and not NAME.fullmatch(part):
            raise typer.BadParameter(f"unknown part {part}; use {', '.join(BUDGETS)}, or a name like decoder-3b")
    out.mkdir(parents=True, exist_ok=True)
    worker = Path(__file__).parent / "gpu_parts.py"
    words = [word for text in setting or [] for word in ("--setting", text)]
    words += ["--small", str((out / "models").resolve())] if small else []

    def command(part: str, rows: Path, seconds: float) -> list[str]:
        return [sys.executable, str(worker), part, "--out", str(rows), "--seconds", f"{seconds:.0f}", *words]

    table = run_parts(parts or list(BUDGETS), out, minutes, command)
    text = report.table(
        ["part", "", "check", "finding"],
        [[row["part"], MARKS[row["ok"]], row["check"], row["answer"]] for row in table],
    )
    print(text)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "gpu.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if any(row["ok"] is False for row in table):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
