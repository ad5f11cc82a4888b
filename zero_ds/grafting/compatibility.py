"""Does a trained encoder fit a full language model? Compares the models of its training with those of today.

A graft is not a copy of anything: it is the target's own weights, read where they are, with the trained encoder and
adapter. So everything depends on whether the two belong together, and that can be read from files, without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zero_ds.config.loading import validate
from zero_ds.config.schema import RunConfig
from zero_ds.model.adapter import output_width
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.layer_plan import LayerPlan
from zero_ds.model.loading import model_hash
from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.runtime.files import home_path
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.safetensors import same_bytes
from zero_ds.surrogate.build import kept_tensors
from zero_ds.training.checkpoint.checkpoint import Checkpoint, find_checkpoint
from zero_ds.training.checkpoint.peft_folder import is_peft_folder
from zero_ds.training.stages import decoder_kind, trained_parts


@dataclass(frozen=True)
class Check:
    """One line of the compatibility report."""

    name: str
    """Name under which a user accepts a difference."""
    what: str
    """Description of the compared values, for messages."""
    trained_with: str
    here: str
    fits: bool | None
    """Whether both sides agree; None if one side is unknown, in which case `here` explains why."""

    @classmethod
    def of(cls, name: str, what: str, trained_with: str | None, here: str) -> Check:
        """Compares two values; the result is unknown if nothing was recorded in training."""
        if not trained_with:
            return cls(name, what, "not recorded", here or "none", None)
        return cls(name, what, trained_with, here or "none", trained_with == here)


ACCEPTABLE = ("family", "target", "tokenizer", "template", "embeddings", "encoder", "kept-layers")
"""Names of the checks whose difference a user may accept. Nothing can be grafted across different hidden sizes."""


def graft(
    weights: str | Path,
    target: str,
    *,
    accept: Iterable[str] = (),
    surrogate: str | None = None,
    report: Callable[[Sequence[Check]], object] = lambda checks: None,
) -> list[Check]:
    """Checks thoroughly that the result of a run can be grafted into a full language model; returns the checks.

    weights: run or checkpoint folder; target: folder or hub id of the full model; accept: names of checks (ACCEPTABLE)
    whose difference is accepted; surrogate: folder of the surrogate, if it is no longer where the run found it; report:
    function that receives the checks before a difference raises an error. The graft itself needs no further step:
    `load.load_graft` reads both folders where they are.

    Raises:
        ConfigError, CheckpointError: as `compatibility` and `refuse_differences`.
    """
    checkpoint = find_checkpoint(weights)
    checks = compatibility(checkpoint, DecoderFolder(local_folder(target)), thorough=True, surrogate=surrogate)
    report(checks)
    refuse_differences(checkpoint, target, checks, accept)
    return checks


def run_config(checkpoint: Checkpoint) -> RunConfig:
    """Returns the configuration that a checkpoint was trained with.

    Raises:
        ConfigError: the manifest holds no valid configuration.
    """
    return validate(RunConfig, checkpoint.manifest.get("config"), what=f"manifest of {checkpoint.folder}")


def compatibility(
    checkpoint: Checkpoint, target: DecoderFolder | Path, *, thorough: bool = False, surrogate: str | None = None
) -> list[Check]:
    """Compares the models of a training run with a target model.

    thorough: also hash the weights file and all word embeddings, and compare everything that the surrogate kept with
    the target's tensors, byte for byte and a block at a time. surrogate: folder of the surrogate, if it is no longer
    where the run found it.

    Raises:
        ConfigError: weights without an adapter, a damaged or missing folder.
        CheckpointError: damaged weights; damage after the file's header is found only if `thorough`.
    """
    target = DecoderFolder.of(target)
    manifest, config = checkpoint.manifest, run_config(checkpoint)
    width = target.hidden_size
    # a language model that trained alone has no adapter, and fits its own target
    alone = config.encoder is None and not {"decoder", "lora"}.isdisjoint(trained_parts(config))
    trained_width = width if alone else adapter_width(checkpoint)
    if thorough:
        checkpoint.check_weights()
    recorded_hash = str(manifest.get("target_hash"))
    target_hash = target.hash(like=recorded_hash)
    relied_on = _relied_on(manifest, config, surrogate)

    checks = [
        Check("stage", "stage", config.stage, _what_trained(config), True),
        Check.of("family", "family", str(manifest.get("family")), target.family.name),
        Check.of("hidden-size", "hidden size", str(trained_width), str(width)),
        Check.of("target", "target's config and weights", recorded_hash, target_hash),
        Check.of("tokenizer", "tokenizer", relied_on.get("tokenizer"), target.text_hashes["tokenizer"]),
    ]
    if config.data.chat_template:
        checks.append(Check("template", "chat template", "the run's own", config.data.chat_template, True))
    else:
        checks.append(Check.of("template", "chat template", relied_on.get("template"), target.text_hashes["template"]))

    from_surrogate = bool(manifest.get("plan"))
    # a run against the target itself relied on embeddings of which the target's hash contains samples
    if width == trained_width and (recorded_hash != target_hash or (thorough and from_surrogate)):
        embeddings = relied_on.get("embeddings")
        checks.append(Check.of("embeddings", "word embeddings", embeddings, target.embeddings_hash()))
    if config.encoder is not None:
        began_with = manifest.get("encoder_hash")
        encoder_hash = model_hash(local_folder(config.encoder.path), like=str(began_with))
        checks.append(Check.of("encoder", "vision encoder", began_with, encoder_hash))
        checks.append(_compare_adapters(checkpoint, config))

    trained_early = _checkpoint_with_early_layers(checkpoint, config)
    if trained_early is not None:
        what = "the source of the kept layers"
        checks.append(Check("kept-layers", what, f"{trained_early}, which trained them", "the target", False))
    elif thorough and width == trained_width and from_surrogate:
        checks.append(_compare_kept_layers(manifest, config, target, surrogate))
    return checks


def refuse_differences(
    checkpoint: Checkpoint, target: str | Path | DecoderFolder, checks: Iterable[Check], accept: Iterable[str]
) -> None:
    """Refuses weights that do not fit, unless every difference is accepted by the name of its check.

    Raises:
        ConfigError: the first difference that is not accepted; an unknown name in `accept`.
    """
    accept = tuple(accept)
    for name in accept:
        if name not in ACCEPTABLE:
            raise ConfigError(
                f"'{name}' is not a check whose difference can be accepted{did_you_mean(name, list(ACCEPTABLE))}"
            )
    for check in checks:
        if check.fits is False and check.name not in accept:
            remedy = f"; pass --accept {check.name} to graft anyway" if check.name in ACCEPTABLE else ""
            raise ConfigError(
                f"{checkpoint.folder} cannot be grafted into {target}: {check.what} is {check.here}, "
                f"trained with {check.trained_with}{remedy}."
            )


def adapter_width(checkpoint: Checkpoint) -> int:
    """Returns the width of the adapter's output, read from the header of the weights file.

    Raises:
        ConfigError: the weights hold no adapter. CheckpointError: the file is missing or damaged.
    """
    width = output_width({name: span.shape for name, span in checkpoint.weight_spans().items()})
    if width is None:
        raise ConfigError(
            f"{checkpoint.folder} holds no adapter, so there is nothing to graft; name a run of a later stage."
        )
    return width


def _what_trained(config: RunConfig) -> str:
    return f"{config.stage}, which trains {', '.join(trained_parts(config))} against the {decoder_kind(config)}"


def _relied_on(manifest: dict[str, Any], config: RunConfig, surrogate: str | None) -> dict[str, str]:
    """Returns the recorded hashes of tokenizer, template and embeddings, or else those of the run's surrogate."""
    if recorded := manifest.get("relies_on"):
        return dict(recorded)
    if decoder_kind(config) != "surrogate":
        return {}
    folder = _surrogate_folder(config, surrogate)
    return folder.relied_on if folder is not None else {}


def _surrogate_folder(config: RunConfig, surrogate: str | None) -> DecoderFolder | None:
    """Returns the folder of the run's surrogate: `surrogate`, or where the run found it, or None if it is gone."""
    if surrogate is not None:
        folder = DecoderFolder(local_folder(surrogate))
        if not folder.is_surrogate:
            raise ConfigError(f"--surrogate {surrogate} is not a surrogate, because it holds no surrogate.json.")
        return folder
    if config.surrogate is None or not DecoderFolder(home_path(config.surrogate)).is_surrogate:
        return None
    return DecoderFolder(local_folder(config.surrogate))


def _earlier_checkpoints(config: RunConfig) -> list[Checkpoint]:
    """Returns the results that a run started from, as far as they are where it found them."""
    folders = [Path(start) for start in config.starts]
    return [find_checkpoint(folder) for folder in folders if folder.is_dir() and not is_peft_folder(folder)]


def _compare_adapters(checkpoint: Checkpoint, config: RunConfig) -> Check:
    """Compares the kind of the run's adapter with the results that it started from and that supply tensors of it."""
    own = config.adapter.described
    for earlier in _earlier_checkpoints(config):
        kind = earlier.adapter()
        if kind not in (None, own):
            return Check("adapter", "adapter", own, f"{kind} in {earlier.folder}", False)
    return Check("adapter", "adapter", own, own, True)


def _checkpoint_with_early_layers(checkpoint: Checkpoint, config: RunConfig) -> Path | None:
    """Returns the folder of the checkpoint that holds trained kept layers (the starred control of the paper), if any.

    Searches the results that the run started from, then the run itself.
    """
    for candidate in [*_earlier_checkpoints(config), checkpoint]:
        if any(name.startswith("early.") for name in candidate.weight_spans()):
            return candidate.folder
    return None


def _compare_kept_layers(
    manifest: dict[str, Any], config: RunConfig, target: DecoderFolder, surrogate: str | None
) -> Check:
    """Compares all tensors that the surrogate did not replace with the target's, byte for byte."""
    name = "kept-layers"
    folder = _surrogate_folder(config, surrogate)
    if folder is None:
        here = f"{config.surrogate} does not exist; name its folder with --surrogate"
        return Check(name, "kept layers", str(config.surrogate), here, None)
    plan = LayerPlan.from_json(manifest["plan"])
    if folder.plan != plan:
        return Check(name, f"the cut of {folder}", str(plan), str(folder.plan), False)
    pairs = kept_tensors(plan, target.family.layer_prefix, folder.spans, target.spans)
    size = sum(kept.size for _, kept, _ in pairs)
    with tqdm(total=size, desc="comparing", unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        for tensor, kept, original in pairs:
            if original is None or not same_bytes(kept, original, bar):
                return Check(name, "the first kept tensor that differs", f"the one in {folder}", tensor, False)
    count = f"{len(plan.kept)} layers, {len(pairs)} tensors, {size:,} bytes equal"
    return Check(name, "kept layers", count, count, True)
