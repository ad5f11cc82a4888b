"""Master copies, moments and step counts of DeepSpeed's optimizers, independent of world size and ZeRO stage.

DeepSpeed (0.19) flattens trained parameters into buffers and shards these over ranks, each ZeRO stage in its own way.
Here it is known which elements of each parameter a rank holds. A checkpoint has every parameter's state whole
(exchange.py), and a rank reads the elements that it holds. So any number of ranks under any stage can restore the state
that any other has saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from zero_ds.runtime import distributed
from zero_ds.runtime.zero3 import is_partitioned, live_elements, parameter_shape, part_size
from zero_ds.training.checkpoint import KEYS, PIECE

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class OptimizerState:
    """State of a DeepSpeed engine's optimizer, which wraps an AdamW whose parameter groups have names."""

    def __init__(self, optimizer: Any, parameters: list[torch.nn.Parameter], stage: int) -> None:
        """Creates Adam's moments now, so that they can be restored before the first step.

        DeepSpeed would create them during that step, and under ZeRO-1 and 2 it would then link only those of the first
        parameter group, so that those of the others could not be saved. Without ZeRO it creates them earlier, in bf16,
        by a step on gradients of zero, which must not count.
        """
        self.optimizer = optimizer
        self.inner = getattr(optimizer, "optimizer", optimizer)
        self._masters = self._unsharded(parameters) if stage == 0 else {}
        self._swapped = _Swapped(optimizer)
        for flats in self._flats().values():
            for flat in flats:
                with self._swapped.in_memory(flat):
                    moments = {key: torch.zeros_like(flat.data) for key in KEYS[1:]}
                    self.inner.state[flat] = {"step": _step_count(flat, 0), **moments}
        _map_round_robin_(optimizer)
        link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _unsharded(self, parameters: list[torch.nn.Parameter]) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Returns, without ZeRO, the tensor that is updated for each parameter: itself in fp32, a copy in bf16."""
        pairs = zip(getattr(self.optimizer, "fp16_groups", ()), getattr(self.optimizer, "fp32_groups", ()), strict=True)
        copies = {half: full for halves, fulls in pairs for half, full in zip(halves, fulls, strict=True)}
        return {parameter: copies.get(parameter, parameter) for parameter in parameters}

    def _flats(self) -> dict[str, list[torch.Tensor]]:
        """Returns the tensors whose state AdamW keeps on this rank, by the name of their parameter group."""
        groups = self.inner.param_groups
        flats = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)
        if flats is None:
            return {group["name"]: list(group["params"]) for group in groups}
        named: dict[str, list[torch.Tensor]] = {group["name"]: [] for group in groups}  # ZeRO-3 has its own lists
        for index, flat in enumerate(flats):
            named[groups[self.optimizer.sub_group_to_group_id[index]]["name"]].append(flat)
        return named

    # -- the elements of a parameter on this rank ----------------------------------------------------------------------

    def span(self, parameter: torch.nn.Parameter) -> tuple[int, int]:
        """Returns the first element and the number of elements that this rank holds of the flattened parameter.

        Padding does not count.
        """
        size = parameter_shape(parameter).numel()
        if parameter in self._masters:  # every rank holds all of it; rank 0 represents them
            return (0, size) if distributed.is_rank_zero() else (0, 0)
        if is_partitioned(parameter):
            part = part_size(parameter)
            start = min(size, distributed.rank() * part)
            return start, min(part, size - start)
        mapping = cast(Any, parameter)._hp_mapping
        return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    def held(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """Returns this rank's elements of `key` (one of `KEYS`), as the optimizer holds them: (elements,), float32."""
        from deepspeed import utils as ds

        _, size = self.span(parameter)
        if parameter in self._masters:
            value = self._masters[parameter] if key == "master" else self.inner.state[self._masters[parameter]][key]
        elif is_partitioned(parameter):
            of = ds.safe_get_local_fp32_param if key == "master" else ds.safe_get_local_optimizer_state
            value = of(parameter) if key == "master" else of(parameter, key)
            value = self._swapped.kept(value)
        else:
            mapping = cast(Any, parameter)._hp_mapping
            value = None if mapping is None else mapping.get_hp_fragment(None if key == "master" else key)
        assert value is not None or size == 0, f"DeepSpeed holds no {key} for a trained parameter"
        return torch.zeros(0) if value is None else value.detach().flatten()[:size]

    def set_held(self, parameter: torch.nn.Parameter, key: str, values: torch.Tensor) -> None:
        """Replaces what `held` returns by values, (elements,); without ZeRO by the whole tensor, on every rank."""
        if parameter in self._masters:
            master = self._masters[parameter]
            with torch.no_grad():
                (master if key == "master" else self.inner.state[master][key]).copy_(values.view(master.shape))
                if key == "master":
                    parameter.copy_(master)
        elif is_partitioned(parameter):
            padded = torch.nn.functional.pad(values, (0, part_size(parameter) - values.numel()))
            self._swapped.set_(parameter, key, padded)
        elif values.numel():
            self.held(parameter, key).copy_(values)

    def equals_live(self, parameter: torch.nn.Parameter) -> bool:
        """Returns whether this rank's elements of the master copy, rounded, are the weights that the model computes
        with, bit for bit. A collective where parameters are swapped out to a disk.
        """
        if parameter in self._masters:
            master, live = self._masters[parameter].detach().flatten(), parameter.detach().flatten()
        else:
            start, count = self.span(parameter)
            master, live = self.held(parameter, "master"), live_elements(parameter, start, count)
        for begin in range(0, len(master), PIECE):
            rounded = master[begin : begin + PIECE].to(live.device, live.dtype)
            kind = torch.int32 if live.element_size() == 4 else torch.int16
            if not torch.equal(rounded.view(kind), live[begin : begin + PIECE].view(kind)):
                return False
        return True

    def span_to_set(self, parameter: torch.nn.Parameter) -> tuple[int, int]:
        """Returns the first element and the number of elements that `set_held` needs on this rank."""
        return (0, parameter.numel()) if parameter in self._masters else self.span(parameter)

    # -- counts --------------------------------------------------------------------------------------------------------

    def steps(self) -> dict[str, int]:
        """Returns Adam's step count of every group, on which its bias correction depends."""
        counts = {}
        for name, flats in self._flats().items():
            states = [self.inner.state[flat] for flat in flats if flat in self.inner.state]
            counts[name] = max((int(state["step"]) for state in states if "step" in state), default=0)
        return counts

    def set_steps(self, counts: Mapping[str, int]) -> None:
        """Sets the step counts of the groups in `counts`."""
        for name, flats in self._flats().items():
            for flat in flats:
                state = self.inner.state.get(flat, {})
                if name in counts and "step" in state:
                    state["step"] = _step_count(flat, counts[name])

    def loss_scalars(self) -> dict[str, float]:
        """Returns the scalars to plot: fp16's loss scale."""
        return {"loss_scale": scale["cur_scale"]} if (scale := self.loss_scale()) else {}

    def loss_scale(self) -> dict[str, float]:
        """Returns the state of fp16's dynamic loss scale; empty for bf16 and fp32."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return {}
        return {key: float(getattr(scaler, key)) for key in _SCALER if hasattr(scaler, key)}

    def set_loss_scale(self, values: Mapping[str, float]) -> None:
        """Restores what `loss_scale` returned."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        for key, value in values.items():
            if key in _SCALER and hasattr(scaler, key):
                setattr(scaler, key, type(getattr(scaler, key))(value))


class _Swapped:
    """Sub-groups of ZeRO-3's optimizer whose master copies and moments are on a disk; there may be none.

    DeepSpeed reads a sub-group as a whole into buffers, which it uses again for the next one.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._swaps = bool(getattr(optimizer, "swap_optimizer", False))

    @contextlib.contextmanager
    def in_memory(self, flat: torch.Tensor) -> Iterator[None]:
        """Reads the sub-group with this master copy while the block runs, and writes it back, with new moments."""
        numbers = enumerate(self._optimizer.fp32_partitioned_groups_flat) if self._swaps else ()
        swapped = [n for n, one in numbers if one is flat and self._optimizer._swappable_optimizer_subgroup(n)]
        for number in swapped:
            self._optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        for number in swapped:
            self._write_back(number)

    def kept(self, value: torch.Tensor) -> torch.Tensor:
        """Returns a tensor that stays as it is when the buffer is used again."""
        return value.clone() if self._swaps else value

    def set_(self, parameter: torch.nn.Parameter, key: str, values: torch.Tensor) -> None:
        """Replaces this rank's part of `key` (one of `KEYS`) of a partitioned parameter.

        DeepSpeed's public functions do this only for parameters that are not on a disk themselves.
        """
        held, number = self._optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=None if key == "master" else key
        )
        held.data.copy_(values)
        if self._optimizer._swappable_optimizer_subgroup(number):
            self._write_back(number)

    def _write_back(self, number: int) -> None:
        """Writes a sub-group back to the disk, and waits for it: DeepSpeed might read it again before it is there."""
        flat = self._optimizer.fp32_partitioned_groups_flat[number]
        self._optimizer.optimizer_swapper.swap_out_optimizer_state(parameter=flat, async_swap=False)


def _step_count(flat: torch.Tensor, count: int) -> torch.Tensor:
    """Returns Adam's step count for the parameters in `flat`, in the form that torch's fused update needs.

    The kernel of a GPU reads the count on the GPU: one in host memory is an error of the first update. All other state
    lies where its parameter lies because it is made from it.
    """
    return torch.full((), float(count), dtype=torch.float32, device=flat.device)


def _map_round_robin_(optimizer: Any) -> None:
    """Corrects DeepSpeed's (0.19) map from parameters to the elements of its shards under `round_robin_gradients`.

    With that setting ZeRO-1 and 2 lay the parameters out in another order than they list them in. The map follows the
    list, unless it is told that there is padding between parameters; then it looks up where each of them lies.
    """
    if not getattr(optimizer, "round_robin_gradients", False):
        return
    paddings = optimizer.round_robin_bit16_padding
    optimizer.round_robin_bit16_padding = [[1] for _ in paddings]
    try:
        optimizer._link_all_hp_params()
    finally:
        optimizer.round_robin_bit16_padding = paddings
