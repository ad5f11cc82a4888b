"""Runs suites on a model and writes their results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from zero_ds.data.formats import DataError
from zero_ds.evaluation.suites.harness import SelectedSuite, select_suites
from zero_ds.evaluation.suites.results import Result, read_result, table
from zero_ds.evaluation.suites.tasks import SuiteOptions
from zero_ds.grafting.engines.vllm import engine_setting
from zero_ds.grafting.named_model import LoadedModel, NamedModel, find_model, load_model
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically
from zero_ds.runtime.precision import fast_dtype
from zero_ds.training.checkpoint.manifest import versions


def load_on_rank(named: NamedModel) -> LoadedModel:
    """Loads a model onto this rank's device, in the precision that the device is fast at."""
    return load_model(named, dtype=fast_dtype(), device=distributed.device())


def evaluate(
    model: str,
    suite: str,
    *,
    target: str | None = None,
    out: Path = Path("results"),
    name: str | None = None,
    options: SuiteOptions | None = None,
    harness: str = "auto",
    tasks_folder: Path | None = None,
) -> list[Result]:
    """Evaluates a model as `zero-ds eval MODEL --suite SUITE` does; returns the results on rank 0, nothing elsewhere.

    model: Folder or hub id of a target, surrogate or export, or a run. suite: Name of a suite, or names of tasks.
    target: Full language model that a run is grafted into. out: Folder of the result files. name: Name of the model in
    tables; by default `model` and its target. harness: Harness of tasks given by name. tasks_folder: Folder with
    further tasks.

    Raises:
        ConfigError: as `find_model`, `select_suites` and `evaluate_suites`.
    """
    label = name or (f"{model} + {target}" if target else model)
    selected = select_suites(suite, harness, tasks_folder)
    named = find_model(model, target, options.template_file if options else None)
    return list(evaluate_suites(named, selected, out, label, options))


def evaluate_suites(
    named: NamedModel,
    suites: Sequence[SelectedSuite],
    out: Path,
    label: str,
    options: SuiteOptions | None = None,
    load: Callable[[NamedModel], LoadedModel] = load_on_rank,
) -> Iterator[Result]:
    """Runs suites on a model, on as many ranks as the launcher started, and writes `out/SUITE.json` and `out/SUITE.md`.

    Yields the result of each suite after it is written; nothing on ranks other than 0, which have to iterate as well.
    Everything that can be checked without the model is checked before `load` is called, and not after hours.

    named: Result of `find_model`. suites: Result of `select_suites`. label: Name of the model in tables. load: Loads
    the model.

    Raises:
        ConfigError: an option below 1, a folder of results that cannot be used (see `refuse_other_results`), a suite
            that cannot run (see `check_suite`), or an image that cannot be read.
    """
    options = options or SuiteOptions()
    check_options(options)
    refuse_other_results(out, label, suites)
    if distributed.world_size() > 1:
        distributed.initialize()
    for selected in suites:
        check_suite(named, selected, options)
    loaded = load(named)
    for selected in suites:
        result = evaluate_suite(named, loaded, selected, options, label)
        if result is not None:
            result.write(out / f"{result.suite}.json")
            write_atomically(out / f"{result.suite}.md", table(result))
            yield result


def check_options(options: SuiteOptions) -> None:
    """Raises ConfigError for a number below 1, by the name of its command-line option."""
    numbers = {
        "--batch": options.batch_size,
        "--limit": options.limit,
        "--max-new-tokens": options.max_new_tokens,
    }
    for option, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value} is too small; it must be at least 1.")


def refuse_other_results(out: Path, label: str, suites: Sequence[SelectedSuite]) -> None:
    """Makes the folder of results, and refuses to overwrite results of another model or of other tasks.

    Raises:
        ConfigError: `out` cannot be a folder, or holds such results in a file that would be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--out {out} is not a folder; name a folder for the results.") from None
    for selected in suites:
        path = out / f"{selected.suite.name}.json"
        if not path.exists():
            continue
        try:
            previous = read_result(path)
        except DataError as error:
            raise ConfigError(f"{error}, or choose another --out.") from None
        tasks = {score.task for score in previous.scores}
        if previous.name != label or not tasks <= {task.label for task in selected.suite.tasks}:
            raise ConfigError(f"{path} holds {', '.join(sorted(tasks))} of {previous.name}; choose another --out.")


def check_suite(named: NamedModel, selected: SelectedSuite, options: SuiteOptions) -> None:
    """Checks on every rank whether a suite can run on a model, before the model is loaded.

    Raises:
        ConfigError: as `Harness.check`, or the suite shows images and the model has no vision encoder.
    """
    if selected.suite.harness == "lmms-eval" and not named.sees:
        raise ConfigError(f"{named.name} has no vision encoder; name a run (with --target for its graft) or an export.")
    selected.harness.check(selected.suite.tasks, options)


def evaluate_suite(
    named: NamedModel, loaded: LoadedModel, selected: SelectedSuite, options: SuiteOptions, label: str
) -> Result | None:
    """Runs a suite on this rank's share of its documents, after `check_suite` has passed.

    Returns the result on rank 0, and None on other ranks.

    Raises:
        ConfigError: an image cannot be read.
    """
    suite = selected.suite
    started = time.monotonic()
    measured = selected.harness.measure(loaded, suite.tasks, options)
    if measured is None:
        return None
    parameter = next(loaded.model.decoder.parameters())
    setting = {
        **asdict(options),
        "ranks": distributed.world_size(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        **engine_setting(loaded),
        "seconds": round(time.monotonic() - started, 1),
    }
    return Result(
        name=label,
        suite=suite.name,
        harness={"name": suite.harness, "version": version(suite.harness)},
        model=named.identity(),
        setting=setting,
        versions=versions(),
        scores=measured.scores,
        samples=measured.samples,
    )
