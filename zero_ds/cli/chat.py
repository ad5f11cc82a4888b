"""`zero-ds chat`: a conversation with a model, in the terminal or on a web page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zero_ds.cli.options import (
    ChatTemplateOption,
    DeviceMapOption,
    DeviceOptions,
    EngineOption,
    MaxModelLenOption,
    MemoryShareOption,
    OffloadOption,
    TensorParallelOption,
    TrustRemoteCodeOption,
    load,
)
from zero_ds.runtime.errors import ConfigError

if TYPE_CHECKING:
    from zero_ds.grafting.chat import Conversation

ModelName = tuple[str, str | None, str | None]
"""MODEL, --target and --chat-template."""
LOCAL = "127.0.0.1"
PORT = 7860
HELP = "/image FILE shows an image, /new begins a new conversation, /quit ends the chat."


def chat(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a target, surrogate or export; or a run folder.")],
    target: Annotated[str | None, typer.Option(help="Full language model to graft the run's encoder into.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image that the first question is about; repeatable.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    chat_template: ChatTemplateOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    engine: EngineOption = "transformers",
    tensor_parallel: TensorParallelOption = 1,
    device_map: DeviceMapOption = None,
    offload_folder: OffloadOption = None,
    max_model_len: MaxModelLenOption = None,
    gpu_memory_share: MemoryShareOption = None,
    page: Annotated[
        bool, typer.Option("--page", help="Open a web page on this machine instead of the terminal.")
    ] = False,
    host: Annotated[
        str, typer.Option(help="With --page: address to listen on. Any other address opens the page to other machines.")
    ] = LOCAL,
    port: Annotated[int, typer.Option(help="With --page: port to listen on; 0 takes a free one.")] = PORT,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Talk with a model in the terminal or on a web page, about any number of images.

    For a run with --target the page shows two models side by side: the run's own, usually the surrogate, and the graft.

    Example: zero-ds chat runs/quickstart/encoder --target meta-llama/Llama-3.1-8B-Instruct --image photo.jpg
    """
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens}: an answer needs room for at least 1 token.")
    options = DeviceOptions(engine, tensor_parallel, device_map, offload_folder, max_model_len, gpu_memory_share)
    options.check()
    answers: dict[str, Any] = {"max_new_tokens": max_new_tokens, "system": system}
    if page:
        if image:
            raise ConfigError("--image is for the terminal; on the page, upload images.")
        if engine != "transformers":
            raise ConfigError("--page needs --engine transformers, whose layers it can read.")
        _show_page((model, target, chat_template), dtype, options, host, port, **answers)
    else:
        _talk_in_terminal((model, target, chat_template), dtype, options, image or [], **answers)


def _show_page(name: ModelName, dtype: str, options: DeviceOptions, host: str, port: int, **answers: Any) -> None:
    """Serves the page. Everything that could prevent it is checked before the models are loaded."""
    from zero_ds.grafting import page

    page.check_installed()
    with page.bind(host, port) as server:
        models = page.load_models(*name, dtype, options)
        address = f"[{host}]" if ":" in host else host
        print(f"http://{address}:{server.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        page.serve(models, server, **answers)


def _talk_in_terminal(name: ModelName, dtype: str, options: DeviceOptions, paths: list[Path], **answers: Any) -> None:
    from zero_ds.data.images import open_image
    from zero_ds.grafting.engines.vllm import conversation
    from zero_ds.grafting.named_model import find_model

    for path in paths:
        open_image(path)  # a damaged one is an error before the model is loaded
    loaded = load(find_model(*name), dtype, options)
    talk = conversation(loaded, **answers)
    for path in paths:
        talk.show(path)
    if sys.stdin.isatty():
        print(HELP)
    while (line := _read_line()) is not None:
        if line == "/quit":
            break
        if line == "/new":
            talk = conversation(loaded, **answers)
        elif line.split()[:1] == ["/image"]:
            _show_image(talk, line.removeprefix("/image").strip())
        elif line.startswith("/"):
            print(f"{line.split()[0]} is not known. {HELP}", file=sys.stderr)
        elif line:
            _answer(talk, line)


def _read_line() -> str | None:
    """Returns the next line that the user types; None at the end of the input, or after Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _show_image(talk: Conversation, path: str) -> None:
    """Adds an image. If it cannot be used, prints why; the conversation continues."""
    from zero_ds.data.images import ImageError

    try:
        if not path:
            raise ConfigError("/image names no file; type its path after the word.")
        talk.show(path)
    except (ConfigError, ImageError) as error:
        print(f"zero-ds: {error}", file=sys.stderr)


def _answer(talk: Conversation, question: str) -> None:
    """Prints the answer while it is generated. Ctrl-C ends the answer."""
    from zero_ds.data.formats import DataError

    try:
        for piece in talk.ask(question):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" ...")
    except DataError as error:
        print(f"zero-ds: {error}", file=sys.stderr)
