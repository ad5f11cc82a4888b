"""Tasks with pictures through lmms-eval, data-parallel over our ranks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection
from pathlib import Path

import yaml
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.tasks import TaskManager, get_task_dict
from tenacity import RetryError

from zero_ds import distributed
from zero_ds.config import ConfigError
from zero_ds.evaluation.figures import task_scores
from zero_ds.evaluation.lmms_model import ZeroDs
from zero_ds.evaluation.results import Measured, Score
from zero_ds.evaluation.suites import BINARY_PROMPT, Request, Task
from zero_ds.named_model import LoadedModel


class LmmsEval:
    """lmms-eval with its own tasks and those of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._local = TaskManager(include_path=str(folder), include_defaults=False) if folder is not None else None
        self._whole: TaskManager | None = None

    def knows(self, name: str) -> bool:
        return name in self._manager([name]).all_tasks

    def names(self) -> list[str]:
        return list(self._manager([]).all_tasks)

    def _manager(self, wanted: Collection[str]) -> TaskManager:
        """One that knows these; the harness's own index takes seconds, so the folder's is asked first."""
        if wanted and self._local is not None and set(wanted) <= set(self._local.all_tasks):
            return self._local
        if self._whole is None:
            self._whole = TaskManager(include_path=str(self._folder) if self._folder is not None else None)
        return self._whole

    def measure(self, loaded: LoadedModel, tasks: tuple[Task, ...], request: Request) -> Measured | None:
        """See `Backend.measure`.

        Raises:
            ConfigError: data that is not in the cache and cannot be fetched.
        """
        lm = ZeroDs(loaded, batch_size=request.batch_size, max_new_tokens=request.max_new_tokens)
        manager = self._manager([task.name for task in tasks])
        with tempfile.TemporaryDirectory(prefix="zero_ds-tasks-") as scratch:
            binary = [task for task in tasks if task.binary]
            if binary:
                manager = self._with_binary(manager, binary, Path(scratch))
            names = [_name(task) for task in tasks]
            _check_documents(manager, names, request)
            found = simple_evaluate(
                model=lm,
                tasks=names,
                limit=request.limit,
                batch_size=request.batch_size,
                bootstrap_iters=request.bootstrap,
                task_manager=manager,
                distributed_executor_backend="torchrun" if distributed.world_size() > 1 else "accelerate",
            )
        if found is None or not distributed.is_rank_zero():
            return None
        scores: list[Score] = []
        for task in tasks:
            scores += task_scores(found, task, _name(task))
        return Measured(tuple(scores), dict(found["samples"]) if request.samples else {})

    def _with_binary(self, manager: TaskManager, tasks: Collection[Task], scratch: Path) -> TaskManager:
        """A manager that also knows tasks with another prompt: files that include the harness's own."""
        for task in tasks:
            content = {
                "include": str(manager.task_index[task.name]["yaml_path"]),
                "task": _name(task),
                "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": BINARY_PROMPT}},
            }
            (scratch / f"{_name(task)}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        paths = [str(scratch), *([str(self._folder)] if self._folder is not None else [])]
        return TaskManager(include_path=paths, include_defaults=manager is not self._local)


def _name(task: Task) -> str:
    """What the task is called in the harness's index."""
    return task.name + "_binary" * task.binary


def _check_documents(manager: TaskManager, names: list[str], request: Request) -> None:
    """Reads the tasks' data, on rank 0 first, which fetches what is not in the cache.

    Raises:
        ConfigError: data that cannot be had, or fewer documents than ranks.
    """
    with distributed.rank_zero_first():
        try:
            found = get_task_dict(list(names), manager, "simple")
        except (OSError, RetryError) as error:  # of the data set library and the hub's client
            cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise ConfigError(
                f"the data of {', '.join(names)} is not here and could not be fetched: {reason[:200]} "
                "Check the network, or give local tasks with --tasks-folder."
            ) from None
    for task in get_task_list(found):
        count = min(len(task.task.eval_docs), request.limit or math.inf)
        if count < (ranks := distributed.world_size()):
            raise ConfigError(f"{task.task_name} has {count} documents for {ranks} ranks; take fewer ranks.")
