"""The functions that `zero_ds` offers to Python programs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

import zero_ds


def test_the_work_of_the_commands_can_be_called() -> None:
    names = ("measure_trajectory", "build_surrogate", "train", "graft", "evaluate", "export_model", "plan")
    assert tuple(zero_ds.PUBLIC) == names


@pytest.mark.parametrize("name", zero_ds.PUBLIC)
def test_every_name_leads_to_its_function(name: str) -> None:
    value = getattr(zero_ds, name)
    assert isinstance(value, Callable) and value.__doc__  # type: ignore[arg-type]
    assert name in dir(zero_ds)
    assert value.__module__ == zero_ds.PUBLIC[name].partition(":")[0]


def test_the_package_loads_nothing_heavy_and_train_is_the_function() -> None:
    """The module `zero_ds.train` is the entry point of `deepspeed --module` and refuses to be imported."""
    script = """
import sys
import zero_ds
assert "torch" not in sys.modules and "transformers" not in sys.modules
try:
    import zero_ds.train
    raise SystemExit("the entry point was imported")
except ImportError as error:
    assert "is run, not imported" in str(error)
from zero_ds import train
assert callable(train) and train.__module__ == "zero_ds.training.train"
try:
    zero_ds.trian
except AttributeError:
    pass
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)
