"""Formats of exports: how often files are opened, and that only one module knows the adapter's tensor names."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import export_helper
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

import zero_ds
from zero_ds.config.schema import RunConfig
from zero_ds.data.loader import Loader
from zero_ds.export import FORMATS, export_model
from zero_ds.export.remote.configuration_grafted import GraftedConfig
from zero_ds.export.remote.modeling_grafted import GraftedForCausalLM
from zero_ds.export.remote.processing_grafted import GraftedProcessor
from zero_ds.grafting.load import load_graft, load_trained
from zero_ds.grafting.named_model import find_model, load_model
from zero_ds.model import adapter
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.encoders import ENCODERS, EncoderFamily
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import CheckpointError, find_checkpoint
from zero_ds.training.checkpoint.manifest import describe_models
from zero_ds.training.setup import load_initial_weights

PACKAGE = Path(zero_ds.__file__).parent


class Opened:
    """Counts how often Python code in this process opens a given file."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.count = 0
        sys.addaudithook(self._hook)  # Python cannot remove such a hook, but without a path it does nothing

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.path is not None and event == "open" and isinstance(arguments[0], str | Path | bytes):
            name = arguments[0].decode() if isinstance(arguments[0], bytes) else str(arguments[0])
            if Path(name) == self.path:
                self.count += 1

    def of(self, path: Path) -> Opened:
        self.path, self.count = path, 0
        return self


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    counter = Opened()
    yield counter
    counter.path = None


@pytest.fixture
def run(made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """Returns a finished run of the decoder stage on the tiny Llama."""
    target = made("llama", tied=True)
    config = run_config("decoder", tmp_path / "run", decoder="target", data={"max_length": 512})
    return export_helper.write_run(config, target)


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("proof", ["full", "tensors"])
def test_the_config_of_the_target_is_opened_at_most_twice(
    form: str,
    proof: str,
    run: Path,
    made: Callable[..., Path],
    opened: Opened,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This package opens it once and transformers once: its tokenizer and model are given the loaded config."""
    export_helper.here(monkeypatch)
    config = made("llama", tied=True) / "config.json"
    counter = opened.of(config)
    config.read_bytes()
    assert counter.count == 1, "the counter counts"
    counter = opened.of(config)
    export_model(run, None, tmp_path / "out", form=form, proof=proof)
    assert 1 <= counter.count <= 2


SPELLED = re.compile(r"(adapter|boundary|aligner)\.(\d|weight|bias|embeddings|$)")
"""Names of the adapter's tensors, and the prefixes of such names."""


def constants(path: Path) -> Iterator[tuple[int, str]]:
    """Yields line and value of every string in a module, except docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_only_one_module_spells_names_of_adapter_tensors() -> None:
    """That module is model/adapter.py. In the code that exports contain, only modeling_grafted.py has the names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        places = [f"line {line}: {text}" for line, text in constants(path) if SPELLED.match(text)]
        if places:
            found[str(path.relative_to(PACKAGE))] = places
    assert list(found) == ["model/adapter.py"], found
    remote = sorted(PACKAGE.glob("export/remote/*.py"))
    naming = [path.name for path in remote if re.search(r"self\.(adapter|boundary)\b", path.read_text("utf-8"))]
    assert naming == ["modeling_grafted.py"]


def three_layers(self: nn.Sequential, vision_width: int, width: int, *_: object) -> None:
    first, second, third = nn.Linear(vision_width, width), nn.Linear(width, width), nn.Linear(width, width)
    nn.Sequential.__init__(self, first, nn.GELU(), second, nn.GELU(), third)


def change_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes model/adapter.py as an adapter of three layers would."""
    monkeypatch.setattr(adapter.Adapter, "__init__", three_layers)
    monkeypatch.setattr(adapter, "LINEARS", ("adapter.0", "adapter.2", "adapter.4"))
    monkeypatch.setattr("zero_ds.export.llava.LINEARS", adapter.LINEARS)


def change_exported_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does the same to the class in modeling_grafted.py."""
    before = GraftedForCausalLM.__init__

    def changed(self: GraftedForCausalLM, config: GraftedConfig) -> None:
        before(self, config)
        three_layers(self.adapter, config.vision_config.hidden_size, config.adapter_width)

    monkeypatch.setattr(GraftedForCausalLM, "__init__", changed)


def test_an_adapter_of_three_layers(
    run: Path,
    made: Callable[..., Path],
    run_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only model/adapter.py and modeling_grafted.py have to change, and every other file follows or refuses.

    An export contains all tensors, and is refused if modeling_grafted.py was forgotten. Runs and exports of two layers:
    an export can still be opened, and a run is refused instead of leaving the third layer random.
    """
    export_model(run, None, tmp_path / "older", proof="tensors")
    older, target = run, made("llama", tied=True)
    change_adapter(monkeypatch)
    opened = load_model(find_model(str(tmp_path / "older"))).model.adapter
    assert opened is not None and [name for name, _ in opened.named_parameters()] == [
        *("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    assert torch.equal(opened.last.weight, find_checkpoint(older).weights()["adapter.2.weight"])
    for opening in (load_trained, load_graft):
        with pytest.raises(CheckpointError, match=r"holds adapter\.4\.weight, which this model has; open it with"):
            opening(older, target)
    config = run_config("encoder", tmp_path / "next", decoder="target", init_from=[str(older)])
    assert config.encoder is not None
    model = build_model(ModelSpec(target, Path(config.encoder.path), config.encoder, config.adapter))
    with pytest.raises(ConfigError, match=r"adapter\.4\.weight would stay random: init_from brings other tensors of"):
        load_initial_weights(model, config, describe_models(config, None), cast(Loader, None))

    config = run_config("decoder", tmp_path / "three", decoder="target", data={"max_length": 512})
    run = export_helper.write_run(config, target)
    assert load_graft(run, target).adapter is not None
    with pytest.raises(
        ConfigError, match=r"adapter\.4\.bias has shape .*, or, if the model's code has changed, change"
    ):
        export_model(run, None, tmp_path / "out", form="remote-code", proof="tensors")
    assert not (tmp_path / "out").exists()
    change_exported_code(monkeypatch)
    export_model(run, None, tmp_path / "out", proof="tensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    trained = load_file(run / "step-000001" / "weights.safetensors")
    assert {name for name in stored if name.startswith("adapter.")} == {
        name for name in trained if name.startswith("adapter.")
    }
    assert "adapter.4.weight" in stored
    with pytest.raises(ConfigError, match="Llava's projector has 2 linear layers; this adapter has 3; use --format"):
        export_model(run, None, tmp_path / "llava", form="llava")


def test_an_encoder_without_a_llava_form(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "clip", replace(ENCODERS["clip"], llava_prefix=None))
    with pytest.raises(ConfigError, match="the vision encoder clip has no Llava form; use --format remote-code"):
        export_model(run, None, tmp_path / "out", form="llava")
    assert export_model(run, None, tmp_path / "out", proof="tensors")["format"] == "remote-code"


def test_an_encoder_says_how_large_its_images_are() -> None:
    """Other encoders' configs call the size differently, so only the family reads it."""

    class Square(EncoderFamily):
        def image_size(self, config: Any) -> int:
            return int(config.side)

    clip = ENCODERS["clip"]
    family = Square(name="square", model_types=(), load=clip.load, prefix_tokens=0, final_norm="norm")
    assert family.tokens_per_image(SimpleNamespace(side=64, patch_size=16)) == 16
    read = re.compile(r"vision(_config\(.*\))?\.image_size\b")
    assert not [path.name for path in PACKAGE.rglob("*.py") if read.search(path.read_text("utf-8"))]


def test_a_template_that_writes_nothing_before_a_question(made: Callable[..., Path]) -> None:
    """The image then goes to the start of the prompt, followed by the line break that training writes after it."""
    tokenizer = AutoTokenizer.from_pretrained(made("llama", tied=True))
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    processor = GraftedProcessor(tokenizer, template, image_token="<reponame>", tokens_per_view=2, image_size=32)
    inputs = processor(text="which shape?", images=Image.new("RGB", (32, 32)))
    image, text = tokenizer.convert_tokens_to_ids("<reponame>"), tokenizer("\nwhich shape?").input_ids
    assert inputs["input_ids"] == [[image, image, *text]]


def test_formats_are_called_by_their_names() -> None:
    assert {name: layout.name for name, layout in FORMATS.items()} == {"llava": "llava", "remote-code": "remote-code"}
    assert [layout.remote_code for layout in FORMATS.values()] == [False, True]
