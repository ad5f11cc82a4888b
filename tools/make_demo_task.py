"""Writes held-out questions of the demo as two tasks of lmms-eval: free answers, and a choice between words.

python tools/make_demo_task.py runs/demo/data/heldout.json --out tasks --questions 7
zero-ds eval runs/quickstart/encoder --target MODEL --suite demo_words,demo_choice --tasks-folder tasks
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.evaluation.heldout.records import read_records

FUNCTIONS = """from PIL import Image

from zero_ds.evaluation.heldout.scoring import first_choice


def visuals(doc):
    return [Image.open(doc["path"])]


def score(doc, results):
    return {"right": float(first_choice(results[0], doc["choices"]) == doc["word"])}
"""
SHARED = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
doc_to_visual: !function functions.visuals
doc_to_text: "{{{{question}}}}"
metadata:
  - version: 0
"""
MEAN = "    aggregation: mean\n    higher_is_better: true\n"
WORDS = """task: demo_words
output_type: generate_until
doc_to_target: "{{word}}"
process_results: !function functions.score
generation_kwargs:
  max_new_tokens: 24
metric_list:
  - metric: right
"""
CHOICE = """task: demo_choice
output_type: multiple_choice
doc_to_choice: "{{answers}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
"""


def main(
    records: Annotated[Path, typer.Argument(help="Held-out records of the demo.")],
    out: Annotated[Path, typer.Option(help="Folder of the tasks.")],
    questions: Annotated[int, typer.Option(help="Number of questions; the first ones are used.", min=1)] = 7,
) -> None:
    """Write the tasks demo_words and demo_choice, their documents and their functions."""
    rows = []
    for record in [r for r in read_records(records) if r.kind == "question"][:questions]:
        word = record.words[0]
        before, after = record.answer[: word.start], record.answer[word.start + len(word.word) :]
        rows.append(
            {
                "path": str(record.path),
                "question": record.question,
                "word": word.word,
                "choices": list(word.choices),
                "answers": [before + choice + after for choice in word.choices],
                "gold": word.choices.index(word.word),
            }
        )
    out.mkdir(parents=True, exist_ok=True)
    documents = out.absolute() / "documents.json"
    documents.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (out / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    shared = SHARED.format(documents=documents)
    for name, content in (("demo_words", WORDS), ("demo_choice", CHOICE)):
        (out / f"{name}.yaml").write_text(shared + content + MEAN, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
