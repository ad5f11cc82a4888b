"""The part of a surrogate that has to run where hidden states before its translators are known: its late layers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zero_ds.model.decoders.cut import fed
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.layer_plan import LayerPlan
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.lens import tapped, with_bias
from zero_ds.trajectory.streaming import LayerFiles


class Student(nn.Module):
    """Translators, kept layers after the first of them, final norm and output head of a surrogate.

    The layers before the first translator are not loaded. Only the translators train.
    """

    def __init__(self, surrogate: DecoderFolder | Path, dtype: torch.dtype, device: torch.device) -> None:
        """Loads the late layers from a surrogate's folder.

        Raises:
            ConfigError: the folder is not a surrogate, or its weights are damaged.
        """
        super().__init__()
        folder = DecoderFolder.of(surrogate)
        if folder.plan is None:
            raise ConfigError(f"{folder} is not a surrogate; build one with `zero-ds surrogate`, or give --replace.")
        self.files = LayerFiles.of(folder, dtype, device)
        self.plan: LayerPlan = folder.plan
        self.model: Any = self.files.skeleton
        for layer in self.plan.late:
            self.files.put_in_(layer)
        head = self.files.read(self.files.head())
        self.head_bias = self.files.family.head_bias
        if self.head_bias:
            head = with_bias(head, self.files.read(self.files.family.head.removesuffix("weight") + "bias"))
        self.register_buffer("head", head, persistent=False)
        self.requires_grad_(False)
        layers = self.files.family.layers(self.model)
        self.trained: dict[str, nn.Parameter] = {}
        """Parameters of the translators by their names in weights files."""
        for number, layer in enumerate(self.plan.translators):
            for name, parameter in layers[layer].named_parameters():
                parameter.requires_grad_(True)
                self.trained[f"translator.{number}.{name}"] = parameter

    def train(self, mode: bool = True) -> Student:
        """Stays in evaluation mode, whatever `mode` is: nothing is dropped at random."""
        return super().train(False)

    @property
    def goals(self) -> list[int]:
        """Number of the target's layers after whose run each translator should give what the target gives."""
        return [self.plan.replaced_by(number)[1] + 1 for number in range(len(self.plan.translators))]

    @property
    def wanted(self) -> list[int]:
        """Numbers of the target's layers after which hidden states are needed: before the translators, at their goals,
        and after the last layer."""
        return sorted({self.plan.first_replaced, *self.goals, self.plan.depth})

    def forward(self, entered: torch.Tensor, mask: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Runs the late layers.

        entered: hidden states before the first translator, (batch, seq, hidden); mask: (batch, seq), 1 at tokens.

        Returns the hidden states after each translator, and those after the final norm: (batch, seq, hidden) each.
        """
        layers, first = self.files.family.layers(self.model), self.plan.first_replaced
        outputs: list[torch.Tensor] = []
        translators = nn.ModuleList([layers[number] for number in self.plan.translators])
        # steps of a class before its first layer, such as scaling the embeddings, must not happen again
        replaced = fed(layers[first], entered) if first else nullcontext()
        with tapped(translators, lambda _, output: outputs.append(output)), replaced:
            output = self.model(inputs_embeds=entered, attention_mask=mask, use_cache=False)
        return outputs, cast(torch.Tensor, output.last_hidden_state)

    def norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the final norm, as the target does after its last layer."""
        return cast(torch.Tensor, self.files.family.norm(self.model)(hidden_states))

    def scores(self, normed: torch.Tensor) -> torch.Tensor:
        """Returns logits of final-normed states: (rows, hidden) -> (rows, vocabulary)."""
        if self.head_bias:
            normed = torch.cat([normed, torch.ones_like(normed[..., :1])], dim=-1)
        return self.files.family.capped(self.files.config, normed @ cast(torch.Tensor, self.head).T)

    @torch.no_grad()
    def load_(self, weights: dict[str, torch.Tensor]) -> None:
        """Copies translators from a weights file of the same surrogate.

        Raises:
            ConfigError: a translator is missing in it, or has another shape.
        """
        for name, parameter in self.trained.items():
            value = weights.get(name)
            if value is None or value.shape != parameter.shape:
                raise ConfigError(
                    f"init_from holds no {name} of shape {tuple(parameter.shape)}; name a run of this surrogate."
                )
            parameter.copy_(value)
