"""`zero-ds eval`: suites of the field's own harnesses, held-out records, and comparisons."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zero_ds.commands.models import (
    DeviceMapOption,
    EngineOption,
    OffloadOption,
    Placing,
    TensorParallelOption,
    loaded,
)
from zero_ds.commands.records import records
from zero_ds.config import ConfigError


class SuiteFirst(TyperGroup):
    """`zero-ds eval MODEL ...` is `zero-ds eval run MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


evaluate = typer.Typer(
    cls=SuiteFirst,
    no_args_is_help=True,
    help="Measure models: MODEL --suite SUITE (short for: run MODEL ...), records, compare.",
)


@evaluate.command()
def run(
    model: Annotated[str, typer.Argument(help="Target, surrogate or export (folder or hub id), or a run folder.")],
    suite: Annotated[
        str, typer.Option(help="text, vision, paper-text, paper-vision, or tasks: NAME[:binary][,NAME...].")
    ],
    target: Annotated[str | None, typer.Option(help="Full language model that the run is plugged into.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results: one JSON and one table a suite.")] = Path("results"),
    name: Annotated[str | None, typer.Option(help="What tables call the model; else MODEL and its target.")] = None,
    harness: Annotated[str, typer.Option(help="For tasks by name: auto, lm-eval or lmms-eval.")] = "auto",
    tasks_folder: Annotated[Path | None, typer.Option(help="Folder with more task YAML files.")] = None,
    batch: Annotated[int, typer.Option(help="Requests per pass.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Only the first n documents of each task: a trial.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in place of the task's own limit.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="lm-eval: prompts in the chat template.")
    ] = False,
    samples: Annotated[bool, typer.Option("--samples", help="Keep prompts and answers in the JSON.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    engine: EngineOption = "transformers",
    tensor_parallel: TensorParallelOption = 1,
    device_map: DeviceMapOption = None,
    offload_folder: OffloadOption = None,
) -> None:
    """Run a suite of lm-evaluation-harness or lmms-eval on a model, on as many ranks as the launcher started."""
    from zero_ds import distributed
    from zero_ds.evaluation.harness import evaluate_suite, plan
    from zero_ds.evaluation.suites import Request

    for option, value in (("--batch", batch), ("--limit", limit), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: at least 1.")
    placing = Placing(engine, tensor_parallel, device_map, offload_folder)
    placing.check()
    # what is wrong is said before the model is read
    planned = plan(suite, harness, tasks_folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--out {out} is no folder; name one for the results.") from None
    if distributed.world_size() > 1:
        distributed.initialize()
    named, found = loaded(model, target, dtype, placing)
    label = name or model + (f" + {target}" if target else "")
    request = Request(batch, limit, max_new_tokens, chat_template, samples)
    for part in planned:
        result = evaluate_suite(named, found, part, request, label)
        if result is not None:  # on rank 0
            from zero_ds.evaluation.results import table
            from zero_ds.files import write_atomically

            result.write(out / f"{result.suite}.json")
            write_atomically(out / f"{result.suite}.md", table(result))
            print(table(result), end="")


@evaluate.command()
def compare(
    results: Annotated[
        list[Path], typer.Argument(help="Result files, or folders of them; the first is the reference.")
    ],
    out: Annotated[Path | None, typer.Option(help="File for the table (Markdown).")] = None,
) -> None:
    """Lay results of several models side by side: differences with 95 % intervals, and whether language is kept."""
    from zero_ds.evaluation.results import Result, read_results
    from zero_ds.evaluation.results import compare as lay_out

    models: dict[str, list[Result]] = {}
    for path in results:
        for result in read_results(path):
            models.setdefault(result.name, []).append(result)
    text = lay_out(models)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


evaluate.command()(records)
