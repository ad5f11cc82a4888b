"""Wraps a DeepSpeed engine: the only file that calls deepspeed.initialize."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from zero_ds.config.schema import RunConfig
from zero_ds.data.batches import Batch
from zero_ds.data.samples import image_positions
from zero_ds.model.attention import Sequences, is_flash
from zero_ds.model.losses import length_classes, sums_by_length, sums_by_source, supervised_rows
from zero_ds.model.vlm import Known, VisionLanguageModel
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.zero3 import (
    is_always_whole,
    keep_frozen_whole_,
    layers_as_leaves_,
    parameter_shape,
    without_leaf_classes,
    without_prefetch_from_disk_,
)
from zero_ds.training.checkpoint.optimizer_state import OptimizerState
from zero_ds.training.options import compilation
from zero_ds.training.profile import phase
from zero_ds.training.stages import VISION, Part, learning_rate

logger = logging.getLogger(__name__)


def schedule(config: RunConfig, total_steps: int) -> Callable[[int], float]:
    """Returns the function from step 0, 1, ... to a factor of the peak rate.

    The factor rises linearly over `warmup_ratio` of the steps and then falls to zero along a cosine.
    """
    warmup = math.ceil(config.optimizer.warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

    return factor


PATIENCE = 20
"""Number of steps within which every trained part must have had a gradient; for `VISION`, steps with an image."""


@dataclass(frozen=True)
class StepResult:
    """A rank's knowledge about a step it took part in."""

    share: float
    """The rank's share of the loss; the sum over ranks is the mean over the supervised tokens of the global batch."""
    grad_norm: float
    """2-norm of the whole gradient before clipping."""
    by_length: torch.Tensor
    """Sum of the rank's next-token loss and number of its tokens, by length of the response: (classes, 2)."""
    by_source: torch.Tensor
    """Both sums by the source of the sample: (sources, 2)."""
    terms: dict[str, float]
    """The rank's share of each term that the recipe adds to the loss, before it is weighted, by name."""


class Engine:
    """A DeepSpeed engine with this project's loss scaling, schedule and parameter names."""

    def __init__(
        self,
        config: RunConfig,
        model: VisionLanguageModel,
        groups: dict[Part, list[tuple[str, torch.nn.Parameter]]],
        total_steps: int,
        ds: dict[str, Any],
    ) -> None:
        import deepspeed

        self.config = config
        self.named: dict[str, torch.nn.Parameter] = {n: p for group in groups.values() for n, p in group}
        self.parts = {part: [name for name, _ in group] for part, group in groups.items()}
        self.rates = {part: learning_rate(config, part) for part in groups}
        self.factor = schedule(config, total_steps)
        self.world_size = distributed.world_size()
        optimizer = torch.optim.AdamW(
            # each step sets its rates; without ZeRO, DeepSpeed makes one of its own in bf16, which must change nothing
            [{"params": [p for _, p in group], "lr": 0.0, "name": part} for part, group in groups.items()],
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,  # one pass over memory instead of a dozen; 9 times faster on a CPU
        )
        layers = list(model.family.layers(model.decoder))
        if ds["zero_optimization"]["stage"] == 3:
            # a trained layer can be a unit only where its input has a gradient, that is, where the embeddings train
            embeddings_train = cast(Any, model.decoder).get_input_embeddings().weight.requires_grad
            run_twice = model.teacher is not None
            layers = layers_as_leaves_(model, layers, trained=config.compile and embeddings_train, run_twice=run_twice)
            ds = without_leaf_classes(ds) if run_twice else ds
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
        without_prefetch_from_disk_(self.optimizer)
        self.model = model
        self.stage = ds["zero_optimization"]["stage"]
        self.scaled = bool(ds["fp16"]["enabled"])
        self.accumulation = ds["gradient_accumulation_steps"]
        # of parameters without a gradient, DeepSpeed would read from a disk what an earlier step has left there
        on_disk = bool(getattr(self.optimizer, "swap_optimizer", False))
        self.short_backward = (
            config.short_backward and model.teacher is None and self._gathers_nothing() and not on_disk
        )
        self._unseen: dict[Part, int] = dict.fromkeys(groups, 0)
        keep_frozen_whole_(self.optimizer, model)
        if config.compile:
            self._compile(layers)
        self.state = OptimizerState(self.optimizer, list(self.named.values()), self.stage)

    def learning_rates(self, step: int) -> dict[str, float]:
        """Returns the learning rate of every trained part in step 0, 1, ..., as `learning_rate/PART`."""
        return {f"learning_rate/{part}": rate * self.factor(step) for part, rate in self.rates.items()}

    def step(self, batches: list[Batch], step: int, supervised_tokens: float, images: float = 1.0) -> StepResult:
        """Makes one optimizer step over the rank's micro-batches.

        `supervised_tokens` counts the tokens with loss in the GLOBAL batch. DeepSpeed divides by accumulation steps and
        averages over ranks; both are multiplied back, so that the gradient is that of the global token mean however the
        batch is split. `images` counts those of the global batch.

        Raises:
            FloatingPointError: the loss is not finite, naming the samples, or the gradient is not; this step has
                updated nothing.
            ConfigError: a part that should train has no gradient.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates.values(), strict=True):
            group["lr"] = rate * self.factor(step)
        if self.model.teacher is not None:
            self.model.teacher.begin(step)
        norm, share = 0.0, 0.0
        shares: list[torch.Tensor] = []
        tokens: list[torch.Tensor] = []
        terms: list[torch.Tensor] = []
        for number, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(number + 1 == len(batches))  # the number of passes may vary
            with phase("inputs"):
                inputs = self._inputs(batch)
            with phase("forward"):
                outcome = self.engine(**inputs, text_only=self.short_backward and images == 0)
            loss = outcome.total / max(1.0, supervised_tokens)
            shares.append(loss.detach())
            tokens.append(outcome.tokens)
            if outcome.terms is not None:
                terms.append(outcome.terms / max(1.0, supervised_tokens))
            with phase("backward"):
                self.engine.backward(loss * (self.accumulation * self.world_size))
            if self.engine.is_gradient_accumulation_boundary():
                # losses are read only now: a GPU has work queued while the host waits for numbers
                share = self._finite_sum(shares, batches, step)
                norm = self._unsharded_norm()
                self._look_for_gradients(images > 0)
                if not math.isfinite(norm):
                    self._refuse_gradient(step)
            with phase("update"):
                self.engine.step()
        if self.stage:
            norm = float(self.engine.get_global_grad_norm() or 0.0)
            if not math.isfinite(norm) and not self.scaled:  # DeepSpeed skips such a step silently
                self._refuse_gradient(step)
        by_length = torch.zeros(len(length_classes()), 2, dtype=torch.float64)
        by_source = torch.zeros(len(self.config.data.sources), 2, dtype=torch.float64)
        for of_batch, batch in zip(tokens, batches, strict=True):
            losses = of_batch.cpu()
            by_length += sums_by_length(losses, batch.labels, batch.responses)
            if len(by_source) > 1:
                by_source += sums_by_source(losses, batch, len(by_source))
        values = torch.stack(terms).sum(0).tolist() if terms else []
        return StepResult(share, norm, by_length, by_source, dict(zip(self.config.losses, values, strict=True)))

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the arguments of the forward pass on the device, with positions that it would have to ask it for."""
        device = self.engine.device
        inputs: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in batch.inputs().items()}
        places = (supervised_rows(batch.labels), image_positions(batch.input_ids).nonzero(as_tuple=True))
        rows, images = (tuple(index.to(device, non_blocking=True) for index in indices) for indices in places)
        sequences = None
        if is_flash(cast(Any, self.model.decoder).config._attn_implementation):
            bounds = batch.sequence_bounds()
            sequences = Sequences(bounds.to(device, non_blocking=True), int(bounds.diff().max()))
        inputs["known"] = Known(rows, images, sequences)
        return inputs

    @staticmethod
    def _finite_sum(shares: list[torch.Tensor], batches: list[Batch], step: int) -> float:
        """Returns the rank's share of the loss.

        Raises:
            FloatingPointError: as `step`.
        """
        values: list[float] = torch.stack(shares).tolist()
        for value, batch in zip(values, batches, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss of step {step + 1} is {value}; samples: {', '.join(batch.ids)}. Nothing was updated."
                )
        return sum(values)

    def _gathers_nothing(self) -> bool:
        """Returns whether every parameter is whole on every rank.

        Where ZeRO-3 gathers, it does so ahead of use, in the order of the previous step. A backward pass that ends
        earlier than the previous one would leave a gather unanswered.
        """
        return self.stage < 3 or all(is_always_whole(p) for p in self.model.parameters())

    def _compile(self, layers: list[torch.nn.Module]) -> None:
        """Compiles decoder layers that have no hooks of DeepSpeed inside.

        Raises:
            ConfigError: `layers` is empty, or ZeRO-3 gathers parameters, which compiled code would keep until its
                backward pass.
        """
        if not layers:
            raise ConfigError("compile=true finds no decoder layer without ZeRO-3's hooks inside; set zero=zero2.")
        if not self._gathers_nothing():
            raise ConfigError(
                "compile=true would keep all that ZeRO-3 gathers; set zero=zero3_resident or zero=zero2, where "
                "parameters are whole on every rank, or compile=false."
            )
        compilation.compile_(layers)
        count = len(self.model.family.layers(self.model.decoder))
        logger.info("%d of %d decoder layers are compiled when they first run (half a minute)", len(layers), count)

    def _refuse_gradient(self, step: int) -> None:
        distributed.barrier()  # a rank whose loss is not finite never gets here, so that its message is the one shown
        raise FloatingPointError(
            f"the gradient of step {step + 1} is not finite, though the loss is; the step was not made. Lower the "
            "learning rate, or try precision=fp32."
        )

    def _look_for_gradients(self, images: bool) -> None:
        """Checks which parts have a gradient, until all had one. A collective.

        A library's new default, a hook or a rename can silently cut a part off, and the loss still falls.

        images: whether the global batch has any; without, the parts in `VISION` have no gradient.

        Raises:
            ConfigError: a part had no gradient in `PATIENCE` steps.
        """
        from deepspeed.utils import safe_get_full_grad

        for part in list(self._unseen):
            if not images and part in VISION:
                continue
            small_first = sorted((self.named[name] for name in self.parts[part]), key=_size)
            for parameter in small_first:
                gradient = parameter.grad if self.stage == 0 else safe_get_full_grad(parameter)
                if gradient is not None and bool(gradient.any()):
                    del self._unseen[part]
                    break
            else:
                self._unseen[part] += 1
                if self._unseen[part] == PATIENCE:
                    raise ConfigError(
                        f"the {part} had no gradient in {PATIENCE} steps, so it does not train; something between it "
                        "and the loss cuts it off: look at the versions of libraries, and at your last changes."
                    )

    def _unsharded_norm(self) -> float:
        """Returns the gradient's norm before clipping where no ZeRO optimizer knows it, else 0."""
        if self.stage:
            return 0.0
        norms = [torch.linalg.vector_norm(p.grad.float()) for p in self.named.values() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _size(parameter: torch.nn.Parameter) -> int:
    return parameter_shape(parameter).numel()
