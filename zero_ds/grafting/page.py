"""`zero-ds chat --page`: a web page with the answers of one or several models side by side, and their trajectories.

The page is made with Gradio and served by uvicorn, on a socket that this module binds. So Gradio neither looks for
another port, nor asks a server of its own for its newest version, nor offers a public link. Uploads are kept in a
folder that is deleted when the process ends, and no file outside of it is served.
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
from zero_ds.grafting.engines.options import DeviceOptions, load
from zero_ds.grafting.named_model import LoadedModel, find_model
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.answers import draw

logger = logging.getLogger(__name__)

LARGEST = "64mb"
"""Largest size of an uploaded file."""
KEPT = 3600
"""Seconds for which a visitor's conversation, with its caches and uploads, is kept after the last answer."""
FONTS = ("system-ui", "sans-serif")
"""Fonts of the visitor's own machine, because the page must fetch none from another server."""

CSS = "button[aria-label=Share], [id^=chat-] button[aria-label=Clear] { display: none !important; }"
"""Hides Gradio's button that publishes an image, and the one that clears a chat without ending its conversation."""


def load_models(name: str, target: str | None, dtype: str, options: DeviceOptions) -> dict[str, LoadedModel]:
    """Loads the models of a page by the names that it shows. For a graft, also loads the model that the run trained.

    name, target: as `find_model` takes them; dtype: auto, float32 or bfloat16.

    Raises:
        ConfigError, CheckpointError: as `find_model` and `load`.
    """
    named = [find_model(name, target)]
    if named[0].kind == "graft":
        named.insert(0, find_model(name))
    models = {}
    for each in named:
        loaded = load(each, dtype, options)
        if loaded.model.plan is not None:
            models[f"surrogate: {loaded.model.plan}"] = loaded
        else:
            kind = "grafted" if each.kind == "graft" else each.kind
            models[f"{kind}: {each.folder.name}"] = loaded
    return models


# -- a visitor's conversations -----------------------------------------------------------------------------------------


@dataclass
class ChatSession:
    """One visitor's conversations with all models, and their messages on the page."""

    conversations: dict[str, Conversation]
    """Conversation with each model, by the model's name."""
    lock: threading.Lock
    """Held while a model computes, and shared by all visitors: a model's layers are tapped while a trajectory is read,
    and an answer that was stopped may still compute its last word when another visitor's turn comes."""
    shown: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Messages on the page, by the model's name, as Gradio has them: role and content."""

    def ask(self, question: str, files: Sequence[str | Path]) -> Iterator[str]:
        """Asks all models, then lets them answer one after the other.

        Yields the name of a model whenever its `shown` has grown. If the caller stops iterating, the answers end where
        they are; all models have received the question.

        Raises:
            DataError: an empty question, or a conversation that has become too long. ImageError: a file that is not an
            image. ConfigError: images for models without a vision encoder. No model has received the question then.
        """
        if not question.strip():
            raise DataError("the question is empty; type one, because images alone are not answered.")
        first = next(iter(self.conversations.values()))
        for file in files:
            _check_upload(Path(file))
        with self.lock:
            features = [first.features(file) for file in files]
        answers = self._ask_all(question, features)
        for name in answers:
            messages = self.shown.setdefault(name, [])
            messages += [{"role": "user", "content": {"path": str(file)}} for file in files]
            messages += [{"role": "user", "content": question}]
        yield from answers
        for name, pieces in answers.items():
            answer = {"role": "assistant", "content": ""}
            self.shown[name].append(answer)
            while (piece := self._next_piece(pieces)) is not None:
                answer["content"] += piece
                yield name

    def _ask_all(self, question: str, features: Sequence[Any]) -> dict[str, Iterator[str]]:
        """Asks all models the question, or none if one of them cannot take it; returns their answers by name."""
        answers: dict[str, Iterator[str]] = {}
        try:
            for name, conversation in self.conversations.items():
                for image in features:
                    conversation.show_features(image)
                answers[name] = conversation.ask(question)
        except DataError:
            for name, conversation in self.conversations.items():
                if name in answers:
                    conversation.unask()
                conversation.withdraw()
            raise
        return answers

    def _next_piece(self, pieces: Iterator[str]) -> str | None:
        with self.lock:
            return next(pieces, None)

    def trajectory(self, name: str) -> Image.Image:
        """Returns a plot of the prediction trajectory of a model's last answer.

        Raises:
            DataError: nothing has been answered yet.
        """
        with self.lock:
            found = self.conversations[name].trajectory()
        return draw(found, f"{name}: {len(found.divergences)} layers, prediction of each at the answer's tokens")


def _check_upload(file: Path) -> None:
    """Reads an uploaded image. An error names the file without the upload folder, which visitors do not know."""
    try:
        open_image(file)
    except ImageError as error:
        raise ImageError(str(error).replace(str(file), file.name)) from None


# -- the page ----------------------------------------------------------------------------------------------------------


class _Handlers:
    """Handlers of the page's events. Each returns new values for the page's components."""

    def __init__(self, models: Mapping[str, LoadedModel], max_new_tokens: int, system: str | None) -> None:
        self._models = models
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "system": system}
        self._lock = threading.Lock()

    def ask(self, message: Mapping[str, Any], of: str, session: ChatSession | None) -> Iterator[tuple[Any, ...]]:
        """-> question box, session, chat of each model, trajectory of the model `of`."""
        import gradio as gr

        if session is None:
            conversations = {name: Conversation(model, **self._options) for name, model in self._models.items()}
            session = ChatSession(conversations, self._lock)
        unchanged = gr.skip()
        with _errors_on_page():
            for grown in session.ask(str(message.get("text") or ""), message.get("files") or ()):
                chats = [list(session.shown[name]) if name == grown else unchanged for name in self._models]
                yield gr.MultimodalTextbox(value=None, interactive=False), session, *chats, unchanged
            chats = [list(session.shown[name]) for name in self._models]
            yield unchanged, session, *chats, session.trajectory(of)

    def trajectory(self, of: str, session: ChatSession | None) -> Any:
        """-> trajectory of the model `of`."""
        if session is None:
            return None
        with _errors_on_page():
            return session.trajectory(of)

    def new(self) -> tuple[Any, ...]:
        """-> question box, session, chat of each model, trajectory: all of them empty."""
        import gradio as gr

        return gr.MultimodalTextbox(value=None, interactive=True), None, *[[] for _ in self._models], None

    def ready(self) -> Any:
        """-> question box."""
        import gradio as gr

        return gr.MultimodalTextbox(interactive=True)


@contextmanager
def _errors_on_page() -> Iterator[None]:
    """Shows errors that a visitor can correct as sentences on the page."""
    import gradio as gr

    try:
        yield
    except (ConfigError, DataError, ImageError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def build(models: Mapping[str, LoadedModel], *, max_new_tokens: int = 256, system: str | None = None) -> Any:
    """Builds the page as gradio.Blocks. Uploads go to the folder that GRADIO_TEMP_DIR names at this moment.

    models: the models by the names that the page shows; either all of them have a vision encoder, or none.

    API names: /ask (message, name of the model whose trajectory is shown), /trajectory (name), /new.
    """
    import gradio as gr

    names = list(models)
    sees = all(model.encoder.processor is not None for model in models.values())
    handlers = _Handlers(models, max_new_tokens, system)
    with gr.Blocks(title="zero_ds", analytics_enabled=False, delete_cache=(KEPT, KEPT), fill_width=True) as page:
        session = gr.State(None, time_to_live=KEPT)
        with gr.Row():
            chats = [
                gr.Chatbot(
                    label=name,
                    elem_id=f"chat-{number}",
                    height=320,
                    render_markdown=False,  # an answer is shown exactly as the model wrote it
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
            placeholder="Ask about the images you add, or about anything." if sees else "Ask anything.",
            show_label=False,
            autofocus=True,
            elem_id="question",
        )
        _accept_only_uploads_(box)
        with gr.Row():
            of = gr.Radio(names, value=names[-1], label="Trajectory of the last answer of", visible=len(names) > 1)
            stop = gr.Button("Stop", scale=0)
            fresh = gr.Button("New conversation", scale=0, min_width=200)
        trajectory = gr.Image(
            label="Prediction trajectory of the answer", format="png", buttons=["fullscreen"], elem_id="trajectory"
        )
        # one event at a time, whichever visitor it is from
        queue: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
        outputs = [box, session, *chats, trajectory]
        asked = box.submit(handlers.ask, [box, of, session], outputs, api_name="ask", **queue)
        asked.then(handlers.ready, None, box, api_visibility="private")  # also after an error
        stop.click(handlers.ready, None, box, cancels=[asked], queue=False, api_visibility="private")
        of.change(handlers.trajectory, [of, session], trajectory, api_name="trajectory", **queue)
        fresh.click(handlers.new, None, outputs, api_name="new", **queue)
    return page


def _accept_only_uploads_(box: Any) -> None:
    """Keeps the server from fetching an address that a visitor gives in place of an uploaded image."""
    import gradio as gr

    move_to_cache = box.async_move_resource_to_block_cache

    async def move_upload_to_cache(path: str | Path | None) -> Any:
        if "://" in str(path):
            raise gr.Error("images must be uploaded; none is fetched from an address.", print_exception=False)
        return await move_to_cache(path)

    box.async_move_resource_to_block_cache = move_upload_to_cache


# -- serving -----------------------------------------------------------------------------------------------------------


class _SameOrigin:
    """Middleware that refuses requests of other sites' pages, with which a browser would send a visitor's uploads."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        answer = self._app
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            origin = headers.get(b"origin")
            if origin is not None and origin.split(b"://")[-1] != headers.get(b"host"):
                answer = PlainTextResponse("this page does not answer requests from other pages.", status_code=403)
        await answer(scope, receive, send)


def check_installed() -> None:
    """Raises ConfigError if Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("--page needs gradio, which is not installed; pip install 'zero_ds[page]'")


def bind(host: str, port: int) -> socket.socket:
    """Binds the page's address, before anything is loaded. Port 0 takes a free port.

    Raises:
        ConfigError: a port that is in use, not allowed or out of range; an address that is not this machine's.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"--port {port} is out of range; give 1 to 65535, or 0 for a free port.")
    try:
        server = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)
        raise ConfigError(f"the page cannot listen on {host}:{port} ({reason}); choose another --port.") from None
    if not _is_loopback(host):
        logger.warning(
            "the page listens on %s: anyone who can reach this machine can use it, without a password and unencrypted",
            host,
        )
    return server


def _is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def served(models: Mapping[str, LoadedModel], server: socket.socket, **options: Any) -> Iterator[Any]:
    """Yields a uvicorn server for the page on a bound socket. It is started with `run(sockets=[server])`.

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
        if host == "127.0.0.1":  # requests by any other name, which another site may have pointed here, are refused
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
        app.add_middleware(_SameOrigin)
        page = build(models, **options)
        page.queue(api_open=False)
        page.has_launched = True  # only then does Gradio (6.31) check in which folder an input's file is
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
            theme=gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
            css=CSS,
        )
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        # otherwise it logs a traceback for every browser that is still connected when the page ends
        logging.getLogger("uvicorn.error").addFilter(lambda record: not running.should_exit)
        yield running


def serve(models: Mapping[str, LoadedModel], server: socket.socket, **options: Any) -> None:
    """Serves the page until the process is asked to stop (Ctrl-C).

    options: as `build` takes them.
    """
    assert threading.current_thread() is threading.main_thread(), "signals reach the main thread only"
    # once everything is closed, uvicorn raises again the signal that stopped it
    with served(models, server, **options) as running, contextlib.suppress(KeyboardInterrupt):
        running.run(sockets=[server])
