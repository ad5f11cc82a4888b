"""`zero-ds eval`: suites of the field's own harnesses, held-out records, and comparisons."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from zero_ds.cli.models import (
    DeviceMapOption,
    DeviceOptions,
    EngineOption,
    OffloadOption,
    TensorParallelOption,
    load,
    precision,
)
from zero_ds.cli.records import records
from zero_ds.runtime.errors import ConfigError

if TYPE_CHECKING:
    from zero_ds.evaluation.suites.harness import Planned


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
    from zero_ds.evaluation.suites.harness import check_suite, evaluate_suite, plan
    from zero_ds.evaluation.suites.suites import Request
    from zero_ds.grafting.named_model import find_model
    from zero_ds.runtime import distributed

    for option, value in (("--batch", batch), ("--limit", limit), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: at least 1.")
    options = DeviceOptions(engine, tensor_parallel, device_map, offload_folder)
    options.check()
    # what is wrong is said before the model is read, and not after hours
    precision(dtype)
    named = find_model(model, target)
    planned = plan(suite, harness, tasks_folder)
    label = name or model + (f" + {target}" if target else "")
    _check_vacant(out, label, planned)
    if distributed.world_size() > 1:
        distributed.initialize()
    request = Request(batch, limit, max_new_tokens, chat_template, samples)
    for part in planned:
        check_suite(named, part, request)
    found = load(named, dtype, options)
    for part in planned:
        result = evaluate_suite(named, found, part, request, label)
        if result is not None:  # on rank 0
            from zero_ds.evaluation.suites.results import table
            from zero_ds.runtime.files import write_atomically

            result.write(out / f"{result.suite}.json")
            write_atomically(out / f"{result.suite}.md", table(result))
            print(table(result), end="")


def _check_vacant(out: Path, label: str, planned: Sequence[Planned]) -> None:
    """Makes the folder of the results; a model's result gives way to none but a new one of the same tasks on it.

    Raises:
        ConfigError: no folder, or one with results of another model or of other tasks under the same names.
    """
    from zero_ds.data.formats import DataError
    from zero_ds.evaluation.suites.results import read_result

    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--out {out} is no folder; name one for the results.") from None
    for part in planned:
        path = out / f"{part.suite.name}.json"
        if not path.exists():
            continue
        try:
            before = read_result(path)
        except DataError as error:
            raise ConfigError(f"{error}, or choose another --out.") from None
        tasks = {score.task for score in before.scores}
        if before.name != label or not tasks <= {task.label for task in part.suite.tasks}:
            raise ConfigError(f"{path} holds {', '.join(sorted(tasks))} of {before.name}; choose another --out.")


@evaluate.command()
def compare(
    results: Annotated[
        list[Path], typer.Argument(help="Result files, or folders of them; the first is the reference.")
    ],
    out: Annotated[Path | None, typer.Option(help="File for the table (Markdown).")] = None,
) -> None:
    """Lay results of several models side by side: differences with 95 % intervals, and whether language is kept."""
    from zero_ds.evaluation.suites.results import Result, read_results
    from zero_ds.evaluation.suites.results import compare as lay_out

    models: dict[str, list[Result]] = {}
    for path in results:
        for result in read_results(path):
            models.setdefault(result.name, []).append(result)
    text = lay_out(models)
    if out is not None:
        from zero_ds.runtime.files import write_atomically

        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, text)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise ConfigError(f"--out {out} cannot be a file there; name one in a folder.") from None
    sys.stdout.write(text)


evaluate.command()(records)
