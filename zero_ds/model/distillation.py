"""Distillation of the translators from the target: an option beyond the paper, for small budgets.

The surrogate shares the target's layers before the first replaced one. The target's answer to a batch therefore costs
only its layers from there on, which are run without gradient on the surrogate's own hidden states. Only the replaced
layers are loaded; the kept ones are the surrogate's. On image batches this is on-policy: the translator is compared
with the target on exactly the features that the adapter produces now. In the encoder stage it follows
the encoder in this way, instead of being frozen as in the paper, so that what helps with the surrogate also helps with
the target.

Next-token loss on image data teaches a translator the wording of the answers, which the target does not share. So where
something before the translators trains, their layers are run a second time from detached hidden states. Losses of the
second run reach the translators only, and the first run's next-token loss can be taken back from them, while adapter
and encoder see the paper's loss.

With `distill.every: n` all of this happens in one step of n, where the target's share of the loss counts n times, so
that the mean gradient stays the same. In the other steps the surrogate runs once, as without distillation, and the
gradient that its next-token loss gives to the translators is scaled to their share of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zero_ds.config.schema import DistillConfig
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.losses import (
    Places,
    Predictions,
    hidden_distillation_sum,
    logit_distillation_sum,
    next_token_losses,
    supervised,
    weighted_sum,
)
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.zero3 import gathered, is_partitioned, zero_init


@dataclass
class SurrogateTrace:
    """Hidden states and arguments that were recorded in one forward pass of the surrogate."""

    entered: torch.Tensor | None = None
    """Hidden states before the first translator, detached: (batch, seq, hidden)."""
    learns_before: bool = False
    """True if those hidden states have a gradient, that is, if something before the translators trains."""
    left: dict[int, torch.Tensor] = field(default_factory=dict)
    """Hidden states after each translator, by its layer number in the surrogate: (batch, seq, hidden)."""
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other arguments of the decoder layers (mask, positions), by attention type."""


class Teacher(nn.Module):
    """The target's layers from the first replaced one on.

    The replaced layers belong to this module; those that the surrogate kept are shared with it and are not parameters
    of this module.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        target: DecoderFolder | Path,
        weights: DistillConfig,
        dtype: torch.dtype,
    ) -> None:
        """Loads the replaced layers. model: a surrogate; target: folder of the model it was cut from."""
        super().__init__()
        assert model.plan is not None, "only a surrogate has translators to distil"
        target = DecoderFolder.of(target)
        self.weights = weights
        self.plan = model.plan
        self.family = model.family
        own = _load_layers(model, target, self.plan.dropped, dtype)
        self.replaced = nn.ModuleDict({str(layer): module for layer, module in own.items()})
        surrogate_layers = self.family.layers(model.decoder)
        shared = {source: surrogate_layers[number] for number, source in self.plan.kept.items()}
        # in a plain dict, because shared layers must not become parameters of this module
        self._layers: dict[int, nn.Module] = {
            layer: own[layer] if layer in own else shared[layer] for layer in self.plan.target_late
        }
        self._target_types = _layer_types(target.text_config(), self.plan.depth)
        self._surrogate_types = [self._target_types[source] for source in self.plan.sources]
        self.requires_grad_(False).eval()
        self.step = 0
        """Number of the optimizer step, 0, 1, ..."""
        if weights.every > 1:
            for translator in model.translators():
                for parameter in translator.parameters():
                    parameter.register_hook(self._scaled)

    def begin(self, step: int) -> None:
        """Takes note of the optimizer step that follows."""
        self.step = step

    @property
    def is_due(self) -> bool:
        """True if the target's layers run in this step."""
        return self.step % self.weights.every == 0

    def _scaled(self, gradient: torch.Tensor) -> torch.Tensor:
        """Scales the gradient of a translator to its share of the next-token loss, in steps without the target."""
        return gradient if self.is_due else gradient * self.weights.next_token

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @contextmanager
    def watch(self, model: VisionLanguageModel) -> Iterator[SurrogateTrace]:
        """Yields a trace that a forward pass of `model` inside the context fills in."""
        trace, first = SurrogateTrace(), self.plan.late.start
        if not self.is_due:
            yield trace
            return

        def before(index: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                trace.arguments[self._surrogate_types[index]] = others
                if index == first:
                    hidden = args[0] if args else kwargs["hidden_states"]
                    trace.entered, trace.learns_before = hidden.detach(), hidden.requires_grad

            return hook

        def after(index: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                trace.left[index] = _hidden(output)

            return hook

        layers = self.family.layers(model.decoder)
        handles = [
            layer.register_forward_pre_hook(before(index), with_kwargs=True) for index, layer in enumerate(layers)
        ]
        handles += [layers[index].register_forward_hook(after(index)) for index in self.plan.translators]
        try:
            yield trace
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, model: VisionLanguageModel, trace: SurrogateTrace, predictions: Predictions) -> torch.Tensor:
        """Returns what distillation adds to the loss of a forward pass: float32 scalar.

        The result is the weighted sum of the distillation losses and, if `next_token` is less than 1, a term without
        value whose gradient takes back the translators' share of the next-token loss, and reaches nothing before them.
        In the hidden term every position counts like a supervised token. In steps in which the target does not run, the
        result is zero.
        """
        if not self.is_due:
            return predictions.tokens.new_zeros(())
        assert trace.entered is not None, "the surrogate's forward pass was not watched"
        rows = predictions.rows
        outputs, logits, tokens = trace.left, predictions.logits, predictions.tokens
        if trace.learns_before:
            outputs, logits = self._second_run(model, trace, rows)
            tokens = next_token_losses(logits, predictions.labels, rows)
        chosen = self._chosen(predictions)
        goals, goal_logits = self._target_run(model, trace, (rows[0][chosen], rows[1][chosen]))

        taken_back = weighted_sum(tokens, rows, predictions.token_weights)
        total = (self.weights.next_token - 1.0) * (taken_back - taken_back.detach())  # a gradient without a value
        every = self.weights.every
        if self.weights.logits:
            weight = every * self.weights.logits / self.weights.positions
            total = total + weight * logit_distillation_sum(logits[chosen], goal_logits)
        if self.weights.hidden:
            mask = predictions.hidden_mask()
            for number, index in enumerate(self.plan.translators):
                _, last = self.plan.replaced_by(number)
                error = hidden_distillation_sum(outputs[index], goals[last], mask)
                total = total + every * self.weights.hidden * error
        return total

    def _chosen(self, predictions: Predictions) -> torch.Tensor | slice:
        """Returns which of the n supervised tokens `logits` is computed at: (n,), bool; all of them with share 1.

        The choice is a hash of step, token and position in the sample, so it does not depend on how samples are split
        over micro-batches and ranks, nor on a resume.
        """
        if self.weights.positions == 1:
            return slice(None)
        row, column = predictions.rows
        if predictions.position_ids is not None:
            column = predictions.position_ids[row, column]
        mixed = column * 1_000_003 + supervised(predictions.labels, predictions.rows) * 8_191 + self.step * 7_919
        for factor in (2_654_435_761, 2_246_822_519):
            mixed = (mixed * factor) & 0xFFFFFFFF
            mixed = mixed ^ (mixed >> 15)
        return (mixed & 0xFFFF) < round(self.weights.positions * 0x10000)

    def _second_run(
        self, model: VisionLanguageModel, trace: SurrogateTrace, rows: Places
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Runs the surrogate again from the detached hidden states before the first translator.

        Returns the hidden states after each translator, by its number, and the logits at `rows`.
        """
        hidden = cast(torch.Tensor, trace.entered)
        layers = self.family.layers(model.decoder)
        translators = self.plan.translators
        outputs = {}
        for index in self.plan.late:
            hidden = _run(layers[index], hidden, trace.arguments[self._surrogate_types[index]])
            if index in translators:
                outputs[index] = hidden
        return outputs, model.logits(self.family.norm(model.decoder)(hidden[rows]))

    @torch.no_grad()
    def _target_run(
        self, model: VisionLanguageModel, trace: SurrogateTrace, rows: Places
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Runs the target's late layers from the surrogate's hidden states.

        Returns the hidden states after each of these layers, by its number in the target, and the logits at `rows`.

        Raises:
            ConfigError: the surrogate kept no layer of an attention type that the target has.
        """
        hidden = cast(torch.Tensor, trace.entered)
        outputs = {}
        for layer, module in self._layers.items():
            kind = self._target_types[layer]
            if kind not in trace.arguments:
                raise ConfigError(f"distillation needs a layer of attention type {kind} in the surrogate; keep one.")
            hidden = _run(module, hidden, trace.arguments[kind])
            outputs[layer] = hidden
        return outputs, model.logits(self.family.norm(model.decoder)(hidden[rows]))


def _layer_types(config: Any, depth: int) -> list[str]:
    """Returns the type of every layer, by which its class chooses the mask and the positions that it passes on."""
    for name in ("layer_types", "layers_block_type", "layer_block_types"):
        listed = getattr(config, name, None)
        if isinstance(listed, list) and len(listed) == depth:
            return list(listed)
    return ["full_attention"] * depth


def _run(layer: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    return _hidden(layer(hidden, **arguments))


def _hidden(output: Any) -> torch.Tensor:
    """Returns the hidden states from a layer's output, which some library versions wrap in a tuple."""
    return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)


def _load_layers(
    model: VisionLanguageModel, target: DecoderFolder, numbers: Iterable[int], dtype: torch.dtype
) -> dict[int, nn.Module]:
    """Loads layers of the target, tensor by tensor, into new modules, which are partitioned under ZeRO-3."""
    config = target.text_config()
    for name in ("_attn_implementation", "_experts_implementation"):
        if hasattr(own := cast(Any, model.decoder).config, name):
            setattr(config, name, getattr(own, name))
    if target.is_registered:
        kinds = [type(model.family.layers(model.decoder)[0])] * target.depth
    else:
        kinds = [type(layer) for layer in target.family.layers(target.on_meta())]
    layers: dict[int, nn.Module] = {}
    for number in numbers:
        with zero_init():
            layer = cast(Any, kinds[number])(config, number)
        if not any(is_partitioned(p) for p in layer.parameters()):
            layer.to(dtype)
        for name, parameter in layer.named_parameters():
            value = target.class_tensor(f"{model.family.layer_prefix}{number}.{name}")
            with gathered([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(value.to(dtype))
        layers[number] = layer
    return layers
