"""lmms-eval on local tasks with images: scores equal a direct computation, for any batch size and number of ranks.

lmms-eval is installed without its dependencies (launch/env.sh), because nothing here needs them.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks
from pace import scaled
from PIL import ImageFile
from places import ROOT

from zero_ds.cli.demo import LLM, make_llm
from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import Turn
from zero_ds.data.sources import Sample
from zero_ds.evaluation.suites.evaluate import check_suite, evaluate_suite
from zero_ds.evaluation.suites.harness import load_harness, select_suites
from zero_ds.evaluation.suites.lmms_eval import LmmsEval
from zero_ds.evaluation.suites.results import Result, Score
from zero_ds.evaluation.suites.tasks import BINARY_PROMPT, SUITES, SuiteOptions, check_judge
from zero_ds.grafting.named_model import LoadedModel, find_model, load_model
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.foreign import in_pieces, write_result
from zero_ds.training.checkpoint.manifest import describe_models

TASKS = ("seen_answer", "seen_choice")
QUESTIONS: list[tuple[int | None, str, list[str]]] = [
    (0, "what color is it?", ["red", "blue", "a small green circle"]),
    (1, "is there a circle on the left side?", ["Yes", "No"]),
    (2, "describe the image briefly.", ["The image shows a star.", "red"]),
    (0, "how many stars are there?", ["one", "two", "three"]),
    (None, "which shape?", ["circle", "square", "triangle"]),
    (4, "what color is it?", ["red", "blue", "yellow"]),
    (5, "is the square large?", ["Yes", "No"]),
]
"""(image or None, question, choices): seven, a multiple neither of two ranks nor of any batch size used here."""
ANSWER_TOKENS = 5
UTILS = """from PIL import Image


def visuals(doc):
    return SHOWN


def score(doc, results):
    return {"same": float(results[0] == doc["answer"])}
"""


def inputs(loaded: LoadedModel, image: Path | None, question: str) -> tuple[list[int], torch.Tensor | None]:
    sample = Sample("x", (Turn("user", f"<image>\n{question}" if image else question),), (str(image),))
    ids = loaded.encoder.encode(loaded.encoder.turns(sample), generate=True).input_ids
    return ids, loaded.encoder.pixels(sample) if image else None


@torch.no_grad()
def log_probs(loaded: LoadedModel, ids: list[int], pixels: torch.Tensor | None) -> torch.Tensor:
    """Returns the log-probabilities of every next token, in one pass over the whole prompt: (seq, vocabulary)."""
    embeddings = loaded.model.embed(torch.tensor([ids]), pixels)
    logits: torch.Tensor = loaded.model.decoder(inputs_embeds=embeddings, use_cache=False).logits[0]  # type: ignore[operator]
    return logits.log_softmax(-1)


@torch.no_grad()
def greedy(loaded: LoadedModel, image: Path | None, question: str) -> str:
    """Generates with transformers' own loop."""
    ids, pixels = inputs(loaded, image, question)
    embeddings = loaded.model.embed(torch.tensor([ids]), pixels)
    stop = loaded.encoder.template.end_of_turn()
    options = {"do_sample": False, "eos_token_id": stop, "pad_token_id": stop}
    decoder: Any = loaded.model.decoder
    said = decoder.generate(inputs_embeds=embeddings, max_new_tokens=ANSWER_TOKENS, **options)[0].tolist()
    return str(loaded.encoder.template.tokenizer.decode(said, skip_special_tokens=True)).strip()


def best(loaded: LoadedModel, image: Path | None, question: str, choices: list[str]) -> int:
    """Returns the choice whose tokens have the highest mean log-probability, as lmms-eval scores."""
    values = []
    for choice in choices:
        ids, pixels = inputs(loaded, image, question)
        said = loaded.encoder.template.encode_text(choice)
        found = log_probs(loaded, ids + said, pixels)[len(ids) - 1 : -1]
        values.append(float(found.gather(1, torch.tensor(said)[:, None]).mean()))
    return values.index(max(values))


def write_tasks(folder: Path, loaded: LoadedModel, images: Path) -> Path:
    """Writes two tasks: the model's own answers are right in four of seven documents, its own choices in five."""
    folder.mkdir(parents=True)
    rows = []
    for number, (name, question, choices) in enumerate(QUESTIONS):
        image = None if name is None else images / f"{name}.png"
        said, chosen = greedy(loaded, image, question), best(loaded, image, question, choices)
        rows.append(
            {
                "path": str(image or ""),
                "q": question,
                "answer": said if number % 2 == 0 else f"not {said}",
                "choices": choices,
                "gold": chosen if number < 5 else (chosen + 1) % len(choices),
            }
        )
    (folder / "docs.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shown = "[Image.open(doc['path'])] if doc['path'] else []"
    (folder / "utils.py").write_text(UTILS.replace("SHOWN", shown), encoding="utf-8")
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'docs.json'}\ntest_split: test\n"
        'doc_to_visual: !function utils.visuals\ndoc_to_text: "{{q}}"\nmetadata:\n  - version: 0\n'
    )
    mean = "    aggregation: mean\n    higher_is_better: true\n"
    (folder / "seen_answer.yaml").write_text(
        f"task: seen_answer\n{shared}output_type: generate_until\n"
        'doc_to_target: "{{answer}}"\nprocess_results: !function utils.score\n'
        f"generation_kwargs:\n  max_new_tokens: {ANSWER_TOKENS}\nmetric_list:\n  - metric: same\n{mean}",
        encoding="utf-8",
    )
    (folder / "seen_choice.yaml").write_text(
        f"task: seen_choice\n{shared}output_type: multiple_choice\n"
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        f"metric_list:\n  - metric: acc\n{mean}",
        encoding="utf-8",
    )
    return folder


def measured(run: Path, target: str, folder: Path, **options: Any) -> Result | None:
    named = find_model(str(run), target)
    (selected,) = select_suites(",".join(TASKS), "lmms-eval", folder)
    return evaluate_suite(named, load_model(named), selected, SuiteOptions(bootstrap=0, **options), "graft")


def on_ranks(run: Path, target: str, folder: Path) -> list[Score] | None:
    """Runs on each of several ranks."""
    from zero_ds.runtime import distributed

    distributed.initialize()
    result = measured(run, target, folder, batch_size=2)
    return list(result.scores) if result is not None else None


@pytest.fixture(scope="module")
def target(made: Callable[..., Path]) -> str:
    return str(made("llama", tied=True))


@pytest.fixture(scope="module")
def tasks(trained: Path, target: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load_model(find_model(str(trained / "encoder"), target))
    return write_tasks(tmp_path_factory.mktemp("tasks") / "seen", loaded, data.parent / "images")


@pytest.fixture(scope="module")
def result(trained: Path, target: str, tasks: Path) -> Result:
    found = measured(trained / "encoder", target, tasks, batch_size=3, samples=True)
    assert found is not None
    return found


def test_scores_are_those_of_a_direct_computation(result: Result) -> None:
    found = {score.key: (score.value, score.n) for score in result.scores}
    assert found == {
        ("seen_answer", "same"): (pytest.approx(4 / 7), 7),
        ("seen_choice", "acc"): (pytest.approx(5 / 7), 7),
    }
    assert list(next(s for s in result.scores if s.metric == "acc").items.values()) == [1.0] * 5 + [0.0] * 2
    assert set(result.samples) == set(TASKS) and result.model["kind"] == "graft"


@pytest.mark.parametrize("batch_size", [32])
def test_the_batch_size_has_no_influence(
    trained: Path, target: str, tasks: Path, result: Result, batch_size: int
) -> None:
    other = measured(trained / "encoder", target, tasks, batch_size=batch_size)
    assert other is not None and other.scores == result.scores


@pytest.fixture(scope="module")
def real(
    made: Callable[..., Path], run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Makes a result folder on SmolLM2-135M, as a run leaves it: a small encoder and an adapter with random weights."""
    make_llm(LLM.expanduser())
    out = tmp_path_factory.mktemp("real") / "run"
    config = run_config("encoder", out, target=str(LLM.expanduser()), surrogate=None, decoder="target")
    vision = made("clip")
    model = build_model(
        ModelSpec(LLM.expanduser(), encoder=vision, encoder_config=config.encoder, adapter_config=config.adapter)
    )
    tensors = dict(model.parameters_of("encoder") + model.parameters_of("adapter"))
    declared = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write_result(out, config, describe_models(config, None), 0, declared, lambda name: in_pieces(10 * tensors[name]))
    return out


def test_two_ranks_find_what_one_finds(trained: Path, target: str, tasks: Path, result: Result) -> None:
    """Seven documents are not a multiple of two ranks."""
    first, second = run_ranks(on_ranks, 2, trained / "encoder", target, tasks)
    assert second is None
    assert {score.key: score.value for score in first} == {score.key: score.value for score in result.scores}
    assert [score.items for score in first] == [score.items for score in result.scores]


@pytest.mark.slow(reason="minutes of a 135M model; test_two_ranks_find_what_one_finds shows the same on a tiny one")
def test_the_real_model_on_one_rank_and_on_two(real: Path, data: Path, tmp_path: Path) -> None:
    """On SmolLM2-135M with images, the harness's scores equal the direct ones; seven is not a multiple of two ranks."""
    target = str(LLM.expanduser())
    loaded = load_model(find_model(str(real), target))
    folder = write_tasks(tmp_path / "seen", loaded, data.parent / "images")
    result = measured(real, target, folder, batch_size=3)
    assert result is not None and result.model["kind"] == "graft"
    found = {score.key: (score.value, score.n) for score in result.scores}
    assert found == {
        ("seen_answer", "same"): (pytest.approx(4 / 7), 7),
        ("seen_choice", "acc"): (pytest.approx(5 / 7), 7),
    }
    assert list(next(s for s in result.scores if s.metric == "acc").items.values()) == [1.0] * 5 + [0.0] * 2
    assert len({greedy(loaded, data.parent / "images" / f"{n}.png", QUESTIONS[0][1]) for n in range(3)}) > 1
    del loaded
    first, second = run_ranks(on_ranks, 2, real, target, folder)
    assert second is None
    assert {score.key: score.value for score in first} == {score.key: score.value for score in result.scores}
    assert [score.items for score in first] == [score.items for score in result.scores]


def with_document(tasks: Path, folder: Path, data_file: str, **changes: Any) -> Path:
    """Writes the task `seen_answer` with one document into a new folder."""
    folder.mkdir()
    row = {**json.loads((tasks / "docs.json").read_text(encoding="utf-8").splitlines()[0]), **changes}
    (folder / "docs.json").write_text(json.dumps(row), encoding="utf-8")
    for name in ("utils.py", "seen_answer.yaml"):
        text = (tasks / name).read_text(encoding="utf-8").replace(str(tasks / "docs.json"), str(folder / data_file))
        (folder / name).write_text(text, encoding="utf-8")
    return folder


BROKEN = {"none": b"not an image", "cut early": 60, "cut late": -200}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_image_that_cannot_be_read(
    kind: str, trained: Path, target: str, tasks: Path, data: Path, tmp_path: Path
) -> None:
    """The error names the document, even for a truncated image, whose missing part lmms-eval lets Pillow fill."""
    whole = (data.parent / "images" / "0.png").read_bytes()
    left = BROKEN[kind]
    (tmp_path / "broken.png").write_bytes(left if isinstance(left, bytes) else whole[:left])
    folder = with_document(tasks, tmp_path / "tasks", "docs.json", path=str(tmp_path / "broken.png"))
    named = find_model(str(trained / "encoder"), target)
    (selected,) = select_suites("seen_answer", "lmms-eval", folder)
    check_suite(named, selected, SuiteOptions())
    with pytest.raises(ConfigError, match=r"the image of seen_answer/0 cannot be read: .*; repair the task's data"):
        evaluate_suite(named, load_model(named), selected, SuiteOptions(bootstrap=0), "graft")
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "lmms-eval's own setting must stay for others that rely on it"


@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_image_inside_a_data_set(
    broken: int, trained: Path, target: str, tasks: Path, data: Path, tmp_path: Path
) -> None:
    """Most tasks have bytes in a table that the data set library decodes; it reads the first image at once."""
    from datasets import Dataset, Features, Image, Value

    whole = (data.parent / "images" / "0.png").read_bytes()
    images = [{"bytes": whole[:-200] if number == broken else whole, "path": None} for number in range(3)]
    folder = with_document(tasks, tmp_path / "tasks", "docs.parquet")
    columns = {"image": images, "q": ["why?"] * 3, "answer": ["no"] * 3}
    kinds = Features({"image": Image(), "q": Value("string"), "answer": Value("string")})
    Dataset.from_dict(columns, kinds).to_parquet(folder / "docs.parquet")
    yaml = folder / "seen_answer.yaml"
    yaml.write_text(yaml.read_text(encoding="utf-8").replace("dataset_path: json", "dataset_path: parquet"))
    utils = (folder / "utils.py").read_text(encoding="utf-8")
    (folder / "utils.py").write_text(
        utils.replace("Image.open(doc['path'])", "doc['image']").replace("doc['path']", "doc['q']")
    )
    named = find_model(str(trained / "encoder"), target)
    (selected,) = select_suites("seen_answer", "lmms-eval", folder)
    with pytest.raises(ConfigError, match=r"image of seen_answer(/1)? cannot be read: .*; repair the task's data"):
        check_suite(named, selected, SuiteOptions())
        assert broken == 1
        evaluate_suite(named, load_model(named), selected, SuiteOptions(bootstrap=0), "graft")


def test_a_task_with_images_is_for_the_harness_that_shows_them(tasks: Path) -> None:
    """lm-eval would accept it as well, and ask without the images."""
    (selected,) = select_suites("seen_answer", "auto", tasks)
    assert selected.suite.harness == "lmms-eval"
    assert not load_harness("lm-eval", tasks).knows("seen_answer")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("task: [seen", "a task file in .* is not valid YAML"),
        (None, "seen_answer limits answers to 0 tokens; set its limit to at least 1"),
    ],
)
def test_task_files_with_mistakes(
    text: str | None, complaint: str, trained: Path, target: str, tasks: Path, tmp_path: Path
) -> None:
    folder = with_document(tasks, tmp_path / "tasks", "docs.json")
    zero = (folder / "seen_answer.yaml").read_text().replace(f"max_new_tokens: {ANSWER_TOKENS}", "max_new_tokens: 0")
    (folder / "seen_answer.yaml").write_text(text or zero)
    with pytest.raises(ConfigError, match=complaint):
        (selected,) = select_suites("seen_answer", "lmms-eval", folder)
        check_suite(find_model(str(trained / "encoder"), target), selected, SuiteOptions())


def test_a_filelock_that_is_too_new_for_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval 0.7.3 would end in a traceback, and only once it measures."""
    monkeypatch.setitem(sys.modules, "filelock._api", None)
    monkeypatch.delitem(sys.modules, "zero_ds.evaluation.suites.lmms_eval")
    with pytest.raises(ConfigError, match=r"lmms-eval cannot be imported: .*filelock._api.*; see docs/evaluation.md"):
        load_harness("lmms-eval", None)


def test_from_the_harness_s_own_command_line(trained: Path, target: str, tasks: Path, tmp_path: Path) -> None:
    """`lmms-eval --model zero_ds` finds the model by its entry point."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "zero_ds", "--tasks", "seen_answer", "--batch_size", "2"]
    arguments = f"weights={trained / 'encoder'},target={target},dtype=float32"
    options = ["--model_args", arguments, "--include_path", str(tasks), "--output_path", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, timeout=scaled(300))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = tmp_path.rglob("*results.json")
    found = json.loads(file.read_text(encoding="utf-8"))["results"]["seen_answer"]
    assert found["same,none"] == pytest.approx(4 / 7)


def test_the_demo_tasks_import_modules_that_exist() -> None:
    """tools/make_demo_task.py writes a module next to its task files, which lmms-eval imports."""
    functions: dict[str, Any] = {}
    exec(runpy.run_path(str(ROOT / "tools/make_demo_task.py"))["FUNCTIONS"], functions)
    document = {"choices": ["red", "blue"], "word": "blue"}
    assert functions["score"](document, ["It is blue."]) == {"right": 1.0}


def test_a_model_without_a_vision_encoder_is_refused(target: str, tasks: Path) -> None:
    named = find_model(target)
    (selected,) = select_suites("seen_choice", "lmms-eval", tasks)
    with pytest.raises(ConfigError, match="has no vision encoder; name a run"):
        check_suite(named, selected, SuiteOptions())


@pytest.mark.parametrize("task", ["mmvet", "llava_in_the_wild", "mmbench_en_dev", "mmbench_cn_dev"])
def test_a_task_without_its_judge_is_refused_before_data_are_fetched(
    task: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (selected,) = select_suites(task, "lmms-eval")
    with pytest.raises(ConfigError, match=f"{task}: the model gpt-4o.* judges the answers.*OPENAI_API_KEY is not set"):
        selected.harness.check(selected.suite.tasks, SuiteOptions())
    with caplog.at_level("INFO"):
        check_judge([task], {"OPENAI_API_KEY": "k", "MODEL_VERSION": "mine"})
    assert f"mine judges the answers to {task}" in caplog.text
    with pytest.raises(ConfigError, match="AZURE_API_KEY is not set"):
        check_judge([task], {"API_TYPE": "azure", "OPENAI_API_KEY": "k"})


def test_the_suite_without_a_judge_asks_none() -> None:
    """The harness's own answer to an unclear reply is a random letter; its static task counts it as wrong."""
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    check_judge([task.name for task in SUITES["vision"].tasks], {})
    choices = {"A": "a dog", "B": "a cat", "C": "a fish", "D": "a bird"}
    row = {"index": 1, "question": "?", "answer": "A", "category": "c", "L2-category": "c", **choices}
    evaluator = MMBench_Evaluator()
    evaluator.get_chat_response = None  # no judge is asked
    found = [evaluator.eval_result([{**row, "prediction": said}], "static")[0] for said in ("A", "B", "no idea")]
    assert found == [1, 0, 0]


def test_the_suites_of_the_paper_are_in_the_harness(tasks: Path, tmp_path: Path) -> None:
    """The suite has the tasks of appendix A.6 and CV-Bench, and MME and POPE also with the binary prompt.

    A task of the folder takes precedence over the harness's own.
    """
    text = (tasks / "seen_answer.yaml").read_text(encoding="utf-8")
    (tmp_path / "gqa.yaml").write_text(text.replace("task: seen_answer", "task: gqa"), encoding="utf-8")
    (selected,) = select_suites("paper-vision", "auto", tmp_path)
    labels = [task.label for task in selected.suite.tasks]
    assert labels == [
        *("mme", "mme:binary", "pope", "pope:binary", "seedbench", "mmbench_en_dev_static", "gqa"),
        *("vizwiz_vqa_val", "cv_bench_2d", "cv_bench_3d", "mmvet", "llava_in_the_wild"),
    ]
    import tempfile

    assert isinstance(selected.harness, LmmsEval)
    with tempfile.TemporaryDirectory() as scratch:
        binary = [task for task in selected.suite.tasks if task.binary]
        manager = selected.harness._with_binary(selected.harness.manager(["mme"]), binary, Path(scratch))
        for task in binary:
            plain, asked = manager._get_config(task.name), manager._get_config(f"{task.name}_binary")
            assert asked["doc_to_text"] is not None and asked["dataset_path"] == plain["dataset_path"]
            document = {"question": "Is there a dog? Please answer yes or no."}
            text = asked["doc_to_text"](document, asked["lmms_eval_specific_kwargs"]["default"])
            assert text.endswith(BINARY_PROMPT) and "single word" not in text
            assert "single word" in plain["doc_to_text"](document, plain["lmms_eval_specific_kwargs"]["default"])
        assert manager.task_index["gqa"]["yaml_path"] == str(tmp_path / "gqa.yaml")
    with pytest.raises(ConfigError, match="did you mean 'mmvet'"):
        select_suites("mmvte", "lmms-eval", tmp_path)
