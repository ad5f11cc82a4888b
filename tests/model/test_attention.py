"""Every implementation of attention that the installed transformers offers is accepted, if it can be used here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from zero_ds.config.schema import RunConfig
from zero_ds.model import attention
from zero_ds.model.attention import check_attention, known_attentions
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.options.apply import check_options


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine("flash_attn", gpu=True)`: only these packages are installed, and there is a GPU."""

    def install(*packages: str, gpu: bool) -> None:
        find = importlib.util.find_spec
        optional = {"flash_attn", "flash_attn_interface", "kernels"}

        def found(name: str, package: str | None = None) -> Any:
            return object() if name in packages else None if name in optional else find(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", found)
        monkeypatch.setattr(attention, "has_cuda", lambda: gpu)

    return install


def test_names_are_those_of_the_library(machine: Callable[..., None]) -> None:
    assert {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"} <= set(known_attentions())
    machine("flash_attn", "flash_attn_interface", "kernels", gpu=True)
    for name in [*known_attentions(), "kernels-community/flash-attn3"]:
        check_attention(name, trains=True)


@pytest.mark.parametrize(
    ("name", "packages", "gpu", "complaint"),
    [
        ("spda", (), True, "attention=spda is unknown; did you mean 'sdpa'"),
        ("paged|eager", (), True, "is unknown"),
        (
            "flash_attention_2",
            (),
            True,
            "needs flash-attn, which is not installed; .*zero_ds.flash.*else attention=sdpa",
        ),
        ("flash_attention_3", ("flash_attn",), True, "needs flash-attn-3, which is not installed"),
        ("flash_attention_2", ("flash_attn",), False, "needs a GPU; set attention=sdpa"),
        ("flash_attention_3", ("kernels",), False, "needs a GPU"),
        ("flex_attention", (), False, "needs a GPU to train"),
        ("kernels-community/flash-attn3", (), True, "needs kernels, which is not installed"),
        (
            "somebody/kernel",
            ("kernels",),
            True,
            "is not a kernel that transformers loads; name one of kernels-community",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_start(
    machine: Callable[..., None],
    run_config: Callable[..., RunConfig],
    name: str,
    packages: tuple[str, ...],
    gpu: bool,
    complaint: str,
) -> None:
    machine(*packages, gpu=gpu)
    with pytest.raises(ConfigError, match=complaint):
        check_options(run_config("decoder", attention=name))


def test_answers_need_no_backward_pass(machine: Callable[..., None]) -> None:
    machine(gpu=False)
    check_attention("flex_attention")
