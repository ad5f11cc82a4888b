"""The released layout: our model computes the same with it, it comes back unchanged, and wrong files are refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed_helper import run_ranks, train_all
from places import ROOT
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlamaForCausalLM
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.loading import load_run
from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN
from zero_ds.grafting.compatibility import compatibility, run_config
from zero_ds.grafting.load import load_graft, load_trained
from zero_ds.model.build import sample_encoder
from zero_ds.model.layer_plan import Replaced
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.surrogate.build import build_surrogate
from zero_ds.training.checkpoint import released as released_module
from zero_ds.training.checkpoint.checkpoint import CheckpointError, find_checkpoint
from zero_ds.training.checkpoint.released import import_released, to_released

RELEASED = {"3b": (28, True, (16, 26)), "8b": (32, False, (17, 30)), "70b": (80, False, (40, 78))}
"""Depth, whether embeddings are tied, and the surrogate's replaced layers, of the three models."""
CLIP_LAYERS = 3


@torch.no_grad()
def straight_reading(
    file: Path, target: Path, clip: Path, sides: list[torch.Tensor], pixels: torch.Tensor, cut: tuple[int, int] | None
) -> torch.Tensor:
    """Computes the logits that the layout's description prescribes with transformers' CLIP and Llama, without zero_ds.

    sides: token ids before and after the image, (1, n) each; cut: the layers that the surrogate replaces, None for
    the full model. The encoder's classification token is dropped, its last norm applied to the patches, and a
    GELU is between the adapter's two layers.
    """
    content = torch.load(file, weights_only=True)

    vision = CLIPVisionModel.from_pretrained(clip).eval()
    in_vision = {name.removeprefix("vision_model."): p for name, p in vision.named_parameters()}
    for name, tensor in content.items():
        if name.startswith("encoder.vision_model."):
            in_vision[name.removeprefix("encoder.vision_model.")].copy_(tensor)
    norm = next(module for name, module in vision.named_modules() if name.endswith("post_layernorm"))
    patches = norm(vision(pixel_values=pixels).last_hidden_state[:, 1:])

    hidden = F.gelu(F.linear(patches, content["adapter.0.weight"], content["adapter.0.bias"]))
    features = F.linear(hidden, content["adapter.2.weight"], content["adapter.2.bias"])

    llama = LlamaForCausalLM.from_pretrained(target).eval()
    if cut is not None:
        first, last = cut
        layers = list(llama.model.layers)
        translator = copy.deepcopy(layers[first])
        prefix = f"decoder.model.layers.{first}."
        translator.load_state_dict({n.removeprefix(prefix): t for n, t in content.items() if n.startswith(prefix)})
        llama.model.layers = nn.ModuleList([*layers[:first], translator, *layers[last + 1 :]])
        llama.config.num_hidden_layers = len(llama.model.layers)

    words = llama.get_input_embeddings()
    start, end = content["embd_soi"].reshape(1, 1, -1), content["embd_eoi"].reshape(1, 1, -1)
    row = torch.cat([words(sides[0]), start, features, end, words(sides[1])], dim=1)
    return llama(inputs_embeds=row, use_cache=False).logits


def released(
    path: Path,
    target: Path,
    clip: Path,
    kind: str,
    *,
    layers: list[int],
    dtype: torch.dtype = torch.float32,
    last: int | None = None,
    boundary: tuple[int, ...] = (tiny.HIDDEN,),
) -> Path:
    """Writes random weights in the released layout. layers: translators; last: encoder layers, None for all."""
    draw = torch.Generator().manual_seed(len(kind) + sum(layers))

    def random(shape: Any) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=draw).mul(0.2).to(dtype)

    content = {}
    vision = {n.removeprefix("vision_model."): p for n, p in CLIPVisionModel.from_pretrained(clip).named_parameters()}
    trained = tuple(f"encoder.layers.{number}." for number in range(CLIP_LAYERS - (last or 0), CLIP_LAYERS))
    for name, parameter in vision.items():
        wanted = last is None or name.startswith(trained)
        if name.startswith("post_layernorm") or (kind == "encoder" and wanted):
            content[f"encoder.vision_model.{name}"] = random(parameter.shape)
    width = vision["post_layernorm.weight"].shape[0]
    for name, shape in (
        ("0.weight", (tiny.HIDDEN, width)),
        ("0.bias", (tiny.HIDDEN,)),
        ("2.weight", (tiny.HIDDEN, tiny.HIDDEN)),
        ("2.bias", (tiny.HIDDEN,)),
    ):
        content[f"adapter.{name}"] = random(shape)
    content["embd_soi"], content["embd_eoi"] = random(boundary), random(boundary)
    if kind == "translator":
        decoder = LlamaForCausalLM.from_pretrained(target)
        for number in layers:
            for name, parameter in decoder.model.layers[number].named_parameters():
                content[f"decoder.model.layers.{number}.{name}"] = random(parameter.shape)
    torch.save(content, path)
    return path


SIDES = [torch.arange(5, 12)[None], torch.arange(40, 52)[None]]


@torch.no_grad()
def ours(model: VisionLanguageModel, pixels: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([SIDES[0], torch.full((1, model.tokens_per_image()), IMAGE_TOKEN), SIDES[1]], dim=1)
    return model.logits(model.hidden_states(ids, torch.ones_like(ids), pixels))


@pytest.mark.parametrize("size", list(RELEASED))
def test_it_computes_what_the_layout_says(size: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """The command imports both kinds: the translator in its surrogate, the encoder grafted, and the two together."""
    layers, tied, cut = RELEASED[size]
    target, clip = made("llama", tied=tied, layers=layers), made("clip", layers=CLIP_LAYERS)
    build_surrogate(target, [Replaced(*cut)], tmp_path / "surrogate")
    pixels = torch.randn(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    common = ["--target", str(target), "--encoder", str(clip)]
    files = {
        "translator": released(tmp_path / "t.pth", target, clip, "translator", layers=[cut[0]]),
        # the paper trains the last layers of the encoder, in its analysis all of it
        "encoder": released(tmp_path / "e.pth", target, clip, "encoder", layers=[], last=None if size == "3b" else 2),
    }
    for kind, more in (("translator", []), ("encoder", ["--init-from", str(tmp_path / "translator")])):
        arguments = ["import-released", str(files[kind]), *common, *more, "--out", str(tmp_path / kind)]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0 and str(tmp_path / kind / "step-000000") in done.output

    def same(model: VisionLanguageModel, file: Path, cut: tuple[int, int] | None) -> torch.Tensor:
        logits = ours(model, pixels)
        torch.testing.assert_close(
            logits, straight_reading(file, target, clip, SIDES, pixels, cut), atol=1e-5, rtol=1e-5
        )
        return logits

    seen = [
        same(load_trained(tmp_path / "translator", tmp_path / "surrogate"), files["translator"], cut),
        same(load_graft(tmp_path / "translator", target), files["translator"], None),
        same(load_graft(tmp_path / "encoder", target), files["encoder"], None),
    ]
    both = {**torch.load(files["translator"]), **torch.load(files["encoder"])}
    torch.save(both, tmp_path / "both.pth")
    seen.append(same(load_trained(tmp_path / "encoder", tmp_path / "surrogate"), tmp_path / "both.pth", cut))
    for one, other in pairwise(seen):
        assert not torch.allclose(one, other, atol=1e-2), "each of these is another model"
    report = compatibility(
        find_checkpoint(tmp_path / "encoder"), target, thorough=True, surrogate=str(tmp_path / "surrogate")
    )
    assert all(check.fits is not False for check in report)
    assert next(check for check in report if check.name == "kept-layers").fits is True
    assert load_run(str(tmp_path / "encoder" / "config.yaml")) == run_config(find_checkpoint(tmp_path / "encoder"))


@pytest.mark.parametrize("kind", ["translator", "encoder"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_there_and_back(kind: str, dtype: torch.dtype, made: Callable[..., Path], small: Path, tmp_path: Path) -> None:
    """File -> ours -> file -> ours: the same tensors to the byte, in whatever shape the boundary embeddings came."""
    target, clip = made("llama", tied=True), made("clip")
    boundary = (1, 1, tiny.HIDDEN) if dtype is torch.bfloat16 else (tiny.HIDDEN,)
    options: dict[str, Any] = {"layers": [1, 2], "dtype": dtype, "boundary": boundary, "last": 2}
    first = released(tmp_path / "first.pth", target, clip, kind, **options)
    models = {"surrogate": str(small), "encoder": str(clip)}
    checkpoint = import_released(first, str(target), tmp_path / "first", **models)
    if kind == "encoder" or dtype is torch.float32:
        to_released(tmp_path / "first", tmp_path / "again.pth")
    else:
        tool = [sys.executable, str(ROOT / "tools" / "to_released_layout.py")]
        subprocess.run([*tool, "--weights", tmp_path / "first", "--out", tmp_path / "again.pth"], check=True)
    before, after = (torch.load(path, weights_only=True) for path in (first, tmp_path / "again.pth"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert tensor.view(torch.uint8).equal(after[name].view(torch.uint8)), name
    assert abs(first.stat().st_size - (tmp_path / "again.pth").stat().st_size) < 4096, "no tensor is in it twice"
    again = import_released(tmp_path / "again.pth", str(target), tmp_path / "again", **models)
    assert (checkpoint / "weights.safetensors").read_bytes() == (again / "weights.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="already exists"):
        to_released(tmp_path / "first", tmp_path / "again.pth")


def test_a_run_starts_from_it(
    made: Callable[..., Path], small: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The encoder stage trains on an imported translator, and its result can be grafted."""
    target, clip = made("llama", tied=True), made("clip")
    file = released(tmp_path / "t.pth", target, clip, "translator", layers=[1, 2])
    import_released(file, str(target), tmp_path / "imported", surrogate=str(small), encoder=str(clip))
    changes = {
        "encoder": {"path": str(clip), "patch_norm": True},
        "adapter": {"boundary_tokens": True},
        "optimizer": {"learning_rate": 1e-9},
        "max_steps": 1,
    }
    config = run_config("encoder", tmp_path / "run", init_from=[str(tmp_path / "imported")], **changes)
    assert run_ranks(train_all, 1, [config]) == [["step-000001"]]
    model, held = load_trained(tmp_path / "run", small), torch.load(file)
    for number, layer in zip((1, 2), model.translators(), strict=True):
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, held[f"decoder.model.layers.{number}.{name}"])
    grafted = load_graft(tmp_path / "run", target)
    torch.testing.assert_close(grafted.adapter[2].weight, held["adapter.2.weight"], atol=1e-6, rtol=0)  # type: ignore[index]
    encode = sample_encoder(grafted, target, clip, config.data)
    assert encode.tokens_per_image == tiny.TOKENS_PER_IMAGE + 2


def test_it_is_evaluated_like_a_run(made: Callable[..., Path], small: Path, tmp_path: Path) -> None:
    """The command evaluates it in its surrogate, grafted, and in a target with another template if that is accepted."""
    from PIL import Image

    target, clip = made("llama", tied=True), made("clip")
    file = released(tmp_path / "t.pth", target, clip, "translator", layers=[1, 2])
    import_released(file, str(target), tmp_path / "imported", surrogate=str(small), encoder=str(clip))
    records = []
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{number}.png")
        word = {"kind": "colour", "start": 0, "word": colour, "choices": ["red", "blue"]}
        one = {"id": colour, "kind": "question", "image": f"{number}.png", "question": "which colour?"}
        records.append({**one, "answer": colour, "words": [word]})
    (tmp_path / "records.json").write_text(json.dumps(records))
    shutil.copytree(target, tmp_path / "other")
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# other #}")

    def evaluate(decoder: Path, *more: str) -> Any:
        words = ["--weights", tmp_path / "imported", "--decoder", decoder, "--records", tmp_path / "records.json"]
        options = ["--out", tmp_path / "result.json", "--max-new-tokens", 2, "--dtype", "float32", *more]
        return CliRunner().invoke(app, ["eval", "records", *map(str, [*words, *options])])

    for decoder, more in ((small, ()), (target, ()), (tmp_path / "other", ("--accept", "template"))):
        done = evaluate(decoder, *more)
        assert done.exit_code == 0 and "of 2 words free" in done.output, done.output
    refused = evaluate(tmp_path / "other")
    assert "chat template is" in str(refused.exception) and "--accept template" in str(refused.exception)


class Evil:
    """Would make a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_file_is_not_run(made: Callable[..., Path], tmp_path: Path) -> None:
    """The files are a zip archive of torch.save and a bare pickle; plain unpickling would run the code in both."""
    mark = tmp_path / "mark"
    torch.save({"adapter.0.weight": Evil(mark)}, tmp_path / "zip.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"adapter.0.weight": Evil(mark)}))
    for name, complaint in (("zip", "is refused: it names .*mkdir"), ("bare", "is not a file of torch.save")):
        with pytest.raises(ConfigError, match=complaint):
            import_released(tmp_path / f"{name}.pth", str(made("llama", tied=True)), tmp_path / "out")
        assert not mark.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert mark.is_dir(), "the file was harmless, and the test showed nothing"


def _changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = torch.load(path)
        change(content)
        torch.save(content, path)

    return write


def _zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _not_a_number(content: dict[str, Any]) -> None:
    content["adapter.2.weight"][3, 3] = float("nan")


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "zip": (_zip_of_text, {}, "is not a file of torch.save"),
    "text": (lambda path: path.write_text("hello"), {}, "is not a file of torch.save"),
    "truncated": (_truncated, {}, "is not a file of torch.save.* or is damaged"),
    "no file": (lambda path: path.unlink(), {}, "does not exist"),
    "list": (lambda path: torch.save([torch.ones(2)], path), {}, "does not hold a dictionary of tensors"),
    "nested": (
        _changed(lambda c: c.update(model={"a": torch.ones(1)})),
        {},
        r"holds entries that are not tensors with a name \(the first: model\)",
    ),
    "integers": (_changed(lambda c: c.update(embd_soi=torch.ones(32).int())), {}, "embd_soi in .* is torch.int32"),
    "missing": (_changed(lambda c: c.pop("adapter.2.bias")), {}, r"lacks adapter.2.bias \(and 0 more\)"),
    "no boundary": (_changed(lambda c: c.pop("embd_eoi")), {}, "lacks embd_eoi"),
    "half a layer": (
        _changed(lambda c: c.pop("decoder.model.layers.16.mlp.up_proj.weight")),
        {},
        "lacks decoder.model.layers.16.mlp.up_proj.weight",
    ),
    "unknown": (_changed(lambda c: c.update(more=torch.ones(1))), {}, r"holds more \(and 0 more\), for which"),
    "nan": (_changed(_not_a_number), {}, "adapter.2.weight holds a number that is not finite"),
    "one embedding": (_changed(lambda c: c.update(embd_soi=torch.ones(2, 32))), {}, "embd_soi and embd_eoi .* shapes"),
    "neither kind": (
        _changed(lambda c: [c.pop(name) for name in list(c) if name.startswith("decoder.")]),
        {},
        "holds neither a translator nor layers of a vision encoder",
    ),
    "another width": (lambda path: None, {"layers": 28, "hidden": 64}, r"has shape \(32,.*; with .* it is \(64,"),
    "another depth": (
        lambda path: None,
        {"layers": 32},
        r"decoder layers \[16\], and T\(17,30\) has .* at \[17\]",
    ),
    "no such depth": (lambda path: None, {"layers": 6}, "has 6 layers, for which no surrogate was released"),
}


@pytest.fixture(scope="module")
def good(made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = made("llama", tied=True, layers=28)
    path = tmp_path_factory.mktemp("good") / "t.pth"
    return released(path, target, made("clip", layers=CLIP_LAYERS), "translator", layers=[16])


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_wrong_is_refused(case: str, good: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """The error is one sentence, and nothing is written."""
    change, options, complaint = BAD[case]
    file = tmp_path / "file.pth"
    file.write_bytes(good.read_bytes())
    change(file)
    target = made("llama", tied=True, **{"layers": 28, **options})
    with pytest.raises((ConfigError, CheckpointError), match=complaint) as caught:
        import_released(file, str(target), tmp_path / "out", encoder=str(made("clip", layers=CLIP_LAYERS)))
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"file.pth"}


def test_models_that_do_not_fit_or_are_not_there(
    good: Path, made: Callable[..., Path], small: Path, tmp_path: Path
) -> None:
    target, clip = str(made("llama", tied=True, layers=28)), str(made("clip", layers=CLIP_LAYERS))
    for arguments, options, complaint in (
        ((target,), {"encoder": clip, "surrogate": str(small)}, "was cut from another model"),
        (("meta-llama/Llama-3.2-3B-Instruct",), {"encoder": clip}, "could not be fetched from the hub"),
        ((target,), {}, "'openai/clip-vit-large-patch14-336' is not a local folder and could not be fetched"),
        ((target,), {"encoder": clip, "init_from": [tmp_path / "nowhere"]}, "holds no checkpoint"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=complaint):
            import_released(good, arguments[0], tmp_path / "out", **options)  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="already exists"):
        import_released(good, target, tmp_path / "out", encoder=clip)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_what_the_layout_cannot_say(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without encoder\.patch_norm and adapter.boundary_tokens"):
        to_released(trained / "encoder", tmp_path / "out.pth")
    assert not list(tmp_path.iterdir())


def test_the_weights_are_hashed(good: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    target, clip = made("llama", tied=True, layers=28), made("clip", layers=CLIP_LAYERS)
    checkpoint = import_released(good, str(target), tmp_path / "out", encoder=str(clip))
    held = load_file(checkpoint / "weights.safetensors")
    digest = hashlib.sha256((checkpoint / "weights.safetensors").read_bytes()).hexdigest()
    assert find_checkpoint(tmp_path / "out").manifest["weights_sha256"] == digest
    assert torch.equal(held["boundary.embeddings.weight"][1], torch.load(good)["embd_eoi"])


# -- by name -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder that the hub's client finds in its cache; it stands for the authors' repository."""
    import huggingface_hub

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert name == "tomg-group-umd/zero-model-checkpoints"
        if not (tmp_path / "hub").is_dir():
            raise OSError("Cannot reach https://huggingface.co: offline mode is enabled.\nMore about it.")
        fetched = tmp_path / "fetched"
        for file in (path for path in (tmp_path / "hub").rglob("*") if path.is_file()):
            inside = file.relative_to(tmp_path / "hub")
            if any(fnmatch(str(inside), pattern) for pattern in allow_patterns):
                (fetched / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, fetched / inside)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path / "hub"


@pytest.mark.parametrize("place", ["{}.pth", "{}/checkpoint.pth"])
def test_a_released_checkpoint_is_fetched_by_name(
    hub: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The command takes target and folder from the name; other checkpoints of the repository are not fetched."""
    target, clip = made("llama", tied=True, layers=32), made("clip", layers=CLIP_LAYERS)
    for stem in ("llama3.1-8b_adapter_translator", "llama3.1-8b_surrogate-trained-encoder", "llama3.1-70b_other"):
        (hub / place.format(stem)).parent.mkdir(parents=True, exist_ok=True)
    file = hub / place.format("llama3.1-8b_surrogate-trained-encoder")
    released(file, target, clip, "encoder", layers=[])
    released(hub / place.format("llama3.1-8b_adapter_translator"), target, clip, "translator", layers=[17])
    monkeypatch.chdir(tmp_path)
    named = released_module.NAMED["llama-3.1-8b/encoder"]
    assert (named.target, str(named.out)) == ("meta-llama/Llama-3.1-8B-Instruct", "runs/llama-3.1-8b/released-encoder")
    Path(named.name).mkdir(parents=True)  # a folder of the same name is not a file
    arguments = ["import-released", named.name, "--target", str(target), "--encoder", str(clip)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "fetched").rglob("*.pth")) == [file.name]
    stored = torch.load(file)["adapter.0.weight"]
    assert torch.equal(find_checkpoint(named.out).weights()["adapter.0.weight"], stored)
    with pytest.raises(ConfigError, match="already exists"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "llama-3.1-8b/encoder",
            r"could not be fetched from .* on the hub: Cannot reach .*; check the network and your",
        ),
        ("llama-3.1-8b/encodr", "neither a file nor the name of a released checkpoint; did you mean 'llama-3.1-8b/enc"),
        ("zzz", "neither a file nor the name of a released checkpoint; known: llama-3.1-70b/encoder, llama-3.1-70b/tr"),
        ("gone.pth", "gone.pth is a file: name its language model with --target, and a new folder with --out"),
    ],
)
def test_what_cannot_be_fetched(
    hub: Path, name: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        CliRunner().invoke(app, ["import-released", name], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_a_repository_of_another_layout(hub: Path) -> None:
    named = released_module.NAMED["llama-3.1-8b/encoder"]
    for number in (1, 2):
        path = hub / f"{named.stem}-{number}.pth"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"encoder-1.pth, .*encoder-2.pth for llama-3.1-8b/encoder, where one file"):
        released_module.fetch(named)
