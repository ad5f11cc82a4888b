"""The prediction trajectory: which texts are read, what comes of it, and how it is written down and drawn.

Source: section 1.1 of the paper, appendices A.1 (greedy answers) and A.11; Figure 3. The measure itself is in lens.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import ChatTemplate, cut_turns
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records, Sample
from zero_ds.model.decoders.folder import text_config
from zero_ds.model.layer_plan import LayerPlan, Replaced
from zero_ds.model.loading import load_tokenizer, model_hash
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import new_folder
from zero_ds.trajectory.lens import Floats, TokenSample, batches, padded, progress
from zero_ds.trajectory.transition import Transition

logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
"""Longest sample; a longer one loses whole turns from its end."""
ANSWER_TOKENS = 128
"""Longest greedy answer."""


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


def read_samples(
    model: Path, data: Path, *, count: int, seed: int, greedy: bool = False, system_prompt: str | None = None
) -> tuple[list[TokenSample], ChatTemplate]:
    """Text samples of a data file in the words of the model's tokenizer and template (see `choose_samples`).

    Raises:
        ConfigError: no tokenizer, no chat template, token ids that the model does not have, no usable sample.
        DataError: a data file that is damaged.
    """
    config = text_config(model)
    longest = min(MAX_TOKENS, getattr(config, "max_position_embeddings", None) or MAX_TOKENS)
    tokenizer = load_tokenizer(model)
    if not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer in {model} has no chat template; give an instruction-tuned model.")
    template = ChatTemplate(tokenizer)
    encoder = SampleEncoder(template, "response", max_length=longest, system_prompt=system_prompt)
    records = Records([SourceConfig(path=str(data))])
    chosen = choose_samples(records, encoder, count=count, seed=seed, questions_only=greedy)
    largest = max(max(sample.input_ids) for sample in chosen)
    if largest >= config.vocab_size:
        raise ConfigError(
            f"the tokenizer in {model} gives token {largest}, but the model knows {config.vocab_size}; they do not "
            "belong together."
        )
    return chosen, template


def proposed_range(folder: Path, model: Path) -> str:
    """The layers, first:last, of the model in another folder that the trajectory in a folder proposes to replace.

    Raises:
        ConfigError: no trajectory there, one of another model, or one without a verdict.
    """
    path = folder / "trajectory.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measured, verdict, proposed = content["target_hash"], content["transition"]["reason"], content["proposed"]
        replace = str(proposed["replace"]) if proposed else None
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder} holds no readable trajectory.json; run `zero-ds trajectory` first.") from None
    if measured != model_hash(model, like=str(measured)):
        raise ConfigError(f"{path} was measured on another model ({content.get('model')}); measure this one.")
    if replace is None:
        raise ConfigError(f"{path} proposes no layers: {verdict} Give --replace.")
    return replace


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
        with torch.inference_mode(), progress(len(questions), "answering", "sample") as bar:
            for rows in batches([len(question.input_ids) for question in questions], batch_size):
                input_ids, mask = padded([questions[row].input_ids for row in rows], model.device, left=True)
                output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
                for place, row in enumerate(rows):
                    answer = output[place, input_ids.shape[1] :].tolist()
                    end = answer.index(stop) + 1 if stop in answer else len(answer)
                    answered[row] = TokenSample(questions[row].id, questions[row].input_ids + answer[:end])
                bar.update(len(rows))
    finally:
        model.generation_config = kept
    return [answered[row] for row in range(len(questions))]


def write(trajectory: Trajectory, out: Path) -> None:
    """Writes trajectory.json, .png and .pdf to the new folder `out`, all at once."""
    with new_folder(out) as folder:
        text = json.dumps(trajectory.to_json(), indent=1)
        (folder / "trajectory.json").write_text(text + "\n", encoding="utf-8")
        plot(trajectory, folder)


def draw_curves(axes: Any, curves: Floats) -> None:
    """One thin line a curve, and their mean: the look of Figure 3. curves: (number, layers), in nats."""
    from matplotlib.ticker import MaxNLocator

    axes.plot(curves.T, linewidth=0.5, alpha=max(0.15, min(0.8, 30 / len(curves))))
    axes.plot(curves.mean(axis=0), linewidth=1.2, color="black", label="mean")
    axes.set_xlabel("layer")
    axes.set_ylabel("divergence from the last layer (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, curves.shape[1] - 1)
    axes.set_ylim(0, max(1e-3, float(np.percentile(curves.max(axis=0), 95)) * 1.25))


def plot(trajectory: Trajectory, folder: Path) -> None:
    """trajectory.png and trajectory.pdf in the look of Figure 3: one thin line a sample, an arrow at the transition."""
    from matplotlib.figure import Figure

    curves, transition = trajectory.curves, trajectory.transition
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    draw_curves(axes, curves)
    axes.set_title(f"{Path(trajectory.setting.model).name}, {len(curves)} samples, {trajectory.setting.metric} metric")
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
