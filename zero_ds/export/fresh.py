"""Loads an exported folder with transformers alone and lets it answer questions, in a process of its own.

The text of this file is given to a new interpreter (`python -c`), which refuses to import this package. Its argument is
a scratch folder with these files:

    asked.json              in    folder of the export, prompts as pairs of question and image file, image files that
                                  are only looked at, and settings
    pixels.safetensors      in    pixel values of each prompt with an image, and of each file that is only looked at, as
                                  training's image processor makes them
    answers.json            out   token ids of each prompt and answer, differences of pixel values, class of the model
    logits.safetensors      out   logits of each prompt

The model is loaded when a line comes from standard input, because until then the source's model may be in memory.
pixels.safetensors exists by then.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]
"""Inputs of a model by name: `input_ids` and `attention_mask` (batch, seq), `pixel_values` (views, 3, size, size)."""


class _RefuseZeroDs:
    """An import finder that refuses to find this package."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "zero_ds":
            raise ImportError("an exported folder must load without zero_ds")


def batch(prompts: list[Inputs], pad: int) -> Inputs:
    """Joins prompts of several lengths into one batch.

    Tensors with a value for every token are padded on the left, `input_ids` with `pad` and others with 0.
    """
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    joined: dict[str, list[torch.Tensor]] = {}
    for prompt in prompts:
        length = prompt["input_ids"].shape[1]
        for name, value in prompt.items():
            if value.shape == (1, length):
                filler = pad if name == "input_ids" else 0
                value = torch.nn.functional.pad(value, (longest - length, 0), value=filler)
            joined.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in joined.items()}


@torch.no_grad()
def answer(
    generate: Callable[[], torch.Tensor],
    watched: torch.nn.Module,
    scores: Callable[[Any], torch.Tensor],
    lengths: list[int],
    stops: list[int],
    positions: int,
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Generates the answers to a batch and collects the logits that are computed on the way.

    generate: returns the new tokens (batch, steps). watched: module that `generate` calls at every step. scores: makes
    logits (batch, seq, vocabulary) of its output, at least for the last `positions`. lengths: number of tokens of each
    prompt, which are padded on the left. stops: tokens that end an answer.

    Returns the tokens of each answer up to the one that ends it, and the logits of each prompt: (rows, vocabulary), for
    the prompt's last `positions` (or all of a shorter prompt), then for each token of the answer except the last.
    """
    steps: list[torch.Tensor] = []
    hook = watched.register_forward_hook(lambda module, arguments, output: steps.append(scores(output)))
    try:
        tokens = generate().tolist()
    finally:
        hook.remove()
    answers = []
    logits = []
    for row, length in enumerate(lengths):
        found = until_stop(tokens[row], stops)
        answers.append(found)
        of_prompt = steps[0][row, -min(length, positions) :]
        of_answer = [step[row, -1:] for step in steps[1 : len(found)]]
        logits.append(torch.cat([of_prompt, *of_answer]))
    return answers, logits


def until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    """Returns the tokens up to and including the first that is in `stops`."""
    for position, token in enumerate(tokens):
        if token in stops:
            return tokens[: position + 1]
    return tokens


class Export:
    """An exported folder, opened with transformers' Auto classes."""

    def __init__(self, folder: str, remote_code: bool, sees: bool) -> None:
        import transformers

        self.folder = folder
        self.sees = sees
        self.auto_class: Any = transformers.AutoModelForImageTextToText
        self.trust: dict[str, Any] = {}
        if remote_code:
            self.auto_class = transformers.AutoModelForCausalLM
            self.trust = {"trust_remote_code": True}
        self.model: Any = None
        self.processor: Any = None
        if not sees:
            self.auto_class = transformers.AutoModelForCausalLM
            self.processor = transformers.AutoTokenizer.from_pretrained(folder)
            return
        self.processor = transformers.AutoProcessor.from_pretrained(folder, **self.trust)
        self.open_image: Callable[[str], Any] = self._opener(remote_code)

    def _opener(self, remote_code: bool) -> Callable[[str], Any]:
        """Returns the function with which the model card opens an image file."""
        if remote_code:
            from PIL import Image

            return Image.open
        from transformers import AutoConfig
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        read: Any = get_class_from_dynamic_module("read_image.open_image", self.folder)
        background = getattr(AutoConfig.from_pretrained(self.folder), "image_background", "white")
        return lambda path: read(path, background=background)

    def look(self, image: str) -> torch.Tensor:
        """Returns the pixel values that the folder's processor makes of an image file."""
        return self.prompt("What is this?", image)["pixel_values"]

    def prompt(self, question: str, image: str | None) -> Inputs:
        """Returns the inputs that the folder's processor makes of a question, with an image file or without."""
        if not self.sees:
            asked = [{"role": "user", "content": question}]
            text = self.processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            made = self.processor(text, return_tensors="pt")
            return {name: made[name] for name in ("input_ids", "attention_mask")}
        content = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image"})
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        images = None if image is None else [self.open_image(image)]
        return dict(self.processor(text=text, images=images, return_tensors="pt"))

    def load_model(self) -> list[str]:
        """Loads the model; returns the names of tensors that its class and the folder do not agree about."""
        self.model, info = self.auto_class.from_pretrained(
            self.folder, dtype="auto", output_loading_info=True, **self.trust
        )
        self.model.eval()
        names = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        return sorted(str(name) for name in names)

    def answer(self, prompts: list[Inputs], tokens: int, positions: int) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Returns greedy answers of at most `tokens` tokens to a batch, and their logits; see `answer`."""
        settings = self.model.generation_config
        stops = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        inputs = batch(prompts, settings.pad_token_id)

        def generate() -> torch.Tensor:
            output: torch.Tensor = self.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                repetition_penalty=1.0,
                num_beams=1,
                logits_to_keep=positions,
            )
            return output[:, inputs["input_ids"].shape[1] :]

        lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
        return answer(generate, self.model, lambda output: output.logits, lengths, stops, positions)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the largest absolute difference between two tensors of the same shape."""
    return float((one - other).abs().max())


def main(scratch: Path) -> None:
    """Reads asked.json, waits for a line on standard input, then writes answers.json and logits.safetensors."""
    sys.meta_path.insert(0, _RefuseZeroDs)
    from safetensors.torch import load_file, save_file

    asked = json.loads((scratch / "asked.json").read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    export = Export(asked["folder"], asked["remote_code"], asked.get("sees", True))
    prompts = [export.prompt(question, image) for question, image in asked["prompts"]]
    looked_at = {name: export.look(path) for name, path in asked["looked_at"].items()}
    with_image = [number for number, (_, image) in enumerate(asked["prompts"]) if image]
    without_image = [number for number, (_, image) in enumerate(asked["prompts"]) if not image]

    if not sys.stdin.readline():
        return  # the process that asks has ended
    unfilled = export.load_model()
    pixels = load_file(scratch / "pixels.safetensors")

    answers: dict[int, list[int]] = {}
    logits: dict[str, torch.Tensor] = {}
    differences = dict.fromkeys(range(len(prompts)), 0.0)

    def ask(numbers: list[int], batched: list[Inputs]) -> None:
        """Asks a batch. A later batch with the same prompts replaces their answers, but not their logits."""
        found, scores = export.answer(batched, asked["tokens"], asked["positions"])
        for number, tokens, score in zip(numbers, found, scores, strict=True):
            answers[number] = tokens
            logits.setdefault(str(number), score.contiguous())

    # The same image through two processors differs by rounding. Logits are there to test the weights, so they are taken
    # with training's pixel values; answers are taken with those of the folder's own processor.
    if with_image:
        own = [prompts[number] for number in with_image]
        given = [{**prompts[number], "pixel_values": pixels[str(number)]} for number in with_image]
        ask(with_image, given)
        for number, one, other in zip(with_image, own, given, strict=True):
            differences[number] = largest_difference(one["pixel_values"], other["pixel_values"])
        if any(differences.values()):
            ask(with_image, own)
    if without_image:
        ask(without_image, [prompts[number] for number in without_image])

    save_file(logits, scratch / "logits.safetensors")
    content = {
        "class": type(export.model).__name__,
        "unfilled": unfilled,
        "pixel_differences": {name: largest_difference(seen, pixels[name]) for name, seen in looked_at.items()},
        "answers": [
            {
                "ids": prompts[number]["input_ids"][0].tolist(),
                "answer": answers[number],
                "pixel_difference": differences[number],
            }
            for number in range(len(prompts))
        ],
    }
    (scratch / "answers.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
