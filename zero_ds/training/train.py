"""A training run from beginning to end: `zero-ds train RECIPE` or `deepspeed --module zero_ds.train RECIPE`."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

from zero_ds.config.schema import RunConfig
from zero_ds.runtime import distributed
from zero_ds.runtime.trust import allow_code
from zero_ds.training import stages
from zero_ds.training.deepspeed import release_disks
from zero_ds.training.engine import Engine
from zero_ds.training.loop import loop
from zero_ds.training.options.apply import apply_options_
from zero_ds.training.options.fallback import more_recomputation_if_out_of_memory
from zero_ds.training.options.recompute import recomputed_layers
from zero_ds.training.run_folder import use_folder
from zero_ds.training.setup import (
    compare_inputs,
    describe,
    load_initial_weights,
    load_model,
    make_loader,
    start_run,
    total_steps,
)
from zero_ds.training.skipped import SkippedSamples
from zero_ds.training.words import make_word_space

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> Path:
    """Trains or resumes the run that `config` describes; returns the folder of its last checkpoint. A collective.

    Raises:
        ConfigError, CheckpointError, DataError: an error that the user can fix, in one sentence.
        NoMemoryError: memory has run out, with or without a next attempt that may help.
        FloatingPointError: a loss or gradient that is not finite; that step has updated nothing.
    """
    if config.trust_remote_code:
        allow_code(True)
    with use_folder(Path(config.out)):
        distributed.initialize()
        try:
            return _train(config)
        finally:
            release_disks()


def _train(config: RunConfig) -> Path:
    run = start_run(config)
    config = run.config
    model = load_model(config, run.ds, run.folders)
    loader = make_loader(config, model, folders=run.folders)
    model.word_space = make_word_space(config, model, loader, run.folders)
    gc.freeze()  # DeepSpeed collects garbage several times while it sets up, and need not look at what exists by now
    skipped = SkippedSamples(config.data.max_bad_samples)
    skipped.add_records(loader.records)
    total = total_steps(config, samples=len(loader.records))
    if run.resume.checkpoint and run.resume.first_step >= total:
        logger.info("%s is complete: step %d of %d", run.out, run.resume.first_step, total)
        distributed.barrier()  # rank 0 holds the store on which slower ranks may still be waiting
        return run.resume.checkpoint.folder

    manifest = describe(run, model, loader)
    compare_inputs(manifest, loader)
    load_initial_weights(model, config, manifest, loader)
    run.resume.load_weights_(model, manifest)
    groups = stages.freeze_(model, config)
    apply_options_(model, config, run.ds)
    model.train()
    with more_recomputation_if_out_of_memory(config, distributed.world_size(), *recomputed_layers(model)):
        engine = Engine(config, model, groups, total, run.ds)
        run.resume.restore_(engine, skipped, total)
        run.write_settings()
        return loop(run, engine, loader, skipped, manifest, total)
