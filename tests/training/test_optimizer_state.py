"""Adam's state is on the device of its parameter, also for devices that this machine does not have.

Tensors of torch's FakeTensorMode have a device and no values, so torch refuses the same operations as on a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zero_ds.training.checkpoint import KEYS
from zero_ds.training.checkpoint.optimizer_state import OptimizerState


def adam(parameters: list[torch.nn.Parameter]) -> Any:
    """Returns a stand-in of DeepSpeed's optimizer without ZeRO, around the AdamW that the engine makes."""
    groups = [{"params": [parameter], "name": str(number)} for number, parameter in enumerate(parameters)]
    return SimpleNamespace(optimizer=torch.optim.AdamW(groups, lr=1e-3, fused=True))


@pytest.mark.parametrize("devices", [("cpu", "cpu"), ("meta", "meta"), ("cuda:0", "cuda:0"), ("cuda:0", "cpu")])
@pytest.mark.parametrize("restored", [False, True])
def test_state_lies_where_its_parameter_lies(devices: tuple[str, ...], restored: bool) -> None:
    with FakeTensorMode():
        parameters = [torch.nn.Parameter(torch.empty(3, 4, device=device)) for device in devices]
        optimizer = adam(parameters)
        state = OptimizerState(optimizer, parameters, stage=0)
        if restored:
            if "cuda:0" not in devices:  # copying into it needs a torch with CUDA, also without values
                for parameter in parameters:
                    for key in KEYS:
                        state.set_held(parameter, key, torch.zeros(12))  # as read from a file, into host memory
            state.set_steps({"0": 7, "1": 9})
        for parameter in parameters:
            places = {key: value.device for key, value in optimizer.optimizer.state[parameter].items()}
            assert places == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), parameter.device)
            parameter.grad = torch.zeros_like(parameter)
        optimizer.optimizer.step()  # torch refuses a count in host memory next to a parameter on a GPU


def test_counts_are_those_that_were_set() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    state = OptimizerState(adam(parameters), parameters, stage=0)
    assert state.steps() == {"0": 0, "1": 0}
    state.set_steps({"1": 9})
    assert state.steps() == {"0": 0, "1": 9}
