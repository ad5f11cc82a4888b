"""Uses exports as a stranger would: without this package, and as the model cards say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_helper
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_report import evaluation
from transformers import AutoProcessor

from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN, Turn
from zero_ds.data.images import ImageProcessor
from zero_ds.data.sources import Sample
from zero_ds.export import FORMATS, card, export_model, remote_code
from zero_ds.export.source import open_source
from zero_ds.grafting.generate import Answerer
from zero_ds.grafting.load import load_graft
from zero_ds.grafting.named_model import find_model, load_model
from zero_ds.model.build import sample_encoder

GRID = ((1, 2), (2, 1), (2, 2))
EXTRAS: dict[str, Any] = {"adapter": {"boundary_tokens": True}}

CARD = """
from transformers import AutoProcessor, AutoModelForCausalLM
import torch
import yaml
from PIL import Image
# Load model and processor
# Example model ID for a surrogate-trained 8B Llama-3.1 encoder
model_id = "MODEL"
model = AutoModelForCausalLM.from_pretrained(
model_id,
torch_dtype=torch.bfloat16,
device_map="auto",
trust_remote_code=True # Required as it uses a custom LlavaLlamaForCausalLM architecture
)
processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)
# Prepare inputs
image = Image.open("IMAGE.png")
messages = [
{"role": "user", "content": "What is in this image?"},
]
# Apply chat template and process inputs
prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(text=prompt, images=image, return_tensors="pt").to(model.device)
# Generate response
output_ids = model.generate(**inputs, max_new_tokens=50)
output = processor.decode(output_ids[0], skip_special_tokens=True)
print(output)
"""
"""Sample usage on the model card of the released checkpoints, as printed, except for the model and the image."""

PIPELINE = """
from transformers import pipeline
answer = pipeline("image-text-to-text", model="MODEL", dtype="auto")
contents = [{"type": "image", "url": "IMAGE.png"}, {"type": "text", "text": "What is in this image?"}]
said = answer(text=[{"role": "user", "content": contents}], max_new_tokens=8, do_sample=False)
print("PIPELINE", repr(said[0]["generated_text"][-1]["content"]))
print("CARD")
"""


@pytest.fixture(scope="module")
def folders(
    made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Makes runs and their exports: `plain` as llava, `extras` (boundaries, patch norm, tiles) as remote-code."""
    root = tmp_path_factory.mktemp("remote")
    target = made("llama", tied=True)
    extras = {
        **EXTRAS,
        "encoder": {"path": str(made("clip")), "patch_norm": True},
        "data": {"max_length": 512, "image_grid": GRID},
    }
    for name, more in (("plain", {}), ("extras", extras)):
        config = run_config("decoder", root / f"run-{name}", decoder="target", **more)
        run = export_helper.write_run(config, target)
        with pytest.MonkeyPatch.context() as patch:
            export_helper.here(patch)
            export_model(run, None, root / name, form="remote-code" if more else "llava")
    Image.radial_gradient("L").resize((70, 40)).convert("RGB").save(root / "image.png")
    return root


def test_sample_usage_and_pipeline_without_this_package(folders: Path) -> None:
    script = PIPELINE.replace("MODEL", str(folders / "plain")) + CARD.replace("MODEL", str(folders / "extras"))
    said, _, printed = export_helper.run_alone(
        script.replace("IMAGE.png", str(folders / "image.png")), folders
    ).partition("CARD\n")
    assert len(said.split("PIPELINE ", 1)[1].strip()) > 2, "the pipeline answers"
    assert "What is in this image?" in printed and len(printed.split("assistant\n", 1)[1].strip()) > 0


def test_the_folder_opens_by_its_name(folders: Path, made: Callable[..., Path]) -> None:
    """zero_ds opens it again, with the same prompts, features and answers as the run that was exported."""
    named = find_model(str(folders / "plain"))
    assert named.kind == "export" and named.sees
    target = str(made("llama", tied=True))
    ours, theirs = load_model(find_model(str(folders / "run-plain"), target)), load_model(named)
    asked = [Turn("user", "<image>\nwhich shape?")]
    prompts = [m.encoder.encode(m.encoder.turns(Sample("x", tuple(asked), ())), generate=True) for m in (ours, theirs)]
    assert prompts[0] == prompts[1]
    answers = [Answerer(m.model, m.encoder, max_new_tokens=8) for m in (ours, theirs)]
    shown = str(folders / "image.png")
    torch.testing.assert_close(*(a.features([shown])[0] for a in answers), atol=1e-5, rtol=1e-5)
    assert answers[0].reply(asked, [shown]) == answers[1].reply(asked, [shown])


def test_an_image_without_a_place_is_put_where_training_put_it(folders: Path, made: Callable[..., Path]) -> None:
    """The card's plain string and a list with an image give the ids and the pixels of training, tiles included."""
    run, target = folders / "run-extras", made("llama", tied=True)
    source = open_source(run, None)
    encode = sample_encoder(load_graft(run, target), target, made("clip"), source.config.data)
    sample = Sample("x", (Turn("user", "<image>\nwhat is it?"),), (str(folders / "image.png"),))
    tokens = encode.image_tokens(sample)
    assert tokens == [5 * (4 + 2)], "four tiles and the whole"
    encoded = encode.encode(encode.turns(sample), generate=True, image_tokens=tokens)

    processor = AutoProcessor.from_pretrained(folders / "extras", trust_remote_code=True)
    placed = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    image = Image.open(folders / "image.png")
    for content in ("what is it?", placed):
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        assert inputs.input_ids[0].tolist() == [token if i == IMAGE_TOKEN else i for i in encoded.input_ids]
        assert torch.equal(inputs.pixel_values, encode.pixels(sample))


@pytest.mark.parametrize("size", [(40, 30), (32, 32), (64, 64), (7, 90), (1, 1), (500, 3)])
def test_pixels_are_those_of_training(folders: Path, size: tuple[int, int]) -> None:
    processor = AutoProcessor.from_pretrained(folders / "extras", trust_remote_code=True)
    image = Image.radial_gradient("L").convert("RGB").resize(size)
    ours = ImageProcessor(32, processor.image_mean, processor.image_std, processor.resample, GRID)(image)
    assert np.array_equal(processor.views(image), ours.numpy())


def test_prompts_and_images_that_do_not_fit(folders: Path) -> None:
    processor = AutoProcessor.from_pretrained(folders / "extras", trust_remote_code=True)
    image, place = Image.new("RGB", (32, 32)), processor.image_token
    with pytest.raises(ValueError, match="the text has 2 image tokens"):
        processor(text=place * 2, images=image)
    with pytest.raises(ValueError, match="the text has 1 image tokens"):
        processor(text=place)
    with pytest.raises(ValueError, match="3 images for 2 texts"):
        processor(text=["a", "b"], images=[image] * 3)
    two = processor(text=["a", "b longer"], images=[image, image], padding=True, return_tensors="pt")
    assert two.input_ids.shape[0] == 2 and two.pixel_values.shape == (2, 3, 32, 32)
    assert "pixel_values" not in processor(text="no image")


def test_the_code_needs_nothing_of_this_package(folders: Path) -> None:
    for name in remote_code.CODE:
        text = (folders / "extras" / name).read_text()
        assert "zero_ds" not in text and "SPDX-License-Identifier: Apache-2.0" in text


def test_the_model_card(folders: Path, made: Callable[..., Path]) -> None:
    """The card has base models, recipe, licence, proof and metrics; no file contains a path of this machine."""
    for name in ("plain", "extras"):
        text = (folders / name / "README.md").read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert front["base_model"] == [made("llama", tied=True).name, made("clip").name]
        assert front["pipeline_tag"] == "image-text-to-text" and front["license"] == "other"
        assert "| stage | decoder |" in text and "logits are within" in text and "## Licence" in text
        for path in (folders / name).iterdir():
            if path.suffix in (".json", ".md", ".jinja"):
                assert str(folders.parent) not in path.read_text(), path.name


def test_metrics_in_the_model_card(folders: Path, tmp_path: Path) -> None:
    evaluation("held-out | all", tmp_path, 0.6).write(tmp_path / "result.json")
    proof = json.loads((folders / "plain" / "proof.json").read_text())
    measured = card.read_evaluations([tmp_path / "result.json"])
    text = card.model_card(open_source(folders / "run-plain", None), FORMATS["llava"], "plain", proof, measured)
    assert "| held-out \\| all | 60.0% | 26.7% | 90 |" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 60.0


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("~/.cache/hub/models--openai--clip-vit-large-patch14/snapshots/abc", "openai/clip-vit-large-patch14"),
        ("/home/somebody/models/mine/", "mine"),
    ],
)
def test_a_model_is_called_without_its_path(path: str, name: str) -> None:
    assert card.model_name(path) == name
