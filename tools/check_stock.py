"""Exports in an environment without zero_ds: transformers' pipeline, its classes, and lmms-eval's `llava_hf`.

Run by launch/test_stock.sh after tools/ask_source.py has written what must be answered. It imports nothing of this
package, and fails where it could.
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
"""Largest difference of logits."""


def ask_pipeline(answer: Any, question: str, picture: str | None, tokens: int) -> str:
    contents: list[dict[str, str]] = [{"type": "image", "url": picture}] if picture else []
    message = {"role": "user", "content": [*contents, {"type": "text", "text": question}]}
    options = {"max_new_tokens": tokens, "do_sample": False}
    said = answer(text=[message], generate_kwargs=options)[0]["generated_text"][-1]["content"]
    return str(said).strip()


def count(kind: str, lines: list[tuple[str, str, str]]) -> bool:
    """Prints (question, found, wanted) and how many are equal; whether all are."""
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
        found = ask_pipeline(answer, one["question"], one["picture"], asked["tokens"])
        lines.append((one["question"], found, one["answer"]))
    return count("pipeline", lines)


def check_tiny(folder: Path) -> bool:
    """Every export beside its answers: prompts to the token, logits within TOLERANCE, answers, and the pipeline's."""
    import torch
    import transformers
    from PIL import Image
    from safetensors.torch import load_file

    good = True
    names = sorted(path.parent.name for path in folder.glob("*/asked.json"))
    for name in names:
        here, asked = folder / name, json.loads((folder / name / "asked.json").read_text(encoding="utf-8"))
        wanted = load_file(here / "asked.safetensors")
        trust = {"trust_remote_code": True} if asked["remote_code"] else {}
        auto: Any = transformers.AutoModelForCausalLM if trust else transformers.AutoModelForImageTextToText
        model = auto.from_pretrained(here / "export", dtype="auto", **trust).eval()
        processor = transformers.AutoProcessor.from_pretrained(here / "export", **trust)
        answer = transformers.pipeline("image-text-to-text", model=str(here / "export"), device="cpu", **trust)
        gap, same_ids, same_answers, through_pipeline = 0.0, 0, 0, 0
        for number, one in enumerate(asked["asked"]):
            picture = one["picture"]
            contents = [*([{"type": "image"}] if picture else []), {"type": "text", "text": one["question"]}]
            prompt = processor.apply_chat_template([{"role": "user", "content": contents}], add_generation_prompt=True)
            inputs = processor(text=prompt, images=Image.open(picture) if picture else None, return_tensors="pt")
            same_ids += inputs["input_ids"][0].tolist() == wanted[f"{number}.ids"].tolist()
            with torch.inference_mode():
                found = model(**inputs).logits[0, -len(wanted[f"{number}.logits"]) :].float()
                tokens = model.generate(**inputs, max_new_tokens=asked["tokens"], do_sample=False)
            gap = max(gap, float((found - wanted[f"{number}.logits"].float()).abs().max()))
            answered = wanted[f"{number}.answer"].tolist()
            same_answers += tokens[0, inputs["input_ids"].shape[1] :].tolist() == answered
            said = ask_pipeline(answer, one["question"], picture, asked["tokens"])
            through_pipeline += said == one["answer"]
        total, different = len(asked["asked"]), len({one["answer"] for one in asked["asked"]})
        fits = gap <= TOLERANCE and same_ids == same_answers == through_pipeline == total
        good &= fits
        print(
            f"{'same ' if fits else 'OTHER'} {name} ({type(model).__name__}): prompts {same_ids}/{total}, "
            f"logits within {gap:.1e}, answers {same_answers}/{total} ({different} different ones), by pipeline "
            f"{through_pipeline}/{total}",
            flush=True,
        )
    print(f"{len(names)} tiny exports")
    return good and bool(names)


def write_tokens(export: Path, asked: dict[str, Any], scratch: Path) -> bool:
    """What transformers' class answers, token by token, for tools/check_served.py to compare with vLLM's."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(export)
    model = LlavaForConditionalGeneration.from_pretrained(export, dtype=torch.float32).eval()
    lines = []
    for one in asked["asked"]:
        contents = [*([{"type": "image"}] if one["picture"] else []), {"type": "text", "text": one["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": contents}], add_generation_prompt=True)
        image = Image.open(one["picture"]) if one["picture"] else None
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        found = model.generate(**inputs, max_new_tokens=asked["tokens"], do_sample=False)
        ids = inputs["input_ids"][0].tolist()
        lines.append({**one, "prompt": ids, "tokens": found[0, len(ids) :].tolist()})
    (scratch / "tokens.json").write_text(json.dumps({"limit": asked["tokens"], "lines": lines}), encoding="utf-8")
    texts = [str(processor.decode(line["tokens"], skip_special_tokens=True)).strip() for line in lines]
    return count(
        "transformers", [(one["question"], text, one["answer"]) for one, text in zip(lines, texts, strict=True)]
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
    return [Image.open(document["picture"]).convert("RGB")]

def score(document, results):
    return {"same": float(results[0].strip() == document["answer"])}
"""


def check_lmms(export: Path, asked: dict[str, Any], scratch: Path) -> bool:
    """The command line of lmms-eval, on a task of the questions that have a picture."""
    task = scratch / "task"
    task.mkdir()
    shown = [one for one in asked["asked"] if one["picture"]]  # llava_hf cannot ask without one
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
    return count("lmms_eval --model llava_hf", lines)


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
