"""`zero-ds`: the list of commands, and what all of them have in common.

Every command has a module of its own in this package, which parses, calls the packages, and prints. These modules
import what computes only when their command runs, so that `zero-ds --help` answers at once.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from types import FrameType

import typer

from zero_ds.cli.align import align
from zero_ds.cli.chat import chat
from zero_ds.cli.checkpoints import consolidate, export_lora, import_released
from zero_ds.cli.data import data
from zero_ds.cli.demo import demo
from zero_ds.cli.doctor import doctor
from zero_ds.cli.evaluate import evaluate
from zero_ds.cli.export import export
from zero_ds.cli.graft import graft
from zero_ds.cli.init import init
from zero_ds.cli.models import models
from zero_ds.cli.pipeline import pipeline
from zero_ds.cli.plan import plan
from zero_ds.cli.profile import profile
from zero_ds.cli.quickstart import quickstart
from zero_ds.cli.recipes import recipes
from zero_ds.cli.report import report
from zero_ds.cli.status import status
from zero_ds.cli.surrogate import surrogate
from zero_ds.cli.train import train
from zero_ds.cli.trajectory import trajectory
from zero_ds.cli.translate import translate
from zero_ds.cli.why import why
from zero_ds.runtime.console import set_up_logging
from zero_ds.runtime.environment import may_have_gpu, take_devices
from zero_ds.runtime.errors import may_pass
from zero_ds.runtime.failure import WATCH, peer_ended
from zero_ds.runtime.files import disk_sentence, home_path
from zero_ds.runtime.trust import allow_code

app = typer.Typer(
    name="zero-ds",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find where a language model's early phase ends, cut a small surrogate there, train a vision encoder against "
    "it with DeepSpeed, and graft the encoder into the full model.",
)

METHOD = "The method, step by step"
CHAINS = "The whole method in one command"
PREPARATION = "Before and during a run"
RESULTS = "Results"
CHECKPOINTS = "Checkpoints"

app.command("trajectory", rich_help_panel=METHOD)(trajectory)
app.command("surrogate", rich_help_panel=METHOD)(surrogate)
app.command("align", rich_help_panel=METHOD)(align)
app.command("translate", rich_help_panel=METHOD)(translate)
app.command("train", rich_help_panel=METHOD)(train)
app.command("graft", rich_help_panel=METHOD)(graft)
app.command("export", rich_help_panel=METHOD)(export)
app.command("demo", rich_help_panel=CHAINS)(demo)
app.command("quickstart", rich_help_panel=CHAINS)(quickstart)
app.command("pipeline", rich_help_panel=CHAINS)(pipeline)
app.command("init", rich_help_panel=PREPARATION)(init)
app.command("recipes", rich_help_panel=PREPARATION)(recipes)
app.add_typer(data, name="data", rich_help_panel=PREPARATION)
app.command("plan", rich_help_panel=PREPARATION)(plan)
app.command("models", rich_help_panel=PREPARATION)(models)
app.command("profile", rich_help_panel=PREPARATION)(profile)
app.command("doctor", rich_help_panel=PREPARATION)(doctor)
app.command("status", rich_help_panel=PREPARATION)(status)
app.command("why", rich_help_panel=PREPARATION)(why)
app.add_typer(evaluate, name="eval", rich_help_panel=RESULTS)
app.command("chat", rich_help_panel=RESULTS)(chat)
app.command("report", rich_help_panel=RESULTS)(report)
app.command("consolidate", rich_help_panel=CHECKPOINTS)(consolidate)
app.command("import-released", rich_help_panel=CHECKPOINTS)(import_released)
app.command("export-lora", rich_help_panel=CHECKPOINTS)(export_lora)

LAUNCHING = ("doctor", "pipeline")
"""Commands that may start ranks on other machines. Their environment is forwarded, so a machine without a GPU must not
set DS_ACCELERATOR=cpu for all of them."""


@app.callback()
def _before_every_command(context: typer.Context) -> None:
    if context.invoked_subcommand not in LAUNCHING and not may_have_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where a GPU may be, DeepSpeed finds out if torch can use it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    allow_code(False)  # one command's permission is not the next one's
    set_up_logging()


def train_module() -> None:
    """Runs `deepspeed --module zero_ds.train RECIPE key=value ...`, which passes each rank a --local_rank as well."""
    take_devices()
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(["train", *arguments])


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. For an error that the user can fix, prints one sentence to stderr and exits with status 2."""
    atexit.register(_leave_garbage)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # raises instead, so that half-written files are removed
            signal.signal(number, _end)
    try:
        app(args=[_with_home(word) for word in (sys.argv[1:] if arguments is None else arguments)])
    except Exception as error:
        sentence = _sentence(error)
        if peer_ended(error):
            WATCH.record(WATCH.heard(wait=0.0))
        else:
            final = sentence is not None and not may_pass(error)
            WATCH.fail(sentence or f"{type(error).__name__}: {error}", final=final)
        WATCH.leave(status=2)
        if sentence is None:
            raise
        print(f"zero-ds: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        # importing it would load torch; a command that has not imported it has not joined a process group
        distributed = sys.modules.get("zero_ds.runtime.distributed")
        if distributed is not None:
            distributed.shutdown()


def _with_home(word: str) -> str:
    """Returns `--option=~/path` with the home folder in place of `~`, which a shell leaves there."""
    option, equals, value = word.partition("=")
    is_path = word.startswith("--") and equals and (value == "~" or value.startswith("~/"))
    return f"{option}={home_path(value)}" if is_path else word


def _leave_garbage() -> None:
    """Keeps Python from searching all of torch for garbage when it exits, which takes seconds.

    With Triton (3.9) the search has to take place: Triton prints a page about objects that were never collected.
    """
    if "triton._C.libtriton" not in sys.modules:
        gc.freeze()


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _sentence(error: Exception) -> str | None:
    """Returns the sentence that tells a user about an error without a traceback; None for an error that needs one."""
    if isinstance(error, FloatingPointError):
        return str(error)
    if isinstance(error, ValueError) and type(error).__module__.split(".")[0] == "zero_ds":
        return str(error)
    if peer_ended(error):
        return f"this rank ends because of another: {WATCH.heard(wait=5.0)}"
    return disk_sentence(error)
