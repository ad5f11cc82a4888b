"""Which tasks a suite has, in which harness, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zero_ds.runtime.errors import ConfigError

Harness = Literal["lm-eval", "lmms-eval"]
BINARY = ":binary"
"""Behind a task's name: ask for yes or no in the prompt, which a graft, never taught short answers, needs."""
BINARY_TASKS = ("mme", "pope")
BINARY_PROMPT = "\nAnswer the question with Yes or No."
"""lmms-eval's own wording of it for MME."""


@dataclass(frozen=True)
class Task:
    """A task under its name in its harness."""

    name: str
    num_fewshot: int | None = None
    """Examples in the prompt; None leaves the harness's own number."""
    metric: str | None = None
    """The figure that counts, by its name in the harness; None counts all."""
    binary: bool = False
    """Whether the prompt asks for yes or no."""

    @property
    def label(self) -> str:
        return self.name + BINARY * self.binary


@dataclass(frozen=True)
class Suite:
    """Tasks of one harness; one result file."""

    name: str
    harness: Harness
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Request:
    """How to run a suite."""

    batch_size: int = 8
    limit: int | None = None
    """Documents of each task; None takes all."""
    max_new_tokens: int | None = None
    """In place of a task's own limit."""
    chat_template: bool = False
    samples: bool = False
    """Whether to keep prompts and answers."""
    bootstrap: int = 1000
    """Resamplings for the standard error of a figure that is no mean; 0: none."""


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
    Task("mmbench_en_dev"),
    Task("gqa"),
    Task("vizwiz_vqa_val"),
    Task("cv_bench"),
)
JUDGED = (Task("mmvet"), Task("llava_in_the_wild"))
"""Tasks whose answers another model judges; they want an API key."""
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("text", "lm-eval", PAPER_TEXT),
        Suite("paper-text", "lm-eval", PAPER_TEXT),
        Suite("vision", "lmms-eval", WITHOUT_JUDGE),
        Suite("paper-vision", "lmms-eval", (*WITHOUT_JUDGE, *JUDGED)),
    )
}


def parse_task(word: str) -> Task:
    """A task by its name, perhaps with `:binary` behind it.

    Raises:
        ConfigError: `:binary` behind a task whose answers are not yes or no.
    """
    name = word.removesuffix(BINARY)
    if name != word and name not in BINARY_TASKS:
        raise ConfigError(f"{BINARY} is for {' and '.join(BINARY_TASKS)}, whose answers are yes or no, not for {name}.")
    return Task(name, binary=name != word)
