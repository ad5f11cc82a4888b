"""`zero-ds`: the commands. This file parses and reports; the work is in the modules it calls."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from zero_ds.cli.chat import chat
from zero_ds.cli.checkpoints import consolidate, export_lora, import_released
from zero_ds.cli.data import data
from zero_ds.cli.demo import demo
from zero_ds.cli.doctor import doctor
from zero_ds.cli.evaluate import evaluate
from zero_ds.cli.export import export
from zero_ds.cli.graft import graft
from zero_ds.cli.pipeline import pipeline
from zero_ds.cli.plan import plan
from zero_ds.cli.quickstart import quickstart
from zero_ds.cli.report import report
from zero_ds.cli.surrogate import surrogate
from zero_ds.cli.trajectory import trajectory
from zero_ds.runtime.failure import WATCH, peer_ended

app = typer.Typer(
    name="zero-ds",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find where a language model's early phase ends, cut a small surrogate there, train a vision encoder against "
    "it with DeepSpeed, and graft the encoder into the full model.",
)
logger = logging.getLogger("zero_ds.cli")

STARTING = ("doctor", "pipeline")
"""Commands whose processes run on other machines, too: what this one has must not decide what those compute on."""

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings as key=value, e.g. zero=zero2 optimizer.learning_rate=1e-4.")
]


@app.callback()
def _every_command(context: typer.Context) -> None:
    if context.invoked_subcommand not in STARTING:
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_cuda() else "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from zero_ds.runtime.console import set_up_logging

    set_up_logging()


def _has_cuda() -> bool:
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe such as smollm2-135m/encoder, or a YAML file.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and stop.")] = False,
) -> None:
    """Train one stage on this process alone; launch/train.sh starts it on all devices or on many machines."""
    from zero_ds.config.loading import load_run

    config = load_run(recipe, overrides)
    if dry_run:
        import json

        from zero_ds.data.loader import check_batches
        from zero_ds.runtime import distributed
        from zero_ds.training import stages
        from zero_ds.training.deepspeed import ds_config

        stage = stages.stage_of(config)
        world = distributed.world_size()
        check_batches(config, world)
        print(config.dump().rstrip())
        print(
            f"# trains {', '.join(stages.trained_parts(config))} against {stages.decoder_folder(config)} ({stage.name})"
        )
        print("# DeepSpeed: " + json.dumps(ds_config(config, world)))
        return
    from zero_ds.training.train import train as run

    run(config)


@app.command()
def recipes() -> None:
    """List the recipes in the package and the DeepSpeed configs beside them."""
    from zero_ds.config.loading import recipe_names
    from zero_ds.training.deepspeed import ds_config_names

    print("\n".join(recipe_names()))
    print(f"zero= {' '.join(ds_config_names())}")


@app.command()
def why(
    recipe: Annotated[str, typer.Argument(help="Recipe or YAML file of the run.")], overrides: Overrides = None
) -> None:
    """Say why the last attempt at a run failed, on whichever rank that was."""
    from zero_ds.config.loading import load_run
    from zero_ds.runtime import failure

    out = Path(load_run(recipe, overrides).out)
    print(failure.read(out) or f"{out} has not failed.")


app.command("plan")(plan)
app.command("trajectory")(trajectory)
app.command("surrogate")(surrogate)
app.command("graft")(graft)
app.command("export")(export)
app.command("export-lora")(export_lora)
app.command("import-released")(import_released)
app.command("consolidate")(consolidate)
app.add_typer(evaluate, name="eval")
app.command("chat")(chat)
app.command("report")(report)
app.command("demo")(demo)
app.command("doctor")(doctor)
app.add_typer(data, name="data")
app.command("quickstart")(quickstart)
app.command("pipeline")(pipeline)


def train_module() -> None:
    """Entry point of `deepspeed --module zero_ds.train RECIPE key=value ...`."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(["train", *arguments])


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; what a user can mend ends as one sentence on stderr and exit status 2."""
    atexit.register(_leave_garbage)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # an exception, so that nothing half-written stays behind
            signal.signal(number, _end)
    try:
        app(args=arguments, standalone_mode=True)
    except Exception as error:
        sentence = _sentence(error)
        if peer_ended(error):
            WATCH.record(WATCH.heard(wait=0.0))
        else:
            WATCH.fail(sentence or f"{type(error).__name__}: {error}", final=sentence is not None)
        WATCH.leave(status=2)
        if sentence is None:
            raise
        print(f"zero-ds: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        # it loads torch; where it was not imported, no process group was joined
        if distributed := sys.modules.get("zero_ds.runtime.distributed"):
            distributed.shutdown()


def _leave_garbage() -> None:
    """Or Python, on its way out, looks through all of torch for garbage, for seconds.

    Not with Triton (3.9), which prints a page about what nobody collected.
    """
    if "triton._C.libtriton" not in sys.modules:
        gc.freeze()


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _sentence(error: Exception) -> str | None:
    """What a user is told of an error that needs no traceback; None for any other."""
    if isinstance(error, FloatingPointError):
        return str(error)
    if isinstance(error, ValueError) and type(error).__module__.split(".")[0] == "zero_ds":
        return str(error)
    if peer_ended(error):
        return f"this rank ends because of another: {WATCH.heard(wait=5.0)}"
    return _disk_sentence(error)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def _disk_sentence(error: Exception) -> str | None:
    """What is said of a full disk or a closed place; None for any other error."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.strerror}: {error.filename or 'while writing'}; free some space and run again."
    if isinstance(error, OSError) and error.errno in _CLOSED:
        return f"{error.strerror}: {error.filename or 'while writing'}; choose another place."
    if "No space left on device" in str(error):  # of a writer that is not Python: safetensors, Arrow
        return "No space left on device; free some space and run again."
    return None
