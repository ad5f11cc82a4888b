"""One run shows its model the same pixels in training, answers, evaluation and both exports, whatever the image is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import export_helper
import pytest
import torch
from image_kinds import CASES, KINDS
from PIL import Image
from transformers import AutoProcessor

from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import Turn
from zero_ds.data.images import ImageProcessor
from zero_ds.data.sources import Sample
from zero_ds.evaluation.suites.lmms_model import ZeroDs
from zero_ds.export import FORMATS, export_model
from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.generate import Answerer
from zero_ds.grafting.named_model import LoadedModel, find_model, load_model
from zero_ds.grafting.page import ChatSession

BACKGROUND = "#20a060"
IMAGES = {**{name: kind.write for name, kind in KINDS.items()}, **CASES}
del IMAGES["twelve bits"]  # which all of them refuse


@pytest.fixture(scope="module")
def folders(
    made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Makes a run with a background of its own, and its exports in both formats."""
    root = tmp_path_factory.mktemp("pixels")
    config = run_config(
        "decoder", root / "run", decoder="target", data={"max_length": 512, "image_background": BACKGROUND}
    )
    run = export_helper.write_run(config, made("llama", tied=True))
    for form in FORMATS:
        export_model(run, None, root / form, form=form, proof="tensors")
    return root


class Seen:
    """A loaded model whose vision encoder notes its inputs."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.pixels: list[torch.Tensor] = []
        self._features = loaded.model.image_features
        loaded.model.image_features = self._note  # type: ignore[method-assign]

    def _note(self, pixels: torch.Tensor, *arguments: Any) -> torch.Tensor:
        self.pixels.append(pixels)
        return self._features(pixels, *arguments)

    def by(self, look: Callable[[], object]) -> torch.Tensor:
        self.pixels.clear()
        look()
        return torch.cat(self.pixels)


@pytest.fixture(scope="module")
def run(folders: Path) -> Seen:
    return Seen(load_model(find_model(str(folders / "run"))))


@pytest.fixture(scope="module")
def opened_export(folders: Path) -> Seen:
    return Seen(load_model(find_model(str(folders / "llava"))))


def snippet(folders: Path, form: str) -> Callable[[Path], torch.Tensor]:
    """Runs the model card's code on an image file, all of it but the model."""
    card = (folders / form / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    lines = [line for line in code.splitlines() if not line.startswith(("model =", "output_ids =", "print("))]
    text = "\n".join(lines).replace(f'"{form}"', repr(str(folders / form))).replace(".to(model.device)", "")
    opened, before, after = text.partition("\nimage = ")
    space: dict[str, Any] = {}
    exec(opened, space)

    def look(path: Path) -> torch.Tensor:
        exec((before + after).replace("image.png", str(path)), space)
        return space["inputs"]["pixel_values"]

    return look


@pytest.fixture(scope="module")
def consumers(folders: Path, run: Seen, opened_export: Seen) -> dict[str, Callable[[Path], torch.Tensor]]:
    """Returns what is shown an image file, by name: each returns the pixel values of its views."""
    loaded = run.loaded
    processor = AutoProcessor.from_pretrained(folders / "remote-code", trust_remote_code=True)
    harness = ZeroDs(loaded)
    answerer = Answerer(loaded.model, loaded.encoder)

    def shown_by_task(visuals: Callable[[Path], Image.Image]) -> Callable[[Path], torch.Tensor]:
        def look(path: Path) -> torch.Tensor:
            request = SimpleNamespace(args=("q", {}, lambda document: [visuals(path)], 0, "task", "test"))
            harness.task_dict = {"task": {"test": [{}]}}
            return run.by(lambda: harness.answerer.features(harness._images(request)))  # type: ignore[arg-type]

        return look

    def page(path: Path) -> torch.Tensor:
        session = ChatSession({"model": Conversation(loaded, max_new_tokens=1)}, SimpleLock())  # type: ignore[arg-type]
        return run.by(lambda: list(session.ask("what is it?", [path])))

    def loaded_image(path: Path) -> Image.Image:
        image = Image.open(path)
        image.load()
        return image

    return {
        "chat": lambda path: run.by(lambda: Conversation(loaded).show(path)),
        "chat, an image in memory": lambda path: run.by(lambda: Conversation(loaded).show(loaded_image(path))),
        "page": page,
        "eval": lambda path: run.by(lambda: answerer.features([str(path)])),
        "lmms-eval": shown_by_task(Image.open),
        "lmms-eval, a task that converts": shown_by_task(lambda path: Image.open(path).convert("RGB")),
        "chat with the export": lambda path: opened_export.by(lambda: Conversation(opened_export.loaded).show(path)),
        "card of llava": snippet(folders, "llava"),
        "card of remote-code": snippet(folders, "remote-code"),
        "remote-code, a path": lambda path: processor(images=str(path), return_tensors="pt").pixel_values,
        "remote-code, an image in memory": lambda path: (
            processor(images=loaded_image(path), return_tensors="pt").pixel_values
        ),
    }


class SimpleLock:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


CONSUMERS = (
    "chat",
    "chat, an image in memory",
    "page",
    "eval",
    "lmms-eval",
    "lmms-eval, a task that converts",
    "chat with the export",
    "card of llava",
    "card of remote-code",
    "remote-code, a path",
    "remote-code, an image in memory",
)


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_every_cell_of_the_table_is_equal(
    consumers: dict[str, Callable[[Path], torch.Tensor]], run: Seen, tmp_path: Path, consumer: str
) -> None:
    """The pixel values are those of training: bit for bit, and in Llava's own processor up to its rounding."""
    assert set(consumers) == set(CONSUMERS)
    for name, write in IMAGES.items():
        path = write(tmp_path)
        trained = run.loaded.encoder.pixels(Sample("x", (Turn("user", "<image>q?"),), (str(path),)))
        found = consumers[consumer](path)
        assert found.shape == trained.shape, name
        allowed = 1e-5
        if consumer == "card of llava" and Image.open(path).size != (32, 32):
            allowed = 0.02  # a step of eight bits, after it has padded and resized in its own order
        assert float((found - trained).abs().max()) <= allowed, name


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_what_training_refuses_is_refused_by_all(
    consumers: dict[str, Callable[[Path], torch.Tensor]], tmp_path: Path, consumer: str
) -> None:
    with pytest.raises(ValueError, match="largest value is 4,095 of 65,535"):
        consumers[consumer](CASES["twelve bits"](tmp_path))


def test_the_proof_looks_at_images_that_readers_disagree_about(
    folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One is transparent, one turned and one of 16 bits; a folder that reads one of them otherwise is not exported."""
    export_helper.here(monkeypatch, questions=1, tokens=2)
    for form in FORMATS:
        proof = export_model(folders / "run", None, tmp_path / form, form=form)
        assert proof["images"].keys() == {"transparent", "turned", "sixteen-bit"}
        assert max(proof["images"].values()) <= 1e-5
    for kind, change in (
        ("transparent", ("(*ImageColor.getrgb(background)[:3], 255)", "(0, 0, 0, 255)")),
        ("turned", ("if turn is not None", "if False")),
        ("sixteen-bit", ("white = 65535", "white = 65534 + 65536")),
    ):
        _spoil(monkeypatch, change)
        with pytest.raises(ValueError, match=f"reads a {kind} image differently from its source"):
            export_model(folders / "run", None, tmp_path / kind, form="llava")
    assert {path.name for path in tmp_path.iterdir()} == set(FORMATS)


def _spoil(monkeypatch: pytest.MonkeyPatch, change: tuple[str, str]) -> None:
    """Lets exports contain code that reads images in another way."""
    from zero_ds.data import read_image
    from zero_ds.export import llava

    text = Path(read_image.__file__).read_text()
    assert change[0] in text
    monkeypatch.setattr(
        llava, "write_image_reader", lambda folder: (folder / "read_image.py").write_text(text.replace(*change))
    )


def test_the_background_is_a_colour(run_config: Callable[..., RunConfig]) -> None:
    for value in ("nothing", "#12", "#ff000080"):
        with pytest.raises(ValueError, match="is not a colour; write a name such as white, or #rrggbb"):
            run_config("encoder", data={"image_background": value})


def test_a_run_of_before_has_the_fingerprint_that_it_had(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("encoder")
    content = config.model_dump(mode="json")
    del content["data"]["image_background"]
    from zero_ds.config.resume import fingerprint

    assert fingerprint(content) == config.fingerprint()
    assert run_config("encoder", data={"image_background": "black"}).fingerprint() != config.fingerprint()


def test_a_processor_pads_what_it_opened() -> None:
    processor = ImageProcessor(32, [0.5] * 3, [0.5] * 3, background="red")
    image = processor.open(Image.new("RGBA", (32, 16), (0, 0, 255, 0)))
    views = processor(image)[0]
    assert views[0, 16, 0] == 1 and views[2, 16, 0] == -1 and abs(float(views[0, 0, 0])) < 0.01
