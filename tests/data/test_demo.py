"""The demo's data set is seeded, has no held-out image in training, and is read like real data."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from zero_ds.config.schema import SourceConfig
from zero_ds.data.demo import folder
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


def test_no_heldout_image_is_a_training_image(demo: Path) -> None:
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (demo / "images").iterdir()}
    assert len(hashes) == 60
    assert len(set(hashes.values())) == 60


def test_training_and_text_records_are_ordinary_llava_records(demo: Path) -> None:
    images = Records([SourceConfig(path=str(demo / "train.json"))])
    assert len(images) == 40
    assert all(Path(sample.images[0]).is_file() for sample in images)
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
        assert near, f"no {scene.color} in the image of {scene}"


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


# -- the folder --------------------------------------------------------------------------------------------------------

OLD_CODES = (
    "d018d23e1d60eaaafffc2c7d765a6913dda8fdcb3b06979127f8079a290f076d",
    "35e012bdd41f53c1079a35d8250112a7e55d38c74e6cc9ea629d1d71efcf33b9",
)
"""Hashes of source text in demo.json files that are in use."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces drawing and warming up by a list of their calls."""
    calls: list[str] = []

    def write_demo(out: Path, seed: int) -> None:
        calls.append(f"images {seed}")
        out.mkdir(parents=True)

    def warm_up(data: Path, out: Path, steps: int, seed: int) -> dict[str, float]:
        calls.append(f"encoder {steps}")
        out.mkdir(parents=True)
        return {"color": 1.0}

    monkeypatch.setattr("zero_ds.data.demo.dataset.write_demo", write_demo)
    monkeypatch.setattr("zero_ds.data.demo.warmup.warm_up", warm_up)
    return calls


def test_a_demo_is_made_once_for_its_settings(tmp_path: Path, made: list[str]) -> None:
    for _ in range(2):
        folder.make_demo(tmp_path, seed=1, steps=5)
    assert made == ["images 1", "encoder 5"]
    folder.make_demo(tmp_path, seed=1, steps=6)
    assert made == ["images 1", "encoder 5", "images 1", "encoder 6"], "other settings"


@pytest.mark.parametrize("code", OLD_CODES)
def test_a_demo_of_an_earlier_version_counts_as_made(tmp_path: Path, made: list[str], code: str) -> None:
    """It is recognised by the hash of the source text that made it, even though the sources have changed."""
    record = tmp_path / "demo.json"
    record.write_text(json.dumps({"code": code, "seed": 0, "steps": 2000}))
    (tmp_path / "data").mkdir()
    folder.make_demo(tmp_path, seed=0, steps=2000)
    assert not made and (tmp_path / "data").is_dir()
    folder.make_demo(tmp_path, seed=2, steps=2000)
    assert made == ["images 2", "encoder 2000"]


@pytest.mark.parametrize("content", ['{"code": "0", "seed": 0, "steps": 2000}', "[]", '{"version": 0, "seed": 0}'])
def test_a_demo_of_unknown_origin_is_made_again(tmp_path: Path, made: list[str], content: str) -> None:
    (tmp_path / "demo.json").write_text(content)
    folder.make_demo(tmp_path)
    assert made == ["images 0", "encoder 2000"]


def test_a_later_version_makes_every_demo_again(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"code": OLD_CODES[0], "seed": 0, "steps": 2000}))
    monkeypatch.setattr(folder, "VERSION", 2)
    folder.make_demo(tmp_path)
    assert made == ["images 0", "encoder 2000"]
