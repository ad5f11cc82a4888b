"""Checks exports in an environment without zero_ds: transformers' pipeline and classes, and lmms-eval's `llava_hf`.

launch/test_stock.sh runs it after tools/ask_source.py has written the expected answers. It imports nothing of this
package, and fails if it could.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 1e-5
"""Largest difference of logits that is accepted."""


def ask_pipeline(answer: Any, question: str, image: str | None, tokens: int) -> str:
    """Returns a pipeline's greedy answer to a question, with an image file or without."""
    contents: list[dict[str, str]] = [{"type": "image", "url": image}] if image else []
    message = {"role": "user", "content": [*contents, {"type": "text", "text": question}]}
    options = {"max_new_tokens": tokens, "do_sample": False}
    said = answer(text=[message], generate_kwargs=options)[0]["generated_text"][-1]["content"]
    return str(said).strip()


def compare(kind: str, lines: list[tuple[str, str, str]]) -> bool:
    """Prints every (question, found, wanted) and how many answers are the same; returns whether all are."""
    for question, found, wanted in lines:
        print(f"{'same ' if found == wanted else 'OTHER'} {question!r} -> {found!r}")
        if found != wanted:
            print(f"      wanted {wanted!r}")
    same = sum(found == wanted for _, found, wanted in lines)
    print(f"{kind}: {same} of {len(lines)} answers are the same")
    return same == len(lines) > 0


def check_pipeline(export: Path, asked: dict[str, Any]) -> bool:
    from transformers import pipeline

    answer = pipeline("image-text-to-text", model=str(export), dtype="auto", device="cpu")
    lines = []
    for one in asked["asked"]:
        found = ask_pipeline(answer, one["question"], one["image"], asked["tokens"])
        lines.append((one["question"], found, one["answer"]))
    return compare("pipeline", lines)


def check_tiny(folder: Path) -> bool:
    """Compares every tiny export with its source: prompts and answers to the token, logits within TOLERANCE."""
    names = sorted(path.parent.name for path in folder.glob("*/asked.json"))
    good = [check_export(folder / name) for name in names]
    print(f"{len(names)} tiny exports")
    return bool(names) and all(good)


def check_export(folder: Path) -> bool:
    """Compares one tiny export, by transformers' classes and by its pipeline; prints and returns whether all agrees."""
    import torch
    import transformers
    from safetensors.torch import load_file

    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    wanted = load_file(folder / "asked.safetensors")
    trust = {"trust_remote_code": True} if asked["remote_code"] else {}
    auto: Any = transformers.AutoModelForCausalLM if trust else transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(folder / "export", dtype="auto", **trust).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder / "export", **trust)
    pipeline = transformers.pipeline("image-text-to-text", model=str(folder / "export"), device="cpu", **trust)
    gap, same_prompts, same_answers, same_by_pipeline = 0.0, 0, 0, 0
    for number, one in enumerate(asked["asked"]):
        inputs = inputs_of(processor, one["question"], one["image"])
        length = inputs["input_ids"].shape[1]
        wanted_logits = wanted[f"{number}.logits"].float()
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -len(wanted_logits) :].float()
            tokens = model.generate(**inputs, max_new_tokens=asked["tokens"], do_sample=False)[0, length:]
        gap = max(gap, float((logits - wanted_logits).abs().max()))
        same_prompts += inputs["input_ids"][0].tolist() == wanted[f"{number}.ids"].tolist()
        same_answers += tokens.tolist() == wanted[f"{number}.answer"].tolist()
        same_by_pipeline += ask_pipeline(pipeline, one["question"], one["image"], asked["tokens"]) == one["answer"]
    total, different = len(asked["asked"]), len({one["answer"] for one in asked["asked"]})
    good = gap <= TOLERANCE and same_prompts == same_answers == same_by_pipeline == total
    print(
        f"{'same ' if good else 'OTHER'} {folder.name} ({type(model).__name__}): prompts {same_prompts}/{total}, "
        f"logits within {gap:.1e}, answers {same_answers}/{total} ({different} different ones), by pipeline "
        f"{same_by_pipeline}/{total}",
        flush=True,
    )
    return good


def inputs_of(processor: Any, question: str, image: str | None) -> Any:
    """Returns the inputs that the export's processor makes of a question, with an image file or without."""
    from PIL import Image

    contents = [*([{"type": "image"}] if image else []), {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": contents}], add_generation_prompt=True)
    return processor(text=prompt, images=Image.open(image) if image else None, return_tensors="pt")


def write_tokens(export: Path, asked: dict[str, Any], scratch: Path) -> bool:
    """Writes the answers of transformers' class token by token, with which tools/check_served.py compares vLLM's."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(export)
    model = LlavaForConditionalGeneration.from_pretrained(export, dtype=torch.float32).eval()
    lines = []
    for one in asked["asked"]:
        inputs = inputs_of(processor, one["question"], one["image"])
        found = model.generate(**inputs, max_new_tokens=asked["tokens"], do_sample=False)
        ids = inputs["input_ids"][0].tolist()
        lines.append({**one, "prompt": ids, "tokens": found[0, len(ids) :].tolist()})
    (scratch / "tokens.json").write_text(json.dumps({"limit": asked["tokens"], "lines": lines}), encoding="utf-8")
    texts = [str(processor.decode(line["tokens"], skip_special_tokens=True)).strip() for line in lines]
    return compare(
        "transformers", [(line["question"], text, line["answer"]) for line, text in zip(lines, texts, strict=True)]
    )


TASK = """task: seen
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function visuals.visuals
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function visuals.score
generation_kwargs: {{max_new_tokens: {tokens}}}
metric_list:
  - {{metric: same, aggregation: mean, higher_is_better: true}}
"""
VISUALS = """from PIL import Image

def visuals(document):
    return [Image.open(document["image"]).convert("RGB")]

def score(document, results):
    return {"same": float(results[0].strip() == document["answer"])}
"""


def check_lmms(export: Path, asked: dict[str, Any], scratch: Path) -> bool:
    """Runs the command line of lmms-eval on a task with the questions that have an image."""
    task = scratch / "task"
    task.mkdir()
    shown = [one for one in asked["asked"] if one["image"]]  # llava_hf cannot ask without an image
    (task / "documents.json").write_text("\n".join(map(json.dumps, shown)), encoding="utf-8")
    (task / "seen.yaml").write_text(
        TASK.format(documents=task / "documents.json", tokens=asked["tokens"]), encoding="utf-8"
    )
    (task / "visuals.py").write_text(VISUALS, encoding="utf-8")
    model = f"pretrained={export},device=cpu,device_map=cpu,dtype=float32"
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_hf", "--model_args", model, "--tasks", "seen"]
    command += ["--include_path", str(task), "--batch_size", "1", "--log_samples", "--output_path", str(task / "out")]
    print(" ".join(command), flush=True)
    status = subprocess.run(command, cwd=scratch, env={**os.environ, "HF_HOME": str(scratch / "hub")}).returncode
    samples = list((task / "out").rglob("*samples_seen.jsonl"))
    if status or len(samples) != 1:
        print(f"lmms-eval ended with {status} and left {len(samples)} files of samples")
        return False
    lines = []
    for row in map(json.loads, samples[0].read_text(encoding="utf-8").splitlines()):
        found = row["filtered_resps"]
        one = shown[row["doc_id"]]
        lines.append((one["question"], str(found if isinstance(found, str) else found[0]).strip(), one["answer"]))
    return compare("lmms_eval --model llava_hf", lines)


def main(kind: str, scratch: Path, export: Path | None) -> int:
    assert importlib.util.find_spec("zero_ds") is None, "zero_ds can be imported here"
    if kind == "tiny":
        return not check_tiny(scratch / "tiny")
    assert export is not None
    asked = json.loads((scratch / "asked.json").read_text(encoding="utf-8"))
    checks = {
        "pipeline": lambda: check_pipeline(export, asked),
        "lmms": lambda: check_lmms(export, asked, scratch),
        "tokens": lambda: write_tokens(export, asked, scratch),
    }
    return not checks[kind]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]).resolve() if len(sys.argv) > 3 else None))
