"""Compares vLLM with transformers on a graft: greedy answers token for token, with images and without.

launch/test_vllm.sh runs it in an environment with vLLM. Prompts are about held-out images of the demo, or plain text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from zero_ds.data.conversations import IMAGE_TOKEN, PLACEHOLDER, Turn
from zero_ds.data.sources import Sample
from zero_ds.grafting.engines.vllm import answerer, conversation, generate, load_served
from zero_ds.grafting.named_model import find_model, load_model
from zero_ds.model.decoding import Context, Reader

TEXTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "How many legs has a spider?",
    "What is 2 + 3?",
    "Say hello in French.",
    "Who wrote Hamlet?",
    "What do bees make?",
    "Is the sun a star?",
    "Give a synonym of big.",
    "What comes after Tuesday?",
)
TOKENS = 32


def greedy(reader: Reader, ids: list[int], features: torch.Tensor | None, stop: int) -> tuple[list[int], float]:
    """Returns transformers' greedy tokens, up to the closing one, and the smallest lead of a logit over the next."""
    context, tokens, lead = Context(1, reader.device), [], float("inf")
    rest = ids
    while len(tokens) < TOKENS and (not tokens or tokens[-1] != stop):
        hidden = reader.extend(context, [rest], features)
        features = None
        best = reader.model.logits(hidden[0, -1]).float().topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        rest = tokens[-1:]
    return tokens, lead


def main(
    run: Annotated[str, typer.Argument(help="Run folder with a trained encoder.")],
    target: Annotated[str, typer.Option(help="Full language model.")],
    records: Annotated[Path, typer.Option(help="Held-out records of the demo.")],
    images: Annotated[int, typer.Option("--pictures", help="Number of prompts with an image.", min=1)] = 16,
) -> None:
    named = find_model(run, target)
    assert named.kind == "graft", named.kind
    ours = load_model(named)
    reader, encoder = Reader(ours.model), ours.encoder
    asked = json.loads(records.read_text(encoding="utf-8"))[:images]
    prompts: list[tuple[str, list[int], torch.Tensor | None]] = []
    for record in asked:
        path = str(records.parent / record["image"])
        sample = Sample(record["id"], (Turn("user", f"{PLACEHOLDER}\n{record['question']}"),), (path,))
        ids = encoder.encode(encoder.turns(sample), generate=True, image_tokens=encoder.image_tokens(sample)).input_ids
        with torch.inference_mode():
            prompts.append((record["question"], ids, ours.model.image_features(encoder.pixels(sample)).flatten(0, 1)))
    for text in TEXTS:
        turns = encoder.turns(Sample("text", (Turn("user", text),), ()))
        prompts.append((text, encoder.encode(turns, generate=True).input_ids, None))
    stop = encoder.template.end_of_turn()
    with torch.inference_mode():
        expected = [greedy(reader, ids, features, stop) for _, ids, features in prompts]

    theirs = load_served(named, dtype=torch.float32)
    assert theirs.served is not None and theirs.served.folder == named.folder
    assert not len(theirs.model.family.layers(theirs.model.decoder)), "the decoder's layers belong to vLLM now"
    found = generate(
        Reader(theirs.model),
        theirs.served,
        [ids for _, ids, _ in prompts],
        [features for *_, features in prompts],
        [TOKENS] * len(prompts),
        stop,
    )
    differ = []
    for (text, ids, _), tokens, (wanted, lead) in zip(prompts, found, expected, strict=True):
        kind = f"{ids.count(IMAGE_TOKEN)} image tokens" if IMAGE_TOKEN in ids else "text only"
        mark = "same" if tokens == wanted else "OTHER"
        words = encoder.template.tokenizer.decode(tokens, skip_special_tokens=True)
        print(f"{mark}  {len(tokens):3d} tokens, least lead {lead:.4f}, {kind}: {text!r} -> {words!r}")
        if tokens != wanted:
            differ.append(text)
    print(f"{len(prompts) - len(differ)} of {len(prompts)} answers are the same, token for token")
    assert not differ, differ

    # the classes of `zero-ds eval` and `zero-ds chat`, on the same engine
    turns = [Turn("user", f"{PLACEHOLDER}\n{asked[0]['question']}")]
    files = [str(records.parent / asked[0]["image"])]
    replies = [answerer(model, max_new_tokens=TOKENS).reply(turns, files) for model in (ours, theirs)]
    talks = [conversation(model, max_new_tokens=TOKENS) for model in (ours, theirs)]
    said = []
    for talk in talks:
        talk.show(files[0])
        said.append(["".join(talk.ask(question)) for question in (asked[0]["question"], "why?")])
    print(f"reply {replies[1]!r}; conversation {said[1]!r}")
    assert replies[0] == replies[1] and said[0] == said[1], (replies, said)


if __name__ == "__main__":
    typer.run(main)
