"""`zero-ds eval`: suites of public harnesses, held-out records, and comparisons of their results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from zero_ds.cli.models import (
    DeviceMapOption,
    EngineOption,
    OffloadOption,
    Placing,
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
    help="Evaluate models: zero-ds eval MODEL --suite SUITE (short for: eval run MODEL ...), records, compare.",
)


@evaluate.command()
def run(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a target, surrogate or export; or a run folder.")],
    suite: Annotated[
        str, typer.Option(help="text, vision, paper-text, paper-vision, or tasks: NAME[:binary][,NAME...].")
    ],
    target: Annotated[str | None, typer.Option(help="Full language model to graft the run's encoder into.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the results: one JSON file and one table for each suite.")
    ] = Path("results"),
    name: Annotated[
        str | None, typer.Option(help="Name of the model in tables. Default: MODEL and its target.")
    ] = None,
    harness: Annotated[str, typer.Option(help="Harness for tasks given by name: auto, lm-eval or lmms-eval.")] = "auto",
    tasks_folder: Annotated[Path | None, typer.Option(help="Folder with further task files (YAML).")] = None,
    batch: Annotated[int, typer.Option(help="Number of requests in a forward pass.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Use only the first n documents of each task, as a trial.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer in tokens, instead of the task's own limit.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="lm-eval: put prompts into the chat template.")
    ] = False,
    samples: Annotated[bool, typer.Option("--samples", help="Keep prompts and answers in the JSON file.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    engine: EngineOption = "transformers",
    tensor_parallel: TensorParallelOption = 1,
    device_map: DeviceMapOption = None,
    offload_folder: OffloadOption = None,
) -> None:
    """Run a suite of lm-evaluation-harness or lmms-eval on a model, on all ranks that the launcher started."""
    from zero_ds.evaluation.suites.harness import check_suite, evaluate_suite, plan
    from zero_ds.evaluation.suites.suites import Request
    from zero_ds.grafting.named_model import find_model
    from zero_ds.runtime import distributed

    for option, value in (("--batch", batch), ("--limit", limit), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: at least 1.")
    placing = Placing(engine, tensor_parallel, device_map, offload_folder)
    placing.check()
    # everything that can be wrong is checked before the model is read, not after hours
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
    found = load(named, dtype, placing)
    for part in planned:
        result = evaluate_suite(named, found, part, request, label)
        if result is not None:  # on rank 0
            from zero_ds.evaluation.suites.results import table
            from zero_ds.runtime.files import write_atomically

            result.write(out / f"{result.suite}.json")
            write_atomically(out / f"{result.suite}.md", table(result))
            print(table(result), end="")


def _check_vacant(out: Path, label: str, planned: Sequence[Planned]) -> None:
    """Makes the folder of the results; a result may only be replaced by one of the same model on the same tasks.

    Raises:
        ConfigError: it is not a folder, or holds results of another model or of other tasks under the same names.
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
        list[Path], typer.Argument(help="Result files, or folders of result files; the first is the reference.")
    ],
    out: Annotated[Path | None, typer.Option(help="File to write the table into (Markdown).")] = None,
) -> None:
    """Compare results of several models: differences with 95 % intervals, and whether language ability is kept."""
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
