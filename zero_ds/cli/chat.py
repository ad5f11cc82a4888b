"""`zero-ds chat`: a conversation with a model, in the terminal or on a web page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zero_ds.cli.models import DeviceMapOption, EngineOption, OffloadOption, Placing, TensorParallelOption, loaded
from zero_ds.runtime.errors import ConfigError

if TYPE_CHECKING:
    from zero_ds.grafting.chat import Conversation

LOCAL = "127.0.0.1"
HELP = "/image FILE adds an image, /new starts a new conversation, /quit ends."


def chat(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a target, surrogate or export; or a run folder.")],
    target: Annotated[str | None, typer.Option(help="Full language model to graft the run's encoder into.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image that the first question is about; repeatable.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    engine: EngineOption = "transformers",
    tensor_parallel: TensorParallelOption = 1,
    device_map: DeviceMapOption = None,
    offload_folder: OffloadOption = None,
    page: Annotated[
        bool, typer.Option("--page", help="Open a web page on this machine instead of the terminal.")
    ] = False,
    host: Annotated[
        str, typer.Option(help="With --page: address to listen on. Any other address opens the page to other machines.")
    ] = LOCAL,
    port: Annotated[int, typer.Option(help="With --page: port to listen on; 0 takes a free one.")] = 7860,
) -> None:
    """Talk with a model in the terminal or on a web page, about any number of images.

    For a run with --target the page shows two models side by side: the run's own, usually the surrogate, and the graft.

    Example: zero-ds chat runs/quickstart/encoder --target meta-llama/Llama-3.1-8B-Instruct --image photo.jpg
    """
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens}: an answer has at least 1 token.")
    placing = Placing(engine, tensor_parallel, device_map, offload_folder)
    placing.check()
    if page:
        if image:
            raise ConfigError("--image is for the terminal; on the page images are uploaded.")
        if engine != "transformers":
            raise ConfigError("--page wants --engine transformers, whose layers it can read.")
        _page(model, target, dtype, placing, host, port, max_new_tokens=max_new_tokens, system=system)
        return

    from zero_ds.data.images import open_image
    from zero_ds.grafting.engines.vllm import conversation

    pictures = [open_image(path) for path in image or ()]  # before the model is read
    _, found = loaded(model, target, dtype, placing)

    def begin() -> Conversation:
        return conversation(found, max_new_tokens=max_new_tokens, system=system)

    talk = begin()
    for picture in pictures:
        talk.show(picture)
    if sys.stdin.isatty():
        print(HELP)
    while (line := _line()) is not None:
        if line == "/quit":
            break
        elif line == "/new":
            talk = begin()
        elif line.split()[:1] == ["/image"]:
            _show(talk, line.removeprefix("/image").strip())
        elif line.startswith("/"):
            print(f"{line.split()[0]} is not known. {HELP}", file=sys.stderr)
        elif line:
            _say(talk, line)


def _page(model: str, target: str | None, dtype: str, placing: Placing, host: str, port: int, **options: Any) -> None:
    """Serves the page; raises errors of its options before a model is loaded."""
    from zero_ds.grafting import page
    from zero_ds.grafting.named_model import LoadedModel, find_model

    page.check_installed()
    with page.bind(host, port) as server:
        grafted = find_model(model, target).kind == "graft"
        models: dict[str, LoadedModel] = {}
        for into in (None, target) if grafted else (target,):
            named, found = loaded(model, into, dtype, placing)
            kind = "surrogate" if found.model.plan is not None else {"graft": "grafted"}.get(named.kind, named.kind)
            models[f"{kind}: {found.model.plan or named.folder.name}"] = found
        address = f"[{host}]" if ":" in host else host
        print(f"http://{address}:{server.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        page.serve(models, server, **options)


def _line() -> str | None:
    """Returns the next line that is typed; None at the end of the input, or on Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _show(talk: Conversation, path: str) -> None:
    """Adds an image; for a file that is not an image it prints a sentence, and the conversation goes on."""
    from zero_ds.data.images import ImageError

    try:
        if not path:
            raise ConfigError("/image names no file; type one after it.")
        talk.show(path)
    except (ConfigError, ImageError) as error:
        print(f"zero-ds: {error}", file=sys.stderr)


def _say(talk: Conversation, question: str) -> None:
    """Prints the answer while it is generated; Ctrl-C ends the answer."""
    from zero_ds.data.formats import DataError

    try:
        for piece in talk.ask(question):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" ...")
    except DataError as error:
        print(f"zero-ds: {error}", file=sys.stderr)
