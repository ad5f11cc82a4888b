"""The inputs of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ReportInputs:
    """Everything a report is made of. Parts of the report whose input is None or empty are omitted."""

    out: Path
    """Folder that receives report.json, report.md, report.html and report_files/."""
    evaluations: Mapping[str, Path]
    """Name -> result file of `zero-ds eval records`; `surrogate` and `grafted` are required."""
    controls: Mapping[str, Path] = field(default_factory=dict)
    """Further evaluations on the same records, shown in the tables and in a chart of their own."""
    trajectory: Path | None = None
    """Folder that `zero-ds trajectory` wrote."""
    surrogate: Path | None = None
    """Folder of the surrogate."""
    stages: Mapping[str, Path] = field(default_factory=dict)
    """Stage -> run folder, in the order in which the stages ran."""
    comparisons: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    """Title -> {label: run folder}: runs whose loss curves share one panel."""
    cost_stage: str | None = None
    """Stage that the step time is taken from; the last stage if None."""
    full_run: Path | None = None
    """Run folder of that stage trained against the full model."""
    flops_ratio: float | None = None
    """FLOPs of a training step against the surrogate, divided by those against the full model."""
    seeds: Mapping[str, int] = field(default_factory=dict)
    """Seeds that neither the runs nor the evaluations record themselves."""
    notes: Sequence[str] = ()
    """Notes that a reader needs to judge the figures."""
    title: str = "Zero-shot grafting"
    samples: int = 12
    """Number of sample images, drawn at random."""
    sample_seed: int = 0
