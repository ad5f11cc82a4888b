"""Images in zip and tar files beside JSON."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from zero_ds.config.schema import SourceConfig
from zero_ds.data.formats import DataError
from zero_ds.data.sources import Records
from zero_ds.data.stored import StoredImage


def tar(path: Path, members: dict[str, Any]) -> Path:
    """Writes a tar file; a text as content makes a symbolic link to it."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def records(folder: Path, root: Path, image: str = "a.png") -> Records:
    path = folder / "data.json"
    path.write_text(json.dumps([{"id": "s", "image": image, "caption": "c"}]))
    return Records([SourceConfig(path=str(path), root=str(root))])


def content(found: Records) -> bytes:
    (image,) = found[0].images
    assert isinstance(image, StoredImage)
    return image.read()


def test_the_last_member_of_a_name_wins_and_the_index_is_kept(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"./a.png": b"old", "b/c.png": b"other"})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("a.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"new"))
    found = records(tmp_path, path)
    assert content(found) == b"new" and str(found[0].images[0]) == f"a.png in {path}"
    assert content(records(tmp_path, path, "./b/c.png")) == b"other"


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"../a.png": b"x"}, r"is refused: its member '../a.png' leaves the archive's folder"),
        ({"/a.png": b"x"}, r"is refused: its member '/a.png' leaves"),
        ({"a.png": "/etc/passwd"}, r"sample s: image 'a.png' is a link there, which is not followed"),
        ({"b.png": b"x"}, r"sample s: image 'a.png' is not in .*a.tar"),
        ({}, "holds no file"),
    ],
)
def test_members_that_are_refused(tmp_path: Path, members: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        records(tmp_path, tar(tmp_path / "a.tar", members))[0]


def test_a_folder_inside_an_archive(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"train/deep/a.png": b"x"})
    assert content(records(tmp_path, path / "train" / "deep")) == b"x"
    assert content(records(tmp_path, path / "train", "deep/a.png")) == b"x"
    with pytest.raises(DataError, match=r"not in .*a.tar; a folder inside is named by root: ARCHIVE/FOLDER"):
        records(tmp_path, path)[0]
    with pytest.raises(DataError, match=r"image '../a.png' leaves"):
        records(tmp_path, path / "train", "../a.png")[0]


def test_a_name_that_leaves_the_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image '../a.png' leaves .*a.tar"):
        records(tmp_path, tar(tmp_path / "a.tar", {"a.png": b"x"}), "../a.png")[0]


@pytest.mark.parametrize("size", [0, 100, 700, 1500, 2048])
def test_a_truncated_tar(tmp_path: Path, size: int) -> None:
    path = tar(tmp_path / "a.tar", {"a.png": b"x" * 900, "b.png": b"x"})
    os.truncate(path, size)
    with pytest.raises(DataError, match=r"archive .*a.tar cannot be read: \S"):
        records(tmp_path, path)


def test_zip_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"x" * 900, zipfile.ZIP_LZMA)
        link = zipfile.ZipInfo("b.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="compressed there by a method other than deflate"):
        records(tmp_path, path)[0]
    with pytest.raises(DataError, match="is a link there"):
        records(tmp_path, path, "b.png")[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"archive .*a.zip cannot be read: \S"):
        records(tmp_path, path)


def test_archives_that_are_compressed_or_missing(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="is compressed as a whole"):
        records(tmp_path, tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match=r"archive .*b.tar does not exist"):
        records(tmp_path, tmp_path / "b.tar")
