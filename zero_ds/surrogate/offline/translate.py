"""`translate`: recipe -> texts -> hidden states of the target on disk -> trained translators -> checkpoint."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero_ds.config.schema import RunConfig, TranslateConfig
from zero_ds.model.losses import hidden_distillation_sum
from zero_ds.model.vocabulary import cross_entropies, divergences
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically
from zero_ds.runtime.lock import FolderLock
from zero_ds.runtime.trust import allow_code
from zero_ds.surrogate.offline.corpus import TRAINING, Corpus, read_corpus, text_encoder
from zero_ds.surrogate.offline.quality import LookupQuality, Quality, TextBatch, measure, measure_target
from zero_ds.surrogate.offline.samples import write_samples
from zero_ds.surrogate.offline.states import StateStore, compute_states
from zero_ds.surrogate.offline.student import Student
from zero_ds.surrogate.offline.training_state import TrainingState
from zero_ds.training.checkpoint.checkpoint import check_manifest, find_checkpoint
from zero_ds.training.checkpoint.foreign import in_pieces, write_result
from zero_ds.training.checkpoint.interval import SaveClock
from zero_ds.training.checkpoint.manifest import Manifest, describe_models
from zero_ds.training.deepspeed import resolve_precision
from zero_ds.training.engine import schedule
from zero_ds.training.folders import ModelFolders
from zero_ds.training.monitor import Clock
from zero_ds.training.stages import check_start, learning_rate, stage_of, trained_parts
from zero_ds.trajectory.lookup import read_lookups
from zero_ds.trajectory.streaming import LayerFiles

logger = logging.getLogger(__name__)

REPORT = "translate.json"
"""Name of the report in the checkpoint's folder."""
MAX_LOOKUPS = 1000
"""Largest number of questions that are asked, chosen at random."""


def translate(config: RunConfig) -> Path:
    """Trains a surrogate's translators on one device; returns the checkpoint's folder. Goes on where it was killed.

    The target is read one layer at a time; hidden states before the translators, at their ends and after the last layer
    are kept on disk (`translate.states`). Then only the surrogate's late layers run.

    Raises:
        ConfigError, CheckpointError, DataError: an error that the user can fix, in one sentence.
        FloatingPointError: a loss that is not finite; that step has updated nothing.
    """
    if config.trust_remote_code:
        allow_code(True)
    out = Path(config.out)
    _check(config)
    finished = _finished(out, config)
    if finished is not None:
        logger.info("%s holds the result of this run already", out)
        return finished
    states = Path(config.translate.states or out.with_name(f"{out.name}.states"))
    try:
        states.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{states} cannot be made: {error.strerror}; choose another translate.states.") from None
    with FolderLock(states):
        return _translate(config, out, states)


def _check(config: RunConfig) -> None:
    """Refuses what this way of training cannot do, before anything is read.

    Raises:
        ConfigError: the run's stage trains something else than translators; several ranks.
    """
    stage_of(config)
    if trained_parts(config) != ("translator",):
        raise ConfigError(
            f"translators are trained alone here, and stage {config.stage} trains {', '.join(trained_parts(config))}; "
            "set stage=translator."
        )
    if distributed.world_size() > 1:
        raise ConfigError("translate needs one device, and here are several ranks; start it without a launcher.")


def _finished(out: Path, config: RunConfig) -> Path | None:
    """Returns the checkpoint's folder if `out` holds the result of this run; None if `out` is free.

    Raises:
        ConfigError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        checkpoint = find_checkpoint(out)
    except ValueError:
        raise ConfigError(f"{out} already holds something else; choose another out=FOLDER or remove it.") from None
    if checkpoint.manifest.get("fingerprint") != config.fingerprint() or not (checkpoint.folder / REPORT).is_file():
        raise ConfigError(f"{out} already holds the result of another run; choose another out=FOLDER or remove it.")
    return checkpoint.folder


def _translate(config: RunConfig, out: Path, states: Path) -> Path:
    folders = ModelFolders.of(config)
    dtype, device = resolve_precision(config), distributed.device()
    surrogate = folders.decoder.surrogate
    if surrogate is not None and folders.target.hash(like=surrogate.target_hash) != surrogate.target_hash:
        raise ConfigError(f"{folders.decoder} was cut from another model than {folders.target}; name its own target.")
    corpus = _corpus(config, folders, states)
    store = StateStore(states, corpus, folders.target.hidden_size, dtype, _stored(config.translate, dtype))
    student = Student(folders.decoder, dtype, device)
    store.claim(folders.target.hash(), student.wanted)
    compute_states(store, LayerFiles.of(folders.target, dtype, device), config.micro_batch)
    _load_start(config, student, folders)
    before = measure(student, store, config.micro_batch)
    logger.info("before: %s", describe(before))
    steps = _train(config, student, store, states)
    after = measure(student, store, config.micro_batch)
    logger.info("after %d steps: %s", steps, describe(after))
    target = measure_target(student, store, config.micro_batch)
    manifest: Manifest = {
        **describe_models(config, student.plan, folders),
        "decoder_hash": folders.decoder.hash(),
        "data_hash": corpus.content(),
        "precision": str(dtype).removeprefix("torch."),
        "weights_files": {},
    }
    report = json.dumps(_report(student, store, steps, (before, after), target), indent=1) + "\n"
    folder = write_result(
        out,
        config,
        manifest,
        steps,
        [(name, parameter.dtype, parameter.shape) for name, parameter in student.trained.items()],
        lambda name: in_pieces(student.trained[name].cpu()),
        write_more=lambda place: write_atomically(place / REPORT, report),
    )
    TrainingState.path(states, config).unlink(missing_ok=True)
    return folder


def _corpus(config: RunConfig, folders: ModelFolders, states: Path) -> Corpus:
    """Reads the texts and questions of a run; lets the target write texts where asked."""
    encoder = text_encoder(config, folders.target)
    written = write_samples(
        folders.target,
        encoder,
        states,
        count=config.translate.sample,
        seed=config.seed,
        dtype=resolve_precision(config),
        device=distributed.device(),
    )
    lookups = []
    if config.translate.lookups is not None:
        lookups = read_lookups(Path(config.translate.lookups), encoder, count=MAX_LOOKUPS, seed=config.seed)
    return read_corpus(config, encoder, written, lookups)


def _stored(config: TranslateConfig, dtype: torch.dtype) -> torch.dtype:
    """Returns the number format of hidden states on disk."""
    return {"auto": dtype, "bfloat16": torch.bfloat16, "float32": torch.float32}[config.store]


def _load_start(config: RunConfig, student: Student, folders: ModelFolders) -> None:
    """Loads translators of earlier runs, later ones winning.

    Raises:
        ConfigError, CheckpointError: a result that does not exist or belongs to another surrogate.
    """
    for folder in check_start(config):
        checkpoint = find_checkpoint(folder)
        check_manifest(checkpoint, {"plan": student.plan.to_json(), "target_hash": folders.target.hash()})
        student.load_(checkpoint.weights())
        logger.info("loaded the translators in %s", folder)


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """The texts of one step, and how many positions its losses are means over."""

    number: int
    texts: list[int]
    positions: dict[int, np.ndarray[Any, np.dtype[np.bool_]]]
    """Positions of each text that the losses over the vocabulary read: (tokens - 1,)."""

    @property
    def read(self) -> int:
        return sum(int(chosen.sum()) for chosen in self.positions.values())

    @property
    def compared(self) -> int:
        """Number of positions whose hidden states are compared: all but the first of every text."""
        return sum(len(chosen) for chosen in self.positions.values())


def _train(config: RunConfig, student: Student, store: StateStore, states: Path) -> int:
    """Makes the steps that are left; returns the number of all steps."""
    texts = list(store.corpus.groups[TRAINING])
    total = config.max_steps or max(1, math.ceil(len(texts) * config.epochs / config.global_batch))
    state = TrainingState(config, student.trained, store)
    first = state.restore(states)
    factor, rate = schedule(config, total), learning_rate(config, "translator")
    clock, every = Clock(first, total), config.checkpoint.every_steps
    saves = SaveClock(60 * (config.checkpoint.every_minutes or math.inf))
    for number in range(first, total):
        step = _step(config, store.corpus, texts, number)
        losses = _gradients(config, student, store, step)
        state.update(rate * factor(number))
        if (number + 1) % config.log_every == 0 or number + 1 in (1, total):
            named = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            logger.info("%s  %s", clock.line(number + 1), named)
        if number + 1 == total or saves.is_due() or (every is not None and (number + 1) % every == 0):
            with saves.saving(new=True):
                state.save(states, number + 1)
    return total


def _step(config: RunConfig, corpus: Corpus, texts: Sequence[int], number: int) -> _Step:
    """Returns the texts of a step, which depend on seed and step alone. Each pass has an order of its own."""
    chosen: list[int] = []
    place = number * config.global_batch
    while len(chosen) < config.global_batch:
        lap, within = divmod(place + len(chosen), len(texts))
        order = np.random.default_rng([config.seed, lap]).permutation(len(texts))
        chosen += [texts[index] for index in order[within : within + config.global_batch - len(chosen)]]
    positions = {}
    for text in dict.fromkeys(chosen):
        draws = np.random.default_rng([config.seed, number, text]).random(len(corpus.ids[text]) - 1)
        positions[text] = draws < config.translate.positions
    return _Step(number, list(positions), positions)


def _gradients(config: RunConfig, student: Student, store: StateStore, step: _Step) -> dict[str, float]:
    """Adds up the gradients of a step, in passes of `micro_batch` texts; returns the mean losses by name.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    sums: dict[str, float] = {}
    first, depth, goals = student.plan.first_replaced, student.plan.depth, student.goals
    ordered = sorted(step.texts, key=lambda text: (-len(store.corpus.ids[text]), text))
    for start in range(0, len(ordered), config.micro_batch):
        texts = ordered[start : start + config.micro_batch]
        batch = TextBatch.of(store, texts, sorted({first, *goals, depth}), student.files.device)
        outputs, normed = student(batch.states[first], batch.mask)
        total = torch.zeros((), device=normed.device)
        hidden = [
            hidden_distillation_sum(output, batch.states[goal], batch.mask)
            for output, goal in zip(outputs, goals, strict=True)
        ]
        terms = {"hidden": torch.stack(hidden).sum() / max(1, step.compared)}
        terms |= _vocabulary_terms(config.translate, student, batch, normed, [step.positions[text] for text in texts])
        for name, weight in _weights(config.translate).items():
            if name in terms:
                value = terms[name] if name == "hidden" else terms[name] / max(1, step.read)
                total = total + weight * value
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        total.backward()  # type: ignore[no-untyped-call]
    for name, found in sums.items():
        if not math.isfinite(found):
            raise FloatingPointError(f"the loss '{name}' of step {step.number + 1} is {found}; nothing was updated.")
    return sums


def _weights(config: TranslateConfig) -> dict[str, float]:
    """Returns the weights of the losses that are computed, by name."""
    weights = {"hidden": config.hidden, "logits": config.logits, "next_token": config.next_token}
    return {name: weight for name, weight in weights.items() if weight}


def _vocabulary_terms(
    config: TranslateConfig,
    student: Student,
    batch: TextBatch,
    normed: torch.Tensor,
    positions: Sequence[np.ndarray[Any, np.dtype[np.bool_]]],
) -> dict[str, torch.Tensor]:
    """Returns the sums of the losses over the vocabulary at the chosen positions of a batch, by name."""
    if not (config.logits or config.next_token) or not any(chosen.any() for chosen in positions):
        return {}
    places = torch.zeros(batch.ids.shape, dtype=torch.bool)
    for row, chosen in enumerate(positions):
        places[row, : len(chosen)] = torch.from_numpy(chosen)
    places = places.to(normed.device)
    scores = student.scores(normed[places])
    found = {}
    if config.logits:
        with torch.no_grad():
            goals = student.scores(student.norm(batch.states[student.plan.depth][places]))
        found["logits"] = divergences(scores, goals).sum()
    if config.next_token:
        found["next_token"] = cross_entropies(scores, batch.ids.roll(-1, 1)[places]).sum()
    return found


# -- report ------------------------------------------------------------------------------------------------------------


def _report(
    student: Student, store: StateStore, steps: int, measured: tuple[Quality, Quality], target: LookupQuality | None
) -> dict[str, Any]:
    """Returns the content of translate.json."""
    groups = {name: len(numbers) for name, numbers in store.corpus.groups.items()}
    before, after = measured
    return {
        "plan": str(student.plan),
        "steps": steps,
        "texts": groups,
        "tokens": store.corpus.tokens,
        "trained_parameters": sum(parameter.numel() for parameter in student.trained.values()),
        "before": asdict(before),
        "after": asdict(after),
        "lookup": asdict(target) if target is not None else None,
    }


def describe(quality: Quality) -> str:
    """Returns a quality in words."""
    found = "" if quality.lookup is None else f", {quality.lookup:.0%} of the words looked up"
    return f"{quality.kl:.3f} nats per token from the target, the same first choice at {quality.agreement:.0%}{found}"


def lines(report: dict[str, Any], folder: Path) -> list[str]:
    """Returns the lines for people about a translate.json."""
    texts = report["texts"]
    found = [
        f"{report['plan']}: {report['steps']} steps on {texts['training']} texts, judged by {texts['held-out']} others "
        f"({report['tokens']:,} tokens)"
    ]
    found += [f"{name:<8} {describe(Quality(**report[name]))}" for name in ("before", "after")]
    lookup = report["lookup"]
    if lookup:
        found.append(
            f"look-ups {lookup['target']:.0%} by the target itself, {lookup['chance']:.0%} by chance, of "
            f"{lookup['questions']} words"
        )
    return [*found, f"result   {folder}"]
