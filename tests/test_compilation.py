"""Compiled decoder layers: the same losses, scores and gradients, to 1e-5 in float32, and what compiling refuses.

What needs a C++ compiler is run by `launch/test_kernels.sh`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import RankError, run_ranks, train_all
from test_engine import GATHERED
from test_kernels import compare, learned
from test_packing import encoded

from zero_ds import compilation, stages
from zero_ds.config import ConfigError, EncoderConfig, RunConfig
from zero_ds.data.batches import collate, collate_rows
from zero_ds.families import FAMILIES
from zero_ds.model import Assembly, assemble

compiles = pytest.mark.skipif("TEST_COMPILE" not in os.environ, reason="run by launch/test_kernels.sh")


def test_no_compiler_is_said_before_anything_is_loaded(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_compiler", lambda: None)
    compilation.check(run_config("encoder"))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and none was found; install g\+\+"):
        compilation.check(run_config("encoder", compile=True))
