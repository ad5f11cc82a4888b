"""Resuming a run: the checkpoint that it continues from, and the order in which its state is restored.

    1. `Resume.find`      before anything is loaded: the checkpoint in the run folder must be of the same configuration
    2. `load_weights_`    after the initial weights, and before the engine copies weights into its fp32 master copies
    3. `restore_`         master copies, moments, step counts, loss scale, and the counts of skipped samples
    4. `first_step`       where the data, the learning-rate schedule, the metrics and the loop begin

`progress_after` is the other direction: the counts that a checkpoint records, besides the optimizer's state.
Nothing else needs to be restored: the schedule depends only on the step, and the order of samples only on the seed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_ds.config.resume import MAY_DIFFER, OLD_BEHAVIOUR, fingerprint
from zero_ds.config.schema import RunConfig
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.meeting import require_agreement
from zero_ds.training.checkpoint.checkpoint import (
    Checkpoint,
    CheckpointError,
    Progress,
    check_manifest,
    find_checkpoint,
    newest_complete,
)
from zero_ds.training.checkpoint.load import carry_over_, load_weights_, restore_
from zero_ds.training.checkpoint.manifest import COMPARED, Manifest
from zero_ds.training.engine import Engine
from zero_ds.training.skipped import SkippedSamples

logger = logging.getLogger(__name__)

PLACES = ("path", "root")
"""Entries of a data source that may differ if the content of the data is the same."""


@dataclass(frozen=True)
class Resume:
    """The point where a run continues: after its checkpoint, or at the beginning."""

    checkpoint: Checkpoint | None = None

    @classmethod
    def find(cls, out: Path, config: RunConfig) -> Resume:
        """Looks for a checkpoint in the run folder; every rank finds the same one. A collective.

        Raises:
            ConfigError: the folder holds a run with another configuration, or the ranks see different checkpoints.
        """
        return cls(checkpoint_to_resume(out, config))

    @property
    def first_step(self) -> int:
        """Number of steps made before, and so the index of the first step that is left."""
        return self.checkpoint.step if self.checkpoint else 0

    def load_weights_(self, model: VisionLanguageModel, manifest: Manifest) -> None:
        """Loads the checkpoint's weights over the initial ones. A collective.

        manifest: description of the run and its models, with which the checkpoint must agree.

        Raises:
            ConfigError: models or data are not those of the checkpoint. CheckpointError: a damaged file.
        """
        if self.checkpoint:
            expected: dict[str, Any] = dict(manifest)
            check_manifest(self.checkpoint, {key: expected[key] for key in COMPARED})
            load_weights_(model.named_targets(), self.checkpoint, skip=lambda name: False)

    def restore_(self, engine: Engine, skipped: SkippedSamples, total: int) -> None:
        """Restores the optimizer's state and the counts of skipped samples. A collective.

        A run that begins and has `continue_from` takes over the optimizer state of the parts that it trains further.

        Raises:
            CheckpointError: damaged state, or state of other parameters.
        """
        config = engine.config
        if self.checkpoint:
            skipped.restore(restore_(engine, self.checkpoint))
            engine.engine.global_samples = self.first_step * config.global_batch  # the axis of DeepSpeed's own curves
            logger.info("resumed %s after step %d of %d", config.out, self.first_step, total)
        elif config.continue_from:
            parts = carry_over_(engine, find_checkpoint(config.starts[-1]))
            logger.info("the optimizer continues for %s", ", ".join(parts) or "no part")


def progress_after(step: int, skipped: SkippedSamples) -> Progress:
    """Returns the progress that a checkpoint after `step` steps records."""
    progress: Progress = {"step": step}
    skipped.save(progress)
    return progress


def checkpoint_to_resume(out: Path, config: RunConfig) -> Checkpoint | None:
    """Returns the newest checkpoint in the run folder, or None if it holds none. A collective.

    Raises:
        ConfigError: as `Resume.find`.
    """
    found = None
    if (out / "latest").is_file():
        found = find_checkpoint(out)
        if (changed := _changed(found, config)) is not None:
            raise ConfigError(f"{out} holds another run ({changed}); choose another out=FOLDER or remove it.")
    elif (newest := newest_complete(out)) is not None:
        found = _without_latest(newest, config)
    step = found.step if found else 0
    if not distributed.same_on_all_ranks(step):
        largest, negative = distributed.max_over_ranks(step, -step)
        raise ConfigError(
            f"the ranks see different checkpoints in {out} (steps {-negative:.0f} and {largest:.0f}); out= must be a "
            "folder that all machines share."
        )
    if found is not None:
        weights = {f"the content of {found.folder} (its hash)": found.weights_sha256}
        require_agreement(weights, "out= must be a folder that all machines share.")
    return found


def data_has_moved(manifest: Mapping[str, Any], config: RunConfig) -> bool:
    """Returns whether a run differs from that of a checkpoint in the places of its data alone.

    The manifest has a hash of the data's content, which is compared when the checkpoint is loaded.
    """
    content = config.model_dump(mode="json")
    before, now = manifest["config"]["data"]["sources"], content["data"]["sources"]
    if len(before) != len(now) or not manifest.get("data_hash"):
        return False
    for old, new in zip(before, now, strict=True):
        new.update({key: old[key] for key in PLACES if key in old})
    if fingerprint(content) != manifest["fingerprint"]:
        return False
    logger.info("the data has moved since the run began; its content must be the same")
    return True


def _without_latest(newest: Checkpoint, config: RunConfig) -> Checkpoint | None:
    """Returns the checkpoint to go on from in a run folder that has lost `latest`, and says so.

    newest: newest complete checkpoint there. A kill after a run's first checkpoint, and before `latest` names it,
    leaves such a folder, and so does a copy without the file.
    """
    out, changed = newest.folder.parent, _changed(newest, config)
    if distributed.is_rank_zero():
        if changed is None:
            logger.warning("%s has no file `latest`; going on from %s, the newest there", out, newest.folder.name)
        else:
            logger.warning(
                "%s has no file `latest`, and %s is of another run (%s); beginning at step 1, which replaces "
                "these files",
                out,
                newest.folder.name,
                changed,
            )
    return newest if changed is None else None


def _changed(found: Checkpoint, config: RunConfig) -> str | None:
    """Returns what differs between the configuration of a checkpoint and that of a run; None if nothing does.

    Raises:
        CheckpointError: the manifest does not say.
    """
    try:
        same = str(found.manifest["fingerprint"]) == config.fingerprint() or data_has_moved(found.manifest, config)
        stated = dict(found.manifest["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{found.folder / 'manifest.json'} is damaged ({type(error).__name__}: {error}); use another checkpoint."
        ) from None
    return None if same else difference(stated, config.model_dump(mode="json"))


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """Returns the first entry in which two configurations differ, as `key: old -> new`.

    prefix: dotted name of the section that `old` and `new` are, with a dot at its end.
    """
    for key in [*new, *(key for key in old if key not in new)]:
        name = f"{prefix}{key}"
        before, after = old.get(key, OLD_BEHAVIOUR.get(name)), new.get(key)
        if before == after or name in MAY_DIFFER:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            inner = difference(before, after, f"{name}.")
            if inner == "no difference":
                continue
            return inner
        return f"{name}: {before!r} -> {after!r}"
    return "no difference"
