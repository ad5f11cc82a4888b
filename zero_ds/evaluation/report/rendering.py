"""Renders a report as Markdown and HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zero_ds.evaluation.heldout.summary import MODES, SHUFFLED
from zero_ds.evaluation.report.charts import readable
from zero_ds.evaluation.report.findings import percent, points
from zero_ds.evaluation.report.inputs import ReportInputs
from zero_ds.evaluation.report.samples import Sample

TEMPLATES = Path(__file__).parent
KINDS = {"all": "all words", "question": "in answers to questions", "caption": "in captions"}
MODE_NAMES = {"free": "Free answer", "forced": "Forced choice", "forced_calibrated": "Forced choice, calibrated"}

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""
NamedTable = tuple[str, list[str], list[list[str]]]
"""Title, header and rows."""


def view(inputs: ReportInputs, content: Mapping[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    """Returns the variables of the templates: texts and tables. content: result of `facts`."""
    conditions = list(content["accuracy"])
    main = [name for name in conditions if name.removesuffix(SHUFFLED) in inputs.evaluations]
    by_kind, chance = content["accuracy_by"], content["chance"]
    return {
        "content": content,
        "tables": _accuracy_tables(by_kind, chance, main),
        "control_tables": _accuracy_tables(by_kind, chance, conditions) if inputs.controls else [],
        "by_word": _accuracy_tables(content["accuracy_by_word"], content["chance_by_word"], conditions),
        "differences": _difference_table(content["differences"]),
        "cost": _cost_table(content),
        "stages": _stage_table(content),
        "samples": samples,
        "n": content["accuracy"]["grafted"]["n"],
        "images_n": content["accuracy"]["grafted"]["pictures"],
        "plan": content["layer_plan"]["name"] if content["layer_plan"] else None,
    }


def render(template: str, variables: Mapping[str, Any], images: Mapping[str, str]) -> str:
    """Renders a template of this folder. images: name of an image -> its address (a path or a data URL)."""
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
    return environment.get_template(template).render(**variables, images=images).rstrip() + "\n"


# -- tables ------------------------------------------------------------------------------------------------------------


def _accuracy_tables(
    accuracy: Mapping[str, Mapping[str, Any]], chance: Mapping[str, float], conditions: Sequence[str]
) -> list[NamedTable]:
    """Returns one table per mode of scoring: a row for each condition, a column for each kind.

    accuracy: mode -> kind -> condition -> share.
    """
    tables = []
    for mode in MODES:
        kinds = accuracy[mode]
        rows = []
        for condition in conditions:
            rows.append([_condition(condition), *(percent(shares[condition]) for shares in kinds.values())])
        rows.append(["chance", *(f"{100 * chance[kind]:.1f} %" for kind in kinds)])
        tables.append((MODE_NAMES[mode], ["", *(KINDS.get(kind, kind) for kind in kinds)], rows))
    return tables


def _difference_table(differences: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Returns a row for each pair of conditions and a column for each mode. differences: mode -> pairs."""
    rows = []
    for place, pair in enumerate(differences["free"]):
        label = f"{_condition(pair['first'])} − {_condition(pair['second'])}"
        rows.append([label, *(points(differences[mode][place]) for mode in MODES)])
    return ["", *(MODE_NAMES[mode] for mode in MODES)], rows


def _cost_table(content: Mapping[str, Any]) -> Table:
    seconds, parameters = content["step_seconds"], content["parameters"]
    rows = [
        ["decoder parameters", _number(parameters["surrogate"]), _number(parameters["full"])],
        [f"median step, stage {seconds['stage']}", _seconds(seconds["surrogate"]), _seconds(seconds["full"])],
    ]
    if content["flops_ratio"] is not None:
        rows.append(["FLOPs of a training step, relative", f"{content['flops_ratio']:.3f}", "1"])
    return ["", "against the surrogate", "against the full model"], rows


def _stage_table(content: Mapping[str, Any]) -> Table:
    rows = []
    for stage, sizes in content["checkpoint_bytes"].items():
        steps, trained = content["steps"][stage], content["parameters"]["trained"][stage]
        rows.append([stage, _number(steps), _number(trained), _bytes(sizes["weights"]), _bytes(sizes["resume"])])
    return ["stage", "steps", "trained parameters", "weights file", "state to resume from"], rows


# -- texts -------------------------------------------------------------------------------------------------------------


def _condition(name: str) -> str:
    """Returns the label of a condition."""
    if name.endswith(SHUFFLED):
        return f"{readable(name.removesuffix(SHUFFLED))}, other image"
    return readable(name)


def _number(value: int | None) -> str:
    return "not measured" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} s"


def _bytes(value: int | None) -> str:
    if value is None:
        return "none"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def unbroken(text: str) -> str:
    """Puts no-break spaces between a figure, its unit and its interval, so that they stay on one line."""
    held = re.sub(r"\[[^\]]*\]", lambda match: match.group().replace(" ", "\u00a0"), text)
    return held.replace(" %", "\u00a0%").replace(" [", "\u00a0[")


def markdown(text: object) -> str:
    """Escapes text for one line of Markdown, so that nothing in it is markup, a link or the end of a table cell."""
    flat = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", flat)
