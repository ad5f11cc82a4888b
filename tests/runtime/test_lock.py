"""Two jobs never use one run folder; the lock of a killed job does not stop the next one."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from zero_ds.runtime import lock
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.lock import FolderLock, InUseError


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"GOING": 0.0, "SETTLE": 0.3, "LOOK": 0.5, "BEAT": 0.05}.items():
        monkeypatch.setattr(lock, name, seconds)


def left_by(folder: Path, **changes: object) -> None:
    """Writes the lock of another process."""
    (folder / lock.FILE).write_text(json.dumps({**lock._this_process(), **changes}))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_in_use_is_refused_and_says_by_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with FolderLock(tmp_path):
        for refusing in (lambda: FolderLock(tmp_path).take(), lambda: lock.refuse_if_in_use(tmp_path)):
            with pytest.raises(InUseError) as caught:
                refusing()
            said = str(caught.value)
            assert f"process {os.getpid()} on " in said and "SLURM_JOB_ID=77" in said and "\n" not in said
            assert f"If it is certain that it is gone, remove {tmp_path / lock.FILE}." in said
        assert not lock.is_free(tmp_path) and lock.lost(tmp_path) is None
    assert list(tmp_path.iterdir()) == [] and lock.is_free(tmp_path)
    with FolderLock(tmp_path):
        pass


def test_what_a_killed_job_left_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pid = dead_process()
    for changes in ({"pid": pid}, {"ticks": 1}):  # gone, or its id given to another process since
        left_by(tmp_path, **changes)
        with caplog.at_level(logging.WARNING), FolderLock(tmp_path) as mine:
            assert mine.is_ours()
        assert "which is gone" in caplog.text
        assert list(tmp_path.iterdir()) == []


def test_a_job_on_another_machine_is_looked_at(tmp_path: Path) -> None:
    left_by(tmp_path, machine="another")
    living, touching = threading.Event(), tmp_path / lock.FILE

    def touch() -> None:
        while not living.wait(0.05):
            os.utime(touching)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(InUseError):
            FolderLock(tmp_path).take()
    finally:
        living.set()
        thread.join()
    with FolderLock(tmp_path) as mine:  # now nobody touches it
        assert mine.is_ours()


def test_a_clock_that_was_set_does_not_make_the_holder_look_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = psutil.Process.create_time
    with FolderLock(tmp_path) as mine:
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: started(process) + 3600.0)
        assert not lock.is_free(tmp_path) and lock.is_held(tmp_path)
        with pytest.raises(InUseError):
            lock.refuse_if_in_use(tmp_path)
        assert mine.is_ours()
    left_by(tmp_path, ticks=1)  # its id was given to another process
    assert lock.is_free(tmp_path)
    left_by(tmp_path, ticks=None, started=started(psutil.Process()))  # written by an older version
    assert lock.is_free(tmp_path), "by a clock that was set"
    monkeypatch.undo()
    assert lock.is_held(tmp_path)


@pytest.mark.parametrize(
    ("error", "in_use"), [(errno.EIO, True), (errno.ESTALE, True), (errno.EACCES, False), (errno.ENOENT, False)]
)
def test_a_lock_that_cannot_be_looked_at_is_not_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, in_use: bool
) -> None:
    """A file that only another user may read can still be looked at from outside."""
    left_by(tmp_path, machine="another")
    opened = Path.open

    def fails(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.name == lock.FILE and mode == "rb":
            raise OSError(error, os.strerror(error))
        return opened(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", fails)
    if in_use:
        with pytest.raises(InUseError):
            lock.refuse_if_in_use(tmp_path)
    else:
        lock.refuse_if_in_use(tmp_path)


def test_machines_are_not_the_same_because_their_names_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers may have the same name and not show what tells machines apart; process ids then say nothing."""
    monkeypatch.setattr(lock, "BOOT", tmp_path / "missing")
    monkeypatch.setattr("uuid.getnode", lambda: 1)
    left_by(tmp_path, pid=dead_process())
    assert lock.is_free(tmp_path)
    monkeypatch.setattr("uuid.getnode", lambda: 2)
    assert not lock.is_free(tmp_path) and not lock.is_held(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "{}", '{"pid": "x"}'])
def test_a_lock_that_says_nothing_is_taken_over_as_well(tmp_path: Path, content: str) -> None:
    (tmp_path / lock.FILE).write_text(content)
    with FolderLock(tmp_path) as mine:
        assert mine.is_ours()


def test_of_many_that_take_an_abandoned_lock_at_once_one_has_it(tmp_path: Path) -> None:
    left_by(tmp_path, pid=dead_process())
    have: list[FolderLock] = []
    refused: list[str] = []

    def take() -> None:
        mine = FolderLock(tmp_path)
        try:
            mine.take()
            have.append(mine)
        except InUseError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [mine.is_ours() for mine in have] == [True] and len(refused) == 5


def test_a_lock_that_another_has_taken_over_is_lost_and_left_to_it(tmp_path: Path) -> None:
    mine = FolderLock(tmp_path)
    mine.take()
    left_by(tmp_path, host="elsewhere", pid=7)
    taken = lock.lost(tmp_path)
    assert taken is not None and "in use by process 7 on elsewhere" in taken
    mine.release()
    assert (tmp_path / lock.FILE).exists()
    again = FolderLock(tmp_path)
    (tmp_path / lock.FILE).unlink()
    again.take()
    (tmp_path / lock.FILE).unlink()
    removed = lock.lost(tmp_path)
    assert removed is not None and "was removed while this job was using the folder" in removed
    again.release()


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server may answer with an error (ESTALE, EIO), which says nothing about another job."""
    with FolderLock(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(lock, "_read", lambda path: {})
            assert lock.lost(tmp_path) is None
        answers = iter([{}])
        read = lock._read
        monkeypatch.setattr(lock, "_read", lambda path: next(answers, None) or read(path))
        assert lock.lost(tmp_path) is None


def test_the_holder_gives_signs_of_life(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        before = (tmp_path / lock.FILE).stat().st_mtime_ns
        while (tmp_path / lock.FILE).stat().st_mtime_ns == before:
            time.sleep(0.02)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\); free some space"):
        FolderLock(tmp_path).take()
