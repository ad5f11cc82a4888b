"""Run in a process of its own: loads an exported folder with transformers alone and answers questions.

Its text is handed to a new interpreter (`python -c`), which refuses to import this package. argv[1]: a folder with
asked.json. The model is loaded when a line comes from standard input, for until then the source's may be in memory;
pixels.safetensors is there by then. answers.json and logits.safetensors are written beside them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class _Refuse:
    """A finder that finds this package for nobody."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "zero_ds":
            raise ImportError("an exported folder must load without zero_ds")


def batch(prompts: list[dict[str, torch.Tensor]], pad: int) -> dict[str, torch.Tensor]:
    """Prompts of several lengths as one: what is as long as a prompt is padded on the left, the rest joined."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    joined: dict[str, list[torch.Tensor]] = {}
    for prompt in prompts:
        length = prompt["input_ids"].shape[1]
        for key, value in prompt.items():
            if value.shape == (1, length):
                room = (longest - length, 0)
                value = torch.nn.functional.pad(value, room, value=pad if key == "input_ids" else 0)
            joined.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in joined.items()}


@torch.no_grad()
def answer(
    generate: Callable[[], torch.Tensor],
    watched: torch.nn.Module,
    scores: Callable[[Any], torch.Tensor],
    lengths: list[int],
    stops: list[int],
    positions: int,
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy answers of a batch, and the logits that were computed on the way: nothing is computed twice.

    generate: -> new tokens (batch, steps); watched: the module whose outputs `scores` makes logits (batch, seq,
    vocabulary) of, at least of the last `positions`; lengths: tokens of each prompt, which is padded on the left.
    Returns each answer up to its end, and (positions + tokens of the answer - 1, vocabulary): the logits of the
    prompt's last positions (of all, where it has fewer), then of those of the answer that others follow.
    """
    seen: list[torch.Tensor] = []
    hook = watched.register_forward_hook(lambda module, arguments, output: seen.append(scores(output)))
    try:
        tokens = generate().tolist()
    finally:
        hook.remove()
    answers = [row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))] for row in tokens]
    logits = []
    for row, (length, found) in enumerate(zip(lengths, answers, strict=True)):
        prompt = seen[0][row, -min(length, positions) :]
        logits.append(torch.cat([prompt, *(step[row, -1:] for step in seen[1 : len(found)])]))
    return answers, logits


def main(scratch: Path) -> None:
    sys.meta_path.insert(0, _Refuse)
    import transformers
    from PIL import Image
    from safetensors.torch import load_file, save_file

    asked = json.loads((scratch / "asked.json").read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    trust = {"trust_remote_code": True} if asked["remote_code"] else {}
    processor = transformers.AutoProcessor.from_pretrained(asked["folder"], **trust)
    prompts = []
    for question, picture in asked["prompts"]:
        contents = [{"type": "image"}] * bool(picture) + [{"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": contents}], add_generation_prompt=True)
        images = [Image.open(picture)] if picture else None
        prompts.append(processor(text=prompt, images=images, return_tensors="pt"))
    if not sys.stdin.readline():
        return  # whoever asks is gone
    auto: Any = transformers.AutoModelForCausalLM if trust else transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(asked["folder"], dtype="auto", output_loading_info=True, **trust)
    model.eval()
    unfilled = sorted(str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key])
    pixels = load_file(scratch / "pixels.safetensors")
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    greedy = {"max_new_tokens": asked["tokens"], "do_sample": False, "repetition_penalty": 1.0, "num_beams": 1}
    said: dict[int, list[int]] = {}
    answers: list[dict[str, Any]] = [{} for _ in prompts]
    logits: dict[str, torch.Tensor] = {}
    for shown in (True, False):
        numbers = [number for number, (_, picture) in enumerate(asked["prompts"]) if bool(picture) == shown]
        own = [dict(prompts[number]) for number in numbers]
        # one picture through two processors differs by rounding; the same pixels tell what the weights do
        given = [{**one, "pixel_values": pixels[str(n)]} for n, one in zip(numbers, own, strict=True)] if shown else own
        gaps = [
            float((a["pixel_values"] - b["pixel_values"]).abs().max()) if shown else 0.0
            for a, b in zip(own, given, strict=True)
        ]
        for asking in [given, own] if any(gaps) else [given]:
            inputs = batch(asking, model.generation_config.pad_token_id)

            def generate(inputs: dict[str, torch.Tensor] = inputs) -> torch.Tensor:
                done: torch.Tensor = model.generate(**inputs, **greedy, logits_to_keep=asked["positions"])
                return done[:, inputs["input_ids"].shape[1] :]

            lengths = [one["input_ids"].shape[1] for one in asking]
            found, scores = answer(generate, model, lambda output: output.logits, lengths, ends, asked["positions"])
            for number, tokens, score in zip(numbers, found, scores, strict=True):
                logits.setdefault(str(number), score.contiguous())  # of the source's pixels, which come first
                said[number] = tokens  # of its own, which come last
        for number, one, gap in zip(numbers, own, gaps, strict=True):
            answers[number] = {"ids": one["input_ids"][0].tolist(), "answer": said[number], "pixels": gap}
    save_file(logits, scratch / "logits.safetensors")
    content = {"class": type(model).__name__, "unfilled": unfilled, "answers": answers}
    (scratch / "answers.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
