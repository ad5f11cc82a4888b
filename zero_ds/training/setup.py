"""Everything before a run's first step: its folder, its model with the weights it starts from, its data."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero_ds.config.resume import MAY_DIFFER, OLD_BEHAVIOUR
from zero_ds.config.schema import RunConfig
from zero_ds.data.formats import DataError
from zero_ds.data.loader import Loader
from zero_ds.data.sources import Records
from zero_ds.model.adapter import belongs_to, match_embeddings_
from zero_ds.model.build import ModelSpec, build_model, sample_encoder
from zero_ds.model.decoders.folder import decoder_tensors
from zero_ds.model.distillation import Teacher
from zero_ds.model.loading import model_hash
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.safetensors import locate, torch_dtype
from zero_ds.runtime.zero3 import held_part, is_partitioned
from zero_ds.training import stages
from zero_ds.training.checkpoint import checkpoint
from zero_ds.training.checkpoint.checkpoint import Checkpoint
from zero_ds.training.checkpoint.peft_folder import is_peft_folder, load_peft_
from zero_ds.training.deepspeed import resolve_precision

logger = logging.getLogger(__name__)


def make_folder(out: Path) -> None:
    """Makes the run folder, where also a mistake is told that ends the run before its first step.

    Raises:
        ConfigError: there is something else, or no place for it.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is no folder; choose another out=FOLDER.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror}.") from None


def checkpoint_to_resume(out: Path, config: RunConfig) -> Checkpoint | None:
    """The commit in the run folder from which the run goes on, the same on every rank; None if there is none.

    Raises:
        ConfigError: the folder holds a run with another configuration, or the ranks see different ones.
    """
    resumed = None
    if (out / "latest").is_file():
        resumed = checkpoint.find_checkpoint(out)
        before = resumed.manifest["fingerprint"]
        if before != config.fingerprint():
            changed = difference(resumed.manifest["config"], config.model_dump(mode="json"))
            raise ConfigError(f"{out} holds another run ({changed}); choose another out=FOLDER or remove it.")
    step = resumed.step if resumed else 0
    if not distributed.same_on_all_ranks(step):
        last, first = distributed.max_over_ranks(step, -step)
        raise ConfigError(
            f"the ranks see different commits in {out} (steps {-first:.0f} and {last:.0f}); out= must be a folder that "
            "all machines share."
        )
    return resumed


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The first entry in which two configurations differ: `key: old -> new`."""
    for key in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(key, OLD_BEHAVIOUR.get(f"{prefix}{key}")), new.get(key)
        if a == b or f"{prefix}{key}" in MAY_DIFFER:
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
    model = build_model(
        ModelSpec(
            decoder=decoder,
            encoder=encoder,
            encoder_config=config.encoder,
            adapter_config=config.adapter,
            dtype=resolve_precision(config),
            attention=config.attention,
            seed=config.seed,
            lora=config.lora,
        )
    )
    if config.distill.active:
        if model.plan is None:
            raise ConfigError(
                "distill.* needs a surrogate to distil into; set decoder=surrogate or distill weights to 0."
            )
        model.teacher = Teacher(model, local_folder(config.target), config.distill, resolve_precision(config))
    del keep_alive
    check_loaded(model, decoder)
    encode = sample_encoder(
        model, decoder, encoder, config.data, supervise=stages.supervision(config), seed=config.seed
    )
    with distributed.rank_zero_first():
        records = Records(config.data.sources, skip_bad=config.data.bad_samples == "skip")
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
        config.data.grouping,
        config.data.bad_samples == "skip",
        config.data.packing,
    )
    hashes = {
        "family": model.family.name,
        "target": config.target,
        "target_hash": model_hash(local_folder(config.target)),
        "encoder_hash": model_hash(encoder) if encoder else None,
        "decoder_hash": model_hash(decoder),
        "data_hash": records.content(),
        "precision": str(resolve_precision(config)).removeprefix("torch."),
    }
    return model, loader, hashes


def first_pixels(loader: Loader) -> torch.Tensor:
    """Pixel values of up to 16 of the first pictures, the same on every rank: (images, 3, size, size).

    Raises:
        DataError: a picture that cannot be used, unless bad samples are skipped; ConfigError: there is none.
    """
    pictures: list[torch.Tensor] = []
    for index in range(len(loader.records)):
        if loader.records.images(index):
            try:
                pictures += list(loader.sample_encoder.pixels(loader.records[index]))
            except DataError:
                if not loader.skip_bad:
                    raise  # otherwise training counts it when its turn comes
        if len(pictures) >= 16:
            break
    if not pictures:
        raise ConfigError(
            "adapter.match_embeddings=true looks at pictures, and no sample of data.sources has one that can be used; "
            "set it to false or add such samples."
        )
    return torch.stack(pictures[:16])


def start_(model: VisionLanguageModel, config: RunConfig, hashes: dict[str, Any], loader: Loader) -> None:
    """Loads the weights of earlier results, later ones winning, and scales an adapter that none of them brought.

    Raises:
        ConfigError, CheckpointError: a result that is not there or belongs to other models, a layer left random.
    """
    plan = plan_of(model)
    started: set[str] = set()
    for folder in stages.check_start(config):
        if is_peft_folder(folder):
            started |= load_peft_(model, folder, config.lora)
            logger.info("started the low-rank adapters from %s", folder)
            continue
        commit = checkpoint.find_checkpoint(folder)
        if config.adapter.width is None:
            checkpoint.check_manifest(commit, {"target_hash": hashes["target_hash"]})
        if commit.manifest.get("encoder_hash") and hashes["encoder_hash"]:
            checkpoint.check_manifest(commit, {"encoder_hash": hashes["encoder_hash"]})
        names = checkpoint.load_weights_(
            model.named_targets(), commit, skip=lambda name: stages.belongs_elsewhere(config, name)
        )
        if any(name.startswith(stages.SURROGATE_ONLY) for name in names):
            checkpoint.check_manifest(commit, {"plan": plan})
        if any(belongs_to(name, "aligner") for name in names):  # what lies before an aligner had another decoder (A.8)
            checkpoint.check_manifest(commit, {"target_hash": hashes["target_hash"]})
        started |= names
        logger.info("started %d tensors from %s", len(names), commit.folder)
    refuse_untrained(model, config, started)
    last = "adapter" if model.aligner is None else "aligner"
    untrained = model.adapter is not None and not any(belongs_to(name, last) for name in started)
    if config.adapter.match_embeddings and untrained:
        logger.info(
            "image tokens scaled by %.3g to match the word embeddings", match_embeddings_(model, first_pixels(loader))
        )


def check_loaded(model: VisionLanguageModel, folder: Path, elements: int = 16) -> None:
    """Compares the first elements that this rank holds of every tensor of the decoder with the files.

    Under ZeRO-3 weights pass through the hands of two libraries on their way into partitions; what they lose on it
    would train on as random numbers. Nothing is gathered for this, and little is read.

    Raises:
        ConfigError: naming the first tensor that differs.
    """
    places = locate(decoder_tensors(folder))
    for name, parameter in model.parameters_of("decoder"):
        place = places.get(name.removeprefix("decoder."))
        shard = held_part(parameter).detach().flatten()
        start = distributed.rank() * len(shard) if is_partitioned(parameter) else 0
        if place is None or shard.numel() <= 1 or place.parameters <= start:
            continue  # made by the library, swapped out to a disk, or behind the end
        kind = torch_dtype(place.dtype)
        count = min(elements, len(shard), place.parameters - start)
        with place.file.open("rb") as file:
            file.seek(place.start + start * kind.itemsize)
            stored = torch.frombuffer(bytearray(file.read(count * kind.itemsize)), dtype=kind)
        if not torch.equal(shard[:count].cpu(), stored.to(shard.dtype)):
            raise ConfigError(
                f"{name} was not loaded as it stands in {place.file}; install the versions in constraints.txt."
            )


def plan_of(model: VisionLanguageModel) -> dict[str, Any] | None:
    """The surrogate's LayerPlan as a manifest words it; None for a full model."""
    return model.plan.to_json() if model.plan else None


def refuse_untrained(model: VisionLanguageModel, config: RunConfig, started: set[str]) -> None:
    """A random layer between encoder and decoder that neither trains nor was trained is a mistake in the recipe.

    Raises:
        ConfigError: naming the part.
    """
    parts = [part for part in ("adapter", "aligner") if getattr(model, part) is not None]
    for part in parts:
        if part not in stages.trained_parts(config) and not any(belongs_to(name, part) for name in started):
            raise ConfigError(
                f"stage {config.stage} does not train the {part}, and init_from brings none; name a run that did."
            )
