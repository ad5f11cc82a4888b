"""The tasks of each suite, the harness that runs them, and their settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from zero_ds.runtime.errors import ConfigError

logger = logging.getLogger(__name__)

HarnessName = Literal["lm-eval", "lmms-eval"]
BINARY = ":binary"
"""Suffix of a task's name that makes the prompt ask for yes or no. A graft was never taught short answers."""
BINARY_TASKS = ("mme", "pope")
BINARY_PROMPT = "\nAnswer the question with Yes or No."
"""lmms-eval's own wording of the binary prompt, from MME."""


@dataclass(frozen=True)
class Task:
    """A task, by the name that its harness gives it."""

    name: str
    num_fewshot: int | None = None
    """Number of examples in the prompt; None keeps the harness's own number."""
    metric: str | None = None
    """Metric to report, by its name in the harness; None reports all of them."""
    binary: bool = False
    """Whether the prompt asks for yes or no."""

    @property
    def label(self) -> str:
        """Name of the task in results and on the command line."""
        return self.name + BINARY if self.binary else self.name


@dataclass(frozen=True)
class Suite:
    """Tasks of one harness, reported in one result file."""

    name: str
    harness: HarnessName
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class SuiteOptions:
    """How to run a suite. Result files record these settings under the same names."""

    batch_size: int = 8
    limit: int | None = None
    """Number of documents of each task; None takes all of them."""
    max_new_tokens: int | None = None
    """Length limit of answers, in tokens, in place of the task's own limit."""
    chat_template: bool | str = False
    """Lets lm-eval wrap its prompts in the chat template; or names the file of a template that replaces the model's."""
    samples: bool = False
    """Keeps prompts and answers in the result."""
    bootstrap: int = 1000
    """Number of resamplings for the standard error of a metric that is not a mean; 0 switches it off."""

    @property
    def template_file(self) -> str | None:
        """File of the chat template that replaces the model's own."""
        return self.chat_template if isinstance(self.chat_template, str) else None


PAPER_TEXT = (
    Task("mmlu", 5, "acc"),
    Task("hellaswag", 10, "acc_norm"),
    Task("arc_easy", 0, "acc_norm"),
    Task("arc_challenge", 25, "acc_norm"),
    Task("winogrande", 5, "acc"),
    Task("piqa", 0, "acc_norm"),
    Task("boolq", 0, "acc"),
    Task("openbookqa", 0, "acc_norm"),
)
"""Table A.3 of the paper."""
WITHOUT_JUDGE = (
    Task("mme"),
    Task("mme", binary=True),
    Task("pope"),
    Task("pope", binary=True),
    Task("seedbench"),
    Task("mmbench_en_dev_static"),
    Task("gqa"),
    Task("vizwiz_vqa_val"),
    Task("cv_bench_2d"),  # the paper's two parts, whose mean is its average; cv_bench has both, weighted by questions
    Task("cv_bench_3d"),
)
JUDGED = (Task("mmvet"), Task("llava_in_the_wild"))
"""Tasks whose answers another model judges; they need an API key."""
JUDGE = "gpt-4o-2024-11-20"
"""Model that lmms-eval 0.7.3 asks unless MODEL_VERSION names another."""
API_KEYS = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}
"""Variable with the key of the judge, by lmms-eval's API_TYPE."""
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("text", "lm-eval", PAPER_TEXT),
        Suite("paper-text", "lm-eval", PAPER_TEXT),
        Suite("vision", "lmms-eval", WITHOUT_JUDGE),
        Suite("paper-vision", "lmms-eval", (*WITHOUT_JUDGE, *JUDGED)),
    )
}


def needs_judge(name: str) -> bool:
    """Returns whether lmms-eval's task of this name asks another model about answers.

    MMBench does so about answers in which it finds no letter. Without a key it tries for minutes and then draws a
    letter at random. Its tasks named `_static` look for a letter and count an answer without one as wrong.
    """
    return name in {task.name for task in JUDGED} or (name.startswith("mmbench") and not name.endswith("_static"))


def check_judge(names: Sequence[str], environment: Mapping[str, str]) -> None:
    """Checks that the judge of these tasks of lmms-eval can be asked, and logs which model it is.

    Raises:
        ConfigError: a task needs a judge, and the key for its API is not set.
    """
    judged = [name for name in names if needs_judge(name)]
    if not judged:
        return
    judge, kind = environment.get("MODEL_VERSION", JUDGE), environment.get("API_TYPE", "openai")
    key = API_KEYS.get(kind, API_KEYS["openai"])
    if not environment.get(key):
        instead = "; mmbench_en_dev_static needs no judge" * any(name.startswith("mmbench") for name in judged)
        raise ConfigError(
            f"{', '.join(judged)}: the model {judge} judges the answers (MODEL_VERSION names another), and {key} is "
            f"not set; set it, or leave the task out{instead}."
        )
    logger.info("%s judges the answers to %s", judge, ", ".join(judged))


def parse_task(label: str) -> Task:
    """Returns the task of a label, which may end in `:binary`.

    Raises:
        ConfigError: `:binary` is given for a task with answers other than yes or no.
    """
    name = label.removesuffix(BINARY)
    binary = name != label
    if binary and name not in BINARY_TASKS:
        raise ConfigError(
            f"{BINARY} is for {' and '.join(BINARY_TASKS)}, which have yes-or-no answers; leave it out for {name}."
        )
    return Task(name, binary=binary)
