"""Every recipe resolves with every DeepSpeed config, and a config that contradicts its recipe is an error."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from places import ROOT
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.batches import fit_to_ranks
from zero_ds.config.loading import RECIPE_ROOT, load_run, recipe_names
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import deepspeed, stages
from zero_ds.training.deepspeed import DS_CONFIG_ROOT, RELEASED, ds_config, ds_config_names
from zero_ds.training.engine import schedule
from zero_ds.training.planning.model_config import SHIPPED


def dry_run(*arguments: str) -> tuple[RunConfig, dict[str, Any]]:
    """Returns the run and the DeepSpeed configuration that `zero-ds train ... --dry-run` prints."""
    result = CliRunner().invoke(app, ["train", *arguments, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.startswith("# DeepSpeed: "))
    return RunConfig.model_validate(yaml.safe_load(result.stdout)), json.loads(line.removeprefix("# DeepSpeed: "))


class Ranks:
    """Replaces a process group of n ranks where DeepSpeed asks for their number."""

    def __init__(self, n: int) -> None:
        self.n = n

    def get_data_parallel_world_size(self) -> int:
        return self.n


def test_there_are_recipes_and_configs() -> None:
    assert "smollm2-135m/encoder" in recipe_names() and not any(name.endswith("common") for name in recipe_names())
    assert set(ds_config_names()) >= {
        *("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_resident", "zero3_offload"),
        *("zero3_offload_params", "zero3_nvme", "zero3_hpz"),
    }


PAPER = {  # Table A.2: rate and global batch of pretrain, encoder, decoder
    "llama-3.2-3b": {"pretrain": (1e-4, 256), "encoder": (5e-5, 128), "decoder": (5e-5, 128)},
    "llama-3.1-8b": {"pretrain": (1e-4, 256), "encoder": (5e-5, 128), "decoder": (5e-5, 128)},
    "llama-3.1-70b": {"pretrain": (1e-4, 256), "encoder": (5e-5, 128), "decoder": (2e-5, 128)},
}
CUTS = {"llama-3.2-3b": "T16-26", "llama-3.1-8b": "T17-30", "llama-3.1-70b": "T40-78"}


@pytest.mark.parametrize("model", PAPER)
def test_table_a2(model: str) -> None:
    for stage, (rate, batch) in PAPER[model].items():
        config = load_run(f"{model}/{stage}")
        optimizer = config.optimizer
        assert (config.stage, optimizer.learning_rate, config.global_batch) == (stage, rate, batch)
        assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0)
        assert (optimizer.warmup_ratio, optimizer.max_grad_norm, config.epochs) == (0.03, 1.0, 1)
        assert optimizer.learning_rates == {} and config.max_steps is None and not config.distill.active
        assert config.activation_checkpointing == "auto" and config.precision == "bf16"
        assert config.target.split("/")[1].lower() == f"{model}-instruct"
        assert config.encoder is not None and config.encoder.path == "openai/clip-vit-large-patch14-336"
        whole = stage == "pretrain" or (stage == "encoder" and "70b" not in model)  # Section 1 trains the whole encoder
        assert config.encoder.train_last_layers == (None if whole else 8)
        assert config.data.shuffle
        assert [source.images_only for source in config.data.sources] == (
            [False] * 2 if stage == "pretrain" else [True]
        )
        if stage != "decoder":
            assert config.surrogate == f"runs/{model}/{CUTS[model]}"
        assert config.dynamic_loss.order == (0.5 if stage == "decoder" and "70b" not in model else 0)


@pytest.mark.parametrize("model", PAPER)
def test_baselines_and_controls(model: str) -> None:
    recipes = {name.split("/")[1]: load_run(name) for name in recipe_names() if name.startswith(f"{model}/")}
    trained = {name: stages.trained_parts(config) for name, config in recipes.items()}
    assert trained["baseline-adapter"] == ("adapter",)
    assert trained["baseline-decoder"] == trained["decoder"] == ("encoder", "adapter", "decoder")
    assert trained["full-encoder"] == trained["encoder"] == ("encoder", "adapter")
    for name, config in recipes.items():
        if config.stage == "encoder":
            section_2 = "70b" in model or name == "encoder-last8"
            assert config.encoder is not None and config.encoder.train_last_layers == (8 if section_2 else None), name
        if stages.trained_parts(config) == ("adapter",):  # without a translator, text teaches nothing (Table 9)
            assert [Path(source.path).name for source in config.data.sources] == ["llava_v1_5_mix665k.json"], name
    assert trained["lora"] == trained["lora-large"] == ("encoder", "adapter", "lora")
    small, large = recipes["lora"].lora, recipes["lora-large"].lora
    assert small is not None and large is not None
    assert (small.rank, small.alpha, small.modules) == (8, 32, ("q_proj", "k_proj"))
    assert (large.rank, large.alpha, len(large.modules)) == (128, 256, 7)
    assert trained["starred-pretrain"] == ("adapter", "translator", "early")
    assert stages.decoder_kind(recipes["full-encoder"]) == stages.decoder_kind(recipes["baseline-adapter"]) == "target"
    early = {name: config.surrogate for name, config in recipes.items() if name.startswith("early-")}
    assert len(early) == (4 if model == "llama-3.1-8b" else 2)
    for name, surrogate in early.items():
        first, last = name.split("-")[1:3]
        assert surrogate == f"runs/{model}/T{first[1:]}-{last}" and recipes[name].stage == name.split("-")[-1]
    for config in recipes.values():  # a run can only start from the result of another recipe
        assert set(config.starts) <= {other.out for other in recipes.values()}


PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
FIGURES = [*(f"Table {number}" for number in (*range(1, 10), "A.1", "A.2", "A.3", "A.4"))]
FIGURES += [f"Figure {number}" for number in (*range(1, 9), "A.1", "A.2", "A.3")]


@pytest.mark.parametrize("figure", FIGURES)
def test_the_page_on_the_paper_has_every_table_and_figure(figure: str) -> None:
    assert re.search(rf"^\| \**{re.escape(figure)}\b", PAGE, re.MULTILINE), f"docs/paper.md has no row for {figure}"


def test_the_page_on_the_paper_and_the_recipes_name_each_other() -> None:
    """The first line of a recipe says which tables it is for, and these tables name it."""
    rows = {}
    for line in PAGE.splitlines():
        if found := re.match(r"\| \**((?:Table|Figure) [A.\d]*\d)", line):
            rows[found[1]] = set(re.findall(r"`([\w.-]+/[\w-]+)`", line))
    for recipe in recipe_names():
        if recipe.split("/")[0] not in PAPER:
            continue
        head = (RECIPE_ROOT / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[0]
        named = {figure for figure, recipes in rows.items() if recipe in recipes}
        assert named == figures_in(head), f"{recipe} says {head!r}; docs/paper.md has it in {sorted(named)}"
    assert set().union(*rows.values()) <= set(recipe_names())


PLACEHOLDERS = {"MODEL": "llama-3.2-3b", "NAME": "encoder", "RECIPE": "llama-3.2-3b/encoder", "$share": "0.2"}
COMMANDS = re.findall(
    r"^    *((?:zero-ds|launch/train\.sh|python) (?:.*\\\n)*.*)$|`((?:zero-ds|launch/train\.sh|python) [^`]+)`",
    PAGE,
    re.M,
)


@pytest.mark.parametrize("command", sorted({block or inline for block, inline in COMMANDS}))
def test_commands_of_the_page_on_the_paper_exist(command: str) -> None:
    """Options of `zero-ds` are known, recipes resolve with their overrides, and scripts are there."""
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
    program, *words = shlex.split(command.replace("\\\n", " "))
    if program == "python":
        assert (ROOT / words[0]).is_file()
        return
    if program == "zero-ds":
        found: Any = typer.main.get_command(app)
        while hasattr(found, "commands"):
            if words[0] not in found.commands:  # `zero-ds eval MODEL` is short for `zero-ds eval run MODEL`
                words = ["run", *words]
            found = found.commands[words.pop(0)]
        if words:  # otherwise the command alone is named
            found.make_context(found.name, words)
        return
    recipe, *overrides = [word for word in words if not word.startswith("--") and word != "hostfile"]
    assert stages.trained_parts(load_run(recipe, overrides)) and stages.stage_of(load_run(recipe, overrides))


def figures_in(head: str) -> set[str]:
    """Returns the tables and figures that a line such as `# Paper: Tables 1 to 3 and A.1, Figure 2.` names."""
    found = set()
    for kind, listed in re.findall(r"(Table|Figure)s? ([A\d][\dA., toand]*)", head):
        for first, last in re.findall(r"(A\.\d|\d)(?: to (\d))?", listed):
            found |= {f"{kind} {n}" for n in (range(int(first), int(last) + 1) if last else [first])}
    return found


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes DeepSpeed believe that it can compile its swapping to disk, so results do not depend on the machine."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)


BESIDE_THE_PAPER = {  # surrogate, depth, decoder's rate
    "qwen3-8b": ("T19-34", 36, 5e-5),
    "mistral-small": ("T20-38", 40, 2e-5),
    "qwen3-32b": ("T32-62", 64, 2e-5),
    "llama-3.3-70b": ("T40-78", 80, 2e-5),
    "gpt-oss-120b": ("T18-34", 36, 2e-5),
    "qwen3-235b-a22b": ("T47-92", 94, 2e-5),
}


@pytest.mark.parametrize("model", BESIDE_THE_PAPER)
def test_models_beside_the_papers_have_the_papers_stages(model: str) -> None:
    surrogate, depth, rate = BESIDE_THE_PAPER[model]
    runs = {name.split("/")[1]: load_run(name) for name in recipe_names() if name.startswith(f"{model}/")}
    assert set(runs) == {"pretrain", "encoder", "decoder", "baseline-adapter", "baseline-decoder"}
    for name, run in runs.items():
        assert run.encoder is not None and run.encoder.path == "google/siglip2-so400m-patch16-384"
        assert run.optimizer.learning_rate == (rate if "decoder" in name else {"encoder": 5e-5}.get(name, 1e-4))
        assert set(run.starts) <= {other.out for other in runs.values()}
    assert runs["pretrain"].surrogate == runs["encoder"].surrogate == f"runs/{model}/{surrogate}"
    first, last = (int(number) for number in surrogate[1:].split("-"))
    assert last == depth - 2 and 0.5 <= first / depth <= 17 / 32
    shape = json.loads((SHIPPED / runs["pretrain"].target.split("/")[1] / "config.json").read_text(encoding="utf-8"))
    assert shape["num_hidden_layers"] == depth


CROSSED = [name for name in recipe_names() if name.split("/")[0] not in BESIDE_THE_PAPER]
"""Recipes that are resolved with every DeepSpeed config; the others share their stages, and are with their own."""
SHORT = [name for name in CROSSED if name.split("/")[0] in ("smollm2-135m", "llama-3.1-70b")]
"""Recipes for which that is always done."""
CROSS = pytest.mark.slow(reason="hundreds of pairs; each recipe always runs with its own config, two models with all")


@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize(
    ("recipe", "zero"),
    [
        pytest.param(recipe, zero, marks=() if recipe in SHORT or zero == load_run(recipe).zero else CROSS)
        for recipe in CROSSED
        for zero in ds_config_names()
    ]
    + [(recipe, load_run(recipe).zero) for recipe in sorted(set(recipe_names()) - set(CROSSED))],
)
def test_every_recipe_with_every_config(recipe: str, zero: str) -> None:
    overrides = [f"zero={zero}", "nvme_path=/disk"]
    config, ds = dry_run(recipe, *overrides)
    assert config == load_run(recipe, overrides)
    assert stages.trained_parts(config) and stages.decoder_folder(config)
    assert config.data.sources, "a recipe names its data"
    assert 0 < schedule(config, 100)(0) <= 1
    accept(ds, 1)


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("world_size", [2, 8])
def test_every_recipe_on_more_ranks(recipe: str, world_size: int) -> None:
    config = load_run(recipe)
    fitting = fit_to_ranks(config, world_size)
    assert fitting == config.model_copy(update={"micro_batch": fitting.micro_batch})
    assert 0 < fitting.micro_batch <= config.micro_batch
    ds = ds_config(fitting, world_size)
    assert ds["gradient_accumulation_steps"] * fitting.micro_batch * world_size == config.global_batch
    accept(ds, world_size)


def accept(ds: dict[str, Any], world_size: int) -> None:
    """Lets DeepSpeed parse the configuration, which checks types, stages and batch arithmetic."""
    import deepspeed.comm
    from deepspeed.runtime.config import DeepSpeedConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.comm, "get_rank", lambda: 0)  # DeepSpeed also asks for the rank
        read = DeepSpeedConfig(copy.deepcopy(ds), mpu=Ranks(world_size))
    assert read.world_size == world_size
    assert not read.timers_config.synchronized, "the host would wait for the device in every micro-batch"
    assert read.train_batch_size == ds["train_batch_size"]
    assert read.gradient_accumulation_steps == ds["gradient_accumulation_steps"]
    assert read.gradient_clipping == ds["gradient_clipping"]
    assert read.zero_optimization_stage in (0, 1, 2, 3)


def test_dry_run_asks_for_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, ds = dry_run("smollm2-135m/encoder", "global_batch=16", "micro_batch=2")
    assert ds["gradient_accumulation_steps"] == 4
    monkeypatch.setenv("WORLD_SIZE", "3")
    result = CliRunner().invoke(app, ["train", "smollm2-135m/encoder", "global_batch=16", "micro_batch=2", "--dry-run"])
    assert isinstance(result.exception, ConfigError) and "set global_batch to a multiple of 3" in str(result.exception)


def test_dry_run_says_how_a_step_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    result = CliRunner().invoke(app, ["train", "smollm2-135m/encoder", "--dry-run"], catch_exceptions=False)
    said = "# a step of global_batch=8: 8 ranks, each with 1 pass of micro_batch=1 (the recipe's 4 does not divide"
    assert said in result.stdout
    assert yaml.safe_load(result.stdout)["micro_batch"] == 1


@pytest.mark.parametrize("name", ds_config_names())
def test_released_deepspeed_configs_satisfy_deepspeed_itself(name: str) -> None:
    """A dry run can therefore check an unchanged file without loading DeepSpeed.

    A new file needs no entry: without one, DeepSpeed itself checks it in every dry run.
    """
    path = DS_CONFIG_ROOT / f"{name}.json"
    text = path.read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert RELEASED.get(name, digest) == digest, f'{name}.json has changed; RELEASED should say "{name}": "{digest}"'
    config = load_run("smollm2-135m/encoder", [f"zero={name}", "nvme_path=/nvme"])
    content = ds_config(config, 2, ranks_per_node=2)
    deepspeed._refuse_removed_keys(content, path)
    deepspeed._check_values(content, path)


def test_only_unchanged_deepspeed_configs_count_as_released(tmp_path: Path) -> None:
    path = DS_CONFIG_ROOT / "zero2.json"
    text = path.read_text(encoding="utf-8")
    assert deepspeed._is_released(path, text)
    assert not deepspeed._is_released(path, text + " ")
    assert not deepspeed._is_released(tmp_path / "zero2.json", text)
    assert not deepspeed._is_released(DS_CONFIG_ROOT / "mine.json", text)


def test_every_released_config_is_a_file() -> None:
    assert set(RELEASED) <= set(ds_config_names())


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dry_run("smollm2-135m/encoder", "out=somewhere")
    assert not list(tmp_path.iterdir())


# -- DeepSpeed's JSON --------------------------------------------------------------------------------------------------


@pytest.fixture
def json_file(tmp_path: Path) -> Any:
    """Returns a function: `json_file({...})` writes a copy of zero2.json with these entries and returns its path."""

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
        ({"optimizer": {"type": "AdamW"}}, "optimizer follows from the recipe: remove it"),
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
        (
            {"zero_optimization/stage": 0, "zero_optimization/offload_optimizer": {"device": "cpu"}},
            "ZeRO stage 0 has neither offload nor fp16",
        ),
        ({"zero_optimization/offload_param": {"device": "cpu"}}, "offload_param and offload to nvme need ZeRO stage 3"),
        ({"zero_optimization/zero_hpz_partition_size": 2}, "zero_hpz_partition_size needs ZeRO stage 3"),
        (
            {"zero_optimization/stage": 3, "zero_optimization/zero_hpz_partition_size": 2},
            "1 ranks are not a multiple of zero_hpz_partition_size=2",
        ),
        (
            {"zero_optimization/stage": 3, "zero_optimization/offload_param": {"device": "nvme", "nvme_path": "auto"}},
            "swaps to a disk; name a folder on it: nvme_path=",
        ),
        ({"zero_optimization/mics_shard_size": 16}, "MiCS ZeRO-3 sharding has been removed"),
        ({"aio/block_sise": 1}, "aio: unknown key 'block_sise'; did you mean 'block_size'"),
        ({"flops_profiler/enable": True}, "flops_profiler: unknown key 'enable'; did you mean 'enabled'"),
        ({"data_types/grad_acum_dtype": "fp32"}, "data_types: unknown key 'grad_acum_dtype'; did you mean 'grad_accum"),
        ({"data_types/grad_accum_dtype": "fp64"}, "data_types: grad_accum_dtype='fp64'; choose fp32, bf16 or fp16"),
        ({"wandb/projekt": "x"}, "wandb: unknown key 'projekt'; did you mean 'project'"),
        ({"comms_logger/verbos": True}, "comms_logger: unknown key 'verbos'; did you mean 'verbose'"),
        ('{"gradient_clipping": 1.0, "gradient_clipping": 2.0}', "the key 'gradient_clipping' appears twice"),
        ({"zero_optimization/overlap_comm": "perhaps"}, "zero_optimization: overlap_comm='perhaps'"),
        ({"zero_optimization": 2}, "zero_optimization"),
        ({"zero_optimization": None}, "zero_optimization"),
        ({"bf16": True}, "bf16"),
        ("[1, 2]", "must hold a JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_wrong_json_is_refused(json_file: Any, changes: Any, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(json_file(changes))
    assert complaint in str(caught.value) and "mine.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_may_repeat_or_omit_values_of_the_recipe(json_file: Any) -> None:
    ds = resolve(json_file({"train_batch_size": 8, "gradient_clipping": 1.0, "bf16": {}}))
    assert (ds["train_batch_size"], ds["bf16"]["enabled"], ds["fp16"]["enabled"]) == (8, False, False)
    assert resolve(json_file('{"zero_optimization": {"stage": 1}}'))["gradient_accumulation_steps"] == 2


def test_values_of_the_json_reach_deepspeed(json_file: Any) -> None:
    ds = resolve(json_file({"zero_optimization/reduce_bucket_size": 12345, "wall_clock_breakdown": True}))
    assert ds["zero_optimization"]["reduce_bucket_size"] == 12345 and ds["wall_clock_breakdown"] is True


def test_unknown_zero_config_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown DeepSpeed config 'zero33'; did you mean 'zero3'"):
        resolve("zero33")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"enabled": False}, {"enabled": False, "output_path": "here/run", "job_name": "tensorboard"}),
        ({"job_name": "mine"}, {"enabled": True, "output_path": "here/run", "job_name": "mine"}),
        ({"output_path": "all", "job_name": "a"}, {"enabled": True, "output_path": "all", "job_name": "a"}),
    ],
)
def test_what_the_json_says_of_tensorboard_counts(json_file: Any, section: Any, expected: Any) -> None:
    assert resolve(json_file({"tensorboard": section}), "out=here/run")["tensorboard"] == expected


def test_no_entry_of_the_json_is_overridden(json_file: Any) -> None:
    entries = {"zero_allow_untested_optimizer": False, "zero_force_ds_cpu_optimizer": True, "steps_per_print": 5}
    entries |= {"dump_state": True, "memory_breakdown": True, "wall_clock_breakdown": True}
    entries["csv_monitor"] = {"enabled": True, "output_path": "curves", "job_name": "a"}
    entries["data_types"] = {"grad_accum_dtype": "fp32"}
    ds = resolve(json_file(entries))
    assert {key: ds[key] for key in entries} == entries


def test_tensorboard_goes_into_the_run_folder(json_file: Any) -> None:
    assert resolve(json_file({}), "out=here/run")["tensorboard"] == {
        "enabled": True,
        "output_path": "here/run",
        "job_name": "tensorboard",
    }
