"""Held-out evaluation: generation and forced choice against simple reference code, and the scores built on them.

The sections follow the data: generation, forced choice, records, the control, scores, intervals, summary.
"""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import AdapterConfig, EncoderConfig
from zero_ds.data.conversations import ChatTemplate, Turn
from zero_ds.data.formats import DataError
from zero_ds.data.images import ImageError, ImageProcessor
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Sample
from zero_ds.evaluation.heldout.evaluate import evaluate, image_features, shuffled_images
from zero_ds.evaluation.heldout.records import EvaluationRecord, read_records
from zero_ds.evaluation.heldout.results import CONDITIONS, Evaluation, read_evaluation
from zero_ds.evaluation.heldout.scoring import calibrated, first_choice
from zero_ds.evaluation.heldout.statistics import difference, quantile, share
from zero_ds.evaluation.heldout.summary import MODES, SHUFFLED, summary
from zero_ds.grafting.generate import Answerer, Choice, Query, Reply
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.vlm import VisionLanguageModel

LONGEST = 12
IMAGES = 5


def build(made: Callable[..., Path], dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """Returns model and sample encoder. The head favours the end of a turn, so some answers end before the limit."""
    decoder, encoder = made("llama", tied=False), made("clip")
    parts = ModelSpec(
        decoder, encoder, EncoderConfig(path="clip"), AdapterConfig(boundary_tokens=True), dtype, attention
    )
    torch.manual_seed(0)
    model = build_model(parts)
    words = tiny.tokenizer()
    template = ChatTemplate(words, tiny.TEMPLATE)
    with torch.no_grad():
        model.decoder.get_output_embeddings().weight[template.end_of_turn()] *= 2.5  # type: ignore[operator]
    processor = ImageProcessor.from_folder(encoder, tiny.IMAGE_SIZE)
    return model, SampleEncoder(template, "response", processor, model.tokens_per_image(), max_length=256)


@pytest.fixture(scope="module")
def parts(made: Callable[..., Path]) -> tuple[VisionLanguageModel, SampleEncoder]:
    return build(made)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(IMAGES)]


COLORS = ("red", "green", "blue", "heliotrope")
"""`red` and `green` are one token in the tiny vocabulary, the others several."""


def ask(name: str, image: int | None, question: str, answer: str = "", choices: tuple[Choice, ...] = ()) -> Query:
    placeholder = "" if image is None else "<image>\n"
    return Query(name, (Turn("user", placeholder + question),), () if image is None else (image,), answer, choices)


def questions() -> list[Query]:
    """Returns queries of different lengths. Some share an image; one has no image and one has two."""
    shown = "The image shows two blue stars on a gray background."
    two = (
        Turn("user", "<image> and <image>, what is new?"),
        Turn("assistant", "Both."),
        Turn("user", "which is blue?"),
    )
    return [
        ask("a", 0, "what color is it?", "It is red.", (Choice(6, "red", COLORS),)),
        ask(
            "b",
            0,
            "describe the image briefly.",
            shown,
            (Choice(20, "blue", COLORS), Choice(25, "star", ("star", "zebra"))),
        ),
        ask("c", 1, "what color is it?", "It is heliotrope.", (Choice(6, "heliotrope", COLORS),)),
        ask("d", 2, "is there a circle on the left side?", "Yes, it is.", (Choice(0, "Yes", ("Yes", "No")),)),
        ask("e", None, "is snow white?", "No", (Choice(0, "No", ("Yes", "No")),)),
        Query("f", two, (3, 1), "The second.", (Choice(4, "second", ("first", "second")),)),
        ask("g", 4, "what?"),
        ask("h", 1, "why? " * 12, "Because the circle is large and " + "blue " * 8),
    ]


def prompt(encoder: SampleEncoder, query: Query) -> list[int]:
    return encoder.encode(encoder.turns(Sample(query.id, query.turns, ())), generate=True).input_ids


def pixels_of(encoder: SampleEncoder, query: Query, paths: list[str]) -> torch.Tensor | None:
    if not query.images:
        return None
    return encoder.pixels(Sample(query.id, query.turns, tuple(paths[i] for i in query.images)))


@torch.no_grad()
def full_pass_logits(model: VisionLanguageModel, ids: list[int], pixels: torch.Tensor | None) -> torch.Tensor:
    """Returns the logits of all positions, (seq, vocabulary), from transformers' own causal LM without a cache."""
    embeddings = model.embed(torch.tensor([ids]), pixels)
    return model.decoder(inputs_embeds=embeddings, use_cache=False).logits[0]  # type: ignore[no-any-return]


def greedy_answer(parts: Any, query: Query, paths: list[str], longest: int = LONGEST) -> str:
    """Generates greedily and without a cache, one argmax per token."""
    model, encoder = parts
    ids, pixels, stop = prompt(encoder, query), pixels_of(encoder, query, paths), encoder.template.end_of_turn()
    answer: list[int] = []
    while len(answer) < longest:
        token = int(full_pass_logits(model, ids + answer, pixels)[-1].argmax())
        if token == stop:
            break
        answer.append(token)
    return str(encoder.template.tokenizer.decode(answer, skip_special_tokens=True)).strip()


def answerer(parts: Any, batch_size: int = 64, longest: int = LONGEST) -> Answerer:
    return Answerer(*parts, batch_size=batch_size, max_new_tokens=longest)


# -- generation --------------------------------------------------------------------------------------------------------


def test_generation_equals_greedy_decoding_without_a_cache(parts: Any, paths: list[str]) -> None:
    model = answerer(parts)
    replies = model.examine(questions(), model.features(paths))
    expected = [greedy_answer(parts, query, paths) for query in questions()]
    assert [reply.text for reply in replies] == expected
    lengths = {len(parts[1].template.encode_text(text)) for text in expected}
    assert len(lengths) > 3, "the answers should have different lengths"


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_true_answer_does_not_change_what_is_generated(parts: Any, paths: list[str], keep: float) -> None:
    """Tests true answers that begin like the model's own answer, because those tokens are reused."""
    plain = [greedy_answer(parts, query, paths) for query in questions()]
    guided = []
    for query, text in zip(questions(), plain, strict=True):
        begun = text[: round(len(text) * keep)]
        guided.append(Query(query.id, query.turns, query.images, begun + ("" if keep == 1 else " but not so")))
    model = answerer(parts)
    assert [reply.text for reply in model.examine(guided, model.features(paths))] == plain


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_batches_do_not_matter(parts: Any, paths: list[str], batch_size: int) -> None:
    """Covers shared prompts as well: a batch of one query cannot share a prompt with another query."""
    features = answerer(parts).features(paths)
    whole = answerer(parts).examine(questions(), features)
    split = answerer(parts, batch_size).examine(questions()[::-1], features)[::-1]
    assert [reply.text for reply in split] == [reply.text for reply in whole]
    for one, other in zip(split, whole, strict=True):
        for a, b in zip(one.log_probs, other.log_probs, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("longest", [1, 3])
def test_the_limit_holds(parts: Any, paths: list[str], longest: int) -> None:
    model = answerer(parts, longest=longest)
    own = [greedy_answer(parts, query, paths) for query in questions()]
    guided = [Query(q.id, q.turns, q.images, text) for q, text in zip(questions(), own, strict=True)]
    for queries in (questions(), guided):
        replies = model.examine(queries, model.features(paths))
        assert [reply.text for reply in replies] == [
            greedy_answer(parts, query, paths, longest) for query in questions()
        ]


def test_a_conversation_is_answered(parts: Any, paths: list[str]) -> None:
    query = questions()[5]
    assert answerer(parts).reply(query.turns, [paths[3], paths[1]]) == greedy_answer(parts, query, paths)
    text = questions()[4]
    assert answerer(parts).reply(text.turns) == greedy_answer(parts, text, paths)


def test_progress_counts_every_query_once(parts: Any, paths: list[str]) -> None:
    counted: list[int] = []
    model = answerer(parts, 3)
    model.examine(questions(), model.features(paths, counted.append), counted.append)
    assert sum(counted) == len(questions()) + IMAGES


# -- forced choice -----------------------------------------------------------------------------------------------------


def full_pass_log_prob(parts: Any, query: Query, choice: Choice, option: str, paths: list[str]) -> float:
    """Returns the summed log-probability of the option's tokens, from one pass over prompt, true text and option."""
    model, encoder = parts
    template = encoder.template
    before = query.answer[: choice.start]
    rest = query.answer[choice.start + len(choice.word) :]
    ending = rest[: next((i for i, c in enumerate(rest) if not c.isalpha()), len(rest))]
    ids, given = template.encode_text(before + option + ending), len(template.encode_text(before.rstrip()))
    start = prompt(encoder, query)
    log_probs = full_pass_logits(model, start + ids, pixels_of(encoder, query, paths)).log_softmax(-1)
    return sum(float(log_probs[len(start) + place - 1, ids[place]]) for place in range(given, len(ids)))


def test_log_probabilities_are_those_of_a_full_pass(parts: Any, paths: list[str]) -> None:
    model = answerer(parts)
    lengths = [len(parts[1].template.encode_text(f" {color}")) for color in COLORS]
    assert lengths[:2] == [1, 1] and min(lengths[2:]) > 1
    replies = model.examine(questions(), model.features(paths))
    for query, reply in zip(questions(), replies, strict=True):
        assert len(reply.log_probs) == len(query.choices)
        for choice, values in zip(query.choices, reply.log_probs, strict=True):
            expected = [full_pass_log_prob(parts, query, choice, option, paths) for option in choice.options]
            assert values == pytest.approx(expected, abs=1e-4)


def test_bf16_is_close_and_has_no_ties(made: Callable[..., Path], paths: list[str], parts: Any) -> None:
    """The head computes its last step in float32. The model itself stays as it is."""
    low = build(made, torch.bfloat16)
    head = low[0].decoder.get_output_embeddings()
    replies = answerer(low).examine(questions(), answerer(low).features(paths))
    exact = answerer(parts).examine(questions(), answerer(parts).features(paths))
    for reply, other in zip(replies, exact, strict=True):
        for a, b in zip(reply.log_probs, other.log_probs, strict=True):
            assert a == pytest.approx(b, rel=0.05, abs=0.5)
            assert len(set(a)) == len(a)
    assert low[0].decoder.get_output_embeddings() is head
    assert head.weight.dtype == torch.bfloat16


def test_sdpa_agrees(made: Callable[..., Path], paths: list[str], parts: Any) -> None:
    other = build(made, attention="sdpa")
    features = answerer(parts).features(paths)
    assert [r.text for r in answerer(other).examine(questions(), features)] == [
        r.text for r in answerer(parts).examine(questions(), features)
    ]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (ask("x1", 0, "what?", "It is red.", (Choice(5, "red", COLORS),)), "x1.*'red' is not at character 5"),
        (ask("x2", 0, "what?", "It is red.", (Choice(6, "red", ("blue", "green")),)), "x2.*options"),
        (Query("x3", (Turn("user", "no placeholder"),), (0,)), "x3 has 1 images for 0"),
        (ask("x4", 0, "long " * 300), "x4 has .* tokens.*raise data.max_length"),
    ],
)
def test_wrong_queries_are_named(parts: Any, paths: list[str], query: Query, message: str) -> None:
    model = answerer(parts)
    with pytest.raises(DataError, match=message):
        model.examine([query], model.features(paths))


# -- records -----------------------------------------------------------------------------------------------------------


def record(name: str = "r0", image: str = "images/0.png", **changes: Any) -> dict[str, Any]:
    word = {"kind": "color", "start": 14, "word": "blue", "choices": ["red", "blue"]}
    content = {
        "id": name,
        "kind": "question",
        "image": image,
        "question": "what color?",
        "answer": "The stars are blue.",
    }
    return {**content, "words": [word], **changes}


def write(folder: Path, content: Any) -> Path:
    path = folder / "heldout.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_records_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, [record("a"), record("b", kind="caption"), record("c", "images/1.png")])
    records = read_records(path)
    assert [r.id for r in records] == ["a", "b", "c"]
    assert records[0].path == (tmp_path / "images/0.png").resolve()
    assert records[0].words[0].choices == ("red", "blue")
    assert [r.id for r in read_records(path, limit_images=1)] == ["a", "b"]


def word(**changes: Any) -> dict[str, Any]:
    return {"words": [{**record()["words"][0], **changes}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "riddle"}, "kind 'riddle'"),
        ({"image": "../secret.png"}, "leaves the data root"),
        ({"image": "/etc/passwd"}, "leaves the data root"),
        ({"question": " "}, "'question'"),
        ({"answer": 3}, "'answer'"),
        ({"words": []}, "'words'"),
        ({"words": ["blue"]}, "word 0 must be an object"),
        ({"wrods": []}, "unknown key 'wrods'; did you mean 'words'"),
        (word(start=13), "does not start at character 13"),
        (word(start=-5), "character -5"),
        (word(start=True), "character True"),
        (word(word="green"), "'green' does not start"),
        (word(choices=["red", "green"]), "not one of its choices"),
        (word(choices=["blue"]), "at least two"),
        (word(choices=["blue", "Blue"]), "at least two"),
        (word(choices="blue"), "list of non-empty strings"),
        (word(kind=""), "'kind'"),
        (word(chioces=[]), "unknown key 'chioces'"),
    ],
)
def test_wrong_records_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, [record("good"), record("bad", **changes)])
    with pytest.raises(DataError, match=message) as error:
        read_records(path)
    assert "bad" in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data file .* does not exist"):
        read_records(tmp_path / "none.json")
    with pytest.raises(DataError, match="the id of sample r0 is used twice"):
        read_records(write(tmp_path, [record(), record()]))
    with pytest.raises(DataError, match="'answer' is missing"):
        read_records(write(tmp_path, [{k: v for k, v in record().items() if k != "answer"}]))


def test_the_demo_writes_records_that_are_read(tmp_path: Path) -> None:
    from zero_ds.data.demo.dataset import write_demo

    write_demo(tmp_path / "demo", train=2, heldout=20, told=2)
    records = read_records(tmp_path / "demo/heldout.json")
    assert len(records) == 40
    assert {r.kind for r in records} == {"question", "caption"}


# -- the run and its control -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 50])
def test_the_control_never_shows_the_own_image(count: int) -> None:
    names = [f"{i}.png" for i in range(count) for _ in range(2)]
    control = shuffled_images(names, seed=1)
    assert set(control) == set(control.values()) == set(names)
    assert all(shown != own for own, shown in control.items())
    assert control == shuffled_images(names, seed=1)


def test_one_image_has_no_control() -> None:
    with pytest.raises(DataError, match="two images"):
        shuffled_images(["a.png", "a.png"], 0)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, paths: list[str]) -> list[EvaluationRecord]:
    content = []
    for number, path in enumerate(paths):
        name = Path(path).name
        content.append(record(f"q{number}", name))
        caption = "The image shows a red star."
        words = [
            {"kind": "color", "start": 18, "word": "red", "choices": list(COLORS[:3])},
            {"kind": "shape", "start": 22, "word": "star", "choices": ["star", "circle"]},
        ]
        content.append(record(f"c{number}", name, kind="caption", answer=caption, words=words))
    file = tmp_path_factory.mktemp("records") / "heldout.json"
    file.write_text(json.dumps(content))
    return read_records(file, root=Path(paths[0]).parent)


@pytest.fixture(scope="module")
def evaluation(parts: Any, records: list[EvaluationRecord]) -> Evaluation:
    return evaluate(answerer(parts), records, "grafted", setting={"weights": "here"})


def test_both_conditions_are_evaluated(parts: Any, records: list[EvaluationRecord], evaluation: Evaluation) -> None:
    own, shuffled = evaluation.of("own"), evaluation.of("shuffled")
    assert [i.id for i in own] == [i.id for i in shuffled] == [r.id for r in records]
    assert all(i.shown == i.image for i in own)
    assert all(i.shown != i.image for i in shuffled)
    shown_for = {i.image: i.shown for i in shuffled}
    assert all(shown_for[i.image] == i.shown for i in shuffled)
    # the stored answers of the control are the model's answers about the image in `shown`
    row = {r.image: number for number, r in enumerate(records[::2])}
    queries = [ask(r.id, row[shown_for[r.image]], r.question) for r in records]
    replies = answerer(parts).examine(queries, answerer(parts).features([str(r.path) for r in records[::2]]))
    assert [reply.text for reply in replies] == [item.generated for item in shuffled]


def test_features_are_shared_between_decoders(
    parts: Any, records: list[EvaluationRecord], evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = answerer(parts)
    features = image_features(model, records)
    monkeypatch.setattr(model, "features", None)  # must not be called again
    assert evaluate(model, records, "grafted", features=features).items == evaluation.items


def test_scores_are_recomputable(evaluation: Evaluation) -> None:
    for item in evaluation.items:
        for scored in item.words:
            assert scored.free_correct == (first_choice(item.generated, scored.choices) == scored.word)
            best = max(zip(scored.log_probs, scored.choices, strict=True))[1]
            assert scored.forced_correct == (best == scored.word)


def test_an_evaluation_survives_its_file(tmp_path: Path, evaluation: Evaluation) -> None:
    path = tmp_path / "sub/grafted.json"
    evaluation.write(path)
    assert read_evaluation(path) == evaluation
    assert evaluation.setting["weights"] == "here"
    assert [p.name for p in path.parent.iterdir()] == ["grafted.json"]
    content = json.loads(path.read_text())
    for broken in ("{", "[]", json.dumps({**content, "items": [{}]}), json.dumps({**content, "format": 99})):
        path.write_text(broken)
        with pytest.raises(DataError, match=r"grafted\.json"):
            read_evaluation(path)
    with pytest.raises(DataError, match=r"evaluation .* does not exist"):
        read_evaluation(tmp_path / "none.json")


def test_command(trained: Path, made: Callable[..., Path], paths: list[str]) -> None:
    """`zero-ds eval records` evaluates the graft on two images."""
    folder = Path(paths[0]).parent
    file = write(folder, [record("r0", "0.png"), record("r1", "1.png")])
    command = ["eval", "records", "--weights", str(trained / "encoder"), "--decoder", str(made("llama", tied=True))]
    done = CliRunner().invoke(app, [*command, "--records", str(file), "--out", str(folder / "out.json")])
    assert done.exit_code == 0, done.output
    assert "shuffled images" in done.stdout and len(read_evaluation(folder / "out.json").items) == 4


def test_a_missing_image_is_named(parts: Any, tmp_path: Path) -> None:
    records = read_records(write(tmp_path, [record("a"), record("b", "images/1.png")]))
    with pytest.raises(ImageError, match=r"0\.png"):
        evaluate(answerer(parts), records, "x")


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("The stars are BLUE.", ("red", "blue"), "blue"),
        ("Red? No: blue", ("red", "blue"), "red"),
        ("two blue stars", ("star", "circle"), "star"),
        ('The word is "ART"!', ("CAR", "ART"), "ART"),
        ("a starfish on a redwood", ("star", "red"), None),
        ("No, it is", ("Yes", "No"), "No"),
        ("nothing", ("Yes", "No"), None),
        ("", ("Yes", "No"), None),
        ("a dark red one", ("red", "dark red"), "dark red"),
        ("dark reds", ("red", "dark red"), "dark red"),
        ("It's left-hand", ("left", "right"), "left"),
    ],
)
def test_first_choice(text: str, choices: tuple[str, ...], expected: str | None) -> None:
    assert first_choice(text, choices) == expected


def test_calibration_removes_a_preference() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 400)
    evidence = rng.normal(0, 0.3, (400, 4)) + 2.0 * np.eye(4)[truth]
    biased = evidence + np.array([5.0, 0.0, 0.0, 0.0])
    halves = np.arange(400) % 2
    assert np.mean(biased.argmax(1) == truth) < 0.4
    adjusted = np.array(calibrated(biased.tolist(), ["color"] * 400, halves.tolist()))
    assert np.mean(adjusted.argmax(1) == truth) > 0.99


def test_calibration_uses_only_other_images() -> None:
    values = [[-1.0, -2.0], [-3.0, -4.0], [-5.0, -9.0]]
    result = calibrated(values, ["a", "a", "b"], [0, 1, 0])
    assert result[0].tolist() == [2.0, 2.0]
    assert result[1].tolist() == [-2.0, -2.0]
    assert result[2].tolist() == [-5.0, -9.0]  # the other half has no such group
    changed = calibrated([[-7.0, -0.5], *values[1:]], ["a", "a", "b"], [0, 1, 0])
    assert changed[1].tolist() != result[1].tolist()
    assert changed[2].tolist() == result[2].tolist()


# -- intervals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dependent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("images", [20, 200])
def test_intervals_cover_the_truth(images: int, dependent: float, p: float) -> None:
    """Intervals cover p as often as they claim. An image has 1 to 3 words, which agree with probability `dependent`."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        clusters = np.repeat(np.arange(images), rng.integers(1, 4, images))
        common = (rng.random(images) < p)[clusters]
        own = rng.random(len(clusters)) < p
        estimate = share(np.where((rng.random(images) < dependent)[clusters], common, own), clusters)
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= p <= estimate.high
    assert hits / 400 > 0.92  # the nominal 0.95 minus three standard errors


@pytest.mark.parametrize(("first", "second"), [(0.9, 0.3), (0.5, 0.45), (0.99, 0.98)])
def test_paired_intervals_cover_the_truth(first: float, second: float) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        clusters = np.repeat(np.arange(100), rng.integers(1, 4, 100))
        common = rng.random(100)[clusters]
        a = np.where(rng.random(len(clusters)) < 0.5, common, rng.random(len(clusters))) < first
        b = np.where(rng.random(len(clusters)) < 0.5, common, rng.random(len(clusters))) < second
        estimate = difference(a, b, clusters)
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= first - second <= estimate.high
    assert hits / 400 > 0.92


def test_ignoring_images_would_be_wrong() -> None:
    """Words that all agree within an image carry no more information than one word."""
    right = np.repeat(np.arange(40) % 2, 5)
    clustered = share(right, np.repeat(np.arange(40), 5))
    single = share(np.arange(40) % 2, np.arange(40))
    naive = share(right, np.arange(200))
    assert clustered.low == pytest.approx(single.low) and clustered.high == pytest.approx(single.high)
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)
    assert (clustered.n, clustered.images) == (200, 40)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_intervals_never_collapse(value: float) -> None:
    clusters = np.repeat(np.arange(20), 3)
    estimate = share(np.full(60, value), clusters)
    assert estimate.value == value
    assert 0.1 < estimate.high - estimate.low < 0.25  # the width for 20 words, not for 60
    same = difference(np.full(60, value), np.full(60, value), clusters)
    assert same.low < 0 == same.value < same.high
    opposite = difference(np.full(60, value), np.full(60, 1 - value), clusters)
    assert opposite.low < opposite.high and abs(opposite.value) == 1
    alone = share([value], ["one"])
    assert alone.high - alone.low > 0.99


def test_quantiles() -> None:
    known = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 1000: 1.962}
    for degrees, expected in known.items():
        assert quantile(0.95, degrees) == pytest.approx(expected, rel=0.01)


def test_intervals_are_fast_and_need_words() -> None:
    """With 100 times as many words, calls and memory per word at most double, so no loop runs over words or images."""
    rng = np.random.default_rng(0)
    calls, peaks = [], []
    for words in (1_000, 100_000):
        correct, clusters = rng.random(words) < 0.5, rng.integers(0, 3 * words // 10, words)
        share(correct, clusters)  # not measured: imports and what numpy initialises on first use
        seen = []
        sys.setprofile(lambda frame, event, argument, seen=seen: seen.append(event))  # type: ignore[misc]
        share(correct, clusters)
        sys.setprofile(None)
        calls.append(len(seen))
        tracemalloc.start()
        share(correct, clusters)
        peaks.append(tracemalloc.get_traced_memory()[1] / words)
        tracemalloc.stop()
    assert calls[1] <= 2 * calls[0] and peaks[1] <= 2 * peaks[0], (calls, peaks)
    with pytest.raises(ValueError, match="no words"):
        share([], [])


# -- summary -----------------------------------------------------------------------------------------------------------


class Fixed:
    """Stands in for an Answerer. If it sees, its answers are right in the first half, where the own image is shown."""

    max_new_tokens = 5
    device = torch.device("cpu")

    def __init__(self, sees: bool, model: Any) -> None:
        self.sees, self.model = sees, model

    def features(self, paths: list[str], progress: Any) -> torch.Tensor:
        return torch.zeros(len(paths), 1, 1)

    def examine(self, queries: list[Query], features: torch.Tensor, progress: Any) -> list[Reply]:
        replies = []
        for number, query in enumerate(queries):
            right = self.sees and number < len(queries) / 2
            log_probs = []
            for choice in query.choices:
                log_probs.append(tuple(-1.0 if (o == choice.word) == right else -2.0 for o in choice.options))
            replies.append(Reply(query.answer if right else "hm", tuple(log_probs)))
        return replies


def fixed(records: list[EvaluationRecord], name: str, sees: bool, parts: Any) -> Evaluation:
    return evaluate(Fixed(sees, parts[0]), records, name)  # type: ignore[arg-type]


def test_summary(records: list[EvaluationRecord], parts: Any) -> None:
    seeing, blind = fixed(records, "grafted", True, parts), fixed(records, "surrogate", False, parts)
    result = summary({"surrogate": blind, "grafted": seeing})
    conditions = {"surrogate", "grafted", "surrogate" + SHUFFLED, "grafted" + SHUFFLED}
    assert set(result["accuracy"]) == conditions
    assert result["accuracy"]["grafted"]["value"] == 1
    assert 0.3 < result["accuracy"]["grafted"]["low"] < 0.5  # five images
    assert result["accuracy"]["grafted" + SHUFFLED]["value"] == 0
    assert result["accuracy"]["grafted"]["n"] == 3 * IMAGES
    assert set(result["accuracy_by"]) == set(result["accuracy_by_word"]) == set(MODES)
    for mode in MODES:
        assert set(result["accuracy_by"][mode]) == {"all", "question", "caption"}
        assert set(result["accuracy_by_word"][mode]) == {"color", "shape"}
        for shares in [*result["accuracy_by"][mode].values(), *result["accuracy_by_word"][mode].values()]:
            assert set(shares) == conditions
    assert result["accuracy_by"]["forced"]["all"]["grafted"]["value"] == 1
    assert result["chance"] == {
        "all": pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3, abs=1e-5),
        "question": 0.5,
        "caption": pytest.approx((1 / 3 + 1 / 2) / 2, abs=1e-5),
    }
    pairs = {(d["first"], d["second"]): d["value"] for d in result["differences"]["free"]}
    assert pairs == {
        ("surrogate", "surrogate" + SHUFFLED): 0,
        ("grafted", "grafted" + SHUFFLED): 1,
        ("grafted", "surrogate"): 1,
    }
    json.dumps(result)


def test_summary_refuses_different_records(records: list[EvaluationRecord], parts: Any) -> None:
    some = fixed(records[:4], "surrogate", True, parts)
    with pytest.raises(DataError, match="not evaluated on the same records"):
        summary({"grafted": fixed(records, "grafted", True, parts), "surrogate": some})
    with pytest.raises(DataError, match="no evaluation was given"):
        summary({})
    assert CONDITIONS == ("own", "shuffled")
