"""What a surrogate keeps of its target, what it costs, and how far its predictions are from the target's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from zero_ds.model.build import ModelSpec, Modules, build_model
from zero_ds.model.decoders import family_of
from zero_ds.model.decoders.folder import decoder_spans, load_decoder, text_hashes
from zero_ds.model.layer_plan import read_surrogate
from zero_ds.model.loading import model_hash
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.safetensors import content_hash
from zero_ds.training.checkpoint.checkpoint import check_manifest, find_checkpoint
from zero_ds.training.checkpoint.load import load_weights_
from zero_ds.training.planning.cost import encoder_step_ratio
from zero_ds.trajectory.lens import TokenSample, batches, padded, progress

RESAMPLES = 1000


@dataclass(frozen=True)
class Divergence:
    """KL(target || surrogate) over the vocabulary in nats a token, mean over tokens, with a 95 % bootstrap interval
    over samples; and the share of tokens at which both find the same token most probable."""

    kl: float
    low: float
    high: float
    agreement: float
    tokens: int
    samples: int
    weights: str | None
    """Run whose translators were used; None: those that the surrogate was cut with."""


def audit(surrogate: Path, target: Path) -> dict[str, Any]:
    """Parameters and bytes kept and dropped, FLOPs of a step, and whether what an encoder relies on is unchanged.

    Reads headers, the embeddings and, of both, everything that `same` compares; loads no model.

    Raises:
        ConfigError: `surrogate` is none, or was cut from another model.
    """
    info = read_surrogate(surrogate)
    if model_hash(target, like=info.target_hash) != info.target_hash:
        raise ConfigError(f"{surrogate} was cut from another model than {target}; name the one it was cut from.")
    family = family_of(target)
    mine, theirs = decoder_spans(surrogate), decoder_spans(target)
    here, there = text_hashes(surrogate), text_hashes(target)
    hashes = {
        **{name: {"surrogate": here[name], "target": there[name]} for name in here},
        "embeddings": {
            "surrogate": content_hash(mine[family.embeddings]),
            "target": content_hash(theirs[family.embeddings]),
        },
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
            "dropped": sum(
                span.parameters
                for name, span in theirs.items()
                if any(name.startswith(f"{family.layer_prefix}{number}.") for number in info.plan.dropped)
            ),
            "trained": sum(
                span.parameters
                for name, span in mine.items()
                if any(name.startswith(f"{family.layer_prefix}{number}.") for number in info.plan.translators)
            ),
        },
        "bytes": {
            "kept": sum(span.size for span in mine.values()),
            "target": sum(span.size for span in theirs.values()),
        },
        "step_flops_ratio": {
            "encoder": encoder_step_ratio(surrogate, distilled=False, target=target),
            "encoder_distilled": encoder_step_ratio(surrogate, distilled=True, target=target),
        },
        "hashes": hashes,
        "same": {name: pair["surrogate"] == pair["target"] for name, pair in hashes.items()},
    }


def divergence(
    surrogate: Path,
    target: Path,
    samples: Sequence[TokenSample],
    *,
    weights: Path | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
) -> Divergence:
    """How far the surrogate's predictions are from the target's on text; holds both models.

    weights: a run whose translators take the place of the untrained ones.

    Raises:
        ConfigError, CheckpointError: weights that hold no translator, or that do not fit.
    """
    family = family_of(target)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = load_decoder(surrogate, dtype=dtype).eval()
    if weights is not None:
        model = build_model(ModelSpec(Modules(small, family), plan=read_surrogate(surrogate).plan))
        loaded = load_weights_(
            model.named_targets(), find_checkpoint(weights), skip=lambda name: not name.startswith("translator.")
        )
        if not loaded:
            raise ConfigError(f"{weights} holds no translator; name a run of the translator or pretrain stage.")
    whole = load_decoder(target, dtype=dtype).eval()
    small.to(device)
    whole.to(device)
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
        float(sums.sum() / total),
        float(low),
        float(high),
        float(agreed.sum() / total),
        int(total),
        len(samples),
        str(weights) if weights else None,
    )


def check_weights(weights: Path, surrogate: Path) -> None:
    """Raises ConfigError where a run's translators were trained in another surrogate."""
    info = read_surrogate(surrogate)
    check_manifest(find_checkpoint(weights), {"plan": info.plan.to_json(), "target_hash": info.target_hash})


def _log_probs(decoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor, followed: torch.Tensor) -> torch.Tensor:
    """Log-probabilities at the positions that a token follows: (rows, vocabulary)."""
    logits = cast(Any, decoder)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return cast(torch.Tensor, logits[:, :-1][followed].float().log_softmax(-1))


def lines(content: dict[str, Any]) -> list[str]:
    """The audit in words, for a terminal."""
    parameters, size, layers = content["parameters"], content["bytes"], content["layers"]
    ratios = content["step_flops_ratio"]
    share = parameters["kept"] / parameters["target"]
    found = [
        f"{content['plan']} of {content['target']}: {layers['surrogate']} of {layers['target']} layers",
        f"parameters  {parameters['kept']:,} of {parameters['target']:,} ({share:.0%}),"
        f" {parameters['trained']:,} in translators at {content['translators']}",
        f"bytes       {size['kept'] / 1e9:.2f} of {size['target'] / 1e9:.2f} GB",
        f"step        {ratios['encoder']:.2f} of the target's FLOPs in the encoder stage"
        f" ({ratios['encoder_distilled']:.2f} with distillation)",
    ]
    for name, same in content["same"].items():
        verdict = "as the target's" if same else "NOT the target's"
        found.append(f"{name:<11} {verdict} ({content['hashes'][name]['surrogate'][:12] or 'none'})")
    for entry in content.get("divergence", ()):
        which = f"with the translators of {entry['weights']}" if entry["weights"] else "as cut"
        found.append(
            f"KL          {entry['kl']:.3f} nats a token [{entry['low']:.3f}, {entry['high']:.3f}] {which}; the same"
            f" most probable token at {entry['agreement']:.0%} of {entry['tokens']:,} in {entry['samples']} samples"
        )
    return found


def with_divergences(content: dict[str, Any], found: Sequence[Divergence]) -> dict[str, Any]:
    return {**content, "divergence": [asdict(one) for one in found]}
