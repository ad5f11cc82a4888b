"""Suites on the field's own harnesses, unpatched: text through lm-evaluation-harness, pictures through lmms-eval."""

from __future__ import annotations

import importlib.util
import logging
import re
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, cast

import yaml

from zero_ds.evaluation.suites.results import Measured, Result
from zero_ds.evaluation.suites.suites import SUITES, Harness, Request, Suite, Task, parse_task
from zero_ds.grafting.engines.vllm import engine_setting
from zero_ds.grafting.named_model import LoadedModel, NamedModel
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.training.checkpoint.manifest import versions

logger = logging.getLogger(__name__)

MODULES: dict[Harness, str] = {"lm-eval": "lm_eval", "lmms-eval": "lmms_eval"}
INSTALL = "pip install 'zero_ds[eval]'"


class Backend(Protocol):
    """One harness: its tasks, and what it measures on a model."""

    def knows(self, name: str) -> bool: ...

    def names(self) -> list[str]: ...

    def check(self, tasks: tuple[Task, ...], request: Request) -> None:
        """Reads the tasks' data, on every rank, rank 0 first.

        Raises:
            ConfigError: data that is not in the cache and cannot be fetched, fewer documents than ranks, or a limit
            for answers below one token.
        """

    def measure(self, loaded: LoadedModel, tasks: tuple[Task, ...], request: Request) -> Measured | None:
        """On every rank alike, after `check`; the result on rank 0, None elsewhere."""


@dataclass(frozen=True)
class Planned:
    """A suite whose tasks are known to its harness."""

    suite: Suite
    backend: Backend


def backend(harness: Harness, folder: Path | None) -> Backend:
    """The harness, with the task files of a folder beside its own.

    Raises:
        ConfigError: it is not installed, or there is no such folder.
    """
    if importlib.util.find_spec(MODULES[harness]) is None:
        raise ConfigError(f"{harness} is not installed; {INSTALL}")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--tasks-folder {folder} is no folder.")
    try:
        if harness == "lm-eval":
            from zero_ds.evaluation.suites.text import LmEval

            return LmEval(folder)
        from zero_ds.evaluation.suites.vision import LmmsEval

        return LmmsEval(folder)
    except yaml.YAMLError as error:
        raise ConfigError(f"a task file in {folder} is no YAML: {' '.join(str(error).split())[:300]}") from None
    except (ImportError, RuntimeError) as error:  # a dependency that is missing, or torchvision of another build
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{harness} cannot be imported: {reason}; see docs/evaluation.md") from None


def plan(words: str, harness: str, folder: Path | None) -> list[Planned]:
    """What `--suite` asks for: a suite by its name, or tasks by theirs, of one harness or of both.

    harness: where tasks are looked for; `auto` looks in lm-eval first.

    Raises:
        ConfigError: a harness that is not installed, or a task that none of them knows, with names like it.
    """
    if harness not in ("auto", *MODULES):
        raise ConfigError(f"--harness {harness} is not known; choose auto, {' or '.join(MODULES)}.")
    if words in SUITES:
        suite = SUITES[words]
        found = backend(suite.harness, folder)
        for task in suite.tasks:
            if not found.knows(task.name):
                raise ConfigError(f"this version of {suite.harness} has no task '{task.name}'; choose tasks by name.")
        return [Planned(suite, found)]
    tasks = list(dict.fromkeys(parse_task(word.strip()) for word in words.split(",") if word.strip()))
    if not tasks:
        raise ConfigError(f"--suite names no task; choose {', '.join(SUITES)}, or tasks.")
    wanted = list(MODULES) if harness == "auto" else [cast(Harness, harness)]
    installed = [name for name in wanted if importlib.util.find_spec(MODULES[name])]
    if not installed:
        raise ConfigError(f"{' and '.join(wanted)} {'is' if len(wanted) == 1 else 'are'} not installed; {INSTALL}")
    planned: list[Planned] = []
    backends = []
    for name in installed:
        here = backend(name, folder)
        backends.append(here)
        mine = tuple(task for task in tasks if here.knows(task.name) and not (task.binary and name == "lm-eval"))
        tasks = [task for task in tasks if task not in mine]
        if mine:
            label = mine[0].label if len(mine) == 1 else f"{name}-tasks"
            planned.append(Planned(Suite(re.sub(r"[^\w.-]", "-", label), name, mine), here))
        if not tasks:
            return planned
    known = list(dict.fromkeys([*SUITES, *(name for here in backends for name in here.names())]))
    absent = [name for name in wanted if name not in installed]
    more = f" ({', '.join(absent)} is not installed; {INSTALL})" if absent else ""
    raise ConfigError(f"no harness knows the task '{tasks[0].name}'{more}{did_you_mean(tasks[0].name, known)}")


def check_suite(named: NamedModel, planned: Planned, request: Request) -> None:
    """What can be known to fail before the model is read. On every rank alike.

    Raises:
        ConfigError: as `Backend.check`, or a model without a vision encoder for a suite with pictures.
    """
    if planned.suite.harness == "lmms-eval" and not named.sees:
        raise ConfigError(f"{named.name} has no vision encoder; name a run, with --target for its graft, or an export.")
    planned.backend.check(planned.suite.tasks, request)


def evaluate_suite(
    named: NamedModel, loaded: LoadedModel, planned: Planned, request: Request, label: str
) -> Result | None:
    """Runs a suite, once `check_suite` has passed, on this rank's share of its documents.

    Returns the result on rank 0, None elsewhere.

    Raises:
        ConfigError: a picture that cannot be read.
    """
    suite = planned.suite
    started = time.monotonic()
    measured = planned.backend.measure(loaded, suite.tasks, request)
    if measured is None:
        return None
    parameter = next(loaded.model.decoder.parameters())
    setting = {
        **asdict(request),
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
