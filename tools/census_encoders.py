"""Census of vision encoders: carries a tiny random model of every type of transformers' through the method.

For each type: the verdict on its structure; features equal to the class's own hidden states; gradients that reach
adapter and encoder; a graft that sees; an export whose proof holds, and whether it is transformers' own Llava; with
--zero3, a step under ZeRO-3 on two ranks. It works as tools/census.py does for decoders.

Example: python tools/census_encoders.py --zero3 --out census.jsonl --table census.md
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from census import failure, in_a_process, run_configs


def one_type(model_type: str, work: Path, config: Callable[..., Any]) -> dict[str, Any]:
    """Returns the proofs that a type has passed, and the sentence or error that ended it."""
    import encoder_census

    from zero_ds.model.encoders.listing import verdict

    found: dict[str, Any] = {"type": model_type, "done": []}

    def prove() -> None:
        told = verdict(model_type)
        found.update({"class": told.class_name, "verdict": told.how, "note": told.note})
        if told.how != "refused":
            encoder_census.prove(model_type, work, config, found["done"].append)

    return found | failure(prove)


def with_models(root: Path) -> Callable[..., Any]:
    """Returns the function that makes the config of a run on a tiny decoder and its surrogate."""
    import tiny

    from zero_ds.model.layer_plan import Replaced
    from zero_ds.surrogate.build import build_surrogate

    make = run_configs(root)
    tiny.llama(root / "llama", tied=True)
    build_surrogate(root / "llama", [Replaced(1, 2), Replaced(3, 4)], root / "small")
    return partial(make, target=str(root / "llama"), surrogate=str(root / "small"))


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the results as a table in Markdown."""
    import encoder_census

    steps = (*encoder_census.STEPS, "llava", "zero3")
    lines = [f"| type | verdict | {' | '.join(steps)} | note |", "|---" * (len(steps) + 3) + "|"]
    for row in sorted(rows, key=lambda row: row["type"]):
        marks = " | ".join("yes" if step in row["done"] else "" for step in steps)
        note = row.get("error") or row.get("traceback", "").strip().split("\n")[-1] or row.get("note", "")
        lines.append(f"| {row['type']} | {row.get('verdict', '')} | {marks} | {note} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the types that the results lack, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: all that transformers has")
    parser.add_argument("--out", type=Path, default=Path("census.jsonl"), help="results, one JSON object a line")
    parser.add_argument("--table", type=Path, help="file for the table")
    parser.add_argument("--limit", type=int, default=180, help="seconds for each type")
    parser.add_argument("--seconds", type=int, default=0, help="seconds after which no further type begins")
    parser.add_argument("--zero3", action="store_true", help="also a step under ZeRO-3 on two ranks")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    began = time.monotonic()

    import decoder_census
    import encoder_census
    import torch

    from zero_ds.model.encoders.listing import offered_types

    torch.set_num_threads(1)
    decoder_census.quick_proofs()
    known = {}
    if arguments.out.is_file():
        known = {row["type"]: row for row in map(json.loads, arguments.out.read_text(encoding="utf-8").splitlines())}
    with tempfile.TemporaryDirectory() as scratch, arguments.out.open("a", encoding="utf-8") as out:
        root = Path(scratch)
        config = with_models(root)
        for model_type in arguments.types or list(offered_types()):
            if model_type in known or (arguments.seconds and time.monotonic() - began > arguments.seconds):
                continue
            work = root / model_type
            row = in_a_process(arguments.limit, partial(one_type, model_type, work, config), model_type)
            if arguments.zero3 and encoder_census.STEPS[-1] in row["done"]:
                row |= failure(partial(encoder_census.step_under_zero3, model_type, work, config))
                row["done"] += ["zero3"] if row.keys().isdisjoint({"error", "traceback"}) else []
            known[model_type] = row
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(model_type, row.get("verdict"), ",".join(row["done"]), row.get("error", ""), flush=True)
    if arguments.table:
        arguments.table.write_text(table(list(known.values())) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
