"""Tests of tools/bench: each benchmark runs in a minimal form on tiny models, and computes its results correctly."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed_helper import run_ranks
from places import ROOT

sys.path[:0] = [str(ROOT / "tools" / "bench")]

import checkpoints  # noqa: E402
import image_table  # noqa: E402
import image_tokens  # noqa: E402
import report  # noqa: E402
import rounding  # noqa: E402
import save_scaling  # noqa: E402
import scaling  # noqa: E402
import scripts  # noqa: E402
import step  # noqa: E402
import surrogate  # noqa: E402
import trainers  # noqa: E402
import turns  # noqa: E402


@pytest.fixture(scope="module")
def runs(made: Callable[..., Path], data: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of tiny models with the files that launch/quickstart.sh leaves."""
    from zero_ds.export import export_model

    root = tmp_path_factory.mktemp("bench") / "runs"
    (root / "demo").mkdir(parents=True)
    (root / "quickstart").mkdir()
    shutil.copytree(made("clip"), root / "demo/encoder")
    shutil.copytree(data.parent, root / "demo/data")
    (root / "demo/data/data.json").rename(root / "demo/data/train.json")
    texts = [r for r in json.loads((root / "demo/data/train.json").read_text()) if "image" not in r]
    (root / "demo/data/trajectory.json").write_text(json.dumps(texts))
    shutil.copytree(trained / "encoder", root / "quickstart/encoder")
    export_model(trained / "encoder", None, root / "quickstart/export", proof="tensors")
    return root


@pytest.mark.parametrize("webdataset", [False, True])
def test_tables_with_images_are_written_and_read(
    made: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    webdataset: bool,
) -> None:
    from zero_ds.config.schema import SourceConfig
    from zero_ds.data.images import open_image
    from zero_ds.data.sources import Records

    image_table.write(tmp_path / "set", samples=7, shard=3, webdataset=webdataset)
    records = Records([SourceConfig(path=str(tmp_path / "set"))])
    assert len(records) == 7 and len({sample.images[0].read() for sample in records}) == 7  # type: ignore[union-attr]
    assert open_image(records[6].images[0]).size == (640, 480)
    assert image_table.read_rate(lambda index: records[index], range(7)) > 0
    monkeypatch.setattr(image_table, "BATCH", 2)
    data = image_table.plain_data(tmp_path / "set", tmp_path / "cache")
    contents = [image_table.plain_sample(row)[0] for row in data]
    assert contents == [sample.images[0].read() for sample in records]  # type: ignore[union-attr]
    found = image_table._steps(records, data, str(made("llama", tied=True)), 1, 5, 1, 0.01)
    rates = found["samples_per_second_ready"]
    assert len(rates) == 6 and all(min(of_rounds) > 0 for of_rounds in rates.values())
    image_table._report(found)
    assert "1_workers_with_0.01_s_of_computing" in capsys.readouterr().out


class Over(BaseException):
    """Raised when the turns of a `Counted` are over."""


class Counted(turns.Turn):
    """A turn that never waits, and ends after `steps` steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(connection=None)  # type: ignore[arg-type]
        self.left = steps + 1

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Over


def counted(function: Callable[..., None], arguments: dict[str, Any], steps: int) -> dict[str, float]:
    """Returns the numbers that a rank's function counts in `steps` steps."""
    turn = Counted(steps)
    with pytest.raises(Over):
        function(turn, **arguments)
    return turn.counted


@pytest.fixture(scope="module")
def settings(runs: Path, made: Callable[..., Path]) -> tuple[list[str], dict[str, Any]]:
    """Returns our overrides and the peer's arguments for the tiny models."""
    common, peer = step.settings(runs, "zero3_resident", "fp32", 4, 4, 1)
    return [*common, f"target={made('llama', tied=True)}", "data.max_length=512"], peer


def test_both_ways_of_a_step_see_the_same_samples(settings: Any, tmp_path: Path) -> None:
    """Two steps of four samples each: the same images and text, and more positions than tokens in padded batches."""
    common, peer = settings
    entries = step.contestants("encoder", [], tmp_path, "smollm2-135m", common, peer, [], True)
    (theirs,), (ours,) = (run_ranks(counted, 1, *entry[:2], 2) for entry in entries.values())
    assert ours["samples"] == 8 and theirs["samples"] >= 8  # it fetches a batch ahead
    per_sample = theirs["samples"] / ours["samples"]
    assert ours["images"] * per_sample == pytest.approx(theirs["images"], abs=4)
    assert theirs["tokens"] / theirs["samples"] == pytest.approx(ours["tokens"] / ours["samples"], rel=0.2)
    assert 0 < theirs["supervised"] < theirs["tokens"] < theirs["positions"]
    assert ours["supervised"] > 0


def test_saves_of_both_are_counted(settings: Any, tmp_path: Path) -> None:
    """Saves once in every way: each writes a folder with files, which is removed afterwards."""
    common, peer = settings
    for part, function, arguments, ways in (
        (
            "ours",
            checkpoints.ours,
            {
                "recipe": "smollm2-135m/encoder",
                "overrides": [*common, "decoder=target", "init_from=[]", f"out={tmp_path / 'run'}"],
                "zero": peer["zero"],
                "out": str(tmp_path / "ours"),
            },
            checkpoints.OURS,
        ),
        (
            "theirs",
            checkpoints.theirs,
            {"options": trainers.LlavaOptions(**peer, trains=step.ENCODER_PARTS, out=str(tmp_path / "theirs/run"))},
            checkpoints.THEIRS,
        ),
    ):
        (tmp_path / part).mkdir()
        (found,) = run_ranks(counted, 1, function, arguments, len(ways))
        assert found["bytes"] > 0 and found["growth"] >= 0
        assert not [path for path in (tmp_path / part).glob("save-*") if any(path.rglob("*"))]


class Canned:
    """A group without ranks: every step takes 1 s for the first contestant and 0.5 s for the others."""

    number = 0

    def __init__(self, name: str, function: Any, ranks: int, folder: Path, **arguments: Any) -> None:
        self.name, self.found = name, list[dict[str, Any]]()
        self.speed = 1.0 if "Trainer" in name else 0.5
        self.work = {"samples": 8, "tokens": 512, "pairs": 512 * 64, "supervised": 128, "images": 8, "positions": 640}

    def turn(self, steps: int) -> dict[str, Any]:
        number = len(self.found) + 1
        work = {name: float(value * steps * number) for name, value in self.work.items()}
        saved = {"growth": 0.5 * number, "bytes": 1e6 * number}
        found = {"seconds": steps * self.speed, "peak_gib": 2 * self.speed, "counted": {**work, **saved}}
        self.found.append({"steps": steps, **found})
        return found

    def __enter__(self) -> Canned:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_tables(
    settings: Any, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables of step, checkpoints and scaling, with canned results of the ranks; everything else is real."""
    for module in (step, checkpoints, scaling, image_tokens):
        monkeypatch.setattr(module, "Group", Canned)
    monkeypatch.setattr(step, "build", lambda target, layers, out: build(target, layers, out))
    common, _ = settings
    target = [setting for setting in common if setting.startswith("target=")]
    out = tmp_path / "out.json"
    cases = [
        (step.main, {"cut": ["2:4"], "precision": "fp32"}),
        (checkpoints.main, {}),
        (scaling.main, {"cut": ["2:4", "1:4"], "length": [16, 32], "tokens": 64}),
        (image_tokens.main, {"side": 6, "setting": [*target, "precision=fp32", "decoder=target"]}),
    ]
    for main, more in cases:
        main(runs, **{"setting": [*target, "precision=fp32"], "rounds": 2, "out": out, **more})
        assert json.loads(out.read_text())["machine"]["limits"]["fp32_gflops"] > 0
        if main is step.main:
            peer, full, cut = json.loads(out.read_text())["rows"][:3]
            assert peer["times_the_peer"] == 1 and cut["times_the_peer"] == 2 and full["share_of_peers_memory"] == 0.5
            # in half the time MFU doubles; a cut needs fewer FLOPs
            assert full["mfu"] == pytest.approx(2 * peer["mfu"]) and cut["mfu"] < full["mfu"]
        if main is image_tokens.main:
            found = json.loads(out.read_text())["rows"]
            assert [one["tokens_per_image"] for one in found] == [36, 9, 4] and found[0]["flops"] == 1
        if main is checkpoints.main:
            assert json.loads(out.read_text())["rows"][0]["megabytes"] == pytest.approx(1.0)
    assert "contestant" in capsys.readouterr().out


def build(target: Path, layers: str, out: Path) -> None:
    """Does the same as step.build, without a process."""
    from zero_ds.model.layer_plan import Replaced
    from zero_ds.surrogate.build import build_surrogate

    build_surrogate(target, [Replaced.parse(layers)], out)


def test_a_line_is_found() -> None:
    found = scaling.line([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert (
        found["slope"] == pytest.approx(2) and found["at_zero"] == pytest.approx(3) and found["r2"] == pytest.approx(1)
    )


def test_fewer_layers_cost_less(made: Callable[..., Path]) -> None:
    """A cut costs less in measured FLOPs and time on the tiny model, and in the plan."""
    full, cut = surrogate.measured(made("llama", tied=True), ["0:4"], (2, 16, 4), rounds=1, steps=1, precision="fp32")
    assert full["layers"] == 6 and cut["layers"] == 2
    assert 0.2 < cut["flop_ratio"] < 0.8 and full["time_over_flops"] == 1
    (plan,) = surrogate.planned(["llama-3.2-3b"], gpus=8, gpu_memory=80, gpu="A100")
    assert plan["flop_ratio"] < 0.8 and 0.9 < plan["time_over_flops"] < 1.2


def test_obvious_scripts_do_the_same(runs: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """The surrogate and the Llava of the obvious scripts have the same tensors as ours."""
    from safetensors.torch import load_file
    from transformers import LlavaForConditionalGeneration

    target = made("llama", tied=True)
    build(target, "2:4", tmp_path / "ours")
    scripts.surrogate(target, 2, 4, tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    scripts.trajectory(target, runs / "demo/data/trajectory.json", 2, tmp_path / "curves.json")
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert len(curves) == 2 and len(curves[0]) == 6 and all(curve[-1] == pytest.approx(0, abs=1e-6) for curve in curves)
    named = scripts.commands(runs, target, "2:4", 2, tmp_path / "llava")["export"]["obvious script"]
    scripts.export(*(Path(word) for word in named[3:]))
    made_by = [
        LlavaForConditionalGeneration.from_pretrained(folder).state_dict()  # type: ignore[no-untyped-call]
        for folder in (runs / "quickstart/export", tmp_path / "llava")
    ]
    assert made_by[0].keys() == made_by[1].keys()
    assert all((made_by[0][name] == made_by[1][name]).all() for name in made_by[0])
    seconds, peak = scripts.run([sys.executable, "-c", "print(1)"], tmp_path)
    assert seconds > 0 and peak > 0  # no bound: a child of a large process starts with its peak


def test_saves_are_measured_in_a_folder_that_is_made(tmp_path: Path) -> None:
    out = tmp_path / "results" / "saves.json"
    save_scaling.main([1], parameters=1 << 16, tensors=4, rounds=1, folder=tmp_path / "not" / "there", out=out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == list(save_scaling.WAYS)
    assert all(row["ranks"] == 1 and row["complete"][0] > 0 for row in rows)


def gpu_rows(parts: list[str], folder: str, configs: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of parts of gpu.sh with small models."""
    import gpu_models
    import gpu_parts

    small = Path(folder)
    if not small.exists():
        gpu_models.write_small(small)
    found = {}
    for name in parts:
        part, rows = gpu_parts.part_named(name), small / f"{name}.jsonl"
        assert part is not None
        work = gpu_parts.Work(time.monotonic() + 1e6, small, configs=configs)
        gpu_parts.write_rows(part, work, rows)
        found[name] = [json.loads(line) for line in rows.read_text().splitlines()]
    return found


def test_the_parts_of_the_gpu_script_run_on_a_cpu(tmp_path: Path) -> None:
    """All parts in one rank, with two DeepSpeed configs: nothing fails, and what needs a GPU says so."""
    parts = ["nccl", "kernels", "memory", "encoder-8b", "configs"]
    (found,) = run_ranks(gpu_rows, 1, parts, str(tmp_path / "small"), ("zero2", "zero3"))
    failed = [(part, row) for part, rows in found.items() for row in rows if row["ok"] is False]
    assert not failed
    assert [row["check"] for row in found["configs"] if row["ok"]] == ["zero2", "zero3"]
    kernels = {row["check"]: row for row in found["kernels"]}
    assert kernels["attention=sdpa"]["ok"] and kernels["frozen_weights=int8"]["ok"]
    assert kernels["attention=flash_attention_2"]["ok"] is None
    assert {row["check"] for row in found["memory"] if row["ok"]} == {"frozen", "trained", "gradients", "optimizer"}
    trained = next(row["figures"] for row in found["memory"] if row["check"] == "trained")
    assert trained["bytes"] == trained["planned"], "tied weights stay tied"
    (ours,) = found["encoder-8b"]
    assert len(ours["figures"]["seconds"]) == 5 and ours["figures"]["mfu"] > 0 and ours["figures"]["peak_gib"] > 0


def test_the_peer_of_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    (found,) = run_ranks(gpu_rows, 1, ["peer-encoder-8b"], str(tmp_path / "small"), ())
    (theirs,) = found["peer-encoder-8b"]
    assert theirs["ok"] and len(theirs["figures"]["seconds"]) == 5 and theirs["figures"]["tokens_per_second"] > 0


PART = """
import json, sys, time
name, rows = sys.argv[1:]
with open(rows, "w") as file:
    file.write(json.dumps({"check": "first", "answer": "well", "ok": True, "figures": {}}) + "\\n")
    if name == "fails":
        file.write(json.dumps({"check": "second", "answer": "badly", "ok": False, "figures": {}}) + "\\n")
    file.write('{"half a li')
    file.flush()
    time.sleep(600 if name == "hangs" else 0)
sys.exit(name != "works")
"""


def test_parts_of_the_gpu_script_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that hangs is ended and one that fails or crashes is reported; the next one starts until time is over."""
    import gpu

    script = tmp_path / "part.py"
    script.write_text(PART)
    monkeypatch.setattr(gpu, "BUDGETS", {"hangs": gpu.Budget(0, 2)})
    now = iter([0.0, *[1.0, 1.0, 2.0] * 4, *[590.0] * 3])
    table = gpu.run_parts(
        ["works", "fails", "crashes", "hangs", "late"],
        tmp_path,
        10.0,
        lambda part, rows, seconds: [sys.executable, str(script), part, str(rows)],
        clock=lambda: next(now),
    )
    told = {
        part: [(row["check"], row["ok"]) for row in table if row["part"] == part] for part in {r["part"] for r in table}
    }
    assert told["works"] == [("first", True)]
    assert told["fails"] == [("first", True), ("second", False)]
    assert told["crashes"] == [("first", True), ("process", False)]
    assert told["hangs"] == [("first", True), ("time", False)]
    assert told["late"] == [("-", None)]
    assert "skipped" in table[-1]["answer"]


def pauses(turn: turns.Turn, fail: bool) -> None:
    for _ in range(100):
        turn.step()
        turn.count(steps=1)
        if fail:
            raise ValueError("for the test")


def test_groups_take_turns(tmp_path: Path) -> None:
    """Two ranks take two turns; a rank that fails reports its error."""
    with turns.Group("pauses", pauses, 2, tmp_path, fail=False) as group:
        begun = time.perf_counter()
        assert group.turn(2)["counted"] == {"steps": 4}
        waited = time.perf_counter() - begun
        assert group.turn(3)["counted"] == {"steps": 10}
        assert 0 < group.found[0]["seconds"] < waited, "only seconds of the turn, without the start of the ranks"
        assert group.found[1]["peak_gib"] > 0
    with (
        turns.Group("fails", pauses, 1, tmp_path, fail=True) as group,
        pytest.raises(RuntimeError, match="for the test"),
    ):
        group.turn(2)


def test_rounding_is_held_against_float32(trained: Path) -> None:
    exact, rounded, quantized, both = rounding.compare(trained / "encoder", batches=2)
    assert exact["gradient_difference"] == 0 < rounded["gradient_difference"]
    assert 0 < quantized["gradient_difference"] < 0.5 and both["gradient_difference"] > 0
    assert both["megabytes"] < rounded["megabytes"] and quantized["megabytes"] < exact["megabytes"] / 2


def test_a_table_is_markdown() -> None:
    assert report.table(["a", "bc"], [[1.23456, "x"]]) == "| a    | bc |\n|------|----|\n| 1.23 | x  |"
