"""Harnesses of the field, unpatched: text goes through lm-evaluation-harness, images through lmms-eval.

`select_suites` turns the words of `--suite` into suites whose tasks are known to an installed harness.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import yaml

from zero_ds.evaluation.suites.results import Measured
from zero_ds.evaluation.suites.tasks import SUITES, HarnessName, Suite, SuiteOptions, Task, parse_task
from zero_ds.grafting.named_model import LoadedModel
from zero_ds.runtime.errors import ConfigError, did_you_mean

MODULES: dict[HarnessName, str] = {"lm-eval": "lm_eval", "lmms-eval": "lmms_eval"}
"""Name of a harness -> name of its Python module."""
INSTALL = "pip install 'zero_ds[eval]'"


class Harness(Protocol):
    """One harness: the tasks it knows, and how it measures them on a model."""

    def knows(self, name: str) -> bool:
        """Returns whether there is a task or group of this name."""

    def names(self) -> list[str]:
        """Returns the names of all tasks and groups."""

    def check(self, tasks: tuple[Task, ...], options: SuiteOptions) -> None:
        """Reads the tasks' data on every rank, rank 0 first.

        Raises:
            ConfigError: data is neither cached nor can be fetched, a task has fewer documents than there are ranks, or
                it limits answers to less than one token.
        """

    def measure(self, loaded: LoadedModel, tasks: tuple[Task, ...], options: SuiteOptions) -> Measured | None:
        """Measures the tasks after `check` has passed. Every rank calls it; returns None on ranks other than 0."""


@dataclass(frozen=True)
class SelectedSuite:
    """A suite whose tasks are known to its harness."""

    suite: Suite
    harness: Harness


def load_harness(name: HarnessName, tasks_folder: Path | None) -> Harness:
    """Imports a harness, with the task files of a folder added to its own.

    Raises:
        ConfigError: the harness is not installed or cannot be imported, the folder does not exist, or a task file in it
            is not YAML.
    """
    if not _is_installed(name):
        raise ConfigError(f"{name} is not installed; {INSTALL}")
    if tasks_folder is not None and not tasks_folder.is_dir():
        raise ConfigError(f"--tasks-folder {tasks_folder} is not a folder; name one that holds task files (YAML).")
    try:
        if name == "lm-eval":
            from zero_ds.evaluation.suites.lm_eval import LmEval

            return LmEval(tasks_folder)
        from zero_ds.evaluation.suites.lmms_eval import LmmsEval

        return LmmsEval(tasks_folder)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"a task file in {tasks_folder} is not valid YAML: {reason}") from None
    except (ImportError, RuntimeError) as error:  # a missing dependency, or torchvision of another build than torch
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{name} cannot be imported: {reason}; see docs/evaluation.md") from None


def select_suites(words: str, harness: str = "auto", tasks_folder: Path | None = None) -> list[SelectedSuite]:
    """Returns the suites that `--suite` asks for.

    words: Name of a suite, or names of tasks separated by commas, of one harness or of both. harness: Where tasks are
    looked up; `auto` looks in lm-eval first. tasks_folder: Folder with further task files.

    Raises:
        ConfigError: a harness is unknown or not installed, or no harness knows a task; suggests similar names.
    """
    if harness not in ("auto", *MODULES):
        raise ConfigError(f"--harness {harness} is unknown; choose auto, {' or '.join(MODULES)}.")
    if words in SUITES:
        return [_named_suite(SUITES[words], tasks_folder)]
    tasks = list(dict.fromkeys(parse_task(word.strip()) for word in words.split(",") if word.strip()))
    if not tasks:
        raise ConfigError(f"--suite names no task; choose {', '.join(SUITES)}, or name tasks.")
    wanted = list(MODULES) if harness == "auto" else [cast(HarnessName, harness)]
    return _suites_of_tasks(tasks, wanted, tasks_folder)


def _named_suite(suite: Suite, tasks_folder: Path | None) -> SelectedSuite:
    harness = load_harness(suite.harness, tasks_folder)
    for task in suite.tasks:
        if not harness.knows(task.name):
            raise ConfigError(f"this version of {suite.harness} has no task '{task.name}'; name the tasks to run.")
    return SelectedSuite(suite, harness)


def _suites_of_tasks(
    tasks: Sequence[Task], wanted: Sequence[HarnessName], tasks_folder: Path | None
) -> list[SelectedSuite]:
    """Returns one suite for each harness that knows some of the tasks; earlier harnesses take theirs first."""
    installed = [name for name in wanted if _is_installed(name)]
    if not installed:
        raise ConfigError(f"{' and '.join(wanted)} {'is' if len(wanted) == 1 else 'are'} not installed; {INSTALL}")
    remaining = list(tasks)
    selected: list[SelectedSuite] = []
    known = list(SUITES)
    for name in installed:
        harness = load_harness(name, tasks_folder)
        found = tuple(
            task for task in remaining if harness.knows(task.name) and not (task.binary and name == "lm-eval")
        )
        if found:
            label = found[0].label if len(found) == 1 else f"{name}-tasks"
            suite = Suite(re.sub(r"[^\w.-]", "-", label), name, found)
            selected.append(SelectedSuite(suite, harness))
        remaining = [task for task in remaining if task not in found]
        if not remaining:
            return selected
        known += harness.names()
    unknown = remaining[0].name
    missing = [name for name in wanted if name not in installed]
    hint = f" ({', '.join(missing)} is not installed; {INSTALL})" if missing else ""
    raise ConfigError(f"no harness knows the task '{unknown}'{hint}{did_you_mean(unknown, list(dict.fromkeys(known)))}")


def _is_installed(name: HarnessName) -> bool:
    return importlib.util.find_spec(MODULES[name]) is not None
