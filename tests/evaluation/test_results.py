"""Comparisons of results: differences with intervals, the check of Table A.1, and comparisons that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.data.formats import DataError
from zero_ds.evaluation.heldout.statistics import difference
from zero_ds.evaluation.suites.comparison import compare, subtract
from zero_ds.evaluation.suites.results import Result, Score, read_result
from zero_ds.evaluation.suites.scores import task_scores
from zero_ds.evaluation.suites.tasks import Task
from zero_ds.runtime.errors import ConfigError


def score(right: int, of: int = 200, task: str = "piqa", shift: int = 0, **changes: object) -> Score:
    """Returns a score with `right` correct documents: the first ones or, with `shift`, others."""
    items = {f"{task}/{n}": float((n - shift) % of < right) for n in range(of)}
    made = Score(task, "acc", right / of, stderr=(right / of * (1 - right / of) / (of - 1)) ** 0.5, items=items)
    return replace(made, **changes)  # type: ignore[arg-type]


def result(name: str, *scores: Score, harness: str = "lm-eval") -> Result:
    return Result(name, "text", {"name": harness, "version": "1"}, {"kind": "target"}, {}, {}, scores)


def test_a_difference_of_the_same_documents_is_paired() -> None:
    """Nine documents in ten get the same answer: the paired interval is narrower, and equals that of `difference`."""
    first, second = score(100), score(100, shift=10)
    gap = subtract(second, first)
    keys = sorted(first.items)
    expected = difference([second.items[k] for k in keys], [first.items[k] for k in keys], np.arange(200))
    assert (gap.value, gap.low, gap.high) == (0.0, expected.low, expected.high)
    apart = subtract(replace(second, items={}), replace(first, items={}))
    assert gap.high is not None and apart.high is not None and gap.high < apart.high
    assert apart.high == pytest.approx(1.96 * 2**0.5 * (first.stderr or 0), rel=1e-3)
    assert subtract(Score("mme", "score", 1300.0), Score("mme", "score", 1200.0)).low is None


def test_figures_beyond_one_are_paired_too() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(50, 10, 400)
    scores = [
        Score("t", "bleu", float(values.mean()), items={str(n): float(v) for n, v in enumerate(values)})
        for values in (base, base + 1 + rng.normal(0, 1, 400))
    ]
    gap = subtract(scores[1], scores[0])
    assert gap.low is not None and gap.high is not None
    assert gap.low < 1 < gap.high and gap.high - gap.low == pytest.approx(2 * 1.96 / 20, rel=0.15)


@pytest.mark.parametrize(("right", "verdict"), [(118, "kept: no task is lower"), (60, "DEGRADED: piqa acc -0.3")])
def test_language_degradation(right: int, verdict: str) -> None:
    models = {
        "target": [result("target", score(120), score(90, task="boolq"))],
        "tuned": [result("tuned", score(right), score(91, task="boolq"))],
    }
    text = compare(models)
    assert verdict in text and "Language ability of tuned against target (2 metrics" in text
    assert f"| piqa | acc | 0.6 | {right / 200:.4g} | {right / 200 - 0.6:+.4g} [" in text


def test_images_and_perplexities_are_not_a_language_check() -> None:
    seen = {name: [result(name, score(9), harness="lmms-eval")] for name in ("a", "b")}
    assert "Language" not in compare(seen)
    odd = {name: [result(name, score(9, higher_is_better=False))] for name in ("a", "b")}
    assert "Language" not in compare(odd)


def test_results_that_cannot_be_compared() -> None:
    one = [result("a", score(9, num_fewshot=5))]
    with pytest.raises(DataError, match="results of at least two models"):
        compare({"a": one})
    with pytest.raises(DataError, match="a and b share no task"):
        compare({"a": one, "b": [result("b", score(9, task="boolq"))]})
    with pytest.raises(DataError, match=r"piqa was measured with different settings \(num_fewshot: a: 5, b: 0\)"):
        compare({"a": one, "b": [result("b", score(9, num_fewshot=0))]})
    with pytest.raises(DataError, match=r"\(n: a: 200, b: 100\)"):
        compare({"a": one, "b": [result("b", score(9, of=100, num_fewshot=5))]})


def test_sums_over_other_documents_are_refused() -> None:
    """MME's metrics are sums without scores of documents, but the number of documents is known."""
    some = {name: [result(name, Score("mme", "sum", 900.0, documents=n))] for name, n in (("a", 100), ("b", 2374))}
    with pytest.raises(DataError, match=r"mme was measured with different settings \(n: a: 100, b: 2374\)"):
        compare(some)


def test_two_results_of_one_name() -> None:
    """The second result would hide the first, so that one of them would be compared with itself."""
    twice = [result("runs/my", score(9)), result("runs/my", score(90))]
    with pytest.raises(DataError, match=r"2 results with the name 'runs/my' hold piqa acc; .* --name"):
        compare({"runs/my": twice, "target": [result("target", score(9))]})


def test_different_settings_are_named() -> None:
    """Other documents with the same numbers are not paired; other chat templates and versions are named."""
    first, second = score(100, targets="a"), score(110, targets="a")
    plain = compare({"a": [result("a", first)], "b": [result("b", second)]})
    assert "other settings" not in plain
    moved = replace(second, targets="b")
    apart, paired = subtract(moved, first).high, subtract(second, first).high
    assert apart is not None and paired is not None and apart > paired
    odd = replace(result("b", moved), setting={"chat_template": True}, harness={"name": "lm-eval", "version": "2"})
    told = "chat_template True instead of False; lm-eval 2 instead of 1; other documents in piqa"
    assert f"b was measured with other settings than a: {told}." in compare(
        {"a": [replace(result("a", first), setting={"chat_template": False})], "b": [odd]}
    )


def test_command(tmp_path: Path) -> None:
    for name, right in (("target", 120), ("graft", 119)):
        result(name, score(right)).write(tmp_path / name / "text.json")
    command = ["eval", "compare", str(tmp_path / "target"), str(tmp_path / "graft/text.json"), "--out"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "both.md")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "both.md").read_text(encoding="utf-8") == done.stdout and "graft - target" in done.stdout
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.json").write_text("{}")
    (tmp_path / "old.json").write_text('{"format": 0}')
    for path, complaint in (
        ("empty", "holds no result"),
        ("nothing.json", "nothing.json does not exist"),
        ("odd.json", "is not a result of zero-ds eval"),
        ("old.json", "has format 0"),
    ):
        bad = CliRunner().invoke(app, ["eval", "compare", str(tmp_path / path)])
        assert isinstance(bad.exception, DataError) and complaint in str(bad.exception)
    nowhere = CliRunner().invoke(app, [*command, str(tmp_path / "odd.json/both.md")])
    assert isinstance(nowhere.exception, ConfigError) and "name a file in a folder" in str(nowhere.exception)


def test_a_group_is_the_mean_of_its_documents() -> None:
    """Groups contain groups, weighted by size, as in mmlu. A value that is not the documents' mean keeps no scores."""
    found = {
        "results": {"mmlu": {"alias": "mmlu", "acc,none": 0.6, "acc_stderr,none": 0.1}},
        "groups": {},
        "group_subtasks": {"mmlu": ["stem", "law"], "stem": ["maths"]},
        "samples": {
            "maths": [{"doc_id": n, "filter": "none", "acc": float(n < 2), "target": n} for n in range(3)],
            "law": [{"doc_id": n, "filter": "none", "acc": 1.0 - n} for n in range(2)],
        },
        "n-shot": {"maths": 5, "law": 5},
        "higher_is_better": {"maths": {"acc": True}},
    }
    (whole,) = task_scores(found, Task("mmlu", 5, "acc"), "mmlu")
    assert (whole.value, whole.stderr, whole.num_fewshot, whole.n) == (0.6, 0.1, 5, 5)
    found["results"]["mmlu"]["acc,none"] = 0.5
    (sums,) = task_scores(found, Task("mmlu", 5, "acc"), "mmlu")
    assert (sums.items, sums.n, sums.targets) == ({}, 5, whole.targets)
    found["samples"]["maths"][0]["target"] = 7
    assert task_scores(found, Task("mmlu", 5, "acc"), "mmlu")[0].targets != whole.targets


def test_results_are_written_whole(tmp_path: Path) -> None:
    made = result("a", score(9))
    made.write(tmp_path / "r.json")
    assert read_result(tmp_path / "r.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
