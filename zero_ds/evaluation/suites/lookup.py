"""What both harnesses have alike: tasks by their names, a folder's own among them, and the data that tasks read."""

from __future__ import annotations

import functools
import math
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
Make = Callable[[Path | None, bool], M]
"""(folder with task files, whether the harness's own tasks are known, too) -> its manager."""


class Lookup(Generic[M]):
    """A harness's own tasks and those of a folder, which win over its own of the same name."""

    def __init__(self, make: Make[M], folder: Path | None) -> None:
        self._make = make
        self._folder = folder
        self._local = make(folder, False) if folder is not None else None

    def knows(self, name: str) -> bool:
        return name in self.manager([name]).all_tasks

    def names(self) -> list[str]:
        return list(self.manager(()).all_tasks)

    def manager(self, wanted: Sequence[str]) -> M:
        """One that knows these; the harness's own index takes seconds, so the folder's is asked first."""
        if wanted and self._local is not None and set(wanted) <= set(self._local.all_tasks):
            return self._local
        return _whole(self._make, self._folder)


@functools.lru_cache(maxsize=4)
def _whole(make: Make[M], folder: Path | None) -> M:
    """An index that nothing changes."""
    return make(folder, True)


@contextmanager
def reading_data(names: Sequence[str]) -> Iterator[None]:
    """A block that reads the data of these tasks, on rank 0 first, which fetches what is not in the cache.

    Raises:
        ConfigError: data that cannot be had, or whose first picture cannot be read.
    """
    from datasets.exceptions import DatasetsError

    with distributed.rank_zero_first():
        try:
            yield
        except Exception as error:
            what = ", ".join(names)
            if raised_by_pillow(error):
                raise ConfigError(f"a picture of {what} cannot be read: {said(error)}; mend the task's data.") from None
            if not isinstance(error, OSError | DatasetsError):  # of the data set library and the hub's client
                raise
            raise ConfigError(
                f"the data of {what} is not here and could not be fetched: {said(error)[:200].rstrip('. ')}; "
                "check the network, or give local tasks with --tasks-folder."
            ) from None


def check_counts(documents: Mapping[str, int], limit: int | None) -> None:
    """Raises ConfigError for a task with fewer documents than ranks."""
    ranks = distributed.world_size()
    for name, count in documents.items():
        if (count := int(min(count, limit or math.inf))) < ranks:
            raise ConfigError(f"{name} has {count} documents for {ranks} ranks; take fewer ranks.")


def check_limit(name: str, value: Any) -> int | None:
    """A task's own limit for answers, in tokens; None: it sets none.

    Raises:
        ConfigError: less than a token.
    """
    if value is None:
        return None
    if int(value) < 1:
        raise ConfigError(f"{name} allows answers of {value} tokens; give it at least 1, or take --max-new-tokens.")
    return int(value)


def raised_by_pillow(error: BaseException) -> bool:
    """Whether a picture is at fault: Pillow's readers raise many kinds for bytes that they do not expect."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__")).split(".")[0] == "PIL" for frame, _ in frames)


def said(error: BaseException | None) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
