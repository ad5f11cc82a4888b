"""`zero-ds chat --page`: a web page with the answers of one or several models side by side, and their trajectory.

The page is Gradio's, served by uvicorn on a socket that this module binds, so that Gradio neither looks for another
port, nor asks a server of its own for the newest version, nor offers a link to share. Uploads lie in a folder that ends
with the process, and no file outside of it is served.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from zero_ds.data.formats import DataError
from zero_ds.data.images import ImageError, open_image
from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.named_model import LoadedModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.answers import draw

logger = logging.getLogger(__name__)

PORT = 7860
LARGEST = "64mb"
"""Of an uploaded file."""
KEPT = 3600
"""Seconds that a visitor's conversation, its caches among it, is kept after the last answer, and uploads on disk."""
FONTS = ("system-ui", "sans-serif")
"""The reader's own: a page that fetches none."""

CSS = "button[aria-label=Share], [id^=chat-] button[aria-label=Clear] { display: none !important; }"
"""Gradio's button that publishes a picture, and the one that empties a chat without ending its conversation."""


@dataclass
class Visit:
    """One visitor's conversations, by model, and what the page shows of them."""

    talks: dict[str, Conversation]
    alone: threading.Lock
    """Held while a model computes: its layers are tapped while a trajectory is read, and a stopped answer may still be
    at its last word when somebody else's turn comes."""
    shown: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Gradio's messages: role and content."""

    def ask(self, question: str, files: Sequence[str | Path]) -> Iterator[str]:
        """Asks every model, then has one after the other answer; yields the name of the one whose `shown` has grown.

        Whoever stops listening leaves the answers as far as they came; all models have heard the question.

        Raises:
            DataError: an empty question, or a conversation that has become too long. ImageError: a picture that is
            none. ConfigError: pictures for a model without a vision encoder. No model has heard the question then.
        """
        if not question.strip():
            raise DataError("the question is empty; type one, pictures alone are not answered.")
        pictures = [_opened(Path(file)) for file in files]
        first = next(iter(self.talks.values()))
        with self.alone:
            features = [first.features(picture) for picture in pictures]
        answers: dict[str, Iterator[str]] = {}
        try:
            for name, talk in self.talks.items():
                for picture in features:
                    talk.show_features(picture)
                answers[name] = talk.ask(question)
        except DataError:
            for name, talk in self.talks.items():
                if name in answers:
                    talk.unask()
                talk.withdraw()
            raise
        for name in answers:
            messages = self.shown.setdefault(name, [])
            messages += [{"role": "user", "content": {"path": str(file)}} for file in files]
            messages += [{"role": "user", "content": question}]
        yield from answers
        for name, pieces in answers.items():
            answer = {"role": "assistant", "content": ""}
            self.shown[name].append(answer)
            while (piece := self._next(pieces)) is not None:
                answer["content"] += piece
                yield name

    def _next(self, pieces: Iterator[str]) -> str | None:
        with self.alone:
            return next(pieces, None)

    def trajectory(self, name: str) -> Image.Image:
        """The picture of the trajectory of a model's last answer.

        Raises:
            DataError: nothing has been answered yet.
        """
        with self.alone:
            found = self.talks[name].trajectory()
        return draw(found, f"{name}: {len(found.divergences)} layers, prediction of each at the answer's tokens")


def _opened(file: Path) -> Image.Image:
    """A picture; what is wrong with it is said by its name alone, not by the upload folder's."""
    try:
        return open_image(file)
    except ImageError as error:
        raise ImageError(str(error).replace(str(file), file.name)) from None


def build(models: Mapping[str, LoadedModel], *, max_new_tokens: int = 256, system: str | None = None) -> Any:
    """The page as gradio.Blocks; uploads go to the folder that GRADIO_TEMP_DIR names now.

    models: by the names under which they answer; all see, or none does.

    API names: /ask (message, name of the model whose trajectory is shown), /trajectory (name), /new.
    """
    import gradio as gr

    names = list(models)
    sees = all(model.encoder.processor is not None for model in models.values())

    alone = threading.Lock()

    def begin() -> Visit:
        talks = {n: Conversation(m, max_new_tokens=max_new_tokens, system=system) for n, m in models.items()}
        return Visit(talks, alone)

    @contextmanager
    def sentences() -> Iterator[None]:
        """What a visitor can mend is shown on the page in its sentence."""
        try:
            yield
        except (ConfigError, DataError, ImageError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def ask(message: Mapping[str, Any], of: str, visit: Visit | None) -> Iterator[tuple[Any, ...]]:
        visit = begin() if visit is None else visit
        nothing = gr.skip()
        with sentences():
            for grown in visit.ask(str(message.get("text") or ""), message.get("files") or ()):
                histories = [list(visit.shown[name]) if name == grown else nothing for name in names]
                yield gr.MultimodalTextbox(value=None, interactive=False), visit, *histories, nothing
            yield nothing, visit, *(list(visit.shown[name]) for name in names), visit.trajectory(of)

    def trajectory(of: str, visit: Visit | None) -> Any:
        if visit is None:
            return None
        with sentences():
            return visit.trajectory(of)

    def new() -> tuple[Any, ...]:
        return gr.MultimodalTextbox(value=None, interactive=True), None, *[[] for _ in names], None

    with gr.Blocks(title="zero_ds", analytics_enabled=False, delete_cache=(KEPT, KEPT), fill_width=True) as page:
        visit = gr.State(None, time_to_live=KEPT)
        with gr.Row():
            chats = [
                gr.Chatbot(
                    label=name,
                    elem_id=f"chat-{number}",
                    height=320,
                    render_markdown=False,  # an answer is shown as it is
                    buttons=["copy"],
                    feedback_options=None,
                    allow_file_downloads=False,
                )
                for number, name in enumerate(names)
            ]
        box = gr.MultimodalTextbox(
            sources=["upload"] if sees else [],
            file_types=["image"],
            file_count="multiple",
            placeholder="Ask about the pictures you add, or about anything." if sees else "Ask anything.",
            show_label=False,
            autofocus=True,
            elem_id="question",
        )
        _uploads_alone(box)
        with gr.Row():
            of = gr.Radio(names, value=names[-1], label="Trajectory of the last answer of", visible=len(names) > 1)
            stop = gr.Button("Stop", scale=0)
            fresh = gr.Button("New conversation", scale=0, min_width=200)
        picture = gr.Image(
            label="Prediction trajectory of the answer", format="png", buttons=["fullscreen"], elem_id="trajectory"
        )
        # one at a time, whoever asks
        turns: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
        asked = box.submit(ask, [box, of, visit], [box, visit, *chats, picture], api_name="ask", **turns)

        def ready() -> Any:
            return gr.MultimodalTextbox(interactive=True)

        asked.then(ready, None, box, api_visibility="private")  # also if it fails
        stop.click(ready, None, box, cancels=[asked], queue=False, api_visibility="private")
        of.change(trajectory, [of, visit], picture, api_name="trajectory", **turns)
        fresh.click(new, None, [box, visit, *chats, picture], api_name="new", **turns)
    return page


def _uploads_alone(box: Any) -> None:
    """Keeps this machine from fetching what a visitor gives an address of."""
    import gradio as gr

    keep = box.async_move_resource_to_block_cache

    async def kept(path: str | Path | None) -> Any:
        if "://" in str(path):
            raise gr.Error("pictures are uploaded, none is fetched from an address.", print_exception=False)
        return await keep(path)

    box.async_move_resource_to_block_cache = kept


class _SameOrigin:
    """Turns requests away that a page of another origin makes: a browser sends it a visitor's uploads, too."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        answer = self._app
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            origin = headers.get(b"origin")
            if origin is not None and origin.split(b"://")[-1] != headers.get(b"host"):
                answer = PlainTextResponse("this page answers to no other one.", status_code=403)
        await answer(scope, receive, send)


def check_installed() -> None:
    """Raises ConfigError where Gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("--page needs gradio, which is not installed; pip install 'zero_ds[page]'")


def bind(host: str, port: int) -> socket.socket:
    """Takes the address that the page will have, before anything is loaded; port 0: one that is free.

    Raises:
        ConfigError: a port in use, not allowed, or no port; an address that is not this machine's.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"--port {port} is no port; give 1 to 65535, or 0 for a free one.")
    try:
        server = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)
        raise ConfigError(f"the page cannot listen on {host}:{port} ({reason}); choose another --port.") from None
    if not _is_own(host):
        logger.warning(
            "the page listens on %s: whoever reaches this machine can use it, without a password and unencrypted",
            host,
        )
    return server


def _is_own(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def served(models: Mapping[str, LoadedModel], server: socket.socket, **options: Any) -> Iterator[Any]:
    """A uvicorn server for the page on a bound socket, not yet running: `run(sockets=[server])`.

    options: as `build` takes them.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="zero_ds-page-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        import fastapi
        import gradio as gr
        import uvicorn
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        host, port = server.getsockname()[:2]
        app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        if host == "127.0.0.1":  # another site's name that leads here is not answered
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
        app.add_middleware(_SameOrigin)
        page = build(models, **options)
        page.queue(api_open=False)
        page.has_launched = True  # Gradio (6.31) looks where an input's file lies only where it was told to launch
        theme = gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace"))
        app = gr.mount_gradio_app(
            app,
            page,
            path="/",
            server_name=host,
            server_port=port,
            allowed_paths=[],
            max_file_size=LARGEST,
            footer_links=[],
            ssr_mode=False,
            theme=theme,
            css=CSS,
        )
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        # or it complains, with a traceback, of every browser that is still there when the page ends
        logging.getLogger("uvicorn.error").addFilter(lambda record: not running.should_exit)
        yield running


def serve(models: Mapping[str, LoadedModel], server: socket.socket, **options: Any) -> None:
    """Shows the page until the process is asked to stop (Ctrl-C)."""
    assert threading.current_thread() is threading.main_thread(), "signals reach the main thread alone"
    # uvicorn sends the signal that has ended it once more, when all is closed
    with served(models, server, **options) as running, contextlib.suppress(KeyboardInterrupt):
        running.run(sockets=[server])
