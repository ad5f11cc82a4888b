"""Compares the answers of vLLM's own `LlavaForConditionalGeneration` on an export with those of transformers.

launch/test_stock.sh runs it in an environment with vLLM. It imports nothing of this package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(scratch: Path, export: Path) -> int:
    from PIL import Image
    from vllm import LLM, SamplingParams

    asked = json.loads((scratch / "tokens.json").read_text(encoding="utf-8"))
    served = LLM(str(export), dtype="float32", enforce_eager=True, max_model_len=1024, limit_mm_per_prompt={"image": 1})
    conversations = []
    for line in asked["lines"]:
        contents: list[dict[str, Any]] = [{"type": "text", "text": line["question"]}]
        if line["image"]:
            contents.insert(0, {"type": "image_pil", "image_pil": Image.open(line["image"]).convert("RGB")})
        conversations.append([{"role": "user", "content": contents}])
    options = SamplingParams(temperature=0, max_tokens=asked["limit"])
    same = 0
    for line, output in zip(asked["lines"], served.chat(conversations, options, use_tqdm=False), strict=True):
        prompt, tokens = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        equal = prompt == line["prompt"] and tokens == line["tokens"]
        same += equal
        mark = "same "
        if not equal:
            mark = "OTHER" if prompt == line["prompt"] else "OTHER PROMPT"
        kind = "with an image" if line["image"] else "text only"
        print(
            f"{mark} {len(prompt)} + {len(tokens)} tokens, {kind}: {line['question']!r} -> {output.outputs[0].text!r}"
        )
        if not equal:
            print(f"      prompt {prompt}\n      wanted {line['prompt']}")
            print(f"      tokens {tokens}\n      wanted {line['tokens']}")
    architecture = served.llm_engine.model_config.architecture
    print(f"vLLM ({architecture}): {same} of {len(asked['lines'])} answers are the same, token for token")
    return not (same == len(asked["lines"]) > 0 and architecture == "LlavaForConditionalGeneration")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]).resolve()))
