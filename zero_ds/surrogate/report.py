"""Reports on a surrogate: the share of its target that it keeps, its cost, and the distance of its predictions."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from zero_ds.model.build import ModelSpec, Modules, build_model
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.decoders.shrink import active_share, is_expert
from zero_ds.model.layer_plan import SurrogateInfo, read_surrogate
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically
from zero_ds.runtime.precision import fast_dtype
from zero_ds.runtime.safetensors import Span, content_hash
from zero_ds.training.checkpoint.checkpoint import check_manifest, find_checkpoint
from zero_ds.training.checkpoint.load import load_weights_
from zero_ds.training.planning.flops import encoder_step_ratio
from zero_ds.trajectory.batching import batches, padded, progress
from zero_ds.trajectory.texts import TokenSample, read_samples

RESAMPLES = 1000
"""Number of bootstrap resamples of an interval."""


@dataclass(frozen=True)
class Comparison:
    """Text on which the predictions of surrogate and target are compared."""

    samples: Sequence[TokenSample]
    weights: Path | None = None
    """Run whose translators are compared as well, besides those that the surrogate was cut with."""

    @classmethod
    def read(
        cls,
        target: DecoderFolder | Path,
        text: Path,
        *,
        count: int = 64,
        weights: Path | None = None,
        chat_template: str | None = None,
    ) -> Comparison:
        """Reads `count` samples, chosen at random, from a file of text data.

        chat_template: file with a template in place of the target's own.

        Raises:
            ConfigError, DataError: as `read_samples`.
        """
        folder = DecoderFolder.of(target).path
        samples, _ = read_samples(folder, text, count=count, seed=0, chat_template=chat_template)
        return cls(samples, weights)


@dataclass(frozen=True)
class Divergence:
    """Distance of a surrogate's predictions from its target's on text."""

    kl: float
    """KL(target || surrogate) over the vocabulary in nats per token, mean over tokens."""
    low: float
    """Lower end of its 95 % bootstrap interval over samples."""
    high: float
    """Upper end of that interval."""
    agreement: float
    """Share of tokens at which both models find the same token most probable."""
    tokens: int
    samples: int
    weights: str | None
    """Run whose translators were used; None: those that the surrogate was cut with."""


def write_report(
    surrogate: DecoderFolder | Path, target: DecoderFolder | Path, comparison: Comparison | None = None
) -> dict[str, Any]:
    """Writes report.json into a surrogate's folder and returns its content, which `lines` puts into words.

    The content is that of `audit`; with a comparison, it also has the entry `divergence`, which needs both models.

    Raises:
        ConfigError, CheckpointError: as `audit`, `check_weights` and `divergence`.
    """
    surrogate = DecoderFolder.of(surrogate)
    content = audit(surrogate, target)
    if comparison is not None:
        runs: list[Path | None] = [None]
        if comparison.weights is not None:
            check_weights(comparison.weights, surrogate)
            runs.append(comparison.weights)
        found = [divergence(surrogate, target, comparison.samples, weights=run, dtype=fast_dtype()) for run in runs]
        content["divergence"] = [asdict(one) for one in found]
    write_atomically(surrogate.path / "report.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    return content


def audit(surrogate: DecoderFolder | Path, target: DecoderFolder | Path) -> dict[str, Any]:
    """Counts kept and dropped parameters, bytes and FLOPs, and compares the parts that an encoder relies on.

    Reads the headers and the word embeddings of both folders, and the texts whose hashes `same` compares. Loads no
    model.

    Raises:
        ConfigError: `surrogate` is not a surrogate, or was cut from another model.
    """
    surrogate, target = DecoderFolder.of(surrogate), DecoderFolder.of(target)
    info = _info(surrogate)
    if target.hash(like=info.target_hash) != info.target_hash:
        raise ConfigError(f"{surrogate} was cut from another model than {target}; name the one it was cut from.")
    family = target.family
    mine, theirs = surrogate.spans, target.spans
    hashes = {
        name: {"surrogate": surrogate.text_hashes[name], "target": target.text_hashes[name]}
        for name in surrogate.text_hashes
    }
    hashes["embeddings"] = {
        "surrogate": content_hash(mine[family.embeddings]),
        "target": content_hash(theirs[family.embeddings]),
    }
    return {
        "surrogate": str(surrogate),
        "target": str(target),
        "plan": str(info.plan),
        "layers": {"surrogate": info.plan.surrogate_depth, "target": info.plan.depth},
        "translators": info.plan.translators,
        "parameters": {
            "kept": info.kept_parameters,
            "target": info.target_parameters,
            "dropped": _parameters(theirs, family.layer_prefix, info.plan.dropped),
            "trained": _parameters(mine, family.layer_prefix, info.plan.translators),
            **_active(surrogate, target),
        },
        "bytes": {
            "kept": sum(span.size for span in mine.values()),
            "target": sum(span.size for span in theirs.values()),
        },
        "step_flops_ratio": {
            "encoder": encoder_step_ratio(surrogate.path, distilled=False, target=target.path),
            "encoder_distilled": encoder_step_ratio(surrogate.path, distilled=True, target=target.path),
            "encoder_distilled_every_4": encoder_step_ratio(
                surrogate.path, distilled=True, target=target.path, every=4
            ),
        },
        "hashes": hashes,
        "same": {name: pair["surrogate"] == pair["target"] for name, pair in hashes.items()},
    }


def _active(surrogate: DecoderFolder, target: DecoderFolder) -> dict[str, int]:
    """Returns the numbers of parameters that compute a token; empty for decoders without experts."""
    share = active_share(target.text_config())
    if share == 1:
        return {}
    counts = {}
    for name, folder in (("active_kept", surrogate), ("active_target", target)):
        spans = folder.spans.items()
        counts[name] = round(sum(span.parameters * (share if is_expert(key) else 1) for key, span in spans))
    return counts


def _info(surrogate: DecoderFolder) -> SurrogateInfo:
    """Returns the content of surrogate.json; raises ConfigError if the folder is not a surrogate."""
    return surrogate.surrogate or read_surrogate(surrogate.path)


def _parameters(tensors: dict[str, Span], prefix: str, layers: Collection[int]) -> int:
    """Returns the number of parameters in the given layers."""
    starts = tuple(f"{prefix}{number}." for number in layers)
    return sum(span.parameters for name, span in tensors.items() if name.startswith(starts))


def check_weights(weights: Path, surrogate: DecoderFolder | Path) -> None:
    """Checks that a run's translators were trained in this surrogate.

    Raises:
        ConfigError, CheckpointError: they were trained in another one, or the run has no usable checkpoint.
    """
    info = _info(DecoderFolder.of(surrogate))
    check_manifest(find_checkpoint(weights), {"plan": info.plan.to_json(), "target_hash": info.target_hash})


def divergence(
    surrogate: DecoderFolder | Path,
    target: DecoderFolder | Path,
    samples: Sequence[TokenSample],
    *,
    weights: Path | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
) -> Divergence:
    """Measures how far a surrogate's predictions are from its target's on text. Holds both models in memory.

    weights: a run whose translators replace the untrained ones.

    Raises:
        ConfigError, CheckpointError: the weights hold no translator, or do not fit.
    """
    device = distributed.device()
    small = _load_surrogate(DecoderFolder.of(surrogate), weights, dtype).to(device)
    whole = DecoderFolder.of(target).load(dtype=dtype).eval().to(device)
    sums, agreed, counts = (np.zeros(len(samples)) for _ in range(3))
    lengths = [len(sample.input_ids) for sample in samples]
    with torch.inference_mode(), progress(sum(lengths), "comparing", "token") as bar:
        for rows in batches(lengths, batch_size):
            ids, mask = padded([samples[row].input_ids for row in rows], device)
            followed = mask[:, 1:].bool()
            p, q = (_log_probs(decoder, ids, mask, followed) for decoder in (whole, small))
            kl = (p.exp() * (p - q)).sum(-1)
            same = (p.argmax(-1) == q.argmax(-1)).double()
            ends = np.cumsum([lengths[row] - 1 for row in rows])[:-1].tolist()
            for row, part, hits in zip(rows, kl.tensor_split(ends), same.tensor_split(ends), strict=True):
                sums[row], agreed[row], counts[row] = float(part.sum()), float(hits.sum()), len(part)
            bar.update(sum(lengths[row] for row in rows))
    if not np.isfinite(sums).all():
        bad = samples[int(np.flatnonzero(~np.isfinite(sums))[0])]
        raise ConfigError(f"the predictions for sample {bad.id} are not finite; the weights are damaged.")
    draws = np.random.default_rng(0).integers(0, len(samples), (RESAMPLES, len(samples)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    total = counts.sum()
    return Divergence(
        kl=float(sums.sum() / total),
        low=float(low),
        high=float(high),
        agreement=float(agreed.sum() / total),
        tokens=int(total),
        samples=len(samples),
        weights=str(weights) if weights else None,
    )


def _load_surrogate(surrogate: DecoderFolder, weights: Path | None, dtype: torch.dtype) -> nn.Module:
    """Loads a surrogate's decoder; with `weights`, the translators of that run.

    Raises:
        ConfigError, CheckpointError: the weights hold no translator, or do not fit.
    """
    decoder = surrogate.load(dtype=dtype).eval()
    if weights is not None:
        model = build_model(ModelSpec(Modules(decoder, surrogate.family), plan=_info(surrogate).plan))
        loaded = load_weights_(
            model.named_targets(), find_checkpoint(weights), skip=lambda name: not name.startswith("translator.")
        )
        if not loaded:
            raise ConfigError(f"{weights} holds no translator; name a run of the translator or pretrain stage.")
    return decoder


def _log_probs(decoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor, followed: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities at the positions that a token follows: (rows, vocabulary)."""
    logits = cast(Any, decoder)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return cast(torch.Tensor, logits[:, :-1][followed].float().log_softmax(-1))


def lines(content: dict[str, Any]) -> list[str]:
    """Returns a report as lines of text for a terminal."""
    parameters, size, layers = content["parameters"], content["bytes"], content["layers"]
    ratios = content["step_flops_ratio"]
    share = parameters["kept"] / parameters["target"]
    active = []
    if "active_target" in parameters:
        active = [f"of a token   {parameters['active_kept']:,} of {parameters['active_target']:,} parameters"]
    found = [
        f"{content['plan']} of {content['target']}: {layers['surrogate']} of {layers['target']} layers",
        f"parameters  {parameters['kept']:,} of {parameters['target']:,} ({share:.0%}),"
        f" {parameters['trained']:,} in translators at {content['translators']}",
        *active,
        f"bytes       {size['kept'] / 1e9:.2f} of {size['target'] / 1e9:.2f} GB",
        f"step        {ratios['encoder']:.2f} of the target's FLOPs in the encoder stage"
        f" ({ratios['encoder_distilled']:.2f} with distillation, {ratios['encoder_distilled_every_4']:.2f} with it in"
        " one step of four)",
    ]
    for name, same in content["same"].items():
        verdict = "as the target's" if same else "NOT the target's"
        found.append(f"{name:<11} {verdict} ({content['hashes'][name]['surrogate'][:12] or 'none'})")
    for entry in content.get("divergence", ()):
        which = f"with the translators of {entry['weights']}" if entry["weights"] else "as cut"
        found.append(
            f"KL          {entry['kl']:.3f} nats per token [{entry['low']:.3f}, {entry['high']:.3f}] {which}; the same"
            f" most probable token at {entry['agreement']:.0%} of {entry['tokens']:,} in {entry['samples']} samples"
        )
    return found
