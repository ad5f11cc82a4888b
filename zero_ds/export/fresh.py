"""Run in a process of its own: loads an exported folder with transformers alone and answers questions.

Its text is handed to a new interpreter (`python -c`), which refuses to import this package. argv[1]: a folder with
asked.json and pixels.safetensors; answers.json and logits.safetensors are written beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


class _Refuse:
    """A finder that finds this package for nobody."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "zero_ds":
            raise ImportError("an exported folder must load without zero_ds")


def main(scratch: Path) -> None:
    sys.meta_path.insert(0, _Refuse)
    import transformers
    from PIL import Image
    from safetensors.torch import load_file, save_file

    asked = json.loads((scratch / "asked.json").read_text(encoding="utf-8"))
    pixels = load_file(scratch / "pixels.safetensors")
    torch.set_num_threads(asked["threads"])
    trust = {"trust_remote_code": True} if asked["remote_code"] else {}
    processor = transformers.AutoProcessor.from_pretrained(asked["folder"], **trust)
    auto: Any = transformers.AutoModelForCausalLM if trust else transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(asked["folder"], dtype="auto", output_loading_info=True, **trust)
    model.eval()
    unfilled = sorted(str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key])
    answers: list[dict[str, Any]] = []
    logits: dict[str, torch.Tensor] = {}
    for number, (question, picture) in enumerate(asked["prompts"]):
        contents = [{"type": "image"}] * bool(picture) + [{"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": contents}], add_generation_prompt=True)
        images = [Image.open(picture)] if picture else None
        inputs = processor(text=prompt, images=images, return_tensors="pt", add_special_tokens=False)
        length = inputs["input_ids"].shape[1]
        own = dict(inputs)
        gap = 0.0
        if picture:  # one picture through two processors differs by rounding; the same pixels tell what the weights do
            gap = float((inputs["pixel_values"] - pixels[str(number)]).abs().max())
            own["pixel_values"] = pixels[str(number)]
        with torch.no_grad():
            scores = model(**own, logits_to_keep=asked["positions"], use_cache=False).logits[0]
            answer = model.generate(
                **inputs, max_new_tokens=asked["tokens"], do_sample=False, repetition_penalty=1.0, num_beams=1
            )
        logits[str(number)] = scores.contiguous()
        answers.append({"ids": inputs["input_ids"][0].tolist(), "answer": answer[0, length:].tolist(), "pixels": gap})
    save_file(logits, scratch / "logits.safetensors")
    content = {"class": type(model).__name__, "unfilled": unfilled, "answers": answers}
    (scratch / "answers.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
