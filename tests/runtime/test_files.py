"""Files and folders appear completely or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from zero_ds.runtime import files
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import disk_sentence, new_folder, write_atomically


def test_write_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "three")
    assert path.read_text() == "two", "the old content or the new one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    with new_folder(out) as folder:
        (folder / "a").write_text("a")
        assert not out.exists()
    assert (out / "a").read_text() == "a" and list(out.parent.iterdir()) == [out]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "run"
    with pytest.raises(type(error)), new_folder(out) as folder:
        (folder / "a").write_text("a")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_with_content_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with new_folder(out) as folder:
        (folder / "a").write_text("a")
    with pytest.raises(ConfigError, match="run already exists; choose another --out or remove it"), new_folder(out):
        raise AssertionError("never entered")
    assert [path.name for path in out.iterdir()] == ["a"]
    late = tmp_path / "late"
    with pytest.raises(ConfigError, match="late already exists"), new_folder(late) as folder:
        late.mkdir()
        (late / "b").write_text("b")
    assert [path.name for path in late.iterdir()] == ["b"], "a folder that appeared meanwhile is not overwritten"


def test_what_cannot_be_made_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"), new_folder(tmp_path / "file" / "run"):
        raise AssertionError("never entered")
    with pytest.raises(ConfigError, match="MB free that run needs"), new_folder(tmp_path / "run", need=1 << 60):
        raise AssertionError("never entered")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("words", ["No space left on device", "Disk quota exceeded"])
def test_a_full_disk_is_known_by_the_words_of_other_writers(words: str) -> None:
    """safetensors and Arrow write without Python, and raise types of their own."""
    assert (
        disk_sentence(RuntimeError(f"I/O error: {words} (os error 28)")) == f"{words}; free some space and run again."
    )
    assert disk_sentence(OSError(errno.EDQUOT, "Disk quota exceeded", "a")) == (
        "Disk quota exceeded: a; free some space and run again."
    )


def test_the_home_folder_is_found_in_one_place() -> None:
    """Python raises a RuntimeError for a user that does not exist, and a folder named `~` must never be made."""
    sources = Path(files.__file__).parents[1].rglob("*.py")
    others = [path.name for path in sources if ".expanduser(" in path.read_text(encoding="utf-8")]
    assert sorted(others) == ["files.py", "probe.py"], "the latter runs on other machines, without the package"
