"""Master copies, moments and step counts of DeepSpeed's optimizers, free of the world size and the ZeRO stage.

DeepSpeed (0.19) flattens what trains into buffers, shards these over ranks, and each ZeRO stage does so in its own way.
Here a parameter's state is read and written whole, one tensor at a time, so that what was saved by any number of ranks
under any stage is restored by any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from zero_ds import distributed

KEYS = ("master", "exp_avg", "exp_avg_sq")
"""What there is of each parameter, fp32: 12 bytes a parameter."""

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

    # -- one tensor of one parameter; collectives: all ranks call them in one order ------------------------------------

    def get(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """The whole tensor `key` (one of KEYS) of a parameter, float32, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if parameter in self._masters:
            master = self._masters[parameter]
            value = master.detach().clone() if key == "master" else self.inner.state[master][key]
        elif key == "master":
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, key)
        assert value is not None, f"DeepSpeed holds no {key} for a trained parameter"
        return value.detach().float().cpu()

    def put(self, parameter: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Puts back what `get` returned."""
        from deepspeed import utils as ds

        value = value.view(parameter_shape(parameter))
        if parameter in self._masters:
            master = self._masters[parameter]
            with torch.no_grad():
                (master if key == "master" else self.inner.state[master][key]).copy_(value)
                if key == "master":
                    parameter.copy_(master)
        elif hasattr(parameter, "ds_id"):
            # not by the function for whole tensors, which fails where the ranks do not divide a parameter's size
            own = _partition(value, cast(Any, parameter).ds_tensor.numel())
            if key == "master":
                ds.safe_set_local_fp32_param(parameter, own)
            else:
                ds.safe_set_local_optimizer_state(parameter, own, key)
        elif key == "master":
            ds.safe_set_full_fp32_param(parameter, value)
        else:
            ds.safe_set_full_optimizer_state(parameter, value, key)

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


def _partition(value: torch.Tensor, size: int) -> torch.Tensor:
    """This rank's `size` elements of a tensor that ZeRO-3 cuts evenly, with zeros behind its end."""
    own = value.flatten()[distributed.rank() * size :][:size]
    return torch.nn.functional.pad(own, (0, size - own.numel()))


def parameter_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also when ZeRO-3 holds only a partition of it."""
    return getattr(parameter, "ds_shape", parameter.shape)
