"""Half precision with a dynamic loss scale, forced on the CPU although DeepSpeed does not support it there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks, train_all
from places import ROOT
from safetensors.torch import load_file

from zero_ds.config.schema import RunConfig


def train_in_half(configs: list[RunConfig]) -> list[str]:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True
    CPU_Accelerator.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
    return train_all(configs)


def scalars(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_the_loss_scale_is_found_kept_and_resumed(
    run_config: Callable[..., RunConfig], tmp_path: Path, zero: str
) -> None:
    ds = json.loads((ROOT / "ds_configs" / f"{zero}.json").read_text())
    # from a scale that overflows, down; and up again after every two good steps
    ds["fp16"] = {"enabled": "auto", "initial_scale_power": 17, "loss_scale_window": 2, "hysteresis": 1}
    (tmp_path / "half.json").write_text(json.dumps(ds))

    def config(name: str, **changes: Any) -> RunConfig:
        more = {"checkpoint": {"every_steps": 6, "keep": 9}, "max_steps": 12, **changes}
        return run_config("pretrain", tmp_path / name, zero=str(tmp_path / "half.json"), precision="fp16", **more)

    assert run_ranks(train_in_half, 2, [config("whole")]) == [["step-000012"]] * 2
    scales = scalars(tmp_path / "whole", "loss_scale")
    norms = scalars(tmp_path / "whole", "grad_norm")
    assert not all(torch.tensor(norms).isfinite()) and norms[3:] != [float("inf")] * 9, (
        "some steps overflow, some do not"
    )
    moves = {after / before for before, after in pairwise(scales)}
    assert moves >= {0.5, 2.0}, "down after an overflow, up after good steps"
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "step-000012")
    (tmp_path / "again" / "latest").write_text("step-000006\n")
    assert run_ranks(train_in_half, 2, [config("again")]) == [["step-000012"]] * 2
    for name in ("loss", "loss_scale", "grad_norm"):
        assert scalars(tmp_path / "again", name) == scalars(tmp_path / "whole", name)
    ours, theirs = (load_file(tmp_path / n / "step-000012" / "weights.safetensors") for n in ("again", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
