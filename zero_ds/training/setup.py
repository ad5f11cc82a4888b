"""Everything before a run's first step: its checks and folder, its model with the initial weights, its data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero_ds.config.batches import describe_batches, fit_to_ranks
from zero_ds.config.schema import RunConfig
from zero_ds.data.formats import DataError
from zero_ds.data.loader import Loader
from zero_ds.data.prepared import Prepared
from zero_ds.data.sources import Records
from zero_ds.model.adapter import belongs_to, match_embeddings_, missing_tensors
from zero_ds.model.build import ModelSpec, build_model, sample_encoder
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.decoders.shrink import position_limit
from zero_ds.model.distillation import Teacher
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime import distributed, failure, lock
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically
from zero_ds.runtime.meeting import require_agreement
from zero_ds.runtime.safetensors import Span, torch_dtype
from zero_ds.runtime.zero3 import begin_swapping, held_part, is_partitioned
from zero_ds.training import stages
from zero_ds.training.checkpoint.checkpoint import check_manifest, find_checkpoint
from zero_ds.training.checkpoint.load import load_weights_
from zero_ds.training.checkpoint.manifest import Manifest, code_hash, describe_models, describe_run, versions
from zero_ds.training.checkpoint.peft_folder import is_peft_folder, load_peft_, other_base, weights_hash
from zero_ds.training.deepspeed import ds_config, resolve_precision, take_disks
from zero_ds.training.folders import ModelFolders
from zero_ds.training.gathering import Units, follow_layers_
from zero_ds.training.options import determinism
from zero_ds.training.options.apply import check_options
from zero_ds.training.resume import Resume

logger = logging.getLogger(__name__)

PIXEL_SAMPLES = 16
"""Number of images by which the scale of a new adapter is matched to the word embeddings."""


@dataclass(frozen=True)
class Run:
    """Everything that is decided about a run before its model is loaded."""

    config: RunConfig
    """Configuration with a micro-batch that fits the ranks."""
    out: Path
    """Run folder."""
    ds: dict[str, Any]
    """Resolved DeepSpeed configuration."""
    folders: ModelFolders
    resume: Resume
    stop: distributed.StopSignal
    """Signals that ask the run to save a checkpoint and end."""

    def write_settings(self) -> None:
        """Writes the resolved configuration into the run folder."""
        if distributed.is_rank_zero():
            write_atomically(self.out / "config.yaml", self.config.dump())
            write_atomically(self.out / "deepspeed.json", json.dumps(self.ds, indent=2, default=str) + "\n")


def start_run(config: RunConfig) -> Run:
    """Checks the configuration, compares it over all ranks, and looks for a checkpoint to resume. A collective.

    Raises:
        ConfigError: a setting that cannot work or differs between ranks, or a run folder that holds another run.
            CheckpointError: a damaged checkpoint.
    """
    out = Path(config.out)
    stop = distributed.StopSignal()
    stages.stage_of(config)
    world_size = distributed.world_size()
    asked, config = config.micro_batch, fit_to_ranks(config, world_size)
    logger.info("%s", describe_batches(config, world_size, asked))
    for remark in stages.remarks(config):
        logger.warning(remark)
    ds = ds_config(config, world_size)
    check_options(config)
    take_disks(ds)
    compare_settings(config, ds)
    failure.WATCH.folder, failure.WATCH.holder = out, lock.holder(out)
    determinism.apply(config)
    resume = Resume.find(out, config)
    seed_everything(config.seed)
    folders = ModelFolders.of(config)
    distributed.wait_for_all()  # machines may fetch the models, each for itself
    follow_layers_(ds, Units.of_folder(folders.decoder))
    return Run(config, out, ds, folders, resume, stop)


def compare_settings(config: RunConfig, ds: dict[str, Any]) -> None:
    """Compares configuration, DeepSpeed JSON and code over all ranks, before any of them acts on its own. A collective.

    Raises:
        ConfigError: on every rank; names the first entry that differs.
    """
    entries = {**flattened(config.model_dump(mode="json")), **flattened(ds, "DeepSpeed's ")}
    entries |= {f"the version of {name}": version for name, version in versions().items() if name != "python"}
    entries["the code of zero_ds (its hash)"] = code_hash()
    require_agreement(entries, "start every rank with the same recipe, overrides and installation.")


def compare_inputs(manifest: Manifest, loader: Loader) -> None:
    """Compares data, chat template, models and starting weights over all ranks, before the first step. A collective.

    Raises:
        ConfigError: on every rank; names the first of them that differs.
    """
    template = loader.sample_encoder.template.source
    entries: dict[str, Any] = {
        "the content of the data files (its hash)": manifest["data_hash"],
        "the chat template (its hash)": hashlib.sha256(template.encode()).hexdigest()[:16],
    }
    known = ("config", "fingerprint", "data_hash")
    entries |= {name: value for name, value in manifest.items() if name not in known}
    require_agreement(entries, "give every machine the same files.")


def flattened(entries: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the entries of nested sections under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def seed_everything(seed: int) -> None:
    """Seeds all random generators, the same on every rank: ranks must draw the same new weights, and nothing else is
    drawn at random.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# -- model and data ----------------------------------------------------------------------------------------------------


def _check_rows(config: RunConfig, decoder: DecoderFolder) -> None:
    """Checks that the decoder can read rows of samples as the run makes them.

    Raises:
        ConfigError: samples are packed, and the layers would mix them; or samples are longer than a table of positions.
    """
    family = decoder.family
    if config.data.packing and not family.packs:
        raise ConfigError(
            f"data.packing=true needs layers in which a sample sees only itself, and those of {family.name} mix "
            "samples; set data.packing=false."
        )
    if not family.counted_positions:
        return
    positions = position_limit(decoder.text_config())
    assert positions is not None, "a number of positions that was verified"
    if config.data.max_length > positions:
        raise ConfigError(
            f"data.max_length={config.data.max_length}, but {family.name} has a table of {positions} positions; set "
            f"data.max_length={positions}."
        )


def load_model(config: RunConfig, ds: dict[str, Any], folders: ModelFolders | None = None) -> VisionLanguageModel:
    """Loads the model of a run, with new layers at random. A collective under ZeRO-3.

    ds: resolved DeepSpeed configuration; folders: those of `config`, if they have been opened already.

    Raises:
        ConfigError: a folder that does not hold the model it should, or weights that were not loaded as stored.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    folders = folders or ModelFolders.of(config)
    _check_rows(config, folders.decoder)
    dtype = resolve_precision(config)
    sharded = ds["zero_optimization"].get("stage") == 3
    # while this object is alive, from_pretrained fills ZeRO-3 partitions directly
    keep_alive = HfDeepSpeedConfig(ds) if sharded else None
    if sharded:
        begin_swapping()
    # without ZeRO-3 every rank reads all of the model: the next one of a machine begins when this one's is on its GPU
    with contextlib.nullcontext() if sharded else distributed.one_rank_at_a_time():
        model = build_model(
            ModelSpec(
                decoder=folders.decoder,
                encoder=folders.encoder,
                encoder_config=config.encoder,
                adapter_config=config.adapter,
                dtype=dtype,
                attention=config.attention,
                seed=config.seed,
                lora=config.lora,
                words_only=stages.words_only(config),
            )
        )
        if config.distill.active:
            if model.plan is None:
                raise ConfigError(
                    "distill.* needs a surrogate to distil into; set decoder=surrogate or distill weights to 0."
                )
            model.teacher = Teacher(model, folders.target, config.distill, dtype)
        if not sharded and config.frozen_weights == "native":  # rounded weights move later, because they are smaller
            model.to(distributed.device())
    model.loss_weights = config.losses
    del keep_alive
    check_loaded(model, folders.decoder)
    return model


def make_loader(
    config: RunConfig,
    model: VisionLanguageModel,
    world_size: int | None = None,
    folders: ModelFolders | None = None,
    *,
    raw_images: bool = False,
) -> Loader:
    """Opens the data of a run for this rank. A collective.

    world_size: number of ranks that share a global batch; all of them if None. folders: as for `load_model`.
    raw_images: give images as they were read, without the image processor (`Batch.images`).

    Raises:
        DataError: a data file that cannot be used.
    """
    folders = folders or ModelFolders.of(config)
    encode = sample_encoder(
        model,
        folders.decoder.path,
        folders.encoder,
        config.data,
        supervise=stages.supervision(config),
        seed=config.seed,
    )
    skip_bad = config.data.bad_samples == "skip"
    with distributed.rank_zero_first():
        permute = config.seed if config.data.shuffle else None
        records = Records(
            config.data.sources,
            skip_bad=skip_bad,
            permute=permute,
            caption_prompt=config.data.caption_prompt,
            share=config.validation.share,
        )
    return Loader(
        records=records,
        sample_encoder=encode,
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        rank=distributed.rank(),
        world_size=distributed.world_size() if world_size is None else world_size,
        pad_id=encode.template.tokenizer.pad_token_id or 0,
        seed=config.seed,
        workers=config.data.workers,
        prepared=Prepared(Path(config.data.prepared), records, encode) if config.data.prepared else None,
        grouping=config.data.grouping,
        skip_bad=skip_bad,
        packing=config.data.packing,
        raw_images=raw_images,
    )


def total_steps(config: RunConfig, samples: int) -> int:
    """Returns the number of optimizer steps of a run on `samples` samples: `max_steps`, or as many as `epochs` need."""
    if config.max_steps:
        return config.max_steps
    seen = samples * config.epochs
    if seen < config.global_batch:
        logger.warning(
            "epochs=%g of %d samples is less than one global batch of %d: the run makes one step, in which samples "
            "repeat; lower global_batch or raise epochs",
            config.epochs,
            samples,
            config.global_batch,
        )
    return max(1, math.ceil(seen / config.global_batch))


def describe(run: Run, model: VisionLanguageModel, loader: Loader) -> Manifest:
    """Returns the manifest that all checkpoints of the run share; saving adds the fields that differ.

    Raises:
        ConfigError, CheckpointError: the run starts from a result that does not exist or cannot be read.
    """
    config, folders = run.config, run.folders
    return {
        **describe_run(config),
        **describe_models(config, model.plan, folders),
        "decoder_hash": folders.decoder.hash(),
        "data_hash": loader.records.content(),
        "precision": str(resolve_precision(config)).removeprefix("torch."),
        "starts": [weights_hash(folder) for folder in stages.check_start(config)],
    }


# -- initial weights ---------------------------------------------------------------------------------------------------


def load_initial_weights(model: VisionLanguageModel, config: RunConfig, manifest: Manifest, loader: Loader) -> None:
    """Loads the weights of earlier results, later ones winning, and scales an adapter that none of them has trained.

    manifest: description of the run's models, with which the earlier results must agree.

    Raises:
        ConfigError, CheckpointError: a result that does not exist or belongs to other models, or a layer that would
            stay random.
    """
    loaded: set[str] = set()
    for folder in stages.check_start(config):
        if is_peft_folder(folder):
            loaded |= load_peft_(model, folder, config.lora)
            if remark := other_base(folder, config.target, manifest["target_hash"]):
                logger.warning("%s", remark)
            logger.info("loaded the low-rank adapters in %s", folder)
        else:
            loaded |= _load_result(model, config, manifest, folder)
    refuse_untrained(model, config, loaded)
    last = "adapter" if model.aligner is None else "aligner"
    is_new = model.adapter is not None and not any(belongs_to(name, last) for name in loaded)
    if config.adapter.match_embeddings and is_new:
        factor = match_embeddings_(model, first_pixels(loader))
        logger.info("image tokens scaled by %.3g to match the word embeddings", factor)


def _load_result(model: VisionLanguageModel, config: RunConfig, manifest: Manifest, folder: Path) -> set[str]:
    """Loads the weights of one earlier run; returns the names of those it brought."""
    checkpoint = find_checkpoint(folder)
    target = {"target_hash": manifest["target_hash"]}
    if config.adapter.width is None:
        check_manifest(checkpoint, target)
    if checkpoint.manifest.get("encoder_hash") and manifest["encoder_hash"]:
        check_manifest(checkpoint, {"encoder_hash": manifest["encoder_hash"]})
    kind, before = config.adapter.described, checkpoint.adapter()
    if config.encoder is not None and before not in (None, kind):
        raise ConfigError(
            f"{checkpoint.folder} holds an adapter of the kind {before}, and this run has {kind}; set adapter.kind and "
            "adapter.factor as that run had them, or leave it out of init_from."
        )
    names = load_weights_(model.named_targets(), checkpoint, skip=lambda name: stages.belongs_elsewhere(config, name))
    if any(name.startswith(stages.SURROGATE_ONLY) for name in names):
        check_manifest(checkpoint, {"plan": manifest["plan"]})
    if any(belongs_to(name, "aligner") for name in names):  # the encoder before an aligner had another decoder (A.8)
        check_manifest(checkpoint, target)
    if names:  # what an earlier stage trained may not be part of this one, such as a translator of a full model
        logger.info("loaded %d tensors from %s", len(names), checkpoint.folder)
    return names


def first_pixels(loader: Loader) -> torch.Tensor:
    """Returns the first images of the data, up to `PIXEL_SAMPLES`, the same on every rank: (images, 3, size, size).

    Raises:
        DataError: an image cannot be used, and bad samples are not skipped. ConfigError: the data hold no image.
    """
    images: list[torch.Tensor] = []
    for index in range(len(loader.records)):
        if loader.records.images(index):
            try:
                images += list(loader.sample_encoder.pixels(loader.records[index]))
            except DataError:
                if not loader.skip_bad:
                    raise  # otherwise the sample is counted when training comes to it
        if len(images) >= PIXEL_SAMPLES:
            break
    if not images:
        raise ConfigError(
            "adapter.match_embeddings=true measures images, and no sample of data.sources has one that can be used; "
            "set it to false or add such samples."
        )
    return torch.stack(images[:PIXEL_SAMPLES])


def refuse_untrained(model: VisionLanguageModel, config: RunConfig, loaded: set[str]) -> None:
    """Refuses random tensors between vision encoder and decoder that neither train nor were trained before.

    Also refused are tensors that would stay random inside a module whose other tensors earlier results bring, even if
    it trains: those results had another module.

    loaded: names of the weights that earlier results have brought.

    Raises:
        ConfigError: such a tensor; names the first one, or the part if none of it was brought.
    """
    trained = stages.trained_parts(config)
    for name in missing_tensors(model, loaded):
        module = name.partition(".")[0]
        if any(belongs_to(other, module) for other in loaded):
            raise ConfigError(
                f"{name} would stay random: init_from brings other tensors of the {module}, but not this one; name a "
                "run of this model."
            )
        part = "aligner" if module == "aligner" else "adapter"  # which trains together with its boundary embeddings
        if part not in trained:
            raise ConfigError(
                f"stage {config.stage} does not train the {module}, and init_from brings none; name a run that did."
            )


def check_loaded(model: VisionLanguageModel, folder: DecoderFolder, elements: int = 16) -> None:
    """Compares, for every tensor of the decoder, the first elements that this rank holds with the files.

    Under ZeRO-3 weights pass through two libraries on their way into partitions; a tensor lost on that way would train
    on as random numbers. Nothing is gathered for this check, and little is read.

    Raises:
        ConfigError: a tensor differs; names the first one.
    """
    for name, parameter in model.parameters_of("decoder"):
        span = folder.located.get(name.removeprefix("decoder."))
        shard = held_part(parameter).detach().flatten()
        start = distributed.rank() * len(shard) if is_partitioned(parameter) else 0
        if span is None or shard.numel() <= 1 or span.parameters <= start:
            continue  # not in the files, swapped out to a disk, or past the tensor's end
        stored = _read_elements(span, start, min(elements, len(shard), span.parameters - start))
        if not torch.equal(shard[: len(stored)].cpu(), stored.to(shard.dtype)):
            raise ConfigError(
                f"{name} was not loaded as it is stored in {span.file}; install the versions in constraints.txt."
            )


def _read_elements(span: Span, start: int, count: int) -> torch.Tensor:
    """Reads `count` elements of a flattened tensor in a file, from element `start` on."""
    dtype = torch_dtype(span.dtype)
    with span.file.open("rb") as file:
        file.seek(span.start + start * dtype.itemsize)
        return torch.frombuffer(bytearray(file.read(count * dtype.itemsize)), dtype=dtype)
