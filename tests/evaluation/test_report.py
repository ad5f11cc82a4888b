"""The report of a run with made-up evaluations: its figures, its files, and the escaping of text."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from zero_ds.data.formats import DataError
from zero_ds.evaluation.heldout.results import Evaluation, ItemResult, WordResult
from zero_ds.evaluation.report import report as module
from zero_ds.evaluation.report.inputs import ReportInputs
from zero_ds.evaluation.report.rendering import markdown, unbroken
from zero_ds.evaluation.report.report import FILES, write_report
from zero_ds.evaluation.report.samples import Sample, draw_samples
from zero_ds.model.layer_plan import LayerPlan, Replaced, SurrogateInfo
from zero_ds.runtime.errors import ConfigError

HOSTILE = "<script>alert(1)</script> | [x](javascript:1) ![y](z) `*_"
COLORS = ("red", "blue", "green", "white")
IMAGES = 30
DEPTH = 30


def evaluation(name: str, root: Path, right: float, text: str = "It is {}.") -> Evaluation:
    """Returns an evaluation with the share `right` of correct answers in both modes, and a quarter in the control."""
    items = []
    for condition in ("own", "shuffled"):
        for number in range(IMAGES):
            share = right if condition == "own" else 0.25
            for kind in ("question", "caption"):
                word = COLORS[number % 4]
                said = word if number < share * IMAGES else COLORS[(number + 1) % 4]
                scored = WordResult(
                    "color",
                    word,
                    COLORS,
                    said,
                    said == word,
                    tuple(-1.0 if c == said else -3.0 for c in COLORS),
                    said == word,
                )
                shown = number if condition == "own" else (number + 1) % IMAGES
                items.append(
                    ItemResult(
                        f"{number}-{kind}",
                        kind,
                        condition,
                        f"{number}.png",
                        f"{shown}.png",
                        f"what color? {HOSTILE}",
                        f"It is {word}. {HOSTILE}",
                        text.format(said),
                        (scored, scored) if kind == "caption" else (scored,),
                    )
                )
    return Evaluation(name, tuple(items), {"root": str(root), "seed": 3})


def stage(folder: Path, seconds: float) -> Path:
    """Writes a run folder with one checkpoint, as training leaves it."""
    checkpoint = folder / "step-000020"
    (checkpoint / "resume").mkdir(parents=True)
    save_file(
        {"adapter.0.weight": torch.zeros(4, 5), "adapter.0.bias": torch.zeros(4)}, checkpoint / "weights.safetensors"
    )
    (checkpoint / "resume/state.safetensors").write_bytes(b"0" * 1000)
    manifest = {"step": 20, "config": {"seed": 7}, "plan": None}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (folder / "latest").write_text("step-000020\n")
    records = [{"step": n, "loss": 3.0 / n, "seconds": seconds} for n in range(1, 21)]
    records[0]["seconds"] *= 100  # the first step is slow
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


Make = Callable[..., ReportInputs]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Returns a function: `make(grafted=0.8, surrogate=0.6)` gives the inputs of a report."""
    root = tmp_path / "images"
    root.mkdir()
    for number in range(IMAGES):
        Image.new("RGB", (300, 200), (8 * number, 90, 90)).save(root / f"{number}.png")
    surrogate = tmp_path / "surrogate"
    surrogate.mkdir()
    info = SurrogateInfo("llama", "there", "0", LayerPlan(DEPTH, (Replaced(20, 28),)), 106, 134)
    (surrogate / "surrogate.json").write_text(json.dumps(info.to_json()))
    trajectory = tmp_path / "trajectory"
    trajectory.mkdir()
    transition = {"layer": 19, "low": 18, "high": 20, "verdict": "clear", "reason": "two lines fit."}
    (trajectory / "trajectory.json").write_text(json.dumps({"transition": transition}))
    Image.new("RGB", (40, 30)).save(trajectory / "trajectory.png")
    stages = {name: stage(tmp_path / name, 0.5) for name in ("pretrain", "encoder")}

    def inputs(text: str = "It is {}.", **right: float) -> ReportInputs:
        files = {}
        for name, share in {"surrogate": 0.5, "grafted": 0.8, **right}.items():
            files[name] = tmp_path / f"evaluation/{name}.json"
            evaluation(name, root, share, text).write(files[name])
        return ReportInputs(
            tmp_path / "out",
            {name: files[name] for name in ("surrogate", "grafted")},
            {name: path for name, path in files.items() if name not in ("surrogate", "grafted")},
            trajectory=trajectory,
            surrogate=surrogate,
            stages=stages,
            flops_ratio=0.7,
            seeds={"pictures": 5},
            notes=("A note & more.", HOSTILE),
            title="Report of a run",
        )

    return inputs


class Page(HTMLParser):
    """Collects the tags, attributes and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_json_holds_every_figure(make: Make) -> None:
    inputs = make()
    content = write_report(inputs)
    assert json.loads((inputs.out / "report.json").read_text()) == content
    for condition in ("surrogate", "grafted", "grafted_shuffled_image", "surrogate_shuffled_image"):
        entry = content["accuracy"][condition]
        assert {"value", "low", "high", "n"} <= set(entry)
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["n"] == 3 * IMAGES
    assert content["accuracy"]["grafted"]["value"] == pytest.approx(0.8)
    assert content["accuracy_by"]["forced_calibrated"]["caption"]["surrogate"]["n"] == 2 * IMAGES
    assert content["transition_layer"] == 19
    assert content["layer_plan"] == {"name": "T(20,28)", "depth": 30, "replaced": [[20, 28, 1]]}
    assert content["step_seconds"] == {"stage": "encoder", "surrogate": 0.5, "full": None}
    assert content["flops_ratio"] == 0.7
    weights = inputs.stages["encoder"] / "step-000020/weights.safetensors"
    assert content["checkpoint_bytes"]["encoder"] == {"weights": weights.stat().st_size, "resume": 1000}
    assert content["parameters"] == {"full": 134, "surrogate": 106, "trained": {"pretrain": 24, "encoder": 24}}
    assert content["seeds"]["encoder"] == 7 and content["seeds"]["pictures"] == 5
    assert content["seeds"]["shuffled pictures"] == 3
    assert {"torch", "deepspeed", "transformers", "zero_ds"} <= set(content["versions"])
    assert content["notes"] == list(inputs.notes)


def test_the_full_run_gives_its_step_time(make: Make, tmp_path: Path) -> None:
    inputs = replace(make(), full_run=stage(tmp_path / "full", 0.8), cost_stage="pretrain")
    assert write_report(inputs)["step_seconds"] == {"stage": "pretrain", "surrogate": 0.5, "full": 0.8}
    assert "0.80 s" in (inputs.out / "report.html").read_text()


def test_the_page_is_self_contained(make: Make) -> None:
    inputs = make(full=0.9)
    write_report(inputs)
    text = (inputs.out / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert not [name for name, _ in page.attributes if name in ("href", "srcset") or name.startswith("on")]
    sources = [value or "" for name, value in page.attributes if name == "src"]
    assert len(sources) == 4 + inputs.samples  # accuracy, controls, trajectory, loss
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    alternatives = [value for name, value in page.attributes if name == "alt"]
    assert len(alternatives) == len(sources) and all(alternatives)


def test_no_text_becomes_markup(make: Make) -> None:
    inputs = make(text=HOSTILE)
    write_report(inputs)
    text = (inputs.out / "report.html").read_text()
    assert "<script" not in text
    assert HOSTILE in "".join(Page(text).words)
    lines = (inputs.out / "report.md").read_text().splitlines()
    hostile = [line for line in lines if "alert" in line]
    assert hostile
    for line in hostile:
        assert "<" not in line and "[x](" not in line and "![" not in line.replace("\\[", "") and " | " not in line


def test_markdown_links_only_existing_files(make: Make) -> None:
    inputs = make()
    write_report(inputs)
    text = (inputs.out / "report.md").read_text()
    links = re.findall(r"(?<!\\)\]\(([^)]*)\)", text)  # links that are not escaped
    assert sorted(Path(link).name for link in links) == sorted(p.name for p in (inputs.out / FILES).iterdir())
    for link in links:
        Image.open(inputs.out / link).verify()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert any("grafted, other image" in line for line in tables)
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for block in blocks:
        assert len({line.rstrip().count("|") for line in block}) == 1, block


def test_samples_depend_on_the_seed_and_not_on_answers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Sample]] = []

    def spy(*arguments: Any) -> Any:
        seen.append(draw_samples(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "draw_samples", spy)
    write_report(make(grafted=0.8))
    write_report(make(grafted=0.1))
    write_report(replace(make(grafted=0.8), sample_seed=1))
    asked = [[sample.answer for sample in found] for found in seen]
    assert asked[0] == asked[1] != asked[2]
    verdicts = {reply.verdict for sample in seen[0] for reply in sample.replies}
    assert verdicts <= {"right", "wrong", "0 of 2 words", "2 of 2 words"} and len(verdicts) > 1


@pytest.mark.parametrize(
    ("grafted", "surrogate", "findings"),
    [
        (
            0.9,
            0.5,
            ["The grafted model sees: the correct image is worth", "the graft is better by 40.0 points"],
        ),
        (0.5, 0.9, ["The grafted model sees: the correct image is worth", "the graft is worse by 40.0 points"]),
        (0.5, 0.5, ["the two do not differ significantly"]),
        (0.25, 0.9, ["The evaluation does not show that the grafted model sees"]),
        (0.0, 0.5, ["The grafted model does worse with the correct image"]),
    ],
)
def test_findings(make: Make, grafted: float, surrogate: float, findings: list[str]) -> None:
    content = write_report(make(grafted=grafted, surrogate=surrogate))
    for finding in findings:
        assert finding in content["headline"]
    assert f"{100 * content['accuracy']['grafted']['value']:.1f} % [" in content["headline"]
    assert content["headline"] == " ".join(content["findings"])


def test_a_second_report_replaces_the_first(make: Make) -> None:
    inputs = make()
    write_report(inputs)
    write_report(replace(inputs, samples=3, trajectory=None, stages={}, surrogate=None))
    names = {path.name for path in (inputs.out / FILES).iterdir()}
    assert names == {"accuracy.png", "sample-00.png", "sample-01.png", "sample-02.png"}
    assert {p.name for p in inputs.out.iterdir()} == {"report.json", "report.md", "report.html", FILES}
    content = json.loads((inputs.out / "report.json").read_text())
    assert content["transition_layer"] is None and content["layer_plan"] is None
    assert content["step_seconds"] == {"stage": None, "surrogate": None, "full": None}


def test_missing_inputs_are_named(make: Make, tmp_path: Path) -> None:
    inputs = make()
    with pytest.raises(ConfigError, match="an evaluation named 'grafted'"):
        write_report(replace(inputs, evaluations={"surrogate": inputs.evaluations["surrogate"]}))
    with pytest.raises(DataError, match=r"evaluation .* does not exist"):
        write_report(replace(inputs, controls={"full": tmp_path / "none.json"}))
    with pytest.raises(ConfigError, match="cost_stage=decoder"):
        write_report(replace(inputs, cost_stage="decoder"))
    (tmp_path / "trajectory/trajectory.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"trajectory\.json cannot be read"):
        write_report(inputs)
    assert not inputs.out.exists()


def test_texts_are_made_safe() -> None:
    assert markdown("a|b\n*c* <d>") == r"a\|b \*c\* &lt;d&gt;"
    assert unbroken("71.3 % [68.9, 73.6] of it") == "71.3\u00a0%\u00a0[68.9,\u00a073.6] of it"
