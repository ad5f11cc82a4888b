"""`zero-ds eval`: suites of established harnesses, held-out records, and comparisons."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zero_ds.cli.options import (
    DeviceMapOption,
    DeviceOptions,
    EngineOption,
    MaxModelLenOption,
    MemoryShareOption,
    OffloadOption,
    TensorParallelOption,
    TrustRemoteCodeOption,
    load,
    precision,
)
from zero_ds.cli.records import loss, records
from zero_ds.runtime.errors import ConfigError

OWN_TEMPLATE = "own"
"""Value of --chat-template without a file."""


class SuiteFirst(TyperGroup):
    """Reads `zero-ds eval MODEL ...` as `zero-ds eval run MODEL ...`, and `--chat-template` with or without a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        for place in range(len(args) - 1, -1, -1):
            following = args[place + 1 : place + 2]
            if args[place] == "--chat-template" and not (following and _is_template(following[0])):
                args = [*args[: place + 1], OWN_TEMPLATE, *args[place + 1 :]]
        return super().parse_args(ctx, args)


def _is_template(word: str) -> bool:
    """Returns whether a word after `--chat-template` is its value, not the next argument."""
    return word == OWN_TEMPLATE or Path(word).suffix in (".jinja", ".jinja2", ".j2", ".txt") or Path(word).is_file()


evaluate = typer.Typer(
    cls=SuiteFirst,
    no_args_is_help=True,
    help="Evaluate models: MODEL --suite SUITE (short for: run MODEL ...), records, loss, compare, figure.",
)


@evaluate.command()
def run(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a target, surrogate or export; or a run folder.")],
    suite: Annotated[
        str, typer.Option(help="text, vision, paper-text, paper-vision, or tasks: NAME[:binary][,NAME...].")
    ],
    target: Annotated[str | None, typer.Option(help="Full language model to plug the run into.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results: one JSON file and one table per suite.")] = Path(
        "results"
    ),
    name: Annotated[
        str | None, typer.Option(help="Name of the model in tables; default: MODEL and its target.")
    ] = None,
    harness: Annotated[str, typer.Option(help="For tasks by name: auto, lm-eval or lmms-eval.")] = "auto",
    tasks_folder: Annotated[Path | None, typer.Option(help="Folder with further task files (YAML).")] = None,
    batch: Annotated[int, typer.Option(help="Requests per forward pass.")] = 8,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first n documents of each task, to try it out.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of an answer, in place of the task's own.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="lm-eval: wrap prompts in the chat template. With a FILE: in its template, in all suites."),
    ] = None,
    samples: Annotated[bool, typer.Option("--samples", help="Keep prompts and answers in the JSON file.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    engine: EngineOption = "transformers",
    tensor_parallel: TensorParallelOption = 1,
    device_map: DeviceMapOption = None,
    offload_folder: OffloadOption = None,
    max_model_len: MaxModelLenOption = None,
    gpu_memory_share: MemoryShareOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Run a suite of lm-evaluation-harness or lmms-eval on a model, on as many ranks as the launcher started."""
    from zero_ds.evaluation.suites.evaluate import check_options, evaluate_suites
    from zero_ds.evaluation.suites.harness import select_suites
    from zero_ds.evaluation.suites.results import table
    from zero_ds.evaluation.suites.tasks import SuiteOptions
    from zero_ds.grafting.named_model import find_model

    template = chat_template is not None if chat_template in (None, OWN_TEMPLATE) else chat_template
    options = SuiteOptions(batch, limit, max_new_tokens, template, samples)
    check_options(options)
    devices = DeviceOptions(engine, tensor_parallel, device_map, offload_folder, max_model_len, gpu_memory_share)
    devices.check()
    precision(dtype)
    named = find_model(model, target, options.template_file)
    selected = select_suites(suite, harness, tasks_folder)
    label = name or (f"{model} + {target}" if target else model)
    for result in evaluate_suites(named, selected, out, label, options, lambda found: load(found, dtype, devices)):
        print(table(result), end="")


@evaluate.command()
def compare(
    results: Annotated[
        list[Path], typer.Argument(help="Result files, or folders of result files; the first is the reference.")
    ],
    out: Annotated[Path | None, typer.Option(help="File to write the table into (Markdown).")] = None,
) -> None:
    """Compare results of several models: differences with 95 % intervals, and whether language ability is kept."""
    from zero_ds.evaluation.suites.comparison import compare
    from zero_ds.evaluation.suites.results import Result, read_results
    from zero_ds.runtime.files import write_atomically

    models: dict[str, list[Result]] = {}
    for path in results:
        for result in read_results(path):
            models.setdefault(result.name, []).append(result)
    text = compare(models)
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, text)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise ConfigError(f"--out {out} cannot be written as a file; name a file in a folder.") from None
    sys.stdout.write(text)


@evaluate.command()
def figure(
    out: Annotated[Path, typer.Option(help="Name of the figure without ending: OUT.png, OUT.pdf and OUT.md.")],
    score: Annotated[
        list[str] | None,
        typer.Option(help="METHOD:PERCENT=RESULTS of paper-vision, 0 percent for a graft; repeatable."),
    ] = None,
    hours: Annotated[
        list[str] | None, typer.Option(help="METHOD=RUN,RUN with the run folders of a method; repeatable.")
    ] = None,
) -> None:
    """Draw the paper's Figures 2 and A.2: average score by share of the data, and hours of training by stage.

    Example: zero-ds eval figure --out figure-2 --score ours:10=results/ours-10 --hours ours=runs/encoder,runs/decoder
    """
    if not score and not hours:
        raise ConfigError("there is nothing to draw; name results with --score, or runs with --hours.")
    from zero_ds.evaluation.suites import figures
    from zero_ds.runtime.files import write_atomically

    points, bars = [figures.read_point(text) for text in score or ()], [figures.read_bar(text) for text in hours or ()]
    figures.check_columns(points)
    text = figures.table(points, bars)
    try:
        paths = figures.draw(points, bars, out)
        write_atomically(out.with_name(f"{out.name}.md"), text)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise ConfigError(f"--out {out} cannot be written as files; name a file in a folder, without ending.") from None
    for path in paths:
        print(path)
    sys.stdout.write(text)


evaluate.command()(records)
evaluate.command()(loss)
