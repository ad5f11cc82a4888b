"""Set-up of all tests: no network, no cache outside the session's folder, no accelerator, tiny models built once."""

# ruff: noqa: E402 - the environment is set before any library reads it
from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_SESSION = tempfile.TemporaryDirectory(prefix="zero_ds-tests-")
# set before any library reads them; processes that tests start inherit them
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=f"{_SESSION.name}/huggingface",
    HF_DATASETS_CACHE=f"{_SESSION.name}/datasets",
    HYPOTHESIS_STORAGE_DIRECTORY=f"{_SESSION.name}/hypothesis",
    XDG_CACHE_HOME=f"{_SESSION.name}/cache",
    MPLCONFIGDIR=os.environ.get("MPLCONFIGDIR", f"{Path.home()}/.cache/matplotlib"),  # its list of fonts
    DS_ACCELERATOR="cpu",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    # only tests of compilation compile, and loading the compiler takes a second of every rank
    TORCHDYNAMO_DISABLE="0" if "TEST_COMPILE" in os.environ else "1",
    TRANSFORMERS_VERBOSITY="error",
)

import pace

# inherited by processes that tests start: a rank that is slow on a busy machine must not count as dead
os.environ.setdefault("ZERO_DS_SILENCE", str(round(pace.scaled(30))))

import pytest
import tiny
import torch
from hypothesis import HealthCheck, settings

from zero_ds.config.schema import RunConfig

torch.set_num_threads(1)

settings.register_profile(
    "zero_ds", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("zero_ds")


LONG = ("failure", "nodes", "pipeline", "kill", "engine", "vision_suites", "mixed", "real_model", "export", "distill")
LONG += ("plan", "train", "packing", "recipes", "text_suites", "pains")
"""Files that take longest. They run first, so that no worker is left with one of them at the end."""

_STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the slow tier: tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow(reason): test of the slow tier, which --all runs; give the reason")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("slow"):
            if mark.args or set(mark.kwargs) != {"reason"} or not str(mark.kwargs["reason"]).strip():
                raise pytest.UsageError(f"{item.nodeid}: a slow test needs a reason; mark it as slow(reason=...)")
            if not config.getoption("--all"):
                item.add_marker(pytest.mark.skip(reason=f"slow tier (--all): {mark.kwargs['reason']}"))
        # of two timeout marks the first one counts
        own = item.get_closest_marker("timeout")
        if own or config.getoption("timeout") is None:
            seconds = float(own.args[0] if own else config.getini("timeout"))
            item.add_marker(pytest.mark.timeout(pace.scaled(seconds)), append=False)
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Records the duration of a whole run, from which launch/test.sh estimates the next one."""
    whole = not (config.getoption("keyword") or config.getoption("markexpr") or config.option.file_or_dir)
    if whole and exitstatus == pytest.ExitCode.OK:
        tests = len(terminalreporter.stats.get("passed", []))
        pace.note_run("all" if config.getoption("--all") else "default", time.monotonic() - _STARTED, tests)


def pytest_unconfigure() -> None:
    _SESSION.cleanup()


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Restores signal handlers after every test, because commands set them for the rest of their process.

    A process that a later test forks would inherit a handler that raises. Ended by SIGTERM, it would continue as a
    second pytest, and the first one would wait for it.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Removes the logging set-up of commands after every test."""
    yield
    package = logging.getLogger("zero_ds")
    package.handlers.clear()
    package.propagate = True
    package.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made("llama", tied=True)`, `made("clip")`: read-only folder of a tiny model, which is built on first use."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str, **options: object) -> Path:
        builders = {**tiny.FAMILIES, **tiny.VARIANTS, **tiny.ENCODERS}
        assert name in builders, f"tests/support/tiny.py has no builder for '{name}'; add one to FAMILIES or ENCODERS"
        folder = root / "-".join([name, *(f"{key}={value}" for key, value in sorted(options.items()))])
        if not folder.exists():
            builders[name](folder, **options)
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer() -> object:
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a LLaVA JSON file of eight samples: six with an image, and two with text only."""
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def small(made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a surrogate of the tiny tied Llama, in which a translator each replaces layers 1..2 and 3..4."""
    from zero_ds.model.layer_plan import Replaced
    from zero_ds.surrogate.build import build_surrogate

    out = tmp_path_factory.mktemp("surrogates") / "small"
    build_surrogate(made("llama", tied=True), [Replaced(1, 2), Replaced(3, 4)], out)
    return out


@pytest.fixture(scope="session")
def run_config(
    made: Callable[..., Path], small: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    """`run_config("pretrain", out, seed=3)`: config of a float32 run of a few seconds on the tiny models."""
    nowhere = tmp_path_factory.mktemp("runs")

    def make(stage: str, out: Path | None = None, **changes: object) -> RunConfig:
        base: dict[str, object] = {
            "stage": stage,
            "target": str(made("llama", tied=True)),
            "surrogate": str(small),
            "encoder": {"path": str(made("clip"))},
            "data": {"sources": [{"path": str(data)}], "max_length": 512, "system_prompt": ""},
            "optimizer": {"learning_rate": 1e-2},
            "global_batch": 4,
            "micro_batch": 1,
            "max_steps": 6,
            "precision": "fp32",
            "activation_checkpointing": False,  # a third of a tiny model's step; test_engine and test_mixed enable it
            "zero": "zero2",
            "out": str(out or nowhere),
        }
        return RunConfig.model_validate({**base, **changes})

    return make


@pytest.fixture(scope="session")
def trained(run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with two finished runs: `pretrain`, and `encoder`, which started from it."""
    from distributed_helper import run_ranks, train_all

    root = tmp_path_factory.mktemp("trained")
    configs = [
        run_config("pretrain", root / "pretrain", max_steps=2),
        run_config("encoder", root / "encoder", max_steps=2, init_from=[str(root / "pretrain")]),
    ]
    assert run_ranks(train_all, 1, configs) == [["step-000002", "step-000002"]]
    return root
