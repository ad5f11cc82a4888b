"""The demo's data set: seeded, without a held-out picture in training, and readable by what reads real data."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from zero_ds.config.schema import SourceConfig
from zero_ds.data.demo.dataset import write_demo
from zero_ds.data.demo.scenes import BACKGROUNDS, COLORS, caption, draw, sample_scene
from zero_ds.data.demo.warmup import warm_up
from zero_ds.data.sources import Records
from zero_ds.evaluation.heldout.records import read_records
from zero_ds.runtime.errors import ConfigError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    write_demo(out, train=40, heldout=20, told=10, seed=3)
    return out


def test_the_same_seed_gives_the_same_files(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again", train=40, heldout=20, told=10, seed=3)
    for path in sorted(demo.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(demo)).read_bytes(), path.name


def test_no_heldout_picture_is_a_training_picture(demo: Path) -> None:
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (demo / "images").iterdir()}
    assert len(hashes) == 60
    assert len(set(hashes.values())) == 60


def test_training_and_text_records_are_ordinary_llava_records(demo: Path) -> None:
    pictures = Records([SourceConfig(path=str(demo / "train.json"))])
    assert len(pictures) == 40
    assert all(Path(sample.images[0]).is_file() for sample in pictures)
    assert not any(sample.images for sample in Records([SourceConfig(path=str(demo / "text.json"))]))


def test_heldout_records_name_their_words(demo: Path) -> None:
    records = read_records(demo / "heldout.json")
    assert {record.kind for record in records} == {"question", "caption"}
    assert len(records) == 40
    for record in records:
        for word in record.words:
            assert record.answer[word.start :].startswith(word.word)
            assert word.word in word.choices


def test_a_background_color_counts_against_an_answer_about_the_shape(demo: Path) -> None:
    for record in json.loads((demo / "heldout.json").read_text(encoding="utf-8")):
        for word in record["words"]:
            if word["kind"] in ("color", "background"):
                assert set(word["choices"]) == set(COLORS) | set(BACKGROUNDS)


def test_scenes_are_drawn_as_described() -> None:
    rng = random.Random(0)
    for _ in range(50):
        scene = sample_scene(rng)
        image = draw(scene)
        assert image.tobytes() == draw(scene).tobytes()
        wanted = [scene.color, scene.shape, scene.background] + ([scene.side] if scene.side else [])
        assert all(word in caption(scene) for word in wanted)
        colors = [color for _, color in image.getcolors(maxcolors=image.width * image.height)]
        red, green, blue = COLORS[scene.color]
        near = [c for c in colors if abs(c[0] - red) + abs(c[1] - green) + abs(c[2] - blue) < 90]
        assert near, f"no {scene.color} in the picture of {scene}"


def test_an_existing_folder_is_left_alone(demo: Path) -> None:
    with pytest.raises(ConfigError, match="already exists"):
        write_demo(demo, train=1, heldout=1, told=0)


def test_the_encoder_is_warmed_up_into_a_folder_of_transformers(demo: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, CLIPVisionModel

    accuracy = warm_up(demo, tmp_path / "encoder", steps=3, batch=4)
    assert {"color", "shape"} <= set(accuracy)
    assert all(0 <= value <= 1 for value in accuracy.values())
    model = CLIPVisionModel.from_pretrained(tmp_path / "encoder")
    assert model.config.image_size == AutoImageProcessor.from_pretrained(tmp_path / "encoder").crop_size["height"]
