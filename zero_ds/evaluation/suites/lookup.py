"""Task lookup and data access for both harnesses: by name, including the tasks of a user's folder."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError


class Manager(Protocol):
    """The `TaskManager` of either harness."""

    @property
    def all_tasks(self) -> list[str]: ...


M = TypeVar("M", bound=Manager)
MakeManager = Callable[[Path | None, bool], M]
"""(folder with task files, whether to include the harness's own tasks) -> manager."""


class TaskLookup(Generic[M]):
    """A harness's own tasks and those of a folder, which take precedence over its own tasks of the same name."""

    def __init__(self, make: MakeManager[M], folder: Path | None) -> None:
        self._make = make
        self._folder = folder
        self._local = make(folder, False) if folder is not None else None

    def knows(self, name: str) -> bool:
        """Returns whether there is a task or group of this name."""
        return name in self.manager([name]).all_tasks

    def names(self) -> list[str]:
        """Returns the names of all tasks and groups."""
        return list(self.manager(()).all_tasks)

    def manager(self, names: Sequence[str]) -> M:
        """Returns a manager that knows these tasks, or all tasks if no name is given.

        Building the harness's own index takes seconds, so the folder alone is tried first.
        """
        if names and self._local is not None and set(names) <= set(self._local.all_tasks):
            return self._local
        return _complete_manager(self._make, self._folder)


@functools.lru_cache(maxsize=4)
def _complete_manager(make: MakeManager[M], folder: Path | None) -> M:
    """Returns the manager of all tasks. It is shared, so callers must not change it."""
    return make(folder, True)


@contextmanager
def reading_data(names: Sequence[str]) -> Iterator[None]:
    """Wraps a block that reads the data of these tasks; rank 0 goes first and fills the cache.

    Raises:
        ConfigError: data is neither cached nor can be fetched, or its first image cannot be read.
    """
    from datasets.exceptions import DatasetsError

    with distributed.rank_zero_first():
        try:
            yield
        except Exception as error:
            tasks = ", ".join(names)
            if raised_by_pillow(error):
                raise ConfigError(
                    f"an image of {tasks} cannot be read: {first_line(error)}; repair the task's data."
                ) from None
            if not isinstance(error, OSError | DatasetsError):  # the types that `datasets` and the hub's client raise
                raise
            raise ConfigError(
                f"the data of {tasks} is not cached and could not be fetched: "
                f"{first_line(error)[:200].rstrip('. ')}; check the network, or give local tasks with --tasks-folder."
            ) from None


def check_counts(documents: Mapping[str, int], limit: int | None) -> None:
    """Raises ConfigError for a task with fewer documents than there are ranks.

    documents: Task -> number of its documents. limit: Number of documents that are used, at most.
    """
    ranks = distributed.world_size()
    for name, count in documents.items():
        used = count if limit is None else min(count, limit)
        if used < ranks:
            raise ConfigError(f"{name} has {used} documents for {ranks} ranks; use fewer ranks.")


def check_limit(name: str, value: Any) -> int | None:
    """Returns a task's own limit of an answer's length in tokens, or None if it sets none.

    Raises:
        ConfigError: the limit is below one token.
    """
    if value is None:
        return None
    if int(value) < 1:
        raise ConfigError(
            f"{name} limits answers to {value} tokens; set its limit to at least 1, or use --max-new-tokens."
        )
    return int(value)


def raised_by_pillow(error: BaseException) -> bool:
    """Returns whether an error comes from Pillow, whose readers raise many types for bytes they do not expect."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__")).split(".")[0] == "PIL" for frame, _ in frames)


def first_line(error: BaseException | None) -> str:
    """Returns the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
