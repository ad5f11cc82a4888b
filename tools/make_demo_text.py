"""Writes zero_ds/data/demo/texts.json: prompts, and a language model's own greedy answers to them.

python tools/make_demo_text.py --model ~/.cache/zero_ds/smollm2-135m-instruct --out zero_ds/data/demo/texts.json
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

TOPICS = [
    "cats",
    "dogs",
    "the sun",
    "the moon",
    "rivers",
    "mountains",
    "bread",
    "music",
    "trains",
    "books",
    "schools",
    "friendship",
    "rain",
    "snow",
    "summer",
    "winter",
    "gardens",
    "birds",
    "fish",
    "the ocean",
    "computers",
    "bicycles",
    "painting",
    "photography",
    "history",
    "science",
    "mathematics",
    "cooking",
    "tea",
    "coffee",
    "sleep",
    "dreams",
    "sports",
    "football",
    "chess",
    "movies",
    "theater",
    "language",
    "writing",
    "money",
    "cities",
    "farms",
    "forests",
    "deserts",
    "islands",
    "bridges",
    "doctors",
    "teachers",
    "stars",
    "planets",
    "robots",
    "cars",
    "airplanes",
    "ships",
    "clocks",
    "maps",
    "letters",
    "colors",
    "shapes",
    "numbers",
]
FORMS = (
    "Tell me one fact about {}.",
    "Write one sentence about {}.",
    "Why do people like {}?",
    "Give a short definition of {}.",
    "What is important to know about {}?",
)
PLACES = [
    "France",
    "Japan",
    "Italy",
    "Egypt",
    "Brazil",
    "Canada",
    "India",
    "China",
    "Spain",
    "Germany",
    "Greece",
    "Kenya",
    "Peru",
    "Norway",
    "Turkey",
]
THINGS = [
    "apple",
    "banana",
    "grass",
    "sky",
    "snow",
    "coal",
    "lemon",
    "blood",
    "orange",
    "plum",
    "carrot",
    "milk",
    "night",
    "rose",
    "leaf",
]


def prompts() -> list[str]:
    """Returns about 360 short prompts, the same ones on every call."""
    listed = [form.format(topic) for topic, form in product(TOPICS, FORMS)]
    for place in PLACES:
        listed += [f"What is the capital of {place}?", f"Name a famous food from {place}."]
    for thing in THINGS:
        listed += [f"What color is {thing}?", f"Describe the shape of {thing} briefly."]
    return listed


def main(
    model: Annotated[Path, typer.Option(help="Folder of the language model.")],
    out: Annotated[Path, typer.Option(help="JSON file to write, a list of [prompt, answer].")],
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 48,
    batch: int = 48,
) -> None:
    """Answer every prompt greedily. Answers that reach the limit are cut there."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    asked = sorted(prompts(), key=len)
    answered = []
    for start in tqdm(range(0, len(asked), batch), unit="batch"):
        group = asked[start : start + batch]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "system", "content": ""}, {"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in group
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = network.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        replies = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        answered += [[prompt, reply.strip()] for prompt, reply in zip(group, replies, strict=True) if reply.strip()]
    out.write_text(json.dumps(answered, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
