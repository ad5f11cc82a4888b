"""Census of decoders: carries a tiny random model of every causal LM of the installed transformers through the method.

For each type: the verdict on its structure; surrogate logits equal to those of the target with layers left out;
trajectory curves equal in memory and streamed; gradients that reach the adapter; a graft that sees; an export whose
proof holds; with --zero3, a step under ZeRO-3 on two ranks. Each type runs in a process of its own with a time limit.
Results go to a file with one JSON object a line; types that it holds already are not run again.

Example: python tools/census.py --zero3 --out census.jsonl --page docs/models.md
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]


def one_type(model_type: str, work: Path, config: Callable[..., Any]) -> dict[str, Any]:
    """Returns the proofs that a type has passed, and the sentence or error that ended it."""
    import decoder_census

    from zero_ds.model.decoders.listing import verdict

    found: dict[str, Any] = {"type": model_type, "done": []}

    def prove() -> None:
        told = verdict(model_type)
        found.update({"class": told.class_name, "verdict": told.how, "note": told.note})
        if told.how != "refused":
            decoder_census.prove(model_type, work, config, found["done"].append)

    return found | failure(prove)


def failure(prove: Callable[[], None]) -> dict[str, str]:
    """Returns what a proof fails with: a sentence of this package as `error`, anything else as `traceback`."""
    try:
        prove()
    except Exception as error:
        if isinstance(error, ValueError) and type(error).__module__.startswith("zero_ds"):
            return {"error": str(error)}
        return {"traceback": traceback.format_exc()}
    return {}


def in_a_process(limit: int, call: Callable[[], dict[str, Any]], model_type: str) -> dict[str, Any]:
    """Returns what `call` returns in a forked process, or why it returned nothing."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        signal.alarm(limit)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(call()))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if text else {"type": model_type, "done": [], "error": f"ended with status {status}"}


def run_configs(root: Path) -> Callable[..., Any]:
    """Returns the function that makes the config of a run on a tiny vision encoder and a few samples."""
    import tiny

    from zero_ds.config.schema import RunConfig

    tiny.clip(root / "clip")
    data = tiny.write_data(root / "data")

    def make(stage: str, out: Path, **changes: object) -> RunConfig:
        base: dict[str, object] = {
            "stage": stage,
            "encoder": {"path": str(root / "clip")},
            "data": {"sources": [{"path": str(data)}], "max_length": 512, "system_prompt": ""},
            "optimizer": {"learning_rate": 1e-2},
            "global_batch": 4,
            "micro_batch": 1,
            "max_steps": 1,
            "precision": "fp32",
            "activation_checkpointing": False,
            "zero": "zero3",
            "out": str(out),
        }
        return RunConfig.model_validate({**base, **changes})

    return make


def proofs_of(row: dict[str, Any]) -> Any:
    """Returns the proofs of a type as the page shows them."""
    from zero_ds.model.decoders.listing import Proofs

    refused = row.get("verdict") == "refused"
    error = row.get("error") or row.get("traceback", "").strip().split("\n")[-1]
    return Proofs(frozenset(row["done"]), "" if refused else error)


def main() -> None:
    """Runs the types that the results lack, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: all that transformers has")
    parser.add_argument("--out", type=Path, default=Path("census.jsonl"), help="results, one JSON object a line")
    parser.add_argument("--page", type=Path, help="file for the page, such as docs/models.md, if every type was run")
    parser.add_argument("--limit", type=int, default=180, help="seconds for each type")
    parser.add_argument("--seconds", type=int, default=0, help="seconds after which no further type begins")
    parser.add_argument("--zero3", action="store_true", help="also a step under ZeRO-3 on two ranks")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    began = time.monotonic()

    import decoder_census
    import torch

    from zero_ds.model.decoders.listing import Verdict, offered_types, page

    torch.set_num_threads(1)
    decoder_census.quick_proofs()
    known = {}
    if arguments.out.is_file():
        known = {row["type"]: row for row in map(json.loads, arguments.out.read_text(encoding="utf-8").splitlines())}
    with tempfile.TemporaryDirectory() as scratch, arguments.out.open("a", encoding="utf-8") as out:
        root = Path(scratch)
        config = run_configs(root)
        for model_type in arguments.types or list(offered_types()):
            if model_type in known or (arguments.seconds and time.monotonic() - began > arguments.seconds):
                continue
            work = root / model_type.replace("/", "_")
            started = time.monotonic()

            def call(model_type: str = model_type, work: Path = work) -> dict[str, Any]:
                return one_type(model_type, work, config)

            row = in_a_process(arguments.limit, call, model_type)
            if arguments.zero3 and decoder_census.STEPS[-1] in row["done"]:  # here, so that one server starts all ranks
                row |= failure(partial(decoder_census.step_under_zero3, work, config))
                row["done"] += ["ZeRO-3"] if row.keys().isdisjoint({"error", "traceback"}) else []
            shutil.rmtree(work, ignore_errors=True)
            row |= {"error": row["error"].replace(f"{work}/", "")} if "error" in row else {}
            known[model_type] = {**row, "seconds": round(time.monotonic() - started, 1)}
            out.write(json.dumps(known[model_type]) + "\n")
            out.flush()
            print(model_type, row.get("verdict"), ",".join(row["done"]), row.get("error", ""), flush=True)
    rows = [known[model_type] for model_type in offered_types() if model_type in known]
    proofs = {row["type"]: proofs_of(row) for row in rows}
    print(f"{sum(one.whole for one in proofs.values())} of {len(rows)} types whole.")
    if arguments.page and proofs.keys() == offered_types().keys():
        verdicts = [Verdict(row["type"], row["class"], row["verdict"], row["note"]) for row in rows]
        arguments.page.write_text(page(verdicts, proofs), encoding="utf-8")


if __name__ == "__main__":
    main()
