"""The prediction trajectory: how far the prediction of every layer is from the model's own (Eq. 1-4, Figure 3).

Source: section 1.1 of the paper, appendices A.1 (greedy answers) and A.11. Every layer's output is read through the
final norm and the output head (the lens): q^l = softmax(norm(X^l) W^T), l = 0..L-1, input embeddings excluded; p is the
same of the last layer, X^(L-1), taken before the final norm like all others. Two metrics:

    sequence    (the paper's) q^l and p are the probabilities of the true next token at the N - 1 positions that have
                one, clamped at 1e-6 and normalised over the sequence to sum to one; D = sum_n q^l_n log(q^l_n / p_n).
                Eq. 2 prints the shift the other way round; meant is P[:-1] read at t[1:].
    vocabulary  (the usual one of lens studies) D = KL(q^l || p) over the vocabulary, averaged over the positions.

Logits of all layers are never held: they come layer by layer and in chunks of rows, and only the positions that count
are read, so that padding has no part in anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from zero_ds.config import ConfigError
from zero_ds.data.conversations import ChatTemplate, cut_turns
from zero_ds.data.loader import SampleEncoder
from zero_ds.data.sources import Records, Sample
from zero_ds.families import Family
from zero_ds.files import new_folder
from zero_ds.surrogate import LayerPlan, Replaced
from zero_ds.transition import Transition

logger = logging.getLogger(__name__)

METRICS = ("sequence", "vocabulary")
FLOOR = 1e-6
"""Smallest probability of a true token in the `sequence` metric, as in the paper."""
LOGITS_BYTES = 32 << 20
"""Size of the float32 logits that are held at a time."""
MAX_TOKENS = 2048
"""Longest sample; a longer one loses whole turns from its end."""
ANSWER_TOKENS = 128
"""Longest greedy answer."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """What a trajectory depends on; paths are named for the reader, hashes tell one model or data file from another."""

    model: str
    target_hash: str
    data: str
    data_hash: str
    metric: str
    dtype: str
    greedy: bool
    seed: int
    requested_samples: int
    system_prompt: str | None

    def same(self, content: dict[str, Any]) -> bool:
        """Whether a trajectory.json was measured with this setting, wherever model and data lay then."""
        names = [field.name for field in fields(self) if field.name not in ("model", "data")]
        return all(name in content and content[name] == getattr(self, name) for name in names)


@dataclass(frozen=True)
class TokenSample:
    """One conversation, ready for the model."""

    id: str
    input_ids: list[int]


@dataclass(frozen=True)
class Trajectory:
    """Divergences of every sample at every layer, and the transition point read from them."""

    setting: Setting
    ids: tuple[str, ...]
    curves: Floats
    """(samples, layers), nats; the last layer's is zero."""
    transition: Transition

    @property
    def plan(self) -> LayerPlan | None:
        """The surrogate that follows: late phase replaced, last layer kept as in the paper; None if uncertain."""
        depth = self.curves.shape[1]
        if self.transition.verdict == "uncertain" or self.transition.layer is None:
            return None
        return LayerPlan(depth, (Replaced(self.transition.layer, depth - 2),))

    def to_json(self) -> dict[str, Any]:
        quarter, three_quarters = np.percentile(self.curves, [25, 75], axis=0)
        plan = self.plan
        part = plan.replaced[0] if plan else None
        return {
            **asdict(self.setting),
            "samples": len(self.curves),
            "layers": self.curves.shape[1],
            "transition": asdict(self.transition),
            "proposed": {"replace": f"{part.first}:{part.last}", "name": str(plan)} if part else None,
            "mean": _rounded(self.curves.mean(axis=0)),
            "median": _rounded(np.median(self.curves, axis=0)),
            "spread": _rounded(three_quarters - quarter),
            "versions": {name: version(name) for name in ("zero-ds", "torch", "transformers", "numpy")},
            "ids": list(self.ids),
            "curves": [_rounded(curve) for curve in self.curves],
        }


def choose_samples(
    records: Records, encoder: SampleEncoder, *, count: int, seed: int, questions_only: bool = False
) -> list[TokenSample]:
    """`count` text samples at random, or all there are; those with an image or too long for an answer are left out.

    With `questions_only` a sample ends where the first answer begins (greedy feeding, appendix A.1).

    Raises:
        ConfigError: there is no sample of text alone that fits.
    """
    chosen: list[TokenSample] = []
    pictures = unfit = 0
    for index in np.random.default_rng(seed).permutation(len(records)).tolist():
        if len(chosen) == count:
            break
        if records.images(index):
            pictures += 1
            continue
        sample = records[index]
        input_ids = _question(sample, encoder) if questions_only else _conversation(sample, encoder)
        if len(input_ids) < 2:
            unfit += 1
            continue
        chosen.append(TokenSample(sample.id, input_ids))
    if not chosen:
        raise ConfigError(
            f"the data holds no usable text sample ({pictures} have an image, {unfit} no question and answer within "
            f"{encoder.max_length} tokens); give conversations without images."
        )
    if len(chosen) < count:
        logger.info("%d samples instead of %d: %d have an image, %d are too long", len(chosen), count, pictures, unfit)
    return chosen


def _conversation(sample: Sample, encoder: SampleEncoder) -> list[int]:
    encoded = cut_turns(encoder.turns(sample), encoder.max_length, encoder.encode)
    return encoded.input_ids if encoded else []


def _question(sample: Sample, encoder: SampleEncoder) -> list[int]:
    turns = encoder.turns(sample)
    asked = turns[: next(i for i, turn in enumerate(turns) if turn.role == "assistant")]
    if all(turn.role != "user" for turn in asked):
        return []
    input_ids = encoder.encode(asked, generate=True).input_ids
    return input_ids if len(input_ids) <= encoder.max_length - ANSWER_TOKENS else []


def answer_greedily(
    decoder: nn.Module, template: ChatTemplate, questions: Sequence[TokenSample], *, batch_size: int
) -> list[TokenSample]:
    """The questions, each followed by the model's own greedy answer of at most 128 tokens (appendix A.1)."""
    from transformers import GenerationConfig

    model = cast(Any, decoder)
    stop = template.end_of_turn()
    settings = GenerationConfig(do_sample=False, max_new_tokens=ANSWER_TOKENS, eos_token_id=stop, pad_token_id=stop)
    kept, model.generation_config = model.generation_config, settings  # else the model's own fill in what is left open
    answered: dict[int, TokenSample] = {}
    try:
        with torch.inference_mode(), _progress(len(questions), "answering", "sample") as bar:
            for rows in batches([len(question.input_ids) for question in questions], batch_size):
                input_ids, mask = _padded([questions[row].input_ids for row in rows], model.device, left=True)
                output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
                for place, row in enumerate(rows):
                    answer = output[place, input_ids.shape[1] :].tolist()
                    end = answer.index(stop) + 1 if stop in answer else len(answer)
                    answered[row] = TokenSample(questions[row].id, questions[row].input_ids + answer[:end])
                bar.update(len(rows))
    finally:
        model.generation_config = kept
    return [answered[row] for row in range(len(questions))]


@dataclass(frozen=True)
class Lens:
    """A decoder's final norm and output head, through which the hidden states of any layer can be read."""

    decoder: nn.Module
    family: Family

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output of a layer, not normed: (rows, hidden) -> float32 (rows, vocabulary)."""
        return self.family.logits(self.decoder, self.family.norm(self.decoder)(hidden_states)).float()

    def chunks(self, hidden_states: torch.Tensor) -> Iterator[slice]:
        """Slices of the rows, each with logits of about LOGITS_BYTES."""
        vocabulary = cast(Any, self.decoder).get_output_embeddings().weight.shape[0]
        rows = max(1, LOGITS_BYTES // (4 * vocabulary))
        return (slice(start, start + rows) for start in range(0, len(hidden_states), rows))


def true_token_log_probs(lens: Lens, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Statistic of one layer for the `sequence` metric: log softmax(norm(X) W^T) at the true next tokens (Eq. 2, 3).

    hidden_states: (rows, hidden), of any samples together; targets: (rows,). Returns float32 (rows,).
    """
    parts = []
    for rows in lens.chunks(hidden_states):
        logits = lens.logits(hidden_states[rows])
        chosen = logits.gather(1, targets[rows, None]).squeeze(1)
        parts.append(chosen - logits.logsumexp(dim=1))
    return torch.cat(parts)


def vocabulary_divergences(lens: Lens, layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Statistic of all layers for the `vocabulary` metric: KL(q^l || p) at every row, p from the last entry.

    layers: one (rows, hidden) each. Returns float32 (layers, rows).
    """
    parts = []
    for rows in lens.chunks(layers[-1]):
        final = lens.logits(layers[-1][rows]).log_softmax(dim=1)
        divergences = []
        for hidden_states in layers[:-1]:
            log_probs = lens.logits(hidden_states[rows]).log_softmax(dim=1)
            divergences.append((log_probs.exp() * (log_probs - final)).sum(dim=1))
        parts.append(torch.stack([*divergences, torch.zeros_like(final[:, 0])]))
    return torch.cat(parts, dim=1)


def sequence_divergences(log_probs: Floats) -> Floats:
    """Eq. 4 of one sample: log probabilities of the true tokens, (layers, N - 1) -> (layers,), in nats."""
    probs = np.maximum(np.exp(log_probs), FLOOR)
    probs /= probs.sum(axis=1, keepdims=True)
    return cast(Floats, (probs * np.log(probs / probs[-1])).sum(axis=1))


@contextlib.contextmanager
def tapped(layers: nn.ModuleList, receive: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While open, `receive(number, output)` is called with every layer's output, (batch, seq, hidden)."""

    def hook(number: int) -> Any:
        return lambda module, inputs, output: receive(number, output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Sample numbers in batches of like length, the longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def measure(
    decoder: nn.Module, family: Family, samples: Sequence[TokenSample], *, metric: str, batch_size: int
) -> Floats:
    """Divergence of every layer's prediction from the last layer's: (samples, layers), in nats.

    Raises:
        ConfigError: the model computes something other than finite numbers in its precision.
    """
    assert metric in METRICS
    lens = Lens(decoder, family)
    curves = np.empty((len(samples), len(family.layers(decoder))))
    lengths = [len(sample.input_ids) for sample in samples]
    with torch.inference_mode(), _progress(sum(lengths), "measuring", "token") as bar:
        for rows in batches(lengths, batch_size):
            curves[rows] = _measure_batch(lens, [samples[row].input_ids for row in rows], metric)
            bar.update(sum(lengths[row] for row in rows))
    bad = np.flatnonzero(~np.isfinite(curves).all(axis=1))
    if len(bad):
        half = next(decoder.parameters()).dtype != torch.float32
        remedy = "run with --dtype float32" if half else "its weights are damaged, fetch the model again"
        raise ConfigError(f"the model's predictions for sample {samples[bad[0]].id} are not finite; {remedy}.")
    return curves


def _measure_batch(lens: Lens, samples: Sequence[list[int]], metric: str) -> Floats:
    """Runs the decoder once and reads every layer at the positions that a token follows: (batch, layers)."""
    input_ids, mask = _padded(samples, cast(Any, lens.decoder).device)
    followed = mask[:, 1:].bool()
    targets = input_ids[:, 1:][followed]
    received: list[torch.Tensor] = []

    def receive(number: int, output: torch.Tensor) -> None:
        assert number == len(received), "the layers did not run once each, in order"
        hidden_states = output[:, :-1][followed]
        received.append(true_token_log_probs(lens, hidden_states, targets) if metric == "sequence" else hidden_states)

    embeds = cast(Any, lens.decoder).get_input_embeddings()(input_ids)
    with tapped(lens.family.layers(lens.decoder), receive):
        lens.family.hidden_states(lens.decoder, embeds, mask)
    statistics = torch.stack(received) if metric == "sequence" else vocabulary_divergences(lens, received)
    ends = np.cumsum([len(ids) - 1 for ids in samples])
    per_sample = np.split(statistics.double().cpu().numpy(), ends[:-1], axis=1)
    if metric == "sequence":
        return np.stack([sequence_divergences(log_probs) for log_probs in per_sample])
    return np.stack([divergences.mean(axis=1) for divergences in per_sample])


def _padded(samples: Sequence[list[int]], device: Any, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (batch, seq), padded on the right, or on the left for generation."""
    width = max(len(ids) for ids in samples)
    input_ids = torch.zeros((len(samples), width), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(samples):
        span = slice(width - len(ids), width) if left else slice(len(ids))
        input_ids[row, span] = torch.tensor(ids)
        mask[row, span] = 1
    return input_ids.to(device), mask.to(device)


def check_lens(decoder: nn.Module, family: Family, sample: TokenSample) -> None:
    """Compares the last layer seen through the lens with the model's own logits on one sample.

    Raises:
        ConfigError: they differ, so that this family's norm or head is not all that lies between layers and logits.
    """
    states: list[torch.Tensor] = []
    input_ids = torch.tensor([sample.input_ids[:64]], device=cast(Any, decoder).device)
    with torch.inference_mode(), tapped(family.layers(decoder), lambda _, output: states.append(output)):
        expected = decoder(input_ids=input_ids, use_cache=False).logits[0].float()
        seen = Lens(decoder, family).logits(states[-1][0])
    error = float((seen - expected).norm() / expected.norm())
    if not error < (1e-3 if next(decoder.parameters()).dtype == torch.float32 else 1e-2):
        raise ConfigError(
            f"the last layer through the norm and head of family '{family.name}' differs from the model's own logits "
            f"(by {error:.2g}); the family's description in zero_ds/families does not fit this model."
        )


def write(trajectory: Trajectory, out: Path) -> None:
    """Writes trajectory.json, .png and .pdf to the new folder `out`, all at once."""
    with new_folder(out) as folder:
        text = json.dumps(trajectory.to_json(), indent=1)
        (folder / "trajectory.json").write_text(text + "\n", encoding="utf-8")
        plot(trajectory, folder)


def plot(trajectory: Trajectory, folder: Path) -> None:
    """trajectory.png and trajectory.pdf in the look of Figure 3: one thin line a sample, an arrow at the transition."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves, transition = trajectory.curves, trajectory.transition
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curves.T, linewidth=0.5, alpha=max(0.15, min(0.8, 30 / len(curves))))
    axes.plot(curves.mean(axis=0), linewidth=1.2, color="black", label="mean")
    axes.set_xlabel("layer")
    axes.set_ylabel("divergence from the last layer (nats)")
    axes.set_title(f"{Path(trajectory.setting.model).name}, {len(curves)} samples, {trajectory.setting.metric} metric")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, curves.shape[1] - 1)
    axes.set_ylim(0, max(1e-3, float(np.percentile(curves.max(axis=0), 95)) * 1.25))
    if transition.layer is not None:
        sure = "" if transition.verdict == "clear" else " (uncertain)"
        text = f"transition: layer {transition.layer}{sure}\n95 %: {transition.low} to {transition.high}"
        point = (transition.layer, float(curves[:, transition.layer].max()))
        above = (transition.layer, axes.get_ylim()[1] * 0.97)
        axes.annotate(text, xy=point, xytext=above, ha="center", va="top", arrowprops={"arrowstyle": "->"})
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(folder / "trajectory.png", dpi=160)
    figure.savefig(folder / "trajectory.pdf")


def _rounded(values: Floats) -> list[float]:
    """To six significant digits."""
    return [float(f"{value:.6g}") for value in values]


def _progress(total: int, what: str, unit: str) -> Any:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "token", disable=None, dynamic_ncols=True)
