"""The report of a run: what was found, how sure it is, and what it cost; as JSON, Markdown and one HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import math
import random
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zero_ds.data.images import open_image
from zero_ds.data.sources import inside
from zero_ds.evaluation.heldout.run import Evaluation, ItemResult, read_evaluation
from zero_ds.evaluation.heldout.summary import MODES, SHUFFLED, summary
from zero_ds.evaluation.report import charts
from zero_ds.model.layer_plan import read_surrogate
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically
from zero_ds.training.checkpoint.checkpoint import find_checkpoint
from zero_ds.training.checkpoint.manifest import versions
from zero_ds.training.monitor import read_metrics

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent
FILES = "report_files"
KINDS = {"all": "all words", "question": "in answers to questions", "caption": "in captions"}
THUMBNAIL = 256
"""Longest side of a sample picture in the report, in pixels."""


@dataclass(frozen=True)
class ReportInputs:
    """What a report is made of. Every path is named by the caller; what is None or empty is left out of the report."""

    out: Path
    """Folder that gets report.json, report.md, report.html and report_files/."""
    evaluations: Mapping[str, Path]
    """Name -> result of `zero_ds.evaluation.heldout.run`; `surrogate` and `grafted` must be there."""
    controls: Mapping[str, Path] = field(default_factory=dict)
    """Further evaluations on the same records, shown in the tables and in a chart of their own."""
    trajectory: Path | None = None
    """Folder of `zero-ds trajectory`."""
    surrogate: Path | None = None
    """The surrogate's folder."""
    stages: Mapping[str, Path] = field(default_factory=dict)
    """Stage -> run folder, in the order in which they ran."""
    comparisons: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    """Title -> {label: run folder}: loss curves drawn into one panel."""
    cost_stage: str | None = None
    """Stage whose step time stands for the surrogate's; the last one if empty."""
    full_run: Path | None = None
    """Run folder of that stage trained against the full model."""
    flops_ratio: float | None = None
    """FLOPs of a training step against the surrogate over those against the full model."""
    seeds: Mapping[str, int] = field(default_factory=dict)
    """Seeds beside those that the runs and evaluations state themselves."""
    notes: Sequence[str] = ()
    """What a reader must know to judge the figures."""
    title: str = "Zero-shot grafting"
    samples: int = 12
    """Sample pictures, drawn at random."""
    sample_seed: int = 0


def write_report(inputs: ReportInputs) -> dict[str, Any]:
    """Writes the report and returns the content of report.json.

    Raises:
        ConfigError, DataError, CheckpointError, ImageError: an input that is missing or damaged, in one sentence.
    """
    for name in ("surrogate", "grafted"):
        if name not in inputs.evaluations:
            raise ConfigError(f"the report needs an evaluation named '{name}'; it has {', '.join(inputs.evaluations)}.")
    evaluations = {n: read_evaluation(p) for n, p in {**inputs.evaluations, **inputs.controls}.items()}
    content = facts(inputs, evaluations)
    pictures = {"accuracy": _accuracy_chart(content, list(inputs.evaluations))}
    if inputs.controls:
        pictures["controls"] = _accuracy_chart(content, list(evaluations))
    panels = [(stage, {stage: read_metrics(run)}) for stage, run in inputs.stages.items()]
    panels += [(title, {k: read_metrics(run) for k, run in runs.items()}) for title, runs in inputs.comparisons.items()]
    panels = [(title, {k: records for k, records in runs.items() if records}) for title, runs in panels]
    if panels := [(title, runs) for title, runs in panels if runs]:
        pictures["loss"] = charts.loss_chart(panels)
    plot = inputs.trajectory / "trajectory.png" if inputs.trajectory else None
    if plot is not None and plot.is_file():
        pictures["trajectory"] = plot.read_bytes()
    samples = _samples(inputs, evaluations, pictures)

    view = _view(inputs, content, samples)
    encoded = {n: "data:image/png;base64," + base64.b64encode(data).decode() for n, data in pictures.items()}
    texts = {
        "report.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        "report.md": _render("report.md.jinja", view, {n: f"{FILES}/{n}.png" for n in pictures}),
        "report.html": _render("report.html.jinja", view, encoded),
    }
    folder = inputs.out / FILES
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(data)
        temporary.replace(folder / f"{name}.png")
    for name, text in texts.items():
        write_atomically(inputs.out / name, text)
    for file in folder.iterdir():
        if file.stem not in pictures:
            file.unlink()  # of an earlier report
    logger.info("wrote %s", inputs.out / "report.html")
    return content


# -- facts -------------------------------------------------------------------------------------------------------------


def facts(inputs: ReportInputs, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The content of report.json: every figure of the report, with what it was measured on."""
    scores = summary(evaluations)
    commits = {stage: find_checkpoint(run) for stage, run in inputs.stages.items()}
    info = read_surrogate(inputs.surrogate) if inputs.surrogate else None
    transition = _transition(inputs.trajectory)
    cost_stage = inputs.cost_stage or (list(inputs.stages)[-1] if inputs.stages else None)
    if cost_stage is not None and cost_stage not in inputs.stages:
        raise ConfigError(f"cost_stage={cost_stage} is none of the stages {', '.join(inputs.stages)}.")
    grafted = evaluations["grafted"]
    return {
        "title": inputs.title,
        "headline": " ".join(findings(scores)),
        "findings": findings(scores),
        **scores,
        "transition_layer": transition.get("layer"),
        "transition": transition or None,
        "layer_plan": {"name": str(info.plan), **info.plan.to_json()} if info else None,
        "step_seconds": {
            "stage": cost_stage,
            "surrogate": step_seconds(inputs.stages[cost_stage]) if cost_stage else None,
            "full": step_seconds(inputs.full_run) if inputs.full_run else None,
        },
        "flops_ratio": inputs.flops_ratio,
        "checkpoint_bytes": {
            stage: {
                "weights": _size(commit.folder / "weights.safetensors"),
                "resume": _size(commit.folder / "resume"),
            }
            for stage, commit in commits.items()
        },
        "parameters": {
            "full": info.target_parameters if info else None,
            "surrogate": info.kept_parameters if info else None,
            "trained": {stage: _parameters(commit.folder / "weights.safetensors") for stage, commit in commits.items()},
        },
        "steps": {stage: commit.step for stage, commit in commits.items()},
        "seeds": {
            **{stage: commit.manifest["config"]["seed"] for stage, commit in commits.items()},
            "shuffled pictures": grafted.setting.get("seed"),
            "samples in the report": inputs.sample_seed,
            **inputs.seeds,
        },
        "evaluation": {name: evaluation.setting for name, evaluation in evaluations.items()},
        "versions": versions(),
        "notes": list(inputs.notes),
    }


def findings(scores: Mapping[str, Any]) -> list[str]:
    """What was found, in plain sentences with intervals: the figures, whether it sees, and graft against surrogate."""
    accuracy = scores["accuracy"]
    differences = {(d["first"], d["second"]): d for d in scores["differences"]["free"]}
    sees = differences["grafted", "grafted" + SHUFFLED]
    against = differences["grafted", "surrogate"]
    grafted, control = percent(accuracy["grafted"]), percent(accuracy["grafted" + SHUFFLED])
    sentences = [
        f"Grafted into the full model without further training, the encoder lets it get {grafted} of the looked-for "
        f"words right in free answers about held-out pictures; shown another picture, the same model gets {control}.",
    ]
    if sees["low"] > 0:
        sentences.append(f"So the grafted model sees: the right picture is worth {points(sees)}.")
    elif sees["high"] < 0:
        sentences.append(f"With the right picture it does worse than with a wrong one, by {points(sees, -1)}.")
    else:
        sentences.append(
            f"That the grafted model sees is not shown: right and wrong pictures differ by {points(sees)}."
        )
    trained = f"On the surrogate that the encoder was trained with, the share is {percent(accuracy['surrogate'])}"
    if against["low"] > 0:
        sentences.append(f"{trained}; the graft is better by {points(against)}.")
    elif against["high"] < 0:
        sentences.append(f"{trained}; the graft is worse by {points(against, -1)}.")
    else:
        sentences.append(f"{trained}; no difference between the two is shown ({points(against)}).")
    return sentences


def percent(entry: Mapping[str, float]) -> str:
    """`71.3 % [68.9, 73.6]`."""
    return f"{100 * entry['value']:.1f} % [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def points(entry: Mapping[str, float], sign: int = 1) -> str:
    """A difference of shares: `12.3 points [10.1, 14.5]`."""
    low, high = sorted((sign * entry["low"], sign * entry["high"]))
    return f"{100 * sign * entry['value']:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"


def _transition(folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return {}
    path = folder / "trajectory.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["transition"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}); measure the trajectory again.") from None


def step_seconds(run: Path) -> float | None:
    """Median over the steps; the first one, which sets up caches and kernels, counts only where it is alone."""
    seconds = [record["seconds"] for record in read_metrics(run)]
    return round(statistics.median(seconds[1:] or seconds), 4) if seconds else None


def _size(path: Path) -> int | None:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size if path.is_file() else None


def _parameters(path: Path) -> int:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except Exception as error:
        raise ConfigError(f"{path} cannot be read ({error}); use another commit.") from None


# -- pictures and samples ----------------------------------------------------------------------------------------------


def _accuracy_chart(content: Mapping[str, Any], models: Sequence[str]) -> bytes:
    groups = []
    for mode, label in (("free", "free answer"), ("forced", "forced choice")):
        for kind, shares in content["accuracy_by"][mode].items():
            if kind != "all":
                groups.append((f"{label},\n{kind}s", shares, content["chance"][kind]))
    return charts.accuracy_chart(groups, models, SHUFFLED)


def _samples(
    inputs: ReportInputs, evaluations: Mapping[str, Evaluation], pictures: dict[str, bytes]
) -> list[dict[str, Any]]:
    """Records drawn by seed from all records, whatever was answered; their thumbnails are added to `pictures`."""
    answers = {name: {item.id: item for item in evaluations[name].of("own")} for name in inputs.evaluations}
    items = list(answers["grafted"].values())
    chosen = random.Random(inputs.sample_seed).sample(items, min(inputs.samples, len(items)))
    root = Path(evaluations["grafted"].setting.get("root", "."))
    samples = []
    for number, item in enumerate(chosen):
        image = open_image(inside(root.resolve(), item.image, item.id))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")  # drawn anew: nothing of the file but its pixels enters the report
        name = f"sample-{number:02d}"
        pictures[name] = buffer.getvalue()
        replies = [(charts.readable(model), *_verdict(found[item.id])) for model, found in answers.items()]
        samples.append({"picture": name, "question": item.question, "answer": item.answer, "replies": replies})
    return samples


def _verdict(item: ItemResult) -> tuple[str, str, str]:
    """Generated text, and how many of the looked-for words are right in it: (text, `1 of 2 words`, css class)."""
    right, count = sum(word.free_correct for word in item.words), len(item.words)
    if count == 1:
        return item.generated, "right" if right else "wrong", "right" if right else "wrong"
    return item.generated, f"{right} of {count} words", "right" if right == count else "partly" if right else "wrong"


# -- pages -------------------------------------------------------------------------------------------------------------


def _view(inputs: ReportInputs, content: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the templates print: texts and tables (header, rows)."""
    everything = list(content["accuracy"])
    main = [name for name in everything if name.removesuffix(SHUFFLED) in inputs.evaluations]

    def tables(by: str, chance: Mapping[str, float], conditions: Sequence[str]) -> list[Any]:
        result = []
        for mode in MODES:
            kinds = content[by][mode]
            rows = [[_condition(c), *(percent(shares[c]) for shares in kinds.values())] for c in conditions]
            rows.append(["chance", *(f"{100 * chance[kind]:.1f} %" for kind in kinds)])
            result.append((_mode(mode), ["", *(KINDS.get(kind, kind) for kind in kinds)], rows))
        return result

    differences = [
        [f"{_condition(d['first'])} − {_condition(d['second'])}"]
        + [points(content["differences"][mode][place]) for mode in MODES]
        for place, d in enumerate(content["differences"]["free"])
    ]
    return {
        "content": content,
        "tables": tables("accuracy_by", content["chance"], main),
        "control_tables": tables("accuracy_by", content["chance"], everything) if inputs.controls else [],
        "by_word": tables("accuracy_by_word", content["chance_by_word"], everything),
        "differences": (["", *(_mode(mode) for mode in MODES)], differences),
        "cost": _cost(content),
        "stages": _stage_table(content),
        "samples": samples,
        "n": content["accuracy"]["grafted"]["n"],
        "pictures_n": content["accuracy"]["grafted"]["pictures"],
        "plan": content["layer_plan"]["name"] if content["layer_plan"] else None,
    }


def _condition(name: str) -> str:
    if name.endswith(SHUFFLED):
        return f"{charts.readable(name.removesuffix(SHUFFLED))}, other picture"
    return charts.readable(name)


def _mode(mode: str) -> str:
    return {"free": "Free answer", "forced": "Forced choice", "forced_calibrated": "Forced choice, calibrated"}[mode]


def _cost(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    seconds, parameters = content["step_seconds"], content["parameters"]
    rows = [
        ["parameters of the decoder", _number(parameters["surrogate"]), _number(parameters["full"])],
        [f"median step, stage {seconds['stage']}", _seconds(seconds["surrogate"]), _seconds(seconds["full"])],
    ]
    if content["flops_ratio"] is not None:
        rows.append(["FLOPs of a training step, relative", f"{content['flops_ratio']:.3f}", "1"])
    return ["", "against the surrogate", "against the full model"], rows


def _stage_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            stage,
            _number(content["steps"][stage]),
            _number(content["parameters"]["trained"][stage]),
            _bytes(sizes["weights"]),
            _bytes(sizes["resume"]),
        ]
        for stage, sizes in content["checkpoint_bytes"].items()
    ]
    return ["stage", "steps", "trained parameters", "weights file", "state to resume from"], rows


def _number(value: int | None) -> str:
    return "not measured" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} s"


def _bytes(value: int | None) -> str:
    if value is None:
        return "none"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _render(template: str, view: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = markdown
    environment.filters["unbroken"] = unbroken
    return environment.get_template(template).render(**view, pictures=pictures).rstrip() + "\n"


def unbroken(text: str) -> str:
    """Keeps a figure, its unit and its interval on one line."""
    held = re.sub(r"\[[^\]]*\]", lambda match: match.group().replace(" ", "\u00a0"), text)
    return held.replace(" %", "\u00a0%").replace(" [", "\u00a0[")


def markdown(text: object) -> str:
    """Text as it is, on one line, inside Markdown: nothing in it is markup, a link or the end of a table cell."""
    flat = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", flat)
