"""What a save costs: our commit against DeepSpeed's own ways and transformers' Trainer, in one run, in turns.

    python tools/bench/checkpoints.py --runs runs --stage encoder --out checkpoints.json

Same model, DeepSpeed JSON and ranks, behind one step. `resumes`: whether training can go on from what was written.
Bytes are those of the folder; growth is what the ranks' resident memory grows at its most while they save, summed over
ranks. Ours syncs its files to the disk before it counts as saved, the others leave that to the system.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import report
import step
import trainers
import typer
from turns import Group, Turn

OURS = ("ours, checkpoint", "DeepSpeed save_16bit_model", "DeepSpeed save_checkpoint")
THEIRS = ("Trainer save_model", "Trainer checkpoint")
RESUMES = ("ours, checkpoint", "DeepSpeed save_checkpoint", "Trainer checkpoint")


def saving(turn: Turn, folder: Path, ways: list[Callable[[str], Any]]) -> None:
    """Saves in each way in turn, for ever."""
    import torch.distributed as dist

    rank = dist.get_rank()
    while True:
        for number, way in enumerate(ways):
            out = folder / f"save-{number}"
            turn.step()
            before = report.resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
            way(str(out))
            dist.barrier()
            turn.count(growth=max(0.0, report.resident() - before))
            if rank == 0:
                turn.count(bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()))
                shutil.rmtree(out)
            dist.barrier()


def ours(turn: Turn, recipe: str, overrides: list[str], zero: str, out: str) -> None:
    """Builds a run's engine, makes a step, and saves it in three ways."""
    from zero_ds.config.loading import load_run
    from zero_ds.runtime import distributed
    from zero_ds.training import stages
    from zero_ds.training.checkpoint.manifest import Manifest, describe_models, describe_run
    from zero_ds.training.checkpoint.save import save_checkpoint
    from zero_ds.training.deepspeed import ds_config
    from zero_ds.training.engine import Engine
    from zero_ds.training.setup import load_model, make_loader, seed_everything

    content = json.loads(Path(zero).read_text(encoding="utf-8"))
    if content["zero_optimization"]["stage"] == 3:
        content["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    gathering = Path(out) / f"gathering-{distributed.rank()}.json"
    gathering.write_text(json.dumps(content), encoding="utf-8")
    config = load_run(recipe, [*overrides, f"zero={gathering}"])
    distributed.initialize()
    seed_everything(config.seed)
    ds = ds_config(config, distributed.world_size())
    model = load_model(config, ds)
    loader = make_loader(config, model)
    groups = stages.freeze_(model, config)
    model.train()
    engine = Engine(config, model, groups, 10, ds)
    engine.step(next(iter(loader.steps(0, 1))), 0, 100.0)
    manifest: Manifest = {**describe_run(config), **describe_models(config, model.plan)}

    def commit(folder: str) -> None:
        save_checkpoint(Path(folder), engine, manifest, {"step": 1}, keep=1)

    def commit_in(folder: str) -> None:
        if distributed.is_rank_zero():
            Path(folder).mkdir()
        commit(folder)

    saving(turn, Path(out), [commit_in, engine.engine.save_16bit_model, engine.engine.save_checkpoint])


def theirs(turn: Turn, **arguments: Any) -> None:
    """Lets Trainer make a step, and saves in two ways."""

    def behind(trainer: Any) -> None:
        def checkpoint(folder: str) -> None:
            trainer.args.output_dir = folder
            trainer._save_checkpoint(trainer.model, trial=None)

        saving(turn, Path(arguments["out"]).parent, [trainer.save_model, checkpoint])

    trainers.llava(turn, behind=behind, **arguments)


def main(
    runs: Annotated[Path, typer.Option(help="Folder with demo/ and quickstart/, as launch/quickstart.sh leaves it.")],
    model: Annotated[str, typer.Option(help="Folder of recipes.")] = "smollm2-135m",
    stage: Annotated[str, typer.Option(help="encoder or decoder.")] = "encoder",
    zero: Annotated[str, typer.Option(help="DeepSpeed config.")] = "zero3_resident",
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    setting: Annotated[list[str] | None, typer.Option(help="For ours: key=value of the recipe.")] = None,
    ranks: int = 2,
    rounds: int = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare saves."""
    common, peer = step.settings(runs.resolve(), zero, precision, 4 * ranks, 4, ranks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("ours", "theirs"):
            (folder / part).mkdir()
        overrides = [*common, *(setting or []), "decoder=target", "init_from=[]", f"out={folder / 'ours/run'}"]
        arguments = {"recipe": f"{model}/{stage}", "overrides": overrides, "zero": peer["zero"]}
        trains = step.ENCODER_PARTS if stage == "encoder" else []
        found: dict[str, list[dict[str, float]]] = {way: [] for way in (*OURS, *THEIRS)}
        with (
            Group("ours", ours, ranks, folder, out=str(folder / "ours"), **arguments) as mine,
            Group("Trainer", theirs, ranks, folder, **peer, trains=trains, out=str(folder / "theirs/run")) as other,
        ):
            for _ in range(rounds):
                for group, ways in ((mine, OURS), (other, THEIRS)):
                    for way in ways:
                        found[way].append(_difference(group))
    rows = [
        {
            "way": way,
            "megabytes": turns[-1]["bytes"] / 1e6,
            "seconds": [turn["seconds"] for turn in turns],
            "growth_mib": report.median([turn["growth"] for turn in turns]) * 1024,
            "resumes": way in RESUMES,
        }
        for way, turns in found.items()
    ]
    cells = [
        [
            r["way"],
            "yes" if r["resumes"] else "no",
            r["megabytes"],
            report.spread(r["seconds"]),
            r["growth_mib"],
            r["megabytes"] / 1e3 / report.median(r["seconds"]),
        ]
        for r in rows
    ]
    print(report.table([f"{stage} stage", "resumes", "MB", "seconds", "growth, MiB", "GB/s"], cells))
    report.write(out, {"stage": stage, "ranks": ranks, "zero": zero, "rows": rows})


def _difference(group: Group) -> dict[str, float]:
    """One save: what was counted beyond the saves before it."""
    before = dict(group.found[-1]["counted"]) if group.found else {}
    turn = group.turn(1)
    return {
        "seconds": turn["seconds"],
        **{name: number - before.get(name, 0.0) for name, number in turn["counted"].items()},
    }


if __name__ == "__main__":
    typer.run(main)
