"""The average score of the paper's Table 8, and the drawings of Figures 2, A.1 and A.2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from places import ROOT
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.data.formats import DataError
from zero_ds.evaluation.suites import figures
from zero_ds.evaluation.suites.average import COLUMNS, average
from zero_ds.evaluation.suites.results import Result, Score
from zero_ds.evaluation.suites.tasks import SUITES
from zero_ds.runtime.errors import ConfigError

sys.path[:0] = [str(ROOT / "tools")]

MEASURED = (
    *(("mme:binary", "mme_cognition_score", 1), ("mme:binary", "mme_perception_score", 1)),
    *(("mme", "mme_cognition_score", 1), ("mme", "mme_perception_score", 1)),
    *(("pope:binary", "pope_accuracy", 100), ("pope:binary", "pope_f1_score", 100)),
    *(("pope", "pope_accuracy", 100), ("pope", "pope_f1_score", 100)),
    *(("seedbench", "seed_all", 100), ("seedbench", "seed_image", 100), ("seedbench", "seed_video", 100)),
    *(("mmvet", "gpt_eval_score", 1), ("llava_in_the_wild", "gpt_eval_llava_all", 1)),
    ("mmbench_en_dev_static", "gpt_eval_score", 1),
    *(("cv_bench_2d", "cv_bench_acc", 100), ("cv_bench_3d", "cv_bench_acc", 100)),
    *(("gqa", "exact_match", 100), ("vizwiz_vqa_val", "exact_match", 100)),
)
"""Task and metric of the columns of Table 8, without the average of CV-Bench, and the divisor of its harness."""

TABLE_8 = {  # method and percentage -> average, columns as printed
    ("baseline", 10): (
        0.5127,
        "301 1178 333 1139 74.5 73.1 74.3 73.9 46.0 49.2 34.1 17.7 30.4 45.6 52.4 61.7 45.4 43.9",
    ),
    ("baseline", 30): (
        0.6277,
        "314 1447 316 1399 85.5 84.8 85.5 84.8 59.8 64.8 40.9 30.8 57.9 66.8 60.6 71.1 57.1 55.1",
    ),
    ("baseline", 100): (
        0.6538,
        "327 1545 345 1524 84.9 83.1 84.8 82.9 63.6 68.9 43.7 35.5 67.5 71.8 61.8 73.3 62.4 52.9",
    ),
    ("ours", 0): (0.6259, "295 1348 303 1298 86.8 86.1 87.0 86.4 65.4 70.7 45.3 32.8 68.9 65.6 63.2 67.2 51.9 40.0"),
    ("ours", 10): (0.6612, "340 1404 342 1430 87.3 86.8 84.9 82.7 67.1 72.7 45.9 37.6 69.7 70.9 66.6 70.6 60.1 57.9"),
    ("ours", 20): (0.6701, "369 1435 361 1486 86.7 85.6 86.4 84.9 67.2 72.8 46.0 38.8 70.5 73.2 65.7 74.8 60.6 52.4"),
}


def result(name: str, values: str) -> Result:
    scores = tuple(
        Score(task, metric, float(value) / by)
        for (task, metric, by), value in zip(MEASURED, values.split(), strict=True)
    )
    return Result(name, "paper-vision", {"name": "lmms-eval", "version": "1"}, {"kind": "target"}, {}, {}, scores)


@pytest.mark.parametrize(("method", "share"), TABLE_8)
def test_the_average_of_table_8(method: str, share: int) -> None:
    """Our rule gives the published averages from the published columns."""
    published, values = TABLE_8[method, share]
    found = average([result(method, values)])
    assert found.value == pytest.approx(published, abs=3e-4) and found.missing == []
    assert list(found.columns) == list(COLUMNS)


def test_the_suite_has_every_column_of_table_8() -> None:
    tasks = {task.label for task in SUITES["paper-vision"].tasks}
    assert tasks == {task for task, _, _ in MEASURED}


def test_columns_that_were_not_evaluated() -> None:
    whole = result("a", TABLE_8["ours", 10][1])
    part = Result("b", "vision", whole.harness, {}, {}, {}, (*whole.scores[:4], Score("cv_bench", "cv_bench_acc", 0.7)))
    found = average([part])
    assert len(found.columns) == 5 and "MM-Vet" in found.missing and found.columns["CV-Bench, average"] == 0.7
    points = [figures.Point("a", 10, average([whole])), figures.Point("b", 20, found)]
    with pytest.raises(DataError, match=r"b at 20 % and a at 10 % were evaluated on other tasks \(first: CV-Bench, 2D"):
        figures.check_columns(points)
    assert "Without POPE binary, accuracy" in figures.table(points[1:], [])
    with pytest.raises(DataError, match="none of the paper's vision tasks was evaluated"):
        average([Result("c", "text", whole.harness, {}, {}, {}, (Score("piqa", "acc", 0.5),))])


def run_folder(folder: Path, stage: str, hours: float) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"stage: {stage}\n")
    lines = [json.dumps({"step": n, "seconds": 1800 * hours}) for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"cut o')
    return folder


def test_figure_2(tmp_path: Path) -> None:
    """The command draws Figure 2 from result files and run folders, and writes its numbers."""
    words = ["eval", "figure", "--out", str(tmp_path / "figures/figure-2")]
    for (method, share), (_, values) in TABLE_8.items():
        path = tmp_path / f"{method}-{share}.json"
        result(method, values).write(path)
        words += ["--score", f"{method}:{share}={path}"]
    for method, runs in {
        "baseline": {"adapter": 7.01, "decoder": 27.88},
        "ours": {"pretrain": 9.36, "encoder": 4.25},
    }.items():
        folders = [str(run_folder(tmp_path / f"{method}-{stage}", stage, hours)) for stage, hours in runs.items()]
        words += ["--hours", f"{method}={','.join(folders)}"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "| ours | 10 | 0.6612 |" in done.stdout
    assert "| baseline | 7.01 | 27.88 |  |  | 34.89 |" in done.stdout
    for ending in ("png", "pdf", "md"):
        assert (tmp_path / f"figures/figure-2.{ending}").stat().st_size > 100
    words[3] = str(tmp_path / "figures/figure-2.md/below")
    with pytest.raises(ConfigError, match=r"--out .*below cannot be written as files; name a file in a folder"):
        CliRunner().invoke(app, words, catch_exceptions=False)


@pytest.mark.parametrize(
    ("read", "text", "complaint"),
    [
        (figures.read_point, "ours=results", "--score ours=results is not METHOD:PERCENT=RESULTS"),
        (figures.read_point, "ours:110=results", "--score ours:110=results is not METHOD:PERCENT=RESULTS"),
        (figures.read_bar, "ours", "--hours ours is not METHOD=RUN,RUN"),
        (figures.read_bar, "ours=gone", r"gone is not the folder of a run \(.*\); name a folder that a training wrote"),
    ],
)
def test_what_cannot_be_drawn(read: object, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read(text)  # type: ignore[operator]


def test_figure_a1(tmp_path: Path) -> None:
    """Weights fall with the length of a response, and with the paper's scale their mean is the mean length."""
    import plot_dynamic_loss

    lengths, weights = plot_dynamic_loss.curve(30, 0.5, "paper")
    assert lengths == list(range(2, 31)) and weights == sorted(weights, reverse=True)
    assert sum(weights) / len(weights) == pytest.approx(sum(lengths) / len(lengths))
    _, plain = plot_dynamic_loss.curve(30, 0.5, "none")
    assert plain[0] == pytest.approx((30 / 0.6931472) ** 0.5)
    plot_dynamic_loss.main(tmp_path / "a1.png", order=0.5, normalize="paper", longest=None)
    assert (tmp_path / "a1.png").stat().st_size > 1000
