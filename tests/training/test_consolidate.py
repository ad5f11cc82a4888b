"""Weights restored from DeepSpeed's shards or from resume state equal those that the ranks gathered, to the byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks
from safetensors.torch import load_file
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.loading import load_run
from zero_ds.config.schema import RunConfig
from zero_ds.grafting.load import load_graft, load_trained
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import CheckpointError, find_checkpoint
from zero_ds.training.checkpoint.consolidate import ZeroCheckpoint, consolidate_checkpoint, consolidate_shards
from zero_ds.training.setup import Run


def train_and_save(configs: list[RunConfig]) -> list[str]:
    """Trains each run; after its last step, DeepSpeed itself saves the engine in the run's folder `deepspeed`."""
    from zero_ds.training import train

    loop, saved = train.loop, []

    def saving(run: Run, engine: Any, *rest: Any) -> Path:
        folder = loop(run, engine, *rest)
        engine.engine.save_checkpoint(f"{run.out}/deepspeed", exclude_frozen_parameters=True)
        return folder

    train.loop = saving  # type: ignore[assignment]
    for config in configs:
        saved.append(train.train(config).name)
    train.loop = loop
    return saved


CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "zero3": (2, "pretrain", {"zero": "zero3"}),
    "zero2-bf16": (2, "encoder", {"zero": "zero2", "precision": "bf16"}),
    "zero3-lora-bf16": (2, "decoder", {"zero": "zero3", "precision": "bf16", "lora": {"rank": 3, "layers": [1, 4]}}),
    "zero3-three-ranks": (3, "encoder", {"zero": "zero3", "global_batch": 3}),
    "zero1-three-ranks": (3, "pretrain", {"zero": "zero1", "global_batch": 3}),
}
"""Name -> ranks, stage, settings."""


@pytest.fixture(scope="module")
def runs(run_config: Callable[..., RunConfig], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for world in (2, 3):
        configs = [
            run_config(stage, root / name, max_steps=2, init_from=[str(trained / "pretrain")], **settings)
            for name, (ranks, stage, settings) in CASES.items()
            if ranks == world
        ]
        assert run_ranks(train_and_save, world, configs) == [["step-000002"] * len(configs)] * world
    return root


@pytest.mark.parametrize("case", list(CASES))
def test_shards_become_what_the_ranks_gathered(case: str, runs: Path, tmp_path: Path) -> None:
    """The command finds DeepSpeed's tag and the run's config.yaml; the weights are the checkpoint's, byte for byte."""
    done = CliRunner().invoke(
        app, ["consolidate", str(runs / case / "deepspeed"), "--out", str(tmp_path / "out")], catch_exceptions=False
    )
    assert done.exit_code == 0 and "step-000002" in done.output
    live, found = find_checkpoint(runs / case), find_checkpoint(tmp_path / "out")
    gathered, tensors = (load_file(one.folder / "weights.safetensors") for one in (live, found))
    assert list(gathered) == list(tensors)
    for name, tensor in gathered.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name
    for key in ("weights_sha256", "stage", "step", "family", "target_hash", "encoder_hash", "plan", "relies_on"):
        assert found.manifest[key] == live.manifest[key], key
    assert found.manifest["origin"]["ranks"] == CASES[case][0]


def test_the_model_is_the_run_s(runs: Path, small: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """A consolidated folder is read like a run's: in its surrogate, grafted, and with its low-rank adapters."""
    models: list[tuple[str, Callable[[Path], VisionLanguageModel]]] = [
        ("zero3", lambda run: load_trained(run, small)),
        ("zero3-lora-bf16", lambda run: load_graft(run, made("llama", tied=True))),
    ]
    ids = torch.arange(5, 25)[None]
    for name, load in models:
        config = load_run(str(runs / name / "config.yaml"))
        consolidate_shards(runs / name / "deepspeed" / "global_step2", config, tmp_path / name)
        logits = []
        for run in (runs / name, tmp_path / name):
            model = load(run)
            with torch.no_grad():
                logits.append(model.logits(model.hidden_states(ids, torch.ones_like(ids))))
        assert torch.equal(*logits)


class Evil:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def _rewritten(change: Callable[[dict[str, Any]], Any], name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)

    return write


def _truncated(folder: Path) -> None:
    path = folder / OPTIMIZER
    path.write_bytes(path.read_bytes()[:-3000])


MODEL, OPTIMIZER = "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"

BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rank 0 lost": (lambda f: (f / OPTIMIZER.replace("rank_1", "rank_0")).unlink(), "lacks the share of rank 0"),
    "rank 1 lost": (lambda f: (f / OPTIMIZER).unlink(), "was saved by 2 ranks and holds"),
    "no model states": (lambda f: (f / MODEL).unlink(), "file .*model_states.pt does not exist"),
    "truncated": (_truncated, "optim_states.pt is not a file of torch.save.* or is damaged"),
    "code": (_rewritten(lambda c: c.update(mine=Evil("mark")), MODEL), "is refused: it names .*mkdir"),
    "another share": (
        _rewritten(lambda c: c["optimizer_state_dict"]["fp32_flat_groups"].pop(), OPTIMIZER),
        "elements where its parameters have",
    ),
    "model parallel": (
        lambda f: (f / OPTIMIZER).rename(f / OPTIMIZER.replace("mp_rank_00", "mp_rank_01")),
        "model-par",
    ),
    "another layout": (_rewritten(lambda c: c.pop("param_shapes"), MODEL), "is not a ZeRO checkpoint of DeepSpeed"),
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "holds neither shards of DeepSpeed"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_wrong_is_refused(case: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change, complaint = BAD[case]
    folder = tmp_path / "shards"
    shutil.copytree(runs / "zero3" / "deepspeed" / "global_step2", folder)
    change(folder)
    with pytest.raises(ConfigError, match=complaint) as caught:
        consolidate_shards(folder, load_run(str(runs / "zero3" / "config.yaml")), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_another_run_than_the_recipe_s(runs: Path, tmp_path: Path) -> None:
    shards = runs / "zero3" / "deepspeed"
    other = load_run(str(runs / "zero3-three-ranks" / "config.yaml"))
    with pytest.raises(ConfigError, match=r"holds decoder\.model\.layers\.1.* which stage encoder .* does not train"):
        consolidate_shards(shards, other, tmp_path / "out")
    config = load_run(str(runs / "zero3" / "config.yaml"))
    more = config.model_copy(update={"stage": "pretrain-early"})
    with pytest.raises(ConfigError, match=r"lacks decoder\.model\.layers\.0.* stage pretrain-early .* trains"):
        consolidate_shards(shards, more, tmp_path / "out")
    with pytest.raises(ConfigError, match="say which run saved"):
        CliRunner().invoke(
            app,
            ["consolidate", str(shards / "global_step2"), "--out", str(tmp_path / "out")],
            catch_exceptions=False,
        )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "latest").write_text("../shards")
    with pytest.raises(ConfigError, match="does not name a folder next to it"):
        ZeroCheckpoint(tmp_path / "elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("case", ["zero3", "zero2-bf16"])
def test_lost_weights_come_back_from_the_resume_state(case: str, runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / case, run)
    weights = run / "step-000002" / "weights.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    if case == "zero3":  # auto: the type depends on a machine that is no longer known; the hash tells it
        manifest = json.loads((run / "step-000002" / "manifest.json").read_text())
        manifest["config"]["precision"] = "auto"
        (run / "step-000002" / "manifest.json").write_text(json.dumps(manifest))
    done = CliRunner().invoke(app, ["consolidate", str(run), "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0
    assert (tmp_path / "out" / "step-000002" / "weights.safetensors").read_bytes() == before

    manifest = json.loads((run / "step-000002" / "manifest.json").read_text())
    (run / "step-000002" / "manifest.json").write_text(json.dumps({**manifest, "weights_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="does not give the weights that its manifest names"):
        consolidate_checkpoint(run, tmp_path / "other")
    state = run / "step-000002" / "resume" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is damaged"):
        consolidate_checkpoint(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from zero_ds.training.checkpoint import consolidate
from zero_ds.config.schema import RunConfig
from zero_ds.training.checkpoint.foreign import write_result

folder, mapped = Path(sys.argv[1]), int(sys.argv[2])
consolidate.MAPPED = mapped
config = RunConfig(stage="decoder", target="nowhere", out="nowhere")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
checkpoint = consolidate.ZeroCheckpoint(folder / "shards")
declared = [(name, torch.bfloat16, shape) for name, shape in checkpoint.shapes.items()]
write_result(folder / "out", config, {}, 1, declared, checkpoint.pieces)
print(before, peak())
"""


def write_shards(folder: Path, *, ranks: int, parameters: int, elements: int) -> int:
    """Writes a ZeRO-3 checkpoint whose numbers encode their places; returns the bytes of all shares."""
    folder.mkdir()
    shapes = {f"p{number}": torch.Size([elements]) for number in range(parameters)}
    part = -(-elements // ranks)
    for rank in range(ranks):
        flat = torch.cat(
            [torch.arange(rank * part, (rank + 1) * part, dtype=torch.float32) % 251 + n for n in range(parameters)]
        )
        state = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [flat]}
        torch.save({"optimizer_state_dict": state}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save({"param_shapes": [shapes], "ds_config": {"bf16": {"enabled": True}}}, folder / MODEL)
    return 4 * part * parameters * ranks


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """168 MB of shares take no more than the window of 16 MB and some pieces on top of the libraries' own."""
    elements = 3_500_001
    size = write_shards(tmp_path / "shards", ranks=3, parameters=12, elements=elements)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(16 << 20)], check=True, capture_output=True, text=True
    )
    before, after = map(int, done.stdout.split())
    assert after - before < size / 3, f"{(after - before) >> 20} MiB for {size >> 20} MiB"
    found = load_file(tmp_path / "out" / "step-000001" / "weights.safetensors")
    for number in (0, 11):
        expected = (torch.arange(elements, dtype=torch.float32) % 251 + number).to(torch.bfloat16)
        # the last part is padded, and its numbers go on after the parameter's end
        assert torch.equal(found[f"p{number}"], expected)
