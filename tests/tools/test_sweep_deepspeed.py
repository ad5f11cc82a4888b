"""The sweep over the keys of a DeepSpeed JSON covers every key, its verdicts are right, and its table is complete."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed_helper import run_ranks
from places import ROOT

from zero_ds.training.deepspeed_keys import KEYS, REFUSED

sys.path[:0] = [str(ROOT / "tools")]

import sweep_deepspeed as sweep  # noqa: E402


def documented() -> set[str]:
    """Returns the keys of all sections that DeepSpeed has a model or a table of."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    sections: dict[str, Any] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
    }
    found = {
        f"{section}.{field.alias or name}"
        for section, model in sections.items()
        for name, field in model.model_fields.items()
    }
    found |= {f"aio.{key}" for key in AIO_DEFAULT_DICT}
    return found | {f"flops_profiler.{key}" for key in vars(DeepSpeedFlopsProfilerConfig({}))}


def test_every_key_that_deepspeed_documents_is_accepted_or_refused_by_name() -> None:
    sections = {"zero_optimization.offload_param", "zero_optimization.offload_optimizer"}
    assert documented() - sections <= {*KEYS, *REFUSED}
    assert not set(KEYS) & set(REFUSED)


def test_every_key_is_tried_with_two_values() -> None:
    tried: dict[str, set[str]] = {}
    for variant in sweep.variants():
        tried.setdefault(variant.key, set()).add(json.dumps(variant.value))
    assert not [key for key in KEYS if len(tried.get(key, ())) < 2]
    assert set(REFUSED) <= set(tried)
    assert len({variant.name for variant in sweep.variants()}) == len(sweep.variants())


def test_verdicts() -> None:
    good = {"losses": [2.0, 1.0], "not_as_live": [], "resumed": True}
    assert sweep.verdict(good, good) == "works"
    assert sweep.verdict({"refused": "no."}, good) == "refused: no."
    assert sweep.verdict({**good, "losses": [2.0, 1.00001]}, good) == "FAILS: losses are 1.0e-05 apart"
    assert sweep.verdict({**good, "losses": [2.0, float("nan")]}, good).startswith("FAILS: losses")
    assert sweep.verdict({**good, "not_as_live": ["b", "c"]}, good) == (
        "FAILS: 2 saved tensors differ from the model, first b"
    )
    assert sweep.verdict({**good, "resumed": False}, good) == "FAILS: a resumed run ends elsewhere"
    assert sweep.verdict({"failed": "ValueError: x"}, good) == "FAILS: ValueError: x"
    assert sweep.verdict({**good, "losses": [2.1, 1.1]}, good, "bf16") == "works"
    assert sweep.verdict(good, {}) == "FAILS: nothing to compare with"


def test_results_become_a_table(tmp_path: Path) -> None:
    results = tmp_path / "results-2.jsonl"
    good = {"losses": [1.0], "not_as_live": [], "resumed": True}
    key, other = "zero_optimization.overlap_comm", "prescale_gradients"
    for variant, found in (
        (sweep.Variant("", None, "0"), good),
        (sweep.Variant(key, True, "1"), good),
        (sweep.Variant(key, False, "1"), {"as": sweep.Variant("", None, "0").name}),
        (sweep.Variant(other, True, "0"), good),
        (sweep.Variant(other, True, "3"), {"refused": "variant.json: it works up to stage 1."}),
        (sweep.Variant("gradient_allreduce_op", "sum", "0"), {"refused": "variant.json: not a sum."}),
    ):
        sweep.append(results, variant, found)
    lines = sweep.render(sweep.judge(sweep.read(results), 2)).splitlines()
    assert f"| `{key}` | `true`, `false` |  |" in lines
    (row,) = (line for line in lines if line.startswith(f"| `{other}`"))
    works, refused = row.split(" | ")[1:]
    assert works == "`true` (stage 0 on 2 ranks)"
    assert refused == "`true` with stage 3 on 2 ranks: it works up to stage 1 |"
    why = KEYS["gradient_allreduce_op"].why
    assert f'| `gradient_allreduce_op` |  | `"sum"`: {why} |' in lines


@pytest.fixture
def models(made: Callable[..., Path], small: Path, data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for name, place in (
        ("llama", made("llama", tied=True)),
        ("surrogate", small),
        ("clip", made("clip")),
        ("data", data.parent),
    ):
        (folder / name).symlink_to(place)
    return folder


def try_all(variants: list[sweep.Variant], models: Path, folder: Path) -> list[dict[str, Any]]:
    return [sweep.try_variant(variant, models, folder / str(number)) for number, variant in enumerate(variants)]


def test_variants_are_trained_compared_and_resumed(models: Path, tmp_path: Path) -> None:
    """A tensor that is saved wrongly is noticed as well."""
    variants = [
        sweep.Variant("", None, "0"),
        sweep.Variant("zero_optimization.contiguous_gradients", False, "2"),
        sweep.Variant("gradient_allreduce_op", "sum", "2"),
    ]
    found = run_ranks(try_all, 2, variants, models, tmp_path)
    assert found[0] == found[1]
    reference, works, refused = found[0]
    assert sweep.verdict(works, reference) == "works"
    assert len(works["losses"]) == sweep.STEPS and "only mean works here" in refused["refused"]
    assert sweep.as_read(variants[0], models, 2) != sweep.as_read(variants[1], models, 2)


def test_the_table_in_the_documents_has_every_key() -> None:
    page = sweep.PAGE.read_text(encoding="utf-8")
    rows = page.split(sweep.BEGIN)[1].split(sweep.END)[0].splitlines()
    keys = [row.split("`")[1] for row in rows if row.startswith("| `")]
    assert keys == [*KEYS, *REFUSED], "write it again: python tools/sweep_deepspeed.py run, then table --write"
    assert "FAILS" not in "".join(rows)
    for key, rule in KEYS.items():
        (row,) = (row for row in rows if row.startswith(f"| `{key}` |"))
        assert all(f"`{json.dumps(value)}`: " in row for value in rule.refused), row
