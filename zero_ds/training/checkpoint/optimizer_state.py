"""Master copies, moments and step counts of DeepSpeed's optimizers, free of the world size and the ZeRO stage.

DeepSpeed (0.19) flattens what trains into buffers, shards these over ranks, and each ZeRO stage does so in its own way.
Here a parameter's state goes out as a whole, piece by piece, and comes back as the elements that a rank holds, so that
what was saved by any number of ranks under any stage is restored by any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.zero3 import held_part, is_partitioned, parameter_shape, part_size

KEYS = ("master", "exp_avg", "exp_avg_sq")
"""What there is of each parameter, fp32: 12 bytes a parameter."""

PIECE = 2**22
"""Elements that are gathered at a time: 16 MiB."""

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class OptimizerState:
    """State of a DeepSpeed engine's optimizer around an AdamW, whose parameter groups are called by name."""

    def __init__(self, optimizer: Any, parameters: list[torch.nn.Parameter], stage: int) -> None:
        """Makes Adam's moments now, so that they can be restored before the first step.

        Otherwise DeepSpeed makes them in that step, and with ZeRO 1 and 2 it then tells the parameters of the
        first group only where theirs are, so that those of the others could not be saved.
        """
        self.optimizer = optimizer
        self.inner = getattr(optimizer, "optimizer", optimizer)
        self._masters = self._unsharded(parameters) if stage == 0 else {}
        for flats in self._flats().values():
            for flat in flats:
                if flat.numel() and not self.inner.state[flat]:  # empty: swapped out to a disk
                    moments = {key: torch.zeros_like(flat.data) for key in KEYS[1:]}
                    self.inner.state[flat] = {"step": torch.tensor(0.0), **moments}
        link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _unsharded(self, parameters: list[torch.nn.Parameter]) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Without ZeRO: parameter -> the tensor that is updated, which is itself in fp32 and a copy in bf16."""
        pairs = zip(getattr(self.optimizer, "fp16_groups", ()), getattr(self.optimizer, "fp32_groups", ()), strict=True)
        copies = {half: full for halves, fulls in pairs for half, full in zip(halves, fulls, strict=True)}
        return {parameter: copies.get(parameter, parameter) for parameter in parameters}

    def _flats(self) -> dict[str, list[torch.Tensor]]:
        """Group name -> the tensors whose state AdamW keeps for it on this rank."""
        groups = self.inner.param_groups
        flats = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)
        if flats is None:
            return {group["name"]: list(group["params"]) for group in groups}
        named: dict[str, list[torch.Tensor]] = {group["name"]: [] for group in groups}  # ZeRO 3 keeps them apart
        for index, flat in enumerate(flats):
            named[groups[self.optimizer.sub_group_to_group_id[index]]["name"]].append(flat)
        return named

    # -- what this rank holds of a parameter ---------------------------------------------------------------------------

    def span(self, parameter: torch.nn.Parameter) -> tuple[int, int]:
        """First element, and number of elements, that this rank holds of the flattened parameter, without padding."""
        size = parameter_shape(parameter).numel()
        if parameter in self._masters:  # every rank holds all of it, and rank 0 stands for them
            return (0, size) if distributed.is_rank_zero() else (0, 0)
        if is_partitioned(parameter):
            part = part_size(parameter)
            start = min(size, distributed.rank() * part)
            return start, min(part, size - start)
        mapping = cast(Any, parameter)._hp_mapping
        return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    def held(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """This rank's elements of `key` (one of KEYS): (elements,), float32, where the optimizer keeps them."""
        from deepspeed import utils as ds

        _, size = self.span(parameter)
        if parameter in self._masters:
            value = self._masters[parameter] if key == "master" else self.inner.state[self._masters[parameter]][key]
        elif is_partitioned(parameter):
            of = ds.safe_get_local_fp32_param if key == "master" else ds.safe_get_local_optimizer_state
            value = of(parameter) if key == "master" else of(parameter, key)
        else:
            mapping = cast(Any, parameter)._hp_mapping
            value = None if mapping is None else mapping.get_hp_fragment(None if key == "master" else key)
        assert value is not None or size == 0, f"DeepSpeed holds no {key} for a trained parameter"
        return torch.zeros(0) if value is None else value.detach().flatten()[:size]

    def set_held(self, parameter: torch.nn.Parameter, key: str, values: torch.Tensor) -> None:
        """Puts values (elements,) in the place of what `held` returns; without ZeRO the whole tensor, on every rank."""
        from deepspeed import utils as ds

        if parameter in self._masters:
            master = self._masters[parameter]
            with torch.no_grad():
                (master if key == "master" else self.inner.state[master][key]).copy_(values.view(master.shape))
                if key == "master":
                    parameter.copy_(master)
        elif is_partitioned(parameter):
            if held_part(parameter).numel() != part_size(parameter):
                raise ConfigError(
                    "optimizer state cannot be put back while parameters lie on a disk (DeepSpeed 0.19); resume with "
                    "zero=zero3_offload_params."
                )
            padded = torch.nn.functional.pad(values, (0, part_size(parameter) - values.numel()))
            if key == "master":
                ds.safe_set_local_fp32_param(parameter, padded)
            else:
                ds.safe_set_local_optimizer_state(parameter, padded, key)
        elif values.numel():
            self.held(parameter, key).copy_(values)

    def span_to_set(self, parameter: torch.nn.Parameter) -> tuple[int, int]:
        """The elements that `set_held` wants on this rank."""
        return (0, parameter.numel()) if parameter in self._masters else self.span(parameter)

    # -- the whole, piece by piece -------------------------------------------------------------------------------------

    def pieces(self, parameter: torch.nn.Parameter, key: str) -> Iterator[torch.Tensor]:
        """The whole flattened tensor `key` in pieces of at most PIECE elements, float32, on rank 0's CPU.

        A collective: all ranks call it in one order and run through it; only rank 0 looks at what comes. No rank holds
        more than a piece on top of its own share.
        """
        first, held = self.span(parameter)[0], self.held(parameter, key)
        total = parameter_shape(parameter).numel()
        for start in range(0, total, PIECE):
            piece = torch.zeros(min(PIECE, total - start), device=distributed.device())
            low, high = max(start, first), min(start + len(piece), first + len(held))
            if low < high:
                piece[low - start : high - start] = held[low - first : high - first]
            distributed.add_to_rank_zero(piece.view(torch.int32))  # as bits: nothing is rounded, and -0.0 stays
            yield piece.cpu()

    def whole(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """The whole tensor on rank 0, in the parameter's shape; for what is small. A collective."""
        return torch.cat(list(self.pieces(parameter, key))).view(parameter_shape(parameter))

    # -- counts --------------------------------------------------------------------------------------------------------

    def steps(self) -> dict[str, int]:
        """Adam's step count of every group, on which its bias correction depends."""
        counts = {}
        for name, flats in self._flats().items():
            states = [self.inner.state[flat] for flat in flats if flat in self.inner.state]
            counts[name] = max((int(state["step"]) for state in states if "step" in state), default=0)
        return counts

    def set_steps(self, counts: Mapping[str, int]) -> None:
        """Sets the step counts of the groups that are named."""
        for name, flats in self._flats().items():
            for flat in flats:
                state = self.inner.state.get(flat, {})
                if name in counts and "step" in state:
                    step = state["step"]
                    state["step"] = torch.full_like(step, counts[name]) if torch.is_tensor(step) else counts[name]

    def loss_scalars(self) -> dict[str, float]:
        """What of this is worth plotting."""
        return {"loss_scale": scale["cur_scale"]} if (scale := self.loss_scale()) else {}

    def loss_scale(self) -> dict[str, float]:
        """The dynamic loss scale of fp16 and what decides over its next change; empty for bf16 and fp32."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return {}
        return {key: float(getattr(scaler, key)) for key in _SCALER if hasattr(scaler, key)}

    def set_loss_scale(self, values: Mapping[str, float]) -> None:
        """Puts back what `loss_scale` returned."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        for key, value in values.items():
            if key in _SCALER and hasattr(scaler, key):
                setattr(scaler, key, type(getattr(scaler, key))(value))
