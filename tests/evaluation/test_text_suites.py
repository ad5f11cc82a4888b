"""lm-evaluation-harness on local tasks: scores equal a direct computation, for any batch size and number of ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed_helper import run_ranks
from typer.testing import CliRunner

from zero_ds.cli.demo import LLM, make_llm
from zero_ds.cli.main import app
from zero_ds.evaluation.suites.evaluate import check_suite, evaluate_suite
from zero_ds.evaluation.suites.harness import select_suites
from zero_ds.evaluation.suites.results import Result, Score, read_result
from zero_ds.evaluation.suites.tasks import PAPER_TEXT, SuiteOptions
from zero_ds.grafting.named_model import LoadedModel, find_model, load_model
from zero_ds.runtime.errors import ConfigError

TASKS = ("tiny_choice", "tiny_cloze", "tiny_answer")
QUESTIONS = [
    ("The sky on a clear day is", " blue", [" blue", " a small circle", " no"]),
    ("Snow is", " white", [" black", " white"]),
    ("Is the circle on the left side? Answer:", " Yes", [" Yes", " No", " It is green"]),
    ("A star and a", " square", [" square", " circle and a star", " red"]),
    ("What color is grass? It is", " green", [" red", " green", " blue"]),
    ("The image shows a large", " triangle", [" triangle", " star on a gray background"]),
    ("One, two,", " three", [" three", " blue stars", " two"]),
]
"""Seven questions, which is a multiple neither of two ranks nor of any batch size used here."""
ANSWER_TOKENS = 5


@torch.no_grad()
def log_prob(loaded: LoadedModel, context: str, continuation: str) -> tuple[float, bool]:
    """Returns the continuation's log-probability in one pass, and whether each of its tokens is the most probable."""
    words = loaded.encoder.template.tokenizer
    before = words(context, add_special_tokens=False).input_ids
    ids = words(context + continuation, add_special_tokens=False).input_ids
    logits = loaded.model.decoder(torch.tensor([ids])).logits[0].log_softmax(-1)
    rows = logits[len(before) - 1 : len(ids) - 1]
    wanted = torch.tensor(ids[len(before) :])
    return float(rows.gather(1, wanted[:, None]).sum()), bool((rows.argmax(-1) == wanted).all())


@torch.no_grad()
def greedy(loaded: LoadedModel, context: str) -> str:
    """Returns the answer up to the end of its first line, computed without a cache."""
    words = loaded.encoder.template.tokenizer
    ids = words(context, add_special_tokens=False).input_ids
    start = len(ids)
    for _ in range(ANSWER_TOKENS):
        token = int(loaded.model.decoder(torch.tensor([ids])).logits[0, -1].argmax())
        if token == words.eos_token_id:
            break
        ids.append(token)
    return str(words.decode(ids[start:], skip_special_tokens=True)).split("\n")[0]


def write_tasks(folder: Path, loaded: LoadedModel) -> Path:
    """Writes three tasks; in one of them the true answer is the model's own in four of seven documents."""
    folder.mkdir(parents=True)
    rows = []
    for number, (question, answer, choices) in enumerate(QUESTIONS):
        said = greedy(loaded, question).strip()
        written = said if number % 2 == 0 else f"not {said}"
        rows.append({"q": question, "a": answer, "choices": choices, "gold": choices.index(answer), "answer": written})
    (folder / "docs.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.json")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "target_delimiter": "",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    cloze = {"output_type": "loglikelihood", "doc_to_target": "{{a}}"}
    answer = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False},
        "filter_list": [{"name": "bare", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    }
    metrics: list[list[dict[str, Any]]] = [
        [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, {"metric": "acc", **mean}],
        [{"metric": "exact_match", **mean}],
    ]
    for name, task, figures in zip(TASKS, (choice, cloze, answer), metrics, strict=True):
        content = {"task": name, **shared, **task, "metric_list": figures, "metadata": {"version": 1}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def directly(loaded: LoadedModel) -> dict[tuple[str, str], float]:
    """Computes the scores from the questions, without the harness."""
    right, normed, cloze, said = [], [], [], []
    for number, (question, answer, choices) in enumerate(QUESTIONS):
        values = [log_prob(loaded, question, choice)[0] for choice in choices]
        per_letter = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        right.append(choices[values.index(max(values))] == answer)
        normed.append(choices[per_letter.index(max(per_letter))] == answer)
        cloze.append(log_prob(loaded, question, answer))
        said.append(number % 2 == 0)
    mean = len(QUESTIONS)
    return {
        ("tiny_choice", "acc"): sum(right) / mean,
        ("tiny_choice", "acc_norm"): sum(normed) / mean,
        ("tiny_cloze", "perplexity"): float(torch.tensor([-value for value, _ in cloze]).double().mean().exp()),
        ("tiny_cloze", "acc"): sum(exact for _, exact in cloze) / mean,
        ("tiny_answer", "exact_match,bare"): sum(said) / mean,
    }


def measured(model: str, folder: Path, **options: Any) -> Result:
    """Runs all tasks of the folder on a model, as the command does."""
    named = find_model(model)
    selected = select_suites(",".join(TASKS), "lm-eval", folder)
    assert len(selected) == 1
    result = evaluate_suite(named, load_model(named), selected[0], SuiteOptions(bootstrap=0, **options), "model")
    assert result is not None
    return result


def values(result: Result) -> dict[tuple[str, str], float]:
    return {score.key: score.value for score in result.scores}


def on_ranks(model: str, folder: Path) -> list[Score] | None:
    """Runs on each of several ranks."""
    from zero_ds.runtime import distributed

    distributed.initialize()
    named = find_model(model)
    (selected,) = select_suites(",".join(TASKS), "lm-eval", folder)
    result = evaluate_suite(named, load_model(named), selected, SuiteOptions(batch_size=2, bootstrap=0), "model")
    return list(result.scores) if result is not None else None


def too_many_ranks(model: str, folder: Path) -> str:
    from zero_ds.runtime import distributed

    distributed.initialize()
    named = find_model(model)
    (selected,) = select_suites("tiny_cloze", "lm-eval", folder)
    with pytest.raises(ConfigError) as caught:
        check_suite(named, selected, SuiteOptions(limit=1))
    distributed.barrier()  # the other rank still needs the store of this one
    return str(caught.value)


@pytest.fixture(scope="module")
def target(made: Callable[..., Path]) -> str:
    return str(made("llama", tied=True))


@pytest.fixture(scope="module")
def tasks(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tiny", load_model(find_model(target)))


@pytest.fixture(scope="module")
def result(target: str, tasks: Path) -> Result:
    return measured(target, tasks, batch_size=3, samples=True)


def test_a_base_model_on_plain_text_and_with_a_template(
    target: str, tasks: Path, result: Result, tmp_path: Path
) -> None:
    """It has no template, so plain text is measured as ever; with a file, that template is in the prompts."""
    base = tmp_path / "base"
    shutil.copytree(target, base)
    template = (base / "chat_template.jinja").rename(tmp_path / "own.jinja")
    assert values(measured(str(base), tasks, batch_size=3)) == values(result)
    named = find_model(str(base), None, str(template))
    options = SuiteOptions(bootstrap=0, samples=True, limit=2, chat_template=str(template))
    (selected,) = select_suites("tiny_cloze", "lm-eval", tasks)
    chatted = evaluate_suite(named, load_model(named), selected, options, "model")
    assert chatted is not None and chatted.setting["chat_template"] == str(template)
    asked = [sample["arguments"][0][0] for sample in chatted.samples["tiny_cloze"]]
    assert len(asked) == 2 and all(prompt.endswith("<|im_start|>assistant\n") for prompt in asked)
    assert all(prompt.startswith("<|im_start|>system") for prompt in asked)


def test_scores_are_those_of_a_direct_computation(target: str, result: Result) -> None:
    assert values(result) == pytest.approx(directly(load_model(find_model(target))), rel=1e-4)
    assert values(result)["tiny_answer", "exact_match,bare"] == pytest.approx(4 / 7)
    assert [score.n for score in result.scores] == [7] * 5
    assert not next(score for score in result.scores if score.metric == "perplexity").higher_is_better


@pytest.mark.parametrize("batch_size", [16])
def test_the_batch_size_has_no_influence(target: str, tasks: Path, result: Result, batch_size: int) -> None:
    other = measured(target, tasks, batch_size=batch_size)
    assert values(other) == pytest.approx(values(result), rel=1e-5)
    assert [score.items for score in other.scores] == [score.items for score in result.scores]


def test_two_ranks_give_the_scores_of_one(target: str, tasks: Path, result: Result) -> None:
    """One rank gets four of the seven documents, the other three."""
    first, second = run_ranks(on_ranks, 2, target, tasks)
    assert second is None
    assert {score.key: score.value for score in first} == pytest.approx(values(result), rel=1e-6)
    assert [score.items for score in first] == [score.items for score in result.scores]


def test_a_result_survives_its_file_and_names_its_model(result: Result, tmp_path: Path, target: str) -> None:
    result.write(tmp_path / "r.json")
    again = read_result(tmp_path / "r.json")
    assert again.scores == result.scores and set(again.samples) == set(TASKS)
    assert again.model["kind"] == "target" and len(again.model["decoder_hash"]) == 34
    assert again.harness["name"] == "lm-eval" and again.setting["ranks"] == 1


def test_command(target: str, small: Path, tasks: Path, tmp_path: Path) -> None:
    """Evaluates a surrogate and its target, and compares them."""
    for model, name in ((target, "target"), (str(small), "surrogate")):
        command = [
            "eval",
            model,
            "--suite",
            "tiny_choice,tiny_cloze",
            "--harness",
            "lm-eval",
            "--tasks-folder",
            str(tasks),
        ]
        done = CliRunner().invoke(app, [*command, "--name", name, "--out", str(tmp_path / name), "--dtype", "float32"])
        assert done.exit_code == 0, done.output
        assert "| tiny_choice | acc_norm |" in done.stdout
        assert (tmp_path / name / "lm-eval-tasks.md").read_text() in done.stdout
    compared = CliRunner().invoke(app, ["eval", "compare", str(tmp_path / "target"), str(tmp_path / "surrogate")])
    assert compared.exit_code == 0, compared.output
    assert "surrogate - target" in compared.stdout and "Language ability of surrogate against target" in compared.stdout


def test_the_suite_of_the_paper_is_in_the_harness(tasks: Path) -> None:
    """The harness knows every task of Table A.3, with these numbers of examples and metrics."""
    (selected,) = select_suites("paper-text", "auto", tasks)
    assert selected.suite.tasks == PAPER_TEXT
    table = {task.name: (task.num_fewshot, task.metric) for task in PAPER_TEXT}
    assert table == {
        "mmlu": (5, "acc"),
        "hellaswag": (10, "acc_norm"),
        "arc_easy": (0, "acc_norm"),
        "arc_challenge": (25, "acc_norm"),
        "winogrande": (5, "acc"),
        "piqa": (0, "acc_norm"),
        "boolq": (0, "acc"),
        "openbookqa": (0, "acc_norm"),
    }


@pytest.mark.parametrize(
    ("words", "harness", "complaint"),
    [
        ("tiny_chioce", "lm-eval", "did you mean 'tiny_choice'"),
        ("hellaswga", "lm-eval", r"did you mean 'hellaswag' or '(?!hellaswag')"),
        ("mmlu:binary", "auto", ":binary is for mme and pope"),
        ("text", "harness", "--harness harness is unknown"),
        (",", "auto", "names no task"),
        ("mmmu_val", "lm-eval", "no harness knows the task 'mmmu_val'"),  # it has images
    ],
)
def test_unknown_tasks_and_harnesses(tasks: Path, words: str, harness: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        select_suites(words, harness, tasks)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [("paper-vision", "lmms-eval is"), ("paper-text", "lm-eval is"), ("mmlu", "lm-eval and lmms-eval are")],
)
def test_a_harness_that_is_not_installed(words: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zero_ds.evaluation.suites.harness.MODULES", {"lm-eval": "no_such_1", "lmms-eval": "no_such_2"})
    with pytest.raises(ConfigError, match=rf"^{complaint} not installed; pip install 'zero_ds\[eval\]'$"):
        select_suites(words, "auto", None)


def test_data_that_cannot_be_fetched(target: str, tasks: Path) -> None:
    named = find_model(target)
    (selected,) = select_suites("piqa", "lm-eval", tasks)
    with pytest.raises(ConfigError, match="the data of piqa is not cached and could not be fetched"):
        check_suite(named, selected, SuiteOptions(limit=2))


def test_fewer_documents_than_ranks(target: str, tasks: Path) -> None:
    said = run_ranks(too_many_ranks, 2, target, tasks)
    assert said == ["tiny_cloze has 1 documents for 2 ranks; use fewer ranks."] * 2


def test_a_task_s_own_limit_of_zero(target: str, tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "tiny_answer.yaml").read_text(encoding="utf-8")
    (tmp_path / "none.yaml").write_text(text.replace(f"max_gen_toks: {ANSWER_TOKENS}", "max_gen_toks: 0"))
    (selected,) = select_suites("tiny_answer", "lm-eval", tmp_path)
    with pytest.raises(ConfigError, match="tiny_answer limits answers to 0 tokens; set its limit to at least 1"):
        check_suite(find_model(target), selected, SuiteOptions())
    check_suite(find_model(target), selected, SuiteOptions(max_new_tokens=3))


def test_a_task_named_twice(target: str, tasks: Path, tmp_path: Path) -> None:
    """Named twice by itself, a task counts once; named together with its group, it would stop the harness."""
    (selected,) = select_suites("tiny_answer,tiny_answer", "lm-eval", tasks)
    assert [task.name for task in selected.suite.tasks] == ["tiny_answer"]
    for name in TASKS:
        (tmp_path / f"{name}.yaml").write_text((tasks / f"{name}.yaml").read_text(encoding="utf-8"))
    (tmp_path / "group.yaml").write_text("group: tiny\ntask: [tiny_answer, tiny_cloze]\n")
    (selected,) = select_suites("tiny,tiny_answer", "lm-eval", tmp_path)
    with pytest.raises(ConfigError, match=r"Duplicate task 'tiny_answer'.*; name it only once"):
        check_suite(find_model(target), selected, SuiteOptions())


@pytest.mark.parametrize(("option", "value"), [("--max-new-tokens", "0"), ("--limit", "0"), ("--batch", "0")])
def test_limits_of_zero(target: str, option: str, value: str) -> None:
    done = CliRunner().invoke(app, ["eval", target, "--suite", "text", option, value])
    assert isinstance(done.exception, ConfigError) and f"{option} 0 is too small; it must be at least 1." in str(
        done.exception
    )


def test_results_of_another_model_are_kept(target: str, small: Path, tasks: Path, tmp_path: Path) -> None:
    """Only a new result of the same tasks on the same model replaces a result; otherwise there is an error at once."""
    score = Score("tiny_choice", "acc", 0.5)
    result = Result(target, "tiny_choice", {"name": "lm-eval", "version": "1"}, {}, {}, {}, (score,))
    result.write(tmp_path / "tiny_choice.json")
    command = ["--suite", "tiny_choice", "--harness", "lm-eval", "--tasks-folder", str(tasks), "--out", str(tmp_path)]
    other = CliRunner().invoke(app, ["eval", str(small), *command])
    assert "holds tiny_choice of " in str(other.exception) and "choose another --out" in str(other.exception)
    assert read_result(tmp_path / "tiny_choice.json") == result
    again = CliRunner().invoke(app, ["eval", target, *command])
    assert again.exit_code == 0 and read_result(tmp_path / "tiny_choice.json").scores != result.scores
    (tmp_path / "tiny_choice.json").write_text("{}")
    odd = CliRunner().invoke(app, ["eval", target, *command])
    assert "is not a result of zero-ds eval" in str(odd.exception) and "choose another --out" in str(odd.exception)


def test_results_need_a_folder(target: str, tasks: Path, tmp_path: Path) -> None:
    """The error comes before the model is read, not after hours."""
    (tmp_path / "taken").write_text("")
    command = ["eval", target, "--suite", "tiny_choice", "--harness", "lm-eval", "--tasks-folder", str(tasks)]
    for out in (tmp_path / "taken", tmp_path / "taken" / "inside"):
        done = CliRunner().invoke(app, [*command, "--out", str(out)])
        assert isinstance(done.exception, ConfigError) and "is not a folder" in str(done.exception)


def test_the_real_model(tmp_path: Path) -> None:
    """On SmolLM2-135M, the harness's scores equal the direct ones, and are better than chance."""
    folder = LLM.expanduser()
    make_llm(folder)
    loaded = load_model(find_model(str(folder)))
    result = measured(str(folder), write_tasks(tmp_path / "tasks", loaded), batch_size=4)
    expected = directly(loaded)
    assert values(result) == pytest.approx(expected, rel=1e-3)
    assert expected["tiny_choice", "acc"] >= 5 / 7
