"""Tasks with images through lmms-eval, data-parallel over our ranks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock._api  # noqa: F401 - lmms-eval needs this once it measures; filelock 4.3 removed it
import lmms_eval.tasks
import yaml
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.tasks import TaskManager, get_task_dict
from tenacity import RetryError

from zero_ds.data.images import truncated_images_are_errors, unreadable_metadata_is_none
from zero_ds.evaluation.suites.lmms_model import ZeroDs
from zero_ds.evaluation.suites.lookup import TaskLookup, check_counts, check_limit, reading_data
from zero_ds.evaluation.suites.results import Measured, Score
from zero_ds.evaluation.suites.scores import task_scores
from zero_ds.evaluation.suites.tasks import BINARY_PROMPT, SuiteOptions, Task, check_judge
from zero_ds.grafting.named_model import LoadedModel
from zero_ds.runtime import distributed


def _manager(folder: Path | None, defaults: bool) -> TaskManager:
    """Makes a manager. This harness keeps the first of two tasks with one name, so the folder comes first."""
    paths = []
    if folder is not None:
        paths.append(str(folder))
    if defaults:
        paths.append(str(Path(lmms_eval.tasks.__file__).parent))
    return TaskManager(include_path=paths, include_defaults=False)


class LmmsEval(TaskLookup[TaskManager]):
    """lmms-eval with its own tasks and those of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(_manager, folder)

    def check(self, tasks: tuple[Task, ...], options: SuiteOptions) -> None:
        """See `Harness.check`."""
        with self._tasks(tasks) as (manager, names):
            own = [name for name in names if _is_harness_own(manager, name)]
            check_judge(own, os.environ)
            counts = {}
            for name in names:
                with reading_data([name]), truncated_images_are_errors(), unreadable_metadata_is_none():
                    try:
                        found = get_task_dict([name], manager, "simple")
                    except RetryError as error:
                        raise error.last_attempt.exception() or error from None
                for task in get_task_list(found):
                    counts[task.task_name] = len(task.task.eval_docs)
                    if options.max_new_tokens is None:
                        check_limit(task.task_name, (task.task.config.generation_kwargs or {}).get("max_new_tokens"))
            check_counts(counts, options.limit)

    def measure(self, loaded: LoadedModel, tasks: tuple[Task, ...], options: SuiteOptions) -> Measured | None:
        """See `Harness.measure`."""
        lm = ZeroDs(loaded, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens)
        with self._tasks(tasks) as (manager, names), unreadable_metadata_is_none():
            found = simple_evaluate(
                model=lm,
                tasks=names,
                limit=options.limit,
                batch_size=options.batch_size,
                bootstrap_iters=options.bootstrap,
                task_manager=manager,
                distributed_executor_backend="torchrun" if distributed.world_size() > 1 else "accelerate",
            )
        if found is None or not distributed.is_rank_zero():
            return None
        scores: list[Score] = []
        for task in tasks:
            scores += task_scores(found, task, _name(task))
        return Measured(tuple(scores), dict(found["samples"]) if options.samples else {})

    @contextmanager
    def _tasks(self, tasks: tuple[Task, ...]) -> Iterator[tuple[TaskManager, list[str]]]:
        """Yields a manager that knows these tasks, and their names in it."""
        manager = self.manager([task.name for task in tasks])
        with tempfile.TemporaryDirectory(prefix="zero_ds-tasks-") as scratch:
            binary = [task for task in tasks if task.binary]
            if binary:
                manager = self._with_binary(manager, binary, Path(scratch))
            yield manager, [_name(task) for task in tasks]

    def _with_binary(self, manager: TaskManager, tasks: Collection[Task], scratch: Path) -> TaskManager:
        """Returns a manager that also knows these tasks with the binary prompt.

        Writes one task file each into `scratch`, which includes the harness's own file and replaces the prompt.
        """
        for task in tasks:
            content = {
                "include": str(manager.task_index[task.name]["yaml_path"]),
                "task": _name(task),
                "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": BINARY_PROMPT}},
            }
            (scratch / f"{_name(task)}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        return TaskManager(include_path=[str(scratch), *manager.include_path], include_defaults=False)


def _is_harness_own(manager: TaskManager, name: str) -> bool:
    """Returns whether a task comes from lmms-eval's own folder."""
    path = str(manager.task_index[name].get("yaml_path"))
    return Path(path).is_relative_to(Path(lmms_eval.tasks.__file__).parent)


def _name(task: Task) -> str:
    """Returns the name of a task in the manager's index."""
    return f"{task.name}_binary" if task.binary else task.name
