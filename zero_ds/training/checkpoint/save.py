"""Saves a checkpoint: written into a temporary folder, compared with the live model, synced, renamed, and only then
does `latest` move.

    1. `begin_saving`   a collective of the step: tensors go to the ranks that write them (exchange.py) and are compared
    2. writing          each of these ranks writes its files (shares.py), at once or beside training from a copy
    3. `Saving.publish` a collective between two steps: once all files are whole, rank 0 describes them and renames
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from zero_ds.runtime import distributed, lock
from zero_ds.runtime.failure import WATCH
from zero_ds.runtime.files import disk_sentence, write_atomically
from zero_ds.runtime.safetensors import SafetensorsStream, content_sha256
from zero_ds.runtime.zero3 import parameter_shape
from zero_ds.training.checkpoint import KEYS, PIECE, STATE_BYTES
from zero_ds.training.checkpoint.best import best_folder, set_best
from zero_ds.training.checkpoint.checkpoint import FOLDER_NAME, CheckpointError, Progress
from zero_ds.training.checkpoint.comparison import Comparison
from zero_ds.training.checkpoint.exchange import Cut, Piece, exchanged
from zero_ds.training.checkpoint.manifest import Manifest, versions, write_manifest
from zero_ds.training.checkpoint.shares import SMALLEST, Shares, file_names
from zero_ds.training.engine import Engine

logger = logging.getLogger(__name__)

ARRIVES = 30.0
"""Seconds within which rank 0 has to see the files of the other ranks. Network file systems may show them late."""

Asynchronous = Literal["auto", True, False]
"""Setting `checkpoint.asynchronous`."""


class UnlikeLiveError(CheckpointError):
    """A checkpoint would differ from the live model."""

    may_pass = True  # memory that fails does not fail in the same way twice; a setting does, and the launcher notices


class TakenError(CheckpointError):
    """Another job has taken over the run folder."""


def end_without_folder(run: Path) -> TakenError:
    """Returns the error with which a rank ends after another job has taken over the run folder."""
    WATCH.folder = None  # the launcher of the other job would take this reason for its own
    return TakenError(lock.seen_lost(run) or f"another job has taken over {run}; this one ends.")


def save_checkpoint(
    run: Path, engine: Engine, manifest: Manifest, progress: Progress, keep: int, shares: Shares | None = None
) -> Path:
    """Saves a checkpoint after `progress["step"]` steps and returns its folder. A collective.

    keep: number of checkpoints that stay, the newest. shares: who writes what; None: rank 0 writes everything.

    Raises:
        CheckpointError: a disk refused, the content differs from the live model (`Comparison`), or another job has
            taken the folder; earlier checkpoints are unchanged.
    """
    return begin_saving(run, engine, manifest, progress, shares, asynchronous=False).publish(keep)


def begin_saving(
    run: Path,
    engine: Engine,
    manifest: Manifest,
    progress: Progress,
    shares: Shares | None = None,
    *,
    asynchronous: Asynchronous = "auto",
) -> Saving:
    """Begins to save a checkpoint after `progress["step"]` steps: moves tensors to the ranks that write them.

    A collective. When it returns, training may change the model.

    Raises:
        CheckpointError: as `save_checkpoint`.
    """
    saving = Saving(run, engine, {**manifest, "step": progress["step"], "versions": versions()}, progress, shares)
    try:
        saving.begin(_beside(asynchronous, saving.copy_bytes))
    except BaseException:  # a second signal ends a run at once
        saving.abandon()
        raise
    return saving


class Saving:
    """A checkpoint that is being saved, and not yet published."""

    def __init__(
        self, run: Path, engine: Engine, manifest: Manifest, progress: Progress, shares: Shares | None
    ) -> None:
        """Names the temporary folder. A collective."""
        self.run, self.engine, self.step = run, engine, progress["step"]
        self._manifest, self._progress = manifest, progress
        self._shares = shares or Shares.of_rank_zero(engine.named)
        (token,) = distributed.sum_integers([uuid.uuid4().int >> 66 if distributed.is_rank_zero() else 0])
        self._temporary = run / f".step-{self.step:06d}.{token:x}.tmp"
        mine = self._shares.mine
        self._writer = None if mine is None else _Writer(self._temporary, engine, self._shares, mine)
        self._thread: threading.Thread | None = None
        self.begun_beside = False
        """Whether the ranks write beside training."""

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copy from which this rank would write beside training."""
        return self._writer.copy_bytes if self._writer is not None else 0

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing beside training."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write."""
        return self._writer is not None and self._writer.error is not None

    def begin(self, beside: bool) -> None:
        """Moves the tensors and compares them with the live model; writes them, or begins to. A collective.

        beside: whether to write beside training, from a copy.

        Raises:
            CheckpointError: as `save_checkpoint`.
        """
        self.begun_beside = beside
        self._stop_all_on_error(_error_of(lambda: (self._temporary / "resume").mkdir(parents=True), rank=0))
        comparison, state = Comparison(self.engine.state), self.engine.state
        for name, parameter in self.engine.named.items():
            comparison.add(name, parameter)
        copy = _Copy(self._writer.shapes) if beside and self._writer is not None else None
        for piece in exchanged(state, self.engine.named, self._shares):
            assert self._writer is not None
            comparison.add_piece(piece)
            (self._writer if copy is None else copy).add(piece)
        self._progress = {**self._progress, "optimizer_steps": state.steps(), "loss_scale": state.loss_scale()}
        self._refuse_difference(comparison.verdict())
        if copy is not None and self._writer is not None:
            self._thread = threading.Thread(target=self._writer.write, args=(copy,), daemon=True)
            self._thread.start()

    def publish(self, keep: int) -> Path:
        """Waits until all ranks have written, and publishes the checkpoint; returns its folder. A collective.

        keep: number of checkpoints that stay, the newest.

        Raises:
            CheckpointError: as `save_checkpoint`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error = self._writer.finish() if self._writer is not None else None
        distributed.wait_for_all()  # a disk may take longer than a collective waits
        self._stop_all_on_error(error)
        sealed = self._sealed()
        final = self.run / f"step-{self.step:06d}"
        self._stop_all_on_error(_error_of(lambda: self._publish(sealed, final), rank=0))
        if distributed.is_rank_zero():
            if "validation_loss" in self._progress:
                set_best(final)
            _delete_old(self.run, self.step, keep)
        distributed.barrier()
        return final

    def stop_writing(self) -> None:
        """Makes a thread that writes beside training end soon; the checkpoint can then not be published."""
        if self._writer is not None:
            self._writer.stopped.set()

    def abandon(self) -> None:
        """Gives the checkpoint up, without the other ranks; the next run removes what they leave."""
        self.stop_writing()
        if self._thread is not None:
            self._thread.join()
        if self._writer is not None:
            self._writer.close()
        if distributed.is_rank_zero():
            shutil.rmtree(self._temporary, ignore_errors=True)

    # -- publishing ----------------------------------------------------------------------------------------------------

    def _sealed(self) -> dict[str, Any]:
        """Returns the hashes of all files and weights, and the files' sizes, on every rank. A collective."""
        names, count = list(self.engine.named), len(self._shares.writers)
        kinds = {"weights": file_names("weights", count), "state": file_names("state", count)}
        files = [(kind, number) for kind in kinds for number in range(count)]
        rows = [*files, *names]
        mine = self._writer.sealed() if self._writer is not None else {}
        flat = distributed.sum_integers([word for row in rows for word in mine.get(row, [0] * _ROW)])
        table = dict(zip(rows, (flat[start : start + _ROW] for start in range(0, len(flat), _ROW)), strict=True))
        digests = {row: _hexadecimal(words) for row, words in table.items()}
        return {
            **{
                f"{kind}_files": {name: digests[kind, number] for number, name in enumerate(of_kind)}
                for kind, of_kind in kinds.items()
            },
            "weights_sha256": content_sha256({name: digests[name] for name in names}),
            "sizes": {kinds[kind][number]: table[kind, number][-1] for kind, number in files},
        }

    def _publish(self, sealed: dict[str, Any], final: Path) -> None:
        """Describes the files and moves the folder to its place."""
        resume = self._temporary / "resume"
        files = {self._temporary / name for name in sealed["weights_files"]}
        files |= {resume / name for name in sealed["state_files"]}
        _await_files({path: sealed["sizes"][path.name] for path in sorted(files)}, self.run)
        self._manifest["weights_sha256"] = sealed["weights_sha256"]
        self._manifest["weights_files"] = sealed["weights_files"]
        write_manifest(self._temporary, self._manifest)
        described = json.dumps({**self._progress, "state_files": sealed["state_files"]}, indent=2)
        write_atomically(resume / "progress.json", described + "\n")
        sync_folder(resume)
        sync_folder(self._temporary)
        if (taken := lock.lost(self.run)) is not None:
            raise TakenError(taken)
        # newer than `latest`: left by a kill before `latest` moved, or by a run that was set back
        before = _hide(final) if final.is_dir() else None
        self._temporary.rename(final)
        sync_folder(self.run)
        write_atomically(self.run / "latest", final.name + "\n")
        sync_folder(self.run)
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    # -- errors --------------------------------------------------------------------------------------------------------

    def _remove(self) -> None:
        """Removes what has been written so far. A collective."""
        if self._writer is not None:
            self._writer.close()
        distributed.barrier()
        if distributed.is_rank_zero():
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _refuse_difference(self, difference: str | None) -> None:
        """Raises on every rank if the content differs from the live model. A collective.

        difference: as `Comparison.verdict` returned it, the same on every rank.
        """
        if difference is None:
            return
        sentence = (
            f"step {self.step} is not saved: {difference}; earlier checkpoints are intact. Try another zero=NAME."
        )
        self._remove()
        if distributed.is_rank_zero():
            WATCH.record(sentence)
        raise UnlikeLiveError(sentence)

    def _stop_all_on_error(self, error: Exception | None) -> None:
        """Raises on every rank if any of them could not write. A collective."""
        may_pass, taken, sentence = False, isinstance(error, TakenError), ""
        if error is not None:
            reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
            sentence = f"step {self.step} could not be saved in {self.run}: {reason}; earlier checkpoints are intact."
            # a full disk stays full; a file server that did not answer may answer the next attempt
            may_pass = isinstance(error, OSError) and disk_sentence(error) is None
            if not taken:
                WATCH.record(sentence, not may_pass)  # before the other ranks know
        failed = distributed.world_size() - distributed.rank() if error is not None else 0
        stays = error is not None and not may_pass
        first, stay, takeovers = distributed.max_over_ranks(failed, stays, taken)
        if takeovers:
            WATCH.folder = None  # the launcher of the other job would take this reason for its own
        if first:
            self._remove()
            rank = distributed.world_size() - int(first)
            raised = CheckpointError(sentence or f"step {self.step} could not be saved by rank {rank}.")
            raised.may_pass = not stay
            raise raised


def _error_of(action: Callable[[], object], rank: int) -> OSError | CheckpointError | None:
    """Runs an action on one rank; returns its error on that rank, for which the others wait, and None elsewhere."""
    if distributed.rank() == rank:
        try:
            action()
        except (OSError, CheckpointError) as error:
            return error
    return None


def _await_files(sizes: Mapping[Path, int], run: Path) -> None:
    """Waits until all files, which the ranks have closed, are seen here with their sizes.

    Raises:
        CheckpointError: one is not within `ARRIVES` seconds.
    """
    deadline = time.monotonic() + ARRIVES
    for path, size in sizes.items():
        while _size_of(path) != size:
            if time.monotonic() > deadline:
                raise CheckpointError(f"{path} has not arrived; do all machines share {run}?")
            time.sleep(0.1)


def _size_of(path: Path) -> int | None:
    """Returns the size of a file; None if it is not there."""
    try:
        with path.open("rb") as file:  # opened, because network file systems then ask their server
            return os.fstat(file.fileno()).st_size
    except OSError:
        return None


def _beside(asynchronous: Asynchronous, size: int) -> bool:
    """Returns whether to write beside training, the same on every rank. A collective.

    size: bytes of this rank's copy.
    """
    if asynchronous != "auto":
        return asynchronous
    largest, lacking = distributed.max_over_ranks(size, 2 * size > distributed.free_host_bytes())
    if largest >= SMALLEST and lacking:
        logger.info("training waits for the checkpoint: free memory does not hold a copy of it twice")
    return largest >= SMALLEST and not lacking


def _delete_old(run: Path, step: int, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints up to `step`, and the best one."""
    folders = {int(path.name.removeprefix("step-")): path for path in run.iterdir() if FOLDER_NAME.fullmatch(path.name)}
    up_to_now = [folders[number] for number in sorted(folders) if number <= step]
    best = best_folder(run)
    for folder in up_to_now[:-keep]:
        if folder == best or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(_hide(folder), ignore_errors=True)


def _hide(folder: Path) -> Path:
    """Renames a checkpoint that will be deleted, so that a kill leaves no half of one; the next run removes it."""
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    folder.rename(hidden)
    return hidden


_WORDS = 4
"""Integers of 64 bits in a SHA-256."""
_ROW = _WORDS + 1
"""Integers about a file or a tensor: its SHA-256 and its number of bytes."""


class _Copy:
    """This rank's share in host memory, from which it is written while training changes the model."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self._tensors = {(name, key): torch.empty(shape.numel()) for name, shape in shapes.items() for key in KEYS}

    def add(self, piece: Piece) -> None:
        """Copies a piece to its place."""
        name, key, start, stop = piece.cut
        self._tensors[name, key][start:stop] = piece.values

    def pieces(self) -> Iterator[Piece]:
        """Yields the pieces in the order in which they are written. A tensor is freed once it is passed on."""
        while self._tensors:
            name, key = next(iter(self._tensors))
            tensor = self._tensors.pop((name, key))
            for start in range(0, len(tensor), PIECE):
                part = tensor[start : start + PIECE]
                yield Piece(Cut(name, key, start, start + len(part)), part)


class _Writer:
    """Writes this rank's share. It keeps the first error for later, because the other ranks are in collectives."""

    def __init__(self, folder: Path, engine: Engine, shares: Shares, number: int) -> None:
        """Opens nothing yet. number: index of the share."""
        self.error: Exception | None = None
        self.stopped = threading.Event()
        named = {name: engine.named[name] for name in shares.names[number]}
        self.shapes = {name: parameter_shape(parameter) for name, parameter in named.items()}
        self.copy_bytes = sum(STATE_BYTES * shape.numel() for shape in self.shapes.values())
        self._dtypes = {name: parameter.dtype for name, parameter in named.items()}
        self._number = number
        count = len(shares.writers)
        self._weights_path = folder / file_names("weights", count)[number]
        self._state_path = folder / "resume" / file_names("state", count)[number]
        self._streams: tuple[SafetensorsStream, SafetensorsStream] | None = None
        self._hashes: tuple[str, str] | None = None
        self._sizes = (0, 0)

    def add(self, piece: Piece) -> None:
        """Appends a piece of one of a parameter's tensors (`KEYS`); the master copy also becomes the weight."""
        self._try(lambda: self._add(piece))

    def write(self, copy: _Copy) -> None:
        """Writes a copy of the whole share; runs in a thread."""
        try:
            for piece in copy.pieces():
                if self.stopped.is_set():
                    return
                self.add(piece)
            self.finish()
        except Exception as error:  # also what is nobody's fault but ours: it is raised where training can end
            logger.exception("writing beside training failed")
            self.error = error

    def finish(self) -> Exception | None:
        """Syncs and closes the files, once; returns the first error of all that was done."""
        if self._hashes is None and not self.stopped.is_set():
            self._try(self._finish)
        return self.error

    def close(self) -> None:
        """Closes files that stay incomplete."""
        for stream in self._streams or ():
            stream.abandon()

    def sealed(self) -> dict[Any, list[int]]:
        """Returns SHA-256 and size of this share's files, by kind and share, and SHA-256 of its weights, by name."""
        assert self._hashes is not None and self._streams is not None, "the files are complete"
        weights, state = self._hashes
        return {
            ("weights", self._number): [*_words(weights), self._sizes[0]],
            ("state", self._number): [*_words(state), self._sizes[1]],
            **{name: [*_words(digest), 0] for name, digest in self._streams[0].digests.items()},
        }

    def _try(self, action: Callable[[], None]) -> None:
        if self.error is None:
            try:
                action()
            except (OSError, CheckpointError) as error:
                self.error = error

    def _opened(self) -> tuple[SafetensorsStream, SafetensorsStream]:
        if self._streams is None:
            weights = [(name, self._dtypes[name], shape) for name, shape in self.shapes.items()]
            state = [(f"{key}/{name}", torch.float32, shape) for name, shape in self.shapes.items() for key in KEYS]
            self._streams = (
                SafetensorsStream(self._weights_path, weights, digests=True),
                SafetensorsStream(self._state_path, state),
            )
        return self._streams

    def _add(self, piece: Piece) -> None:
        weights, state = self._opened()
        if piece.cut.key == KEYS[0]:
            weights.write(piece.cut.name, piece.values.to(self._dtypes[piece.cut.name]))
        state.write(f"{piece.cut.key}/{piece.cut.name}", piece.values)

    def _finish(self) -> None:
        weights, state = self._opened()
        hashes = (weights.close(), state.close())
        self._sizes = (self._weights_path.stat().st_size, self._state_path.stat().st_size)
        self._hashes = hashes


def _words(digest: str) -> list[int]:
    """Returns a SHA-256 as signed integers of 64 bits."""
    content = bytes.fromhex(digest)
    return [int.from_bytes(content[start : start + 8], "big", signed=True) for start in range(0, 32, 8)]


def _hexadecimal(words: list[int]) -> str:
    """Returns the SHA-256 whose integers are the first of `words`."""
    return b"".join(word.to_bytes(8, "big", signed=True) for word in words[:_WORDS]).hex()


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries, so that files written into it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
