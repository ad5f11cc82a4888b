"""`zero-ds data show`: samples as the model sees them."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import layouts
import pytest
import tiny
import yaml
from PIL import Image
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import IGNORE, ChatTemplate
from zero_ds.data.images import ImageProcessor
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.show import look, page, terminal
from zero_ds.data.sources import Records

PROCESSOR = ImageProcessor(tiny.IMAGE_SIZE, [0.5] * 3, [0.5] * 3)


def show(*words: Any) -> Any:
    return CliRunner().invoke(app, ["data", "show", *map(str, words)])


def encoder(**more: Any) -> SampleEncoder:
    return SampleEncoder(ChatTemplate(tiny.tokenizer()), "response", PROCESSOR, tiny.TOKENS_PER_IMAGE, **more)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    path = tmp_path / "data.json"
    image = "data:;base64," + base64.b64encode(layouts.image_bytes(0)).decode()
    talks = [
        {"id": "a", "image": image, "question": "What is it?", "answer": "A <b>sq\u00fcare</b> \U0001f642."},
        {"id": "b", "question": "\x1b[31mred?", "answer": "no"},
    ]
    path.write_text(json.dumps(talks))
    return Records([SourceConfig(path=str(path))])


def test_every_token_is_shown_with_its_part_of_the_text(records: Records) -> None:
    encode = encoder()
    shown = look(0, records[0], encode)
    encoded = encode(records[0])
    assert [token.id for token in shown.tokens] == encoded.input_ids
    assert [token.trained for token in shown.tokens] == [label != IGNORE for label in encoded.labels]
    text = "".join(token.text for token in shown.tokens)
    assert text == encode.template.render(encode.turns(records[0])).replace("<image>", "")
    trained = "".join(token.text for token in shown.tokens if token.trained)
    assert trained == "A <b>sq\u00fcare</b> \U0001f642.<|im_end|>"
    assert shown.views.shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


def test_in_a_terminal(records: Records) -> None:
    encode = encoder()
    plain = terminal(look(0, records[0], encode), colors=False)
    assert "[image: 4 tokens]" in plain and "«A <b>sq\u00fcare</b> \U0001f642.<|im_end|>»" in plain
    assert "image 1: in a data: address" in plain and "ids without images: " in plain
    assert "\x1b" not in terminal(look(1, records[1], encode), colors=False), "text from data steers no terminal"
    assert "\u2580" in terminal(look(0, records[0], encode), colors=True)


def test_as_a_page_of_its_own(records: Records) -> None:
    encode = encoder()
    text = page("<samples>", [look(number, records[number], encode) for number in (0, 1)])
    assert "<h1>&lt;samples&gt;</h1>" in text
    assert "<b>sq" not in text and "http" not in text, "nothing of the data is markup, and nothing is fetched"
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert Image.open(io.BytesIO(base64.b64decode(image))).size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


def test_a_recipe_shows_what_its_run_sees(run_config: Any, data: Path, tmp_path: Path) -> None:
    config = run_config("encoder", tmp_path / "run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    out = tmp_path / "page.html"
    result = show(recipe, 0, 7, "--html", out)
    assert result.exit_code == 0, result.output
    samples = Records([SourceConfig(path=str(data))])
    for number in (0, 7):
        assert f"sample {number} ({samples[number].id}): " in result.stdout
    assert "«" in result.stdout and out.read_text().count("<h2>") == 2
    assert not (tmp_path / "run").exists()
    beyond = show(recipe, 8)
    assert "there is no sample 8; the data has samples 0 to 7" in str(beyond.exception)


def test_a_path_needs_a_model(made: Any, data: Path, tmp_path: Path) -> None:
    by_path = show(data, 1, "--model", made("llama", tied=True), "--encoder", made("clip"))
    assert by_path.exit_code == 0 and "«" in by_path.stdout, by_path.output
    without = show(data)
    assert "--model is missing" in str(without.exception)


def test_columns_and_subsets_on_the_command_line(made: Any, tmp_path: Path) -> None:
    found = layouts.write_layouts(tmp_path, layouts.conversations(4))
    check = ["data", "check", found["hub"]["path"], "--subset", "talks", "--split", "train", "--workers", "0"]
    result = CliRunner().invoke(app, check)
    assert result.exit_code == 0 and "4 samples, 4 images" in result.stdout, result.output
    shown = show(found["columns"]["path"], "--column", "image=photos", "--model", made("llama", tied=True))
    assert "has an image, but this stage has no vision encoder" in str(shown.exception)
    wrong = CliRunner().invoke(app, ["data", "check", found["columns"]["path"], "--column", "image=photo"])
    assert "did you mean 'photos'" in wrong.output + str(wrong.exception)
