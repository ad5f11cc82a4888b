"""Runs that an older version wrote stay usable: they are resumed, grafted and exported as that version did it.

tests/support/older_run was written before the modules moved into packages; make_older_run.py next to it says how.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed_helper import run_ranks, train_all
from make_older_run import file_hash
from safetensors.torch import load_file
from transformers import AutoTokenizer

from zero_ds.config.loading import load_run
from zero_ds.data.conversations import PLACEHOLDER, Turn
from zero_ds.export import export_model
from zero_ds.grafting.generate import Answerer
from zero_ds.grafting.named_model import find_model, load_model

OLDER = Path(__file__).parent.parent / "support" / "older_run"
EXPECTED: dict[str, Any] = json.loads((OLDER / "expected.json").read_text(encoding="utf-8"))

REWORDED = (".py", ".md", ".jinja")
"""Files of an export that hold our own code or prose, which may change. All other files must keep every byte."""
MESSAGES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "which shape?"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which shape?"}]}],
    [{"role": "user", "content": "<image>\nwhich shape?"}],
    [{"role": "user", "content": "is <image> left of <image>?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which shape?"}]},
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": "sure?"},
    ],
)
"""Conversations that exports have always read as training wrote them."""


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, as working directory, because its runs name their models relative to it."""
    folder = tmp_path / "older"
    shutil.copytree(OLDER, folder)
    monkeypatch.chdir(folder)
    return folder


def resume(folder: Path, run: str) -> str:
    """Resumes a run of the folder with its own resolved configuration; returns the name of its last checkpoint."""
    os.chdir(folder)
    return train_all([load_run(f"{run}/config.yaml")])[0]


def known_before(now: Any, then: Any) -> Any:
    """Returns a configuration without the keys that it did not have then."""
    if isinstance(now, dict) and isinstance(then, dict):
        return {key: known_before(value, then[key]) for key, value in now.items() if key in then}
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        return [known_before(*pair) for pair in zip(now, then, strict=True)]
    return now


def test_a_stopped_run_is_resumed(older: Path) -> None:
    before = json.loads((older / "pretrain" / "step-000002" / "manifest.json").read_text())
    assert run_ranks(resume, 1, older, "pretrain") == ["step-000004"]
    records = [json.loads(line) for line in (older / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    losses = {str(record["step"]): record["loss"] for record in records}
    assert list(losses) == ["1", "2", "3", "4"]
    assert losses["3"] == pytest.approx(EXPECTED["losses"]["3"], rel=1e-6), "a forward pass of the restored weights"
    assert losses["4"] == pytest.approx(EXPECTED["losses"]["4"], rel=1e-5), "after an update with the restored moments"
    after = json.loads((older / "pretrain" / "step-000004" / "manifest.json").read_text())
    changing = ("step", "versions", "weights_sha256")
    assert [key for key in after if key != "weights_files"] == list(before), "fields in the same order"
    after["config"] = known_before(after["config"], before["config"])
    assert all(after[key] == before[key] for key in before if key not in changing)


def test_a_finished_run_is_complete(older: Path) -> None:
    assert run_ranks(resume, 1, older, "encoder") == ["step-000002"]


def test_it_grafts_with_the_same_answers(older: Path) -> None:
    loaded = load_model(find_model("encoder", "models/target"))
    named = loaded.model.named_targets()
    for name, tensor in load_file(older / "encoder" / "step-000002" / "weights.safetensors").items():
        assert tensor.equal(named[name].detach()), f"{name}, bit for bit"
    answerer = Answerer(loaded.model, loaded.encoder, max_new_tokens=12)
    for number, question in enumerate(EXPECTED["questions"]):
        asked = [Turn("user", f"{PLACEHOLDER}\n{question}")]
        assert answerer.reply(asked, [f"data/images/{number}.png"]) == EXPECTED["answers"][number]


@pytest.mark.parametrize("form", ["llava", "remote-code"])
def test_it_exports_the_same_files(older: Path, form: str) -> None:
    out = older / "export"
    export_model(Path("encoder"), None, out, form=form, proof="tensors")
    files = {str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_file()}
    assert [name for name in files if name != "read_image.py"] == list(EXPECTED["exports"][form])
    for name, path in files.items():
        if path.suffix not in REWORDED:  # of exports on white, which old runs are
            assert file_hash(path) == EXPECTED["exports"][form][name], name
    old = (OLDER / "export.jinja").read_text(encoding="utf-8")
    assert file_hash(OLDER / "export.jinja") == EXPECTED["exports"][form]["chat_template.jinja"]
    words = AutoTokenizer.from_pretrained(out)
    for messages in MESSAGES:
        asked = [
            words.apply_chat_template(messages, chat_template=each, tokenize=False, add_generation_prompt=True)
            for each in (None, old)
        ]
        assert asked[0] == asked[1]


def test_the_folder_names_no_machine() -> None:
    """It was written with paths relative to it, and is small enough to be kept."""
    files = [path for path in OLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.5 * 2**20
    for path in files:
        in_run = path.relative_to(OLDER).parts[0] in ("pretrain", "encoder")
        if in_run and path.suffix in (".json", ".yaml", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            assert '"/' not in text and ": /" not in text, f"{path} holds an absolute path"
