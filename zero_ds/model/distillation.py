"""Distillation of the translators from the target: an option beyond the paper, for small budgets.

The surrogate shares the target's layers before the first replaced one, so the target's answer to a batch costs only its
layers from there on, run without gradient from the surrogate's own hidden states. Only the replaced layers are loaded;
the kept ones are the surrogate's. On image batches this is on-policy: the translator is held to what the target would
do with exactly the features that the adapter produces now. In the encoder stage it so follows the encoder, instead of
being frozen as the paper's is: what helps against the surrogate then helps against the target.

Next-token loss on image data teaches a translator the wording of the answers, which the target then lacks. So where
something before the translators trains, their layers are run a second time from detached hidden states: what the second
run learns reaches the translators only, what the first run teaches the translators can be taken back, and adapter and
encoder see the paper's loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zero_ds.config.schema import DistillConfig
from zero_ds.model.decoders.folder import decoder_tensors, text_config
from zero_ds.model.losses import (
    Places,
    hidden_distillation_sum,
    logit_distillation_sum,
    next_token_losses,
    weighted_sum,
)
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.zero3 import gathered, zero_init


class Teacher(nn.Module):
    """The target's layers from the first replaced one on; those that the surrogate kept are borrowed, not owned."""

    def __init__(self, model: VisionLanguageModel, target: Path, weights: DistillConfig, dtype: torch.dtype) -> None:
        super().__init__()
        assert model.plan is not None, "only a surrogate has translators to distil"
        self.weights = weights
        self.plan = model.plan
        self.family = model.family
        decoder_layers = model.family.layers(model.decoder)
        own = _load_layers(model, target, self.plan.dropped, dtype)
        self.replaced = nn.ModuleDict({str(layer): module for layer, module in own.items()})
        borrowed = {source: decoder_layers[number] for number, source in self.plan.kept.items()}
        first = self.plan.replaced[0].first
        # a plain list: borrowed layers must not become parameters of this module
        self._stream = [own.get(layer) or borrowed[layer] for layer in range(first, self.plan.depth)]
        types = list(getattr(text_config(target), "layer_types", None) or ["full_attention"] * self.plan.depth)
        self._types = [types[layer] for layer in range(first, self.plan.depth)]
        self._student_types = [types[source] for source, _ in self.plan.layers]
        self._first = first
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @contextmanager
    def watch(self, model: VisionLanguageModel) -> Iterator[Watched]:
        """Notes in a forward pass what enters and leaves translators, and every layer's other arguments."""
        watched = Watched()
        first = self.plan.translators[0]

        def entering(index: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                watched.arguments[self._student_types[index]] = {
                    k: v for k, v in kwargs.items() if k != "hidden_states"
                }
                if index == first:
                    hidden = args[0] if args else kwargs["hidden_states"]
                    watched.entered, watched.learns_before = hidden.detach(), hidden.requires_grad

            return hook

        def leaving(index: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                watched.left[index] = _hidden(output)

            return hook

        layers = model.family.layers(model.decoder)
        handles = [
            layer.register_forward_pre_hook(entering(index), with_kwargs=True) for index, layer in enumerate(layers)
        ]
        handles += [layers[index].register_forward_hook(leaving(index)) for index in self.plan.translators]
        try:
            yield watched
        finally:
            for handle in handles:
                handle.remove()

    def loss(
        self,
        model: VisionLanguageModel,
        watched: Watched,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        rows: Places,
        attention_mask: torch.Tensor,
        token_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What is added to the next-token loss, summed over supervised tokens (float32 scalar).

        logits, tokens: (n, vocabulary) and (n,), the forward pass's own scores and cross-entropies at the n positions
        that predict a label, which `rows` names; labels, attention_mask, token_weights: (batch, seq), as
        the forward pass got them. Adds the weighted distillation losses and, as far as `next_token` < 1, takes back the
        translators' share of the next-token loss: its gradient to them, without any to what lies before them, and
        without value. In the hidden term every position counts like a supervised token.
        """
        assert watched.entered is not None, "the surrogate's forward pass was not watched"
        outputs, student_logits = watched.left, logits
        norm = self.family.norm(model.decoder)
        if watched.learns_before:
            layers = list(model.family.layers(model.decoder))
            hidden, outputs = watched.entered, {}
            for index in range(self.plan.translators[0], len(layers)):
                hidden = _run(layers[index], hidden, watched.arguments[self._student_types[index]])
                if index in self.plan.translators:
                    outputs[index] = hidden
            student_logits = model.logits(norm(hidden[rows]))
            tokens = next_token_losses(student_logits, labels, rows)

        with torch.no_grad():
            hidden = watched.entered
            goals: dict[int, torch.Tensor] = {}
            for layer, kind in enumerate(self._types, start=self._first):
                if kind not in watched.arguments:
                    raise ConfigError(
                        f"distillation needs a layer of attention type {kind} in the surrogate; keep one."
                    )
                hidden = _run(self._stream[layer - self._first], hidden, watched.arguments[kind])
                goals[layer] = hidden
            goal_logits = model.logits(norm(hidden[rows]))

        taken_back = weighted_sum(tokens, rows, token_weights)
        total = (self.weights.next_token - 1.0) * (taken_back - taken_back.detach())  # a gradient, no value
        if self.weights.logits:
            total = total + self.weights.logits * logit_distillation_sum(student_logits, goal_logits)
        if self.weights.hidden:
            for number, index in enumerate(self.plan.translators):
                goal = goals[self.plan.replaced_by(number)[1]]
                total = total + self.weights.hidden * hidden_distillation_sum(outputs[index], goal, attention_mask)
        return total


@dataclass
class Watched:
    """What one forward pass of the surrogate showed."""

    entered: torch.Tensor | None = None
    """Hidden states before the first translator, detached: (batch, seq, hidden)."""
    learns_before: bool = False
    """Whether they had a gradient, that is, whether something before the translators trains."""
    left: dict[int, torch.Tensor] = field(default_factory=dict)
    """Hidden states behind each translator, by its number in the surrogate: (batch, seq, hidden)."""
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The decoder layers' other arguments (mask, positions), by attention type."""


def _run(layer: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    return _hidden(layer(hidden, **arguments))


def _hidden(output: Any) -> torch.Tensor:
    return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)


def _load_layers(
    model: VisionLanguageModel, target: Path, numbers: list[int], dtype: torch.dtype
) -> dict[int, nn.Module]:
    """The target's layers of these numbers, read tensor by tensor into new modules (partitions under ZeRO-3)."""
    from safetensors import safe_open

    config = text_config(target)
    config._attn_implementation = cast(Any, model.decoder).config._attn_implementation
    kind = type(model.family.layers(model.decoder)[0])
    tensors = decoder_tensors(target)
    layers: dict[int, nn.Module] = {}
    for number in numbers:
        with zero_init():
            layer = cast(Any, kind)(config, number)
        if not any(hasattr(p, "ds_id") for p in layer.parameters()):
            layer.to(dtype)
        for name, parameter in layer.named_parameters():
            stored = tensors[f"{model.family.layer_prefix}{number}.{name}"]
            with (
                safe_open(stored.file, framework="pt") as file,
                gathered([parameter], modifier_rank=0),
                torch.no_grad(),
            ):
                parameter.copy_(file.get_tensor(stored.name).to(dtype))
        layers[number] = layer
    return layers
