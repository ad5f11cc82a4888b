"""Measures the trajectory of a model that is in memory as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from zero_ds.model.decoders import Family
from zero_ds.trajectory.batching import batches, padded, progress, readings
from zero_ds.trajectory.curves import check_finite
from zero_ds.trajectory.lens import FinalLayer, ResidentLens, tapped
from zero_ds.trajectory.metrics import Metric
from zero_ds.trajectory.texts import TokenSample
from zero_ds.trajectory.transition import Floats


def measure_resident(
    decoder: nn.Module, family: Family, samples: Sequence[TokenSample], *, metric: Metric, batch_size: int
) -> Floats:
    """Returns how far every layer's prediction is from the last layer's, (samples, layers), in the metric's unit.

    Raises:
        ConfigError: the model computes something other than finite numbers in its precision.
    """
    lens = ResidentLens(decoder, family)
    curves = np.empty((len(samples), len(family.layers(decoder))))
    lengths = [len(sample.input_ids) for sample in samples]
    with torch.inference_mode(), progress(sum(lengths), "measuring", "token") as bar:
        for rows in batches(lengths, batch_size):
            curves[rows] = _measure_batch(lens, [samples[row].input_ids for row in rows], metric)
            bar.update(sum(lengths[row] for row in rows))
    check_finite(curves, samples, next(decoder.parameters()).dtype)
    return curves


def _measure_batch(lens: ResidentLens, samples: Sequence[list[int]], metric: Metric) -> Floats:
    """Runs the decoder once and reads every layer at the positions that have a next token: (batch, layers)."""
    input_ids, mask = padded(samples, cast(Any, lens.decoder).device)
    valid = mask.bool()
    own, reading = readings(samples)
    targets = input_ids[valid].roll(-1)[own]
    states: list[torch.Tensor] = []
    numbers: list[torch.Tensor] = []

    def receive(number: int, output: torch.Tensor) -> None:
        assert number == len(states) + len(numbers), "the layers did not run once each, in order"
        hidden_states = output[valid][own]
        if metric.needs_final_layer:
            states.append(hidden_states)
        else:
            numbers.append(metric.read(lens, hidden_states, targets, None))

    embeddings = cast(Any, lens.decoder).get_input_embeddings()(input_ids)
    with tapped(lens.family.layers(lens.decoder), receive):
        lens.family.hidden_states(lens.decoder, embeddings, mask)
    if metric.needs_final_layer:
        normed = lens.norm(states[-1])
        final = FinalLayer(normed, lens.normalizer(normed))
        numbers = [metric.read(lens, hidden_states, targets, final) for hidden_states in states[:-1]]
        numbers.append(torch.zeros_like(final.normalizer))
    return metric.curves(torch.stack(numbers)[:, reading], [len(ids) for ids in samples])


def last_states_resident(
    decoder: nn.Module, family: Family, texts: Sequence[list[int]], *, batch_size: int
) -> list[torch.Tensor]:
    """Returns every layer's hidden states at the last tokens of texts: (texts, hidden) each, on the CPU."""
    layers = family.layers(decoder)
    width = cast(Any, decoder).config.get_text_config().hidden_size
    found = [torch.empty(len(texts), width) for _ in layers]
    with torch.inference_mode(), progress(sum(map(len, texts)), "looking up", "token") as bar:
        for rows in batches([len(text) for text in texts], batch_size):
            input_ids, mask = padded([texts[row] for row in rows], cast(Any, decoder).device)
            ends = mask.sum(1) - 1

            def receive(number: int, output: torch.Tensor, rows: list[int] = rows, ends: torch.Tensor = ends) -> None:
                found[number][rows] = output[torch.arange(len(rows), device=output.device), ends].float().cpu()

            with tapped(layers, receive):
                family.hidden_states(decoder, cast(Any, decoder).get_input_embeddings()(input_ids), mask)
            bar.update(int(mask.sum()))
    return found
