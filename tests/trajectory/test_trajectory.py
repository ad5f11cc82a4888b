"""Checks Eq. 1-4 on tiny random models against a second, plain implementation, and the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner, Result

from zero_ds.cli.trajectory import summary, trajectory
from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import ChatTemplate
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records
from zero_ds.model.decoders import Family
from zero_ds.model.decoders.folder import family_of
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory import lens, texts
from zero_ds.trajectory import measure as measuring
from zero_ds.trajectory.batching import batches, readings
from zero_ds.trajectory.curves import Setting, Trajectory
from zero_ds.trajectory.lens import Lens, check_lens, tapped
from zero_ds.trajectory.measure import TrajectoryOptions, measure_trajectory, write
from zero_ds.trajectory.metrics import METRICS, Metric
from zero_ds.trajectory.resident import measure_resident
from zero_ds.trajectory.streaming import measure_streamed
from zero_ds.trajectory.texts import TokenSample, answer_greedily, choose_samples
from zero_ds.trajectory.transition import Floats, Transition, find_transition

LAYERS = 8
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """With matrices this small, threads only wait for each other, for seconds where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with tied embeddings and a byte-level tokenizer, as an ordinary Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return family_of(folder)


@pytest.fixture(scope="module")
def template(folder: Path) -> ChatTemplate:
    from transformers import AutoTokenizer

    return ChatTemplate(AutoTokenizer.from_pretrained(folder))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def record(number: int, words: int = 3, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"Question {number}?"}, {"from": "gpt", "value": "word " * words + str(number)}]
    return {"id": f"s{number}", "conversations": turns, **more}


def data_file(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def token_samples(count: int = 9) -> list[TokenSample]:
    rng = np.random.default_rng(0)
    lengths = [2, 3, *rng.integers(4, 60, size=count - 2).tolist()]
    return [TokenSample(f"s{i}", rng.integers(0, 250, size=n).tolist()) for i, n in enumerate(lengths)]


def plain_curves(decoder: Any, sample: TokenSample, metric: str) -> Floats:
    """Computes the definition a second time: float32, one sample, all logits at once, RMSNorm by hand."""
    ids = torch.tensor([sample.input_ids])
    with torch.no_grad():
        output = decoder(input_ids=ids, output_hidden_states=True)
        norm, head = decoder.model.norm, decoder.lm_head.weight
        logits = []
        for states in output.hidden_states[1:-1]:
            normed = states[0] * torch.rsqrt(states[0].pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
            logits.append(normed * norm.weight @ head.T)
        logits.append(output.logits[0])
        probs = torch.stack(logits).softmax(dim=-1)[:, :-1]  # (layers, N - 1, vocabulary)
    if metric == "vocabulary":
        return (probs * (probs / probs[-1]).log()).sum(-1).mean(-1).double().numpy()
    chosen = probs[:, torch.arange(ids.shape[1] - 1), ids[0, 1:]].clamp(min=1e-6)
    chosen = chosen / chosen.sum(-1, keepdim=True)
    return (chosen * (chosen / chosen[-1]).log()).sum(-1).double().numpy()


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["sequence", "vocabulary"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_agrees_with_the_definition(decoder: Any, family: Family, metric: str, batch_size: int) -> None:
    samples = token_samples()
    curves = measure_resident(decoder, family, samples, metric=METRICS[metric], batch_size=batch_size)
    assert curves.shape == (len(samples), LAYERS)
    expected = np.stack([plain_curves(decoder, sample, metric) for sample in samples])
    np.testing.assert_allclose(curves, expected, rtol=1e-4, atol=2e-6)
    assert (curves[:, -1] == 0).all()
    assert (curves[2:, :-1] > 0.01).all()  # the comparison is about something


@pytest.mark.parametrize("metric", ["sequence", "vocabulary"])
def test_chunks_do_not_matter_and_bound_the_logits(
    decoder: Any, family: Family, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = token_samples()
    whole = measure_resident(decoder, family, samples, metric=METRICS[metric], batch_size=4)
    sizes: list[tuple[int, int]] = []
    scores = Lens.scores

    def watched(self: Lens, normed: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        sizes.append((len(normed), len(head)))
        return scores(self, normed, head)

    monkeypatch.setattr(Lens, "scores", watched)
    monkeypatch.setattr(lens, "ROWS", 7)
    monkeypatch.setattr(lens, "SCORES", 350)
    chunked = measure_resident(decoder, family, samples, metric=METRICS[metric], batch_size=4)
    np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-6)
    assert max(rows for rows, _ in sizes) == 7 and max(rows * part for rows, part in sizes) <= 350


@pytest.mark.parametrize("metric", ["sequence", "vocabulary"])
def test_a_common_beginning_is_read_once(decoder: Any, family: Family, metric: str) -> None:
    """Samples with a common beginning, one of which is a beginning of the others: the same curves from fewer rows."""
    start = [7, 3, 200, 41, 9]
    samples = [TokenSample(str(i), start + rest) for i, rest in enumerate(([1, 2, 3], [4], [], [1, 9, 9, 9, 9]))]
    alone = measure_resident(decoder, family, samples, metric=METRICS[metric], batch_size=1)
    own, reading = readings([sample.input_ids for sample in samples])
    assert len(reading) == sum(len(s.input_ids) - 1 for s in samples) and len(own) == len(reading) - 3 * 4
    np.testing.assert_allclose(
        measure_resident(decoder, family, samples, metric=METRICS[metric], batch_size=4), alone, rtol=1e-4, atol=1e-6
    )
    expected = np.stack([plain_curves(decoder, sample, metric) for sample in samples])
    np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=2e-6)


def test_padding_does_not_leak(decoder: Any, family: Family) -> None:
    short, long = TokenSample("short", [5, 9, 11, 200]), TokenSample("long", list(range(100)))
    alone = measure_resident(decoder, family, [short], metric=METRICS["sequence"], batch_size=1)
    together = measure_resident(decoder, family, [short, long], metric=METRICS["sequence"], batch_size=2)
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-4, atol=1e-6)


def test_bfloat16_is_near_float32(decoder: Any, family: Family) -> None:
    import copy

    samples = token_samples()
    half = measure_resident(
        copy.deepcopy(decoder).bfloat16(), family, samples, metric=METRICS["vocabulary"], batch_size=4
    )
    full = measure_resident(decoder, family, samples, metric=METRICS["vocabulary"], batch_size=4)
    assert half.dtype == np.float64
    np.testing.assert_allclose(half, full, rtol=0.2, atol=0.1)


def test_sequence_metric_by_hand() -> None:
    probs = np.array([[0.2, 0.2], [1e-12, 0.5], [0.9, 0.1]])
    found = METRICS["sequence"].reduce(np.log(probs))
    tiny = np.array([1e-6, 0.5]) / (0.5 + 1e-6)
    expected = [0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), (tiny * np.log(tiny / [0.9, 0.1])).sum(), 0.0]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_a_new_metric_is_one_class(decoder: Any, family: Family, folder: Path, tmp_path: Path) -> None:
    """It is found by its name, and serves a model in memory and a streamed one."""

    class SurprisalMetric(Metric):
        name = "surprisal"
        description = "difference of the mean surprisal"
        unit = "bits"
        needs_final_layer = False
        read = type(METRICS["sequence"]).read

        def reduce(self, numbers: Floats) -> Floats:
            return (numbers[-1].mean() - numbers.mean(axis=1)) / np.log(2)  # type: ignore[no-any-return]

    try:
        metric = METRICS["surprisal"]
        curves = measure_resident(decoder, family, token_samples(), metric=metric, batch_size=4)
        assert curves.shape == (9, LAYERS) and (curves[:, -1] == 0).all() and np.abs(curves[:, 0]).min() > 0.01
        options: dict[str, Any] = {"batch_size": 4, "dtype": torch.float32, "device": torch.device("cpu")}
        streamed = measure_streamed(folder, token_samples(), metric=metric, scratch=tmp_path, **options)
        np.testing.assert_allclose(streamed, curves, rtol=1e-4, atol=1e-5)
    finally:
        del METRICS["surprisal"]


def test_batches_are_of_like_length_and_complete() -> None:
    assert batches([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]


def test_tapped_takes_tuples_and_leaves_no_hook() -> None:
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x + 1, None

    layers = nn.ModuleList([Layer(), Layer()])
    seen: list[tuple[int, float]] = []
    with pytest.raises(RuntimeError), tapped(layers, lambda number, output: seen.append((number, float(output)))):
        layers[1](layers[0](torch.zeros(()))[0])
        raise RuntimeError
    assert seen == [(0, 1.0), (1, 2.0)]
    assert not any(layer._forward_hooks for layer in layers)


def test_check_lens(decoder: Any, family: Family) -> None:
    class NoNorm(Family):
        def norm(self, decoder: nn.Module) -> nn.Module:
            return nn.Identity()

    sample = token_samples()[-1]
    check_lens(decoder, family, sample)
    wrong = NoNorm(name="wrong", model_types=("wrong",))
    with pytest.raises(ConfigError, match="'wrong' differs from the model's own logits"):
        check_lens(decoder, wrong, sample)


def test_non_finite_predictions_are_refused(decoder: Any, family: Family) -> None:
    import copy

    broken = copy.deepcopy(decoder)
    with torch.no_grad():
        broken.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    half = copy.deepcopy(broken).bfloat16()
    for model, remedy in ((broken, "fetch the model again"), (half, "run with --dtype float32")):
        with pytest.raises(ConfigError, match=f"sample s0 are not finite; .*{remedy}"):
            measure_resident(model, family, token_samples(), metric=METRICS["sequence"], batch_size=4)


# -- samples -----------------------------------------------------------------------------------------------------------


def test_chooses_text_samples_by_seed(tmp_path: Path, template: ChatTemplate) -> None:
    rows = [record(i, **({"image": "a.png"} if i % 3 == 0 else {})) for i in range(12)]
    rows.append(record(99, words=200))  # longer than the model's positions
    records = Records([SourceConfig(path=str(data_file(tmp_path / "data.json", rows)))])
    encoder = SampleEncoder(template, "response", max_length=256)
    everything = choose_samples(records, encoder, count=300, seed=0)
    assert sorted(sample.id for sample in everything) == sorted(f"s{i}" for i in range(12) if i % 3)
    few, others = (choose_samples(records, encoder, count=4, seed=seed) for seed in (0, 1))
    assert few == everything[:4] and few != others
    text = template.tokenizer.decode(everything[0].input_ids)
    number = everything[0].id[1:]
    assert text == (
        f"<|im_start|>user\nQuestion {number}?<|im_end|>\n<|im_start|>assistant\nword word word {number}<|im_end|>\n"
    )


def test_system_prompt_leads_every_sample(tmp_path: Path, template: ChatTemplate) -> None:
    records = Records([SourceConfig(path=str(data_file(tmp_path / "data.json", [record(1)])))])
    encoder = SampleEncoder(template, "response", system_prompt="Be brief.")
    for questions_only in (False, True):
        (sample,) = choose_samples(records, encoder, count=5, seed=0, questions_only=questions_only)
        assert template.tokenizer.decode(sample.input_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_an_answer_before_any_question_is_not_a_greedy_sample(tmp_path: Path, template: ChatTemplate) -> None:
    rows = [record(1)]
    rows[0]["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    records = Records([SourceConfig(path=str(data_file(tmp_path / "data.json", rows)))])
    encoder = SampleEncoder(template, "response")
    assert len(choose_samples(records, encoder, count=5, seed=0)) == 1
    with pytest.raises(ConfigError, match="no usable text sample"):
        choose_samples(records, encoder, count=5, seed=0, questions_only=True)


def test_greedy_answers(tmp_path: Path, decoder: Any, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batched answers equal those of an argmax loop on single samples, cut after the end of the turn."""
    monkeypatch.setattr(texts, "ANSWER_TOKENS", 10)
    rows = [record(10 ** (i % 5) + i) for i in range(8)]
    records = Records([SourceConfig(path=str(data_file(tmp_path / "data.json", rows)))])
    encoder = SampleEncoder(template, "response", max_length=256)
    questions = choose_samples(records, encoder, count=8, seed=0, questions_only=True)
    assert all(template.tokenizer.decode(q.input_ids).endswith("<|im_start|>assistant\n") for q in questions)
    kept = decoder.generation_config
    answered = answer_greedily(decoder, template, questions, batch_size=3)
    assert decoder.generation_config is kept
    for question, answer in zip(questions, answered, strict=True):
        ids = list(question.input_ids)
        for _ in range(10):
            with torch.no_grad():
                ids.append(int(decoder(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == template.end_of_turn():
                break
        assert answer == TokenSample(question.id, ids)


def test_greedy_answer_ends_with_the_turn(
    decoder: Any, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's first token is declared the end of the turn; the padding after it is dropped."""
    monkeypatch.setattr(texts, "ANSWER_TOKENS", 6)
    questions = token_samples(5)
    with torch.no_grad():
        first = int(decoder(input_ids=torch.tensor([questions[3].input_ids])).logits[0, -1].argmax())

    class Stopping(ChatTemplate):
        def end_of_turn(self) -> int:
            return first

    answered = answer_greedily(decoder, Stopping(template.tokenizer), questions, batch_size=5)
    assert answered[3].input_ids == [*questions[3].input_ids, first]


# -- results -----------------------------------------------------------------------------------------------------------

SETTING = Setting("hub/model", "abc", "data.json", "def", "sequence", "float32", False, 0, 300, None)


def synthetic(k: int = 19, layers: int = 30, samples: int = 20) -> Trajectory:
    rng = np.random.default_rng(0)
    early = np.arange(layers) < k
    shape = np.where(early, 2.2, np.linspace(2, 0, layers))
    curves = shape + rng.normal(size=(samples, layers)) * np.where(early, 0.3, 0.05)
    curves[:, -1] = 0
    ids = tuple(f"s{i}" for i in range(samples))
    return Trajectory(SETTING, ids, curves, find_transition(curves))


def test_json_and_files(tmp_path: Path) -> None:
    result = synthetic()
    write(result, tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["trajectory.json", "trajectory.pdf", "trajectory.png"]
    assert list((tmp_path / "new").iterdir()) == [out]
    content = json.loads((out / "trajectory.json").read_text())
    assert content == result.to_json()
    assert content["proposed"] == {"replace": "19:28", "name": "T(19,28)"}
    assert content["transition"]["layer"] == 19 and content["transition"]["verdict"] == "clear"
    assert (content["samples"], content["layers"], content["model"]) == (20, 30, "hub/model")
    np.testing.assert_allclose(content["curves"], result.curves, rtol=1e-5)
    np.testing.assert_allclose(content["mean"], result.curves.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(content["median"], np.median(result.curves, axis=0), rtol=1e-5)
    assert content["spread"][-1] == 0 and len(content["spread"]) == 30
    assert {"torch", "transformers", "zero-ds"} <= set(content["versions"])
    assert (out / "trajectory.pdf").read_bytes().startswith(b"%PDF")
    text = summary(content, out)
    assert text.splitlines()[0] == "transition layer 19 of 30 (95 % interval 19 to 19, 20 samples)"
    assert "T(19,28)" in text and "trajectory.png" in text


def test_uncertain_proposes_nothing() -> None:
    result = replace(synthetic(), transition=Transition(19, 3, 25, "uncertain", "it lies anywhere.", 0.6))
    content = result.to_json()
    assert content["proposed"] is None and content["transition"]["layer"] == 19
    assert summary(content, Path("out")).splitlines()[0] == "no clear transition: it lies anywhere."


@pytest.mark.parametrize("moment", ["plot", "rename"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    if moment == "plot":
        monkeypatch.setattr(measuring, "plot", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        write(synthetic(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- the command -------------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Result:
    app = typer.Typer()
    app.command()(trajectory)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    yield data_file(tmp_path / "data.json", [record(i) for i in range(10)])


@pytest.mark.parametrize("options", [[], ["--metric", "vocabulary", "--dtype", "bfloat16"], ["--greedy"]])
def test_command(tmp_path: Path, folder: Path, data: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "ANSWER_TOKENS", 8)
    out = tmp_path / "out"
    arguments = ["--model", folder, "--data", data, "--out", out, "--batch", 4, *options]
    if "--dtype" not in options:
        arguments += ["--dtype", "float32"]
    first = run(*arguments)
    assert first.exception is None, first.exception
    content = json.loads((out / "trajectory.json").read_text())
    assert np.array(content["curves"]).shape == (10, LAYERS)
    assert content["greedy"] == ("--greedy" in options) and content["samples"] == 10
    assert content["requested_samples"] == 300 and content["data"] == str(data)
    assert sorted(content["ids"]) == sorted(f"s{i}" for i in range(10))
    assert str(out / "trajectory.png") in first.stdout

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measuring, "measure_resident", never)
    again = run(*arguments)
    assert again.exception is None and again.stdout == first.stdout
    before = (out / "trajectory.json").read_bytes()
    other = run(*arguments, "--seed", 1)
    assert isinstance(other.exception, ConfigError) and "a trajectory of another setting" in str(other.exception)
    assert (out / "trajectory.json").read_bytes() == before


def test_measuring_from_python(tmp_path: Path, folder: Path, data: Path) -> None:
    """The function writes and returns the same as the command, and has the same checks."""
    options = TrajectoryOptions(samples=9, dtype="float32")
    content = measure_trajectory(str(folder), data, tmp_path / "out", options)
    assert content == json.loads((tmp_path / "out" / "trajectory.json").read_text())
    assert content == measure_trajectory(str(folder), data, tmp_path / "out", options)
    with pytest.raises(ConfigError, match="--samples 0 is too small"):
        measure_trajectory(str(folder), data, tmp_path / "other", TrajectoryOptions(samples=0))
    assert not (tmp_path / "other").exists()


def test_a_base_model_gets_a_chat_template_from_a_file(tmp_path: Path, folder: Path, data: Path) -> None:
    """Curves are those of a model that has this template itself; another template is another setting."""
    import shutil

    base, template = tmp_path / "base", tmp_path / "template.jinja"
    shutil.copytree(folder, base)
    (base / "chat_template.jinja").rename(template)
    command = ["--data", data, "--samples", 8, "--dtype", "float32", "--out"]
    refused = run("--model", base, *command, tmp_path / "out")
    assert "has no chat template; give one with --chat-template FILE" in str(refused.exception)
    content = []
    for model, name, options in ((folder, "own", []), (base, "given", ["--chat-template", template])):
        result = run("--model", model, *command, tmp_path / name, *options)
        assert result.exception is None, result.exception
        content.append(json.loads((tmp_path / name / "trajectory.json").read_text()))
    assert content[0]["curves"] == content[1]["curves"]
    template.write_text(template.read_text() + "{# another #}", encoding="utf-8")
    other = run("--model", base, *command, tmp_path / "given", "--chat-template", template)
    assert "a trajectory of another setting" in str(other.exception)
    missing = run("--model", base, *command, tmp_path / "out", "--chat-template", tmp_path / "none.jinja")
    assert "none.jinja cannot be read" in str(missing.exception) and not (tmp_path / "out").exists()


def test_too_few_samples_say_so(tmp_path: Path, folder: Path) -> None:
    data = data_file(tmp_path / "data.json", [record(i) for i in range(3)])
    result = run("--model", folder, "--data", data, "--out", tmp_path / "out")
    assert result.exception is None, result.exception
    assert result.stdout.splitlines()[0] == (
        "no clear transition: 3 samples are too few to tell the phases apart; give at least 8."
    )
    content = json.loads((tmp_path / "out" / "trajectory.json").read_text())
    assert content["transition"]["layer"] is None and content["proposed"] is None


def test_an_empty_out_folder_is_taken(tmp_path: Path, folder: Path, data: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run("--model", folder, "--data", data, "--samples", 8, "--out", tmp_path / "out")
    assert result.exception is None, result.exception
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "nowhere"}, "model folder nowhere does not exist."),
        ({"--model": "."}, "holds no config.json"),
        ({"--data": "nothing.json"}, "data file nothing.json does not exist"),
        ({"--data": "broken.json"}, "broken.json cannot be read"),
        ({"--data": "images.json"}, "(2 have an image"),
        ({"--metric": "sequense"}, "did you mean 'sequence'?"),
        ({"--dtype": "float16"}, "--dtype float16 is unknown"),
        ({"--samples": "0"}, "--samples 0 is too small"),
        ({"--batch": "-1"}, "--batch -1 is too small"),
        ({"--seed": "-1"}, "--seed -1 is negative"),
        ({"--out": "full"}, "--out full already holds something else"),
        ({"--out": "data.json"}, "--out data.json already holds something else"),
        ({"--out": "data.json/out"}, "cannot be made below"),
    ],
)
def test_bad_inputs_end_in_one_sentence(
    tmp_path: Path, folder: Path, data: Path, changed: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "broken.json").write_text("[")
    data_file(tmp_path / "images.json", [record(i, image="a.png") for i in range(2)])
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    options = {"--model": str(folder), "--data": "data.json", "--out": "out", **changed}
    result = run(*[word for pair in options.items() for word in pair])
    assert isinstance(result.exception, ValueError), result.exception
    assert type(result.exception).__module__.startswith("zero_ds.")
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert result.stdout == ""
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before


def test_missing_weights_are_refused(tmp_path: Path, folder: Path, data: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    result = run("--model", copy, "--data", data, "--out", tmp_path / "out")
    assert isinstance(result.exception, ConfigError) and "model.layers.2.mlp.up_proj.weight" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_help_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from zero_ds.cli.trajectory import trajectory; "
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
