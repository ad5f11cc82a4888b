"""Every recipe resolves with every DeepSpeed config; a config that says something else than the recipe is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from zero_ds import stages
from zero_ds.cli import app
from zero_ds.config import ConfigError, RunConfig, load_run, recipe_names
from zero_ds.data.loader import check_batches
from zero_ds.deepspeed_config import DS_CONFIG_ROOT, ds_config, ds_config_names
from zero_ds.engine import schedule


def dry_run(*arguments: str) -> tuple[RunConfig, dict[str, Any]]:
    """The run and the DeepSpeed configuration that `zero-ds train ... --dry-run` prints."""
    result = CliRunner().invoke(app, ["train", *arguments, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.startswith("# DeepSpeed: "))
    return RunConfig.model_validate(yaml.safe_load(result.stdout)), json.loads(line.removeprefix("# DeepSpeed: "))


class Ranks:
    """Stands for a process group of n ranks where DeepSpeed asks how many there are."""

    def __init__(self, n: int) -> None:
        self.n = n

    def get_data_parallel_world_size(self) -> int:
        return self.n


def test_there_are_recipes_and_configs() -> None:
    assert "smollm2-135m/encoder" in recipe_names() and not any(name.endswith("common") for name in recipe_names())
    assert {"zero1", "zero2", "zero3", "zero3_offload"} <= set(ds_config_names())


@pytest.mark.parametrize("zero", ds_config_names())
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_with_every_config(recipe: str, zero: str) -> None:
    config, ds = dry_run(recipe, f"zero={zero}")
    assert config == load_run(recipe, [f"zero={zero}"])
    assert stages.trained_parts(config) and stages.decoder_folder(config)
    assert config.data.sources, "a recipe names its data"
    assert 0 < schedule(config, 100)(0) <= 1
    accept(ds, 1)


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_recipe_on_more_ranks(recipe: str, world_size: int) -> None:
    config = load_run(recipe)
    if config.global_batch % (config.micro_batch * world_size):
        with pytest.raises(ConfigError, match="no multiple of micro_batch"):
            check_batches(config, world_size)
        return
    ds = ds_config(config, world_size)
    assert ds["gradient_accumulation_steps"] == check_batches(config, world_size)
    accept(ds, world_size)


def accept(ds: dict[str, Any], world_size: int) -> None:
    """DeepSpeed's own reading of the configuration, which checks types, stages and batch arithmetic."""
    import deepspeed.comm
    from deepspeed.runtime.config import DeepSpeedConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.comm, "get_rank", lambda: 0)  # it asks for rank and size in one breath
        read = DeepSpeedConfig(copy.deepcopy(ds), mpu=Ranks(world_size))
    assert read.world_size == world_size
    assert read.train_batch_size == ds["train_batch_size"]
    assert read.gradient_accumulation_steps == ds["gradient_accumulation_steps"]
    assert read.gradient_clipping == ds["gradient_clipping"]
    assert read.zero_optimization_stage in (1, 2, 3)


def test_dry_run_asks_for_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, ds = dry_run("smollm2-135m/encoder", "global_batch=16", "micro_batch=2")
    assert ds["gradient_accumulation_steps"] == 4
    monkeypatch.setenv("WORLD_SIZE", "3")
    result = CliRunner().invoke(app, ["train", "smollm2-135m/encoder", "global_batch=16", "micro_batch=2", "--dry-run"])
    assert isinstance(result.exception, ConfigError) and "set global_batch to a multiple of 6" in str(result.exception)


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dry_run("smollm2-135m/encoder", "out=somewhere")
    assert not list(tmp_path.iterdir())


# -- DeepSpeed's JSON --------------------------------------------------------------------------------------------------


@pytest.fixture
def json_file(tmp_path: Path) -> Any:
    """`json_file({...})`: zero2.json with these entries set, as a file."""

    def write(changes: dict[str, Any] | str) -> str:
        path = tmp_path / "mine.json"
        if isinstance(changes, str):
            path.write_text(changes)
        else:
            base = json.loads((DS_CONFIG_ROOT / "zero2.json").read_text())
            for key, value in changes.items():
                section, _, entry = key.partition("/")
                if entry:
                    base.setdefault(section, {})[entry] = value
                else:
                    base[section] = value
            path.write_text(json.dumps(base))
        return str(path)

    return write


def resolve(path: str, *overrides: str, world_size: int = 1) -> dict[str, Any]:
    return ds_config(load_run("smollm2-135m/encoder", [f"zero={path}", "precision=fp32", *overrides]), world_size)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'"),
        ({"zero_optimization/stge": 2}, "zero_optimization: unknown key 'stge'; did you mean 'stage'"),
        (
            {"zero_optimization/offload_optimizer": {"devise": "cpu"}},
            "zero_optimization: unknown key 'offload_optimizer.devise'; did you mean 'device'",
        ),
        ({"bf16/enable": True}, "bf16: unknown key 'enable'; did you mean 'enabled'"),
        ({"fp16/loss_scal": 0}, "fp16: unknown key 'loss_scal'; did you mean 'loss_scale'"),
        ({"optimizer": {"type": "AdamW"}}, "unknown key 'optimizer'"),
        ({"train_batch_size": 999}, "train_batch_size=999, but the recipe gives 8"),
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu=3, but the recipe gives 4"),
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps=7, but the recipe gives 2"),
        ({"gradient_clipping": 5.0}, "gradient_clipping=5.0, but the recipe gives 1.0"),
        ({"bf16/enabled": True}, "bf16.enabled=True, but the recipe's precision is float32"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True, but the recipe's precision is float32"),
        (
            {"zero_optimization/zero_hpz_partition_size": 2, "zero_optimization/offload_optimizer": {"device": "cpu"}},
            "hpz",
        ),
        ({"zero_optimization/stage": 4}, "zero_optimization: stage=4"),
        ({"zero_optimization/stage": "two"}, "zero_optimization: stage='two'"),
        ({"zero_optimization/stage": 0}, "choose one"),
        ('{"gradient_clipping": "auto"}', "choose one"),
        ({"zero_optimization/overlap_comm": "perhaps"}, "zero_optimization: overlap_comm='perhaps'"),
        ({"zero_optimization": 2}, "zero_optimization"),
        ({"zero_optimization": None}, "zero_optimization"),
        ({"bf16": True}, "bf16"),
        ("[1, 2]", "must hold a JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_json_that_cannot_be_meant(json_file: Any, changes: Any, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(json_file(changes))
    assert complaint in str(caught.value) and "mine.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_may_agree_with_the_recipe_or_leave_out(json_file: Any) -> None:
    ds = resolve(json_file({"train_batch_size": 8, "gradient_clipping": 1.0, "bf16": {}}))
    assert (ds["train_batch_size"], ds["bf16"]["enabled"], ds["fp16"]["enabled"]) == (8, False, False)
    assert resolve(json_file('{"zero_optimization": {"stage": 1}}'))["gradient_accumulation_steps"] == 2


def test_values_of_the_json_reach_deepspeed(json_file: Any) -> None:
    ds = resolve(json_file({"zero_optimization/reduce_bucket_size": 12345, "wall_clock_breakdown": True}))
    assert ds["zero_optimization"]["reduce_bucket_size"] == 12345 and ds["wall_clock_breakdown"] is True


def test_unknown_zero_config_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="there is no DeepSpeed config 'zero33'; did you mean 'zero3'"):
        resolve("zero33")


def test_tensorboard_goes_into_the_run_folder(json_file: Any) -> None:
    assert resolve(json_file({}), "out=here/run")["tensorboard"] == {
        "enabled": True,
        "output_path": "here/run",
        "job_name": "tensorboard",
    }
