"""`zero-ds data check` inspects a whole data set, and tools/mix_datasets.py loses nothing of it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from pace import scaled
from PIL import Image
from places import ROOT
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import SourceConfig
from zero_ds.data.mixing import mix
from zero_ds.data.sources import Records
from zero_ds.runtime.errors import ConfigError


def write(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Returns a file with samples of every fault and two good ones."""
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png")
    Image.effect_noise((200, 200), 80).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-2000])
    (tmp_path / "empty.png").touch()
    talk = [("what is it?", "a square.")]
    return write(
        tmp_path / "data.json",
        [
            tiny.record("good", talk, "fine.png"),
            tiny.record("missing", talk, "nowhere.png"),
            tiny.record("cut", talk, "cut.jpg"),
            tiny.record("empty", talk, "empty.png"),
            tiny.record("sly", talk, "../secret.png"),
            tiny.record("long", [("q? " * 300, "a.")]),
            {"id": "mute", "conversations": []},
            tiny.record("text", talk),
        ],
    )


def check(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["data", "check", *map(str, words)])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_named_and_counted(faulty: Path, made: Any, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "found"
    options = ("--model", made("llama", tied=True), "--tokens-per-image", 4, "--max-length", 200, "--workers", workers)
    result = check(faulty, *options, "--out", out)
    assert result.exit_code == 1
    content = json.loads((out / "check.json").read_text())
    assert content["faults"] == {"record": 1, "picture": 3, "path": 1, "too long": 1}
    assert (content["samples"], content["pictures"]) == (7, 5)
    assert content["lengths"]["unit"] == "tokens" and content["lengths"]["longest"] < 2000
    named = {kind: " ".join(sentences) for kind, sentences in content["examples"].items()}
    for kind, sample in (("record", "mute"), ("path", "sly"), ("too long", "long")):
        assert f"sample {sample}" in named[kind]
    assert all(f"sample {name}: " in named["picture"] for name in ("missing", "cut", "empty"))
    assert "3 x picture" in result.stdout and "6 samples cannot be used" in result.stdout
    with Image.open(out / "lengths.png") as image:
        assert image.width > 500


def test_keys_that_are_not_read_are_counted(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    record = {**tiny.record("a", [("q?", "a.")], "link/x.png"), "source": "web"}
    write(tmp_path / "data" / "x.json", [record, {**record, "tools": "[]"}, {**record, "tools": "[{}]"}])
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    result = check(tmp_path / "data", "--workers", 0, "--out", tmp_path / "found")
    assert result.exit_code == 1 and "through a link to" in result.stdout and "--allow-root" in result.stdout
    assert "keys that are not read, with the number of their samples: source (2)" in result.stdout
    assert "key 'tools' is not supported" in result.stdout and "skipped files" in result.stdout
    content = json.loads((tmp_path / "found" / "check.json").read_text())
    assert content["keys that are not read"] == {"source": 2} and content["faults"] == {"record": 1, "path": 2}
    allowed = check(tmp_path / "data", "--workers", 0, "--allow-root", tmp_path / "elsewhere")
    assert "x path" not in allowed.stdout


def test_headers_are_enough_to_find_what_is_missing(faulty: Path) -> None:
    result = check(faulty, "--pictures", "headers", "--workers", 0)
    assert "2 x picture" in result.stdout, "a truncated image begins like a whole one"
    assert "x picture" not in check(faulty, "--pictures", "none", "--workers", 0).stdout


def test_a_good_data_set_ends_well(data: Path) -> None:
    result = check(data, "--workers", 0)
    assert result.exit_code == 0 and "nothing is wrong" in result.stdout
    assert "estimated" in result.stdout


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("nowhere.json",), "data file nowhere.json does not exist"),
        (("nowhere",), "data file nowhere does not exist"),
        (("DATA", "--pictures", "heads"), "--pictures heads is unknown; did you mean 'headers'?"),
        (("DATA", "--model", "nowhere"), "model folder nowhere does not exist"),
    ],
)
def test_what_cannot_be_checked(data: Path, words: tuple[str, ...], complaint: str) -> None:
    command = [sys.executable, "-m", "zero_ds.cli", "data", "check", *(str(data) if w == "DATA" else w for w in words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(120))
    assert done.returncode == 2 and complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# -- mixing ------------------------------------------------------------------------------------------------------------


def tool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "mix_datasets.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=scaled(120))


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_mix_holds_every_sample_with_its_images(tmp_path: Path, ending: str) -> None:
    (tmp_path / "images").mkdir()
    talk = [("q?", "a."), ("r?", "b.")]
    with_image = [tiny.record(f"p{n}", talk, f"{n}.png") for n in range(6)]
    two = {**tiny.record("both", [("<image> and <image>?", "a.")]), "image": ["0.png", "1.png"]}
    a = write(tmp_path / "a.json", [*with_image, two])
    b = write(tmp_path / "b.json", [tiny.record(f"t{n}", talk) for n in range(4)])
    outs = [tmp_path / f"mixed{n}.{ending}" for n in range(3)]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        done = tool(f"{a}:{tmp_path / 'images'}", b, "--out", out, "--seed", seed)
        assert done.returncode == 0 and done.stdout == f"{out}: 11 samples\n", done.stderr
    mixed = list(Records([SourceConfig(path=str(outs[0]))]))
    whole = {
        s.id: s for s in Records([SourceConfig(path=str(a), root=str(tmp_path / "images")), SourceConfig(path=str(b))])
    }
    assert {sample.id: sample for sample in mixed} == whole
    places = [n for n, sample in enumerate(mixed) if sample.id.startswith("t")]
    assert all(2 <= right - left <= 4 for left, right in pairwise(places)), "spread evenly"
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()


def test_a_mix_of_a_random_part(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{n}.json", [tiny.record(f"{n}{i}", [("q?", "a.")]) for i in range(20)]) for n in "ab")
    out = tmp_path / "mixed.json"
    assert tool(a, b, "--out", out, "--limit", 5, "--limit", 0).returncode == 0
    ids = [record["id"] for record in json.loads(out.read_text())]
    assert sum(name.startswith("a") for name in ids) == 5 and sum(name.startswith("b") for name in ids) == 20
    assert tool(a, b, "--out", tmp_path / "kept.json", "--no-shuffle").returncode == 0
    kept = [record["id"] for record in json.loads((tmp_path / "kept.json").read_text())]
    assert [name for name in kept if name.startswith("a")] == [f"a{i}" for i in range(20)]


def test_what_cannot_be_mixed(tmp_path: Path) -> None:
    good = write(tmp_path / "good.json", [tiny.record("x", [("q?", "a.")], "x.png")])
    (tmp_path / "inner").mkdir()
    for words, complaint in (
        ((good, "--out", tmp_path / "x.txt"), "must end in .json or .jsonl"),
        ((good, "--out", good), "already exists"),
        ((good, "--out", tmp_path / "inner" / "x.json"), "sample x has its image in"),
        ((good, good, "--out", tmp_path / "x.json", "--limit", 1), "--limit: 1 given for 2 sources"),
        ((tmp_path / "nowhere.json", "--out", tmp_path / "x.json"), "nowhere.json does not exist"),
    ):
        done = tool(*words)
        assert done.returncode == 2 and complaint in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "inner").iterdir()) and not (tmp_path / "x.json").exists()
    with pytest.raises(ConfigError, match="cannot be written"):
        mix([SourceConfig(path=str(good))], tmp_path / "no" / "x.json")
