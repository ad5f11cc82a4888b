"""Compares a training step of this package with transformers' Trainer on Llava, in turns in one run.

    launch/quickstart.sh          # once: demo data, surrogate, and the exported Llava that the peer trains
    python tools/bench/step.py --runs runs --out step.json
    python tools/bench/step.py --runs runs --also compile=true --also env:LD_PRELOAD=libtcmalloc_minimal.so.4

Encoder and decoder stage; both sides have the same model, data, precision, DeepSpeed JSON, global batch, micro-batch
and ranks. In the encoder stage ours trains against a surrogate and the peer through the full model, because saving that
is the purpose of the surrogate; a row `full` shows ours through the full model as well. In a round every contestant
makes `--steps` steps; medians are over rounds. Memory is the peak resident set of a rank, libraries included. MFU
divides the FLOPs that each method needs (zero_ds/training/planning/flops.py) by the rate of one thread per rank in a
matrix product. `--also` adds ours with other settings and, for settings with `env:`, the peer in that environment.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import report
import trainers
import typer
from turns import Group

ENCODER_PARTS = ["vision_tower", "multi_modal_projector"]


def settings(
    runs: Path, zero: str, precision: str, global_batch: int, micro_batch: int, ranks: int
) -> tuple[list[str], dict[str, Any]]:
    """Returns the same settings for both: our overrides, and the peer's arguments for `LlavaOptions`."""
    from zero_ds.training.deepspeed import DS_CONFIG_ROOT

    data = runs / "demo/data/train.json"
    common = [
        f"encoder.path={runs / 'demo/encoder'}",
        f"data.sources=[{{path: {data}}}]",
        f"zero={zero}",
        f"precision={precision}",
        f"global_batch={global_batch}",
        f"micro_batch={micro_batch}",
    ]
    peer = {
        "model": str(runs / "quickstart/export"),
        "data": str(data),
        "zero": zero if zero.endswith(".json") else str(DS_CONFIG_ROOT / f"{zero}.json"),
        "micro_batch": micro_batch,
        "accumulation": global_batch // (micro_batch * ranks),
        "precision": precision,
    }
    return common, peer


def build(target: Path, layers: str, out: Path) -> None:
    """Builds a surrogate in a process of its own, so that this one stays small."""
    command = [sys.executable, "-m", "zero_ds.cli", "surrogate", "--target", str(target), "--replace", layers]
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)


def words(text: str) -> tuple[list[str], dict[str, str]]:
    """Splits `key=value env:NAME=value ...` into settings of a recipe and environment variables."""
    parts = text.split()
    environment = dict(part[4:].split("=", 1) for part in parts if part.startswith("env:"))
    return [part for part in parts if not part.startswith("env:")], environment


def contestants(
    stage: str,
    cuts: list[str],
    folder: Path,
    model: str,
    common: list[str],
    peer: dict[str, Any],
    also: list[str],
    plain: bool,
) -> dict[str, tuple[Any, dict[str, Any], dict[str, str]]]:
    """Returns, for each contestant's name, its function, arguments and environment.

    The peer comes first, then our run through the full model, then our other runs. plain: whether our run without any
    of `also` takes part.
    """
    trains = ENCODER_PARTS if stage == "encoder" else []
    found: dict[str, tuple[Any, dict[str, Any], dict[str, str]]] = {}
    for number, text in enumerate(["", *also]):
        settings, environment = words(text)
        if environment or not text:
            named = ", ".join([f"{stage}: Trainer", *map(short, environment.values())])
            out = str(folder / f"peer-{stage}-{number}")
            options = trainers.LlavaOptions(**peer, trains=trains, out=out)
            found.setdefault(named, (trainers.llava, {"options": options}, environment))
    ways = {"ours": []} if stage == "decoder" else {"ours, full": ["decoder=target"]}
    if stage == "encoder":
        ways |= {f"ours, T({cut.replace(':', ',')})": [f"surrogate={folder / cut.replace(':', '-')}"] for cut in cuts}
    for text in ["", *also] if plain else also:
        settings, environment = words(text)
        for name, own in ways.items():
            if text and own == ["decoder=target"]:
                continue  # the full model is measured with the recipe's own settings only
            named = ", ".join([f"{stage}: {name}", *settings, *map(short, environment.values())])
            overrides = [*common, *own, *settings, f"out={folder / f'{stage}-{len(found)}'}", "init_from=[]"]
            found[named] = (trainers.ours, {"recipe": f"{model}/{stage}", "overrides": overrides}, environment)
    return found


def short(value: str) -> str:
    """Returns a file's name without its folder and extensions."""
    return Path(value).name.split(".")[0]


def flops_per_sample(arguments: dict[str, Any], counted: dict[str, float]) -> float:
    """Returns the FLOPs that the method needs for an average counted sample, forward and backward."""
    from zero_ds.config.loading import load_run
    from zero_ds.training.planning.architecture import architecture
    from zero_ds.training.planning.flops import step_cost

    config = load_run(arguments["recipe"], arguments["overrides"])
    model = architecture(config).model
    tokens = counted["images"] * model.tokens_per_image()
    whole = step_cost(model).flops(
        counted["tokens"], counted["pairs"], counted["supervised"], counted["images"], tokens
    )
    return whole / counted["samples"]


def main(
    runs: Annotated[Path, typer.Option(help="Folder with demo/ and quickstart/, as launch/quickstart.sh leaves it.")],
    model: Annotated[str, typer.Option(help="Folder of recipes.")] = "smollm2-135m",
    stages: Annotated[str, typer.Option(help="encoder, decoder, or both with a comma.")] = "encoder,decoder",
    cut: Annotated[list[str] | None, typer.Option(help="Layers that one translator replaces, first:last.")] = None,
    zero: Annotated[str, typer.Option(help="DeepSpeed config of all contestants.")] = "zero3_resident",
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    setting: Annotated[list[str] | None, typer.Option(help="key=value of our recipe; repeatable.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Also measure ours with these settings: key=value and env:NAME=value, separated by blanks."),
    ] = None,
    plain: Annotated[
        bool, typer.Option(help="Measure ours without --also as well; without it, more of --also fit into memory.")
    ] = True,
    ranks: int = 2,
    global_batch: int = 8,
    micro_batch: int = 4,
    steps: Annotated[int, typer.Option(help="Steps of a turn; a multiple of 8, so that all see the same samples.")] = 8,
    warm_up: Annotated[int, typer.Option(help="Steps that do not count.")] = 8,
    rounds: int = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare training steps."""
    from zero_ds.config.loading import load_run

    runs = runs.resolve()
    names, cuts = stages.split(","), cut or ["24:28", "18:28", "12:28"]
    target = load_run(f"{model}/decoder", setting).target
    common, peer = settings(runs, zero, precision, global_batch, micro_batch, ranks)
    common += setting or []
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layers in cuts if "encoder" in names else []:
            build(Path(target), layers, folder / layers.replace(":", "-"))
        limits = report.measured_limits()
        for stage in names:  # one stage at a time, because all contestants of a stage are alive together
            entries = contestants(stage, cuts, folder, model, common, peer, also or [], plain)
            groups = []
            with contextlib.ExitStack() as stack:
                for called, (function, arguments, environment) in entries.items():
                    group = stack.enter_context(
                        Group(called, function, ranks, folder, environment=environment, **arguments)
                    )
                    # one after the other, because loading needs the most memory
                    print(f"{called}: warm-up {group.turn(warm_up)['seconds']:.1f} s", file=sys.stderr, flush=True)
                    groups.append(group)
                for _ in range(rounds):
                    for group in groups:
                        print(f"{group.name}: {group.turn(steps)['seconds']:.1f} s", file=sys.stderr, flush=True)
            peak = ranks * limits[f"{precision}_gflops"] * 1e9
            methods = {
                name: arguments for name, (function, arguments, _) in entries.items() if function is trainers.ours
            }
            found += summary(groups, methods, steps * global_batch, peak)
    print(
        report.table(
            ["contestant", "samples/s", "times", "supervised/s", "peak GiB", "share", "MFU", "positions used"],
            [
                [
                    row["contestant"],
                    report.spread(row["samples_per_second"]),
                    row["times_the_peer"],
                    row["supervised_per_second"],
                    row["peak_gib"],
                    row["share_of_peers_memory"],
                    row["mfu"],
                    row["positions_used"],
                ]
                for row in found
            ],
        )
    )
    report.write(
        out, {"ranks": ranks, "zero": zero, "precision": precision, "settings": setting, "also": also, "rows": found}
    )


def summary(groups: list[Group], methods: dict[str, dict[str, Any]], samples: int, peak: float) -> list[dict[str, Any]]:
    """Returns a row for each group, compared with the first one, the peer. The first turn was the warm-up.

    methods: the arguments of our groups by name. The peer's FLOPs are those of the full model.
    """
    rows = []
    base = report.median([samples / turn["seconds"] for turn in groups[0].found[1:]])
    some = next(iter(methods.values()))
    through_all = {**some, "overrides": [*some["overrides"], "decoder=target"]}
    for group in groups:
        rates = [samples / turn["seconds"] for turn in group.found[1:]]
        counted, memory = group.found[-1]["counted"], group.found[-1]["peak_gib"]
        rate = report.median(rates)
        rows.append(
            {
                "contestant": group.name,
                "samples_per_second": rates,
                "times_the_peer": rate / base,
                "supervised_per_second": rate * counted["supervised"] / counted["samples"],
                "peak_gib": memory,
                "share_of_peers_memory": memory / groups[0].found[-1]["peak_gib"],
                "mfu": rate * flops_per_sample(methods.get(group.name, through_all), counted) / peak,
                "positions_used": counted["tokens"] / counted["positions"],
            }
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
