"""The training loop: `zero-ds train RECIPE [key=value ...]` or `deepspeed --module zero_ds.train RECIPE ...`."""

from __future__ import annotations

import logging
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero_ds import checkpoint, distributed, stages
from zero_ds.checkpoint import Commit
from zero_ds.config import ConfigError, RunConfig
from zero_ds.data.loader import Loader, check_batches
from zero_ds.data.sources import Records
from zero_ds.distill import Teacher
from zero_ds.engine import Engine, ds_config, resolve_precision
from zero_ds.files import write_atomically
from zero_ds.hub import local_folder
from zero_ds.losses import count_supervised
from zero_ds.model import Assembly, VisionLanguageModel, assemble, match_embeddings_, sample_encoder
from zero_ds.monitor import Monitor
from zero_ds.shards import target_hash

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> Path:
    """Runs, or resumes, the run that `config` describes; returns the folder of its last commit.

    Raises:
        ConfigError, CheckpointError, DataError: what a user can mend, in one sentence.
        FloatingPointError: a loss that is not finite; nothing was updated by it.
    """
    distributed.initialize()
    stop = distributed.StopSignal()
    stages.stage_of(config)
    world_size = distributed.world_size()
    check_batches(config, world_size)
    ds = ds_config(config, world_size)
    out = Path(config.out)
    resumed = prepare_folder(out, config)
    seed_everything(config.seed)

    model, loader, hashes = build(config, ds, world_size)
    total = config.max_steps or max(1, math.ceil(len(loader.records) * config.epochs / config.global_batch))
    if resumed and resumed.step >= total:
        logger.info("%s is complete: step %d of %d", out, resumed.step, total)
        return resumed.folder
    plan = model.plan.to_json() if model.plan else None
    started: set[str] = set()
    skip_translators = stages.decoder_kind(config) == "target"
    for folder in stages.check_start(config):
        commit = checkpoint.find_commit(folder)
        if config.adapter.width is None:
            checkpoint.check_manifest(commit, {"target_hash": hashes["target_hash"]})
        if commit.manifest.get("encoder_hash") and hashes["encoder_hash"]:
            checkpoint.check_manifest(commit, {"encoder_hash": hashes["encoder_hash"]})
        names = checkpoint.load_weights_(
            model.named_targets(), commit, skip=lambda name: skip_translators and name.startswith("translator.")
        )
        if any(name.startswith("translator.") for name in names):
            checkpoint.check_manifest(commit, {"plan": plan})
        if any(name.startswith("aligner.") for name in names):  # what lies before an aligner had another decoder (A.8)
            checkpoint.check_manifest(commit, {"target_hash": hashes["target_hash"]})
        started |= names
        logger.info("started %d tensors from %s", len(names), commit.folder)
    refuse_untrained(model, config, started)
    last = "adapter." if model.aligner is None else "aligner."
    untrained = model.adapter is not None and not any(name.startswith(last) for name in started)
    if config.adapter.match_embeddings and untrained:
        logger.info(
            "image tokens scaled by %.3g to match the word embeddings", match_embeddings_(model, first_pixels(loader))
        )
    if resumed:
        checkpoint.check_manifest(resumed, {**hashes, "plan": plan})
        checkpoint.load_weights_(model.named_targets(), resumed, skip=lambda name: False)

    groups = stages.freeze_(model, config)
    sizes = {part: sum(getattr(p, "ds_numel", p.numel()) for _, p in group) for part, group in groups.items()}
    logger.info("stage %s trains %s", config.stage, ", ".join(f"{part} ({n:,})" for part, n in sizes.items()))
    if config.activation_checkpointing:
        model.decoder.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()
    engine = Engine(config, model, groups, total, ds)
    first = checkpoint.restore_(engine, resumed)["step"] if resumed else 0
    if resumed:
        logger.info("resumed %s after step %d of %d", out, first, total)
    if distributed.is_rank_zero() and not resumed:
        write_atomically(out / "config.yaml", config.dump())

    manifest = {**checkpoint.manifest_of(config), **hashes, "plan": plan}
    monitor = Monitor(out, engine.engine.monitor, config.log_every, first, total)
    try:
        return loop(config, engine, loader, monitor, stop, manifest, first, total)
    finally:
        monitor.close()


def refuse_untrained(model: VisionLanguageModel, config: RunConfig, started: set[str]) -> None:
    """A random layer between encoder and decoder that neither trains nor was trained is a mistake in the recipe.

    Raises:
        ConfigError: naming the part.
    """
    parts = [part for part in ("adapter", "aligner") if getattr(model, part) is not None]
    for part in parts:
        if part not in stages.trained_parts(config) and not any(name.startswith(f"{part}.") for name in started):
            raise ConfigError(
                f"stage {config.stage} does not train the {part}, and init_from brings none; name a run that did."
            )


def loop(
    config: RunConfig,
    engine: Engine,
    loader: Loader,
    monitor: Monitor,
    stop: distributed.StopSignal,
    manifest: dict[str, Any],
    first: int,
    total: int,
) -> Path:
    """Steps first + 1 .. total, with a commit now and then, at the end, and when a signal asks for one."""
    out = Path(config.out)
    saved_at = time.monotonic()
    folder = out
    batches = iter(loader.steps(first, total))
    for step in range(first, total):
        started = time.monotonic()
        micro = next(batches)
        waited = time.monotonic() - started
        labelled = sum(count_supervised(b["labels"]) for b in micro)
        tokens = sum(int(b["attention_mask"].sum()) for b in micro)
        padded = sum(b["attention_mask"].numel() for b in micro)
        labelled_all, tokens_all, padded_all = distributed.sum_over_ranks(labelled, tokens, padded)
        share, grad_norm = engine.step(micro, step, labelled_all)
        loss = distributed.sum_over_ranks(share)[0]
        seconds = time.monotonic() - started
        monitor.step(
            step + 1,
            (step + 1) * config.global_batch,
            {
                "loss": loss,
                **{f"learning_rate/{part}": rate * engine.factor(step) for part, rate in engine.rates.items()},
                "grad_norm": grad_norm,
                "seconds": seconds,
                "data_wait_seconds": waited,
                "tokens_per_second": tokens_all / seconds,
                "samples_per_second": config.global_batch / seconds,
                "supervised_tokens": labelled_all,
                "padding_share": 1 - tokens_all / padded_all,
            },
        )
        stopping = stop.agreed()
        due = config.checkpoint.every_steps is not None and (step + 1) % config.checkpoint.every_steps == 0
        if config.checkpoint.every_minutes is not None:
            late = distributed.is_rank_zero() and time.monotonic() - saved_at > 60 * config.checkpoint.every_minutes
            due = distributed.sum_over_ranks(float(late))[0] > 0 or due
        if due or stopping or step + 1 == total:
            folder = checkpoint.save(out, engine, manifest, {"step": step + 1}, config.checkpoint.keep)
            saved_at = time.monotonic()
            logger.info("committed %s", folder)
        if stopping:
            raise SystemExit(
                f"stopped by {stop.received or 'a signal to another rank'} after step {step + 1}; run again to resume."
            )
    return folder


def prepare_folder(out: Path, config: RunConfig) -> Commit | None:
    """Makes the run folder, or finds the commit to resume from.

    Raises:
        ConfigError: the folder holds a run with another configuration.
    """
    resumed = None
    if (out / "latest").is_file():
        resumed = checkpoint.find_commit(out)
        before = resumed.manifest["fingerprint"]
        if before != config.fingerprint():
            changed = difference(resumed.manifest["config"], config.model_dump(mode="json"))
            raise ConfigError(f"{out} holds another run ({changed}); choose another out=FOLDER or remove it.")
    elif out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is no folder; choose another out=FOLDER.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror}.") from None
    distributed.barrier()
    return resumed


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The first entry in which two configurations differ: `key: old -> new`."""
    for key in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(key), new.get(key)
        if a == b or (not prefix and key in ("out", "log_every", "checkpoint")):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return difference(a, b, f"{prefix}{key}.")
        return f"{prefix}{key}: {a!r} -> {b!r}"
    return "no difference"


def seed_everything(seed: int) -> None:
    """The same seed on every rank: they must initialise the same new weights; no sample is drawn at random."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build(config: RunConfig, ds: dict[str, Any], world_size: int) -> tuple[VisionLanguageModel, Loader, dict[str, Any]]:
    """Model and loader of a run, and the hashes for its manifest."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    stage = stages.STAGES[config.stage]
    # alive while the models load: from_pretrained then fills ZeRO-3 partitions directly
    keep_alive = HfDeepSpeedConfig(ds) if ds["zero_optimization"].get("stage") == 3 else None
    decoder = local_folder(stages.decoder_folder(config))
    encoder = local_folder(config.encoder.path) if stage.vision and config.encoder else None
    model = assemble(
        Assembly(
            decoder=decoder,
            encoder=encoder,
            encoder_config=config.encoder,
            adapter_config=config.adapter,
            dtype=resolve_precision(config),
            attention=config.attention,
            seed=config.seed,
        )
    )
    if config.distill.active:
        if model.plan is None:
            raise ConfigError(
                "distill.* needs a surrogate to distil into; set decoder=surrogate or distill weights to 0."
            )
        model.teacher = Teacher(model, local_folder(config.target), config.distill, resolve_precision(config))
    del keep_alive
    encode = sample_encoder(
        model, decoder, encoder, config.data, supervise=stages.supervision(config), seed=config.seed
    )
    with distributed.rank_zero_first():
        records = Records(config.data.sources)
    loader = Loader(
        records,
        encode,
        config.global_batch,
        config.micro_batch,
        distributed.rank(),
        world_size,
        encode.template.tokenizer.pad_token_id or 0,
        config.seed,
        config.data.workers,
        config.data.group_by_length,
    )
    hashes = {
        "family": model.family.name,
        "target": config.target,
        "target_hash": target_hash(local_folder(config.target)),
        "encoder_hash": target_hash(encoder) if encoder else None,
    }
    return model, loader, hashes


def first_pixels(loader: Loader) -> torch.Tensor:
    """Pixel values of up to 16 of the first pictures, the same on every rank: (images, 3, size, size)."""
    pictures: list[torch.Tensor] = []
    for index in range(len(loader.records)):
        if loader.records.images(index):
            pictures += loader.encoder.pixels(loader.records[index])
        if len(pictures) >= 16:
            break
    return torch.stack(pictures[:16])


if __name__ == "__main__":
    from zero_ds.cli import train_module

    train_module()
