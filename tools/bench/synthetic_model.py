"""Writes a Llama of any shape with random bfloat16 weights, shard by shard, for measurements with large models.

    python tools/bench/synthetic_model.py --shape 8b --tokenizer FOLDER --out /tmp/llama-8b

The vocabulary has the size of the shape, and must not be smaller than that of the tokenizer, whose files are copied. A
shard holds one layer, so the memory needed is that of the embeddings.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from tqdm import tqdm

from zero_ds.runtime.files import new_folder
from zero_ds.surrogate.build import COPIED

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Shapes of Llama 3.x; all have 8 key and value heads and 128256 tokens."""


def main(
    out: Annotated[Path, typer.Option(help="New folder.")],
    tokenizer: Annotated[Path, typer.Option(help="Model folder whose tokenizer and template are copied.")],
    shape: Annotated[str, typer.Option(help="1b, 3b, 8b or 70b.")] = "8b",
    tied: Annotated[bool, typer.Option("--tied", help="Use one tensor for embeddings and head.")] = False,
) -> None:
    """Write the model."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape}; use one of {', '.join(SHAPES)}")
    sizes = {**SHAPES[shape], "num_key_value_heads": 8, "vocab_size": 128256}
    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    head = hidden // sizes["num_attention_heads"]
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (8 * head, hidden),
        "self_attn.v_proj": (8 * head, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(0)
    layers = sizes["num_hidden_layers"]

    def random(rows: int, columns: int) -> torch.Tensor:
        # a repeated block of rows, because drawing all numbers would take longer than any measurement
        block = (torch.randn(min(rows, 1024), columns, generator=generator) * columns**-0.5).bfloat16()
        return block.repeat(-(-rows // len(block)), 1)[:rows].contiguous()

    with new_folder(out) as folder:
        index: dict[str, str] = {}
        total = 0

        def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
            nonlocal total
            name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
            save_file(tensors, folder / name, metadata={"format": "pt"})
            index.update(dict.fromkeys(tensors, name))
            total += sum(tensor.nbytes for tensor in tensors.values())

        for layer in tqdm(range(layers), unit="layer"):
            prefix = f"model.layers.{layer}."
            tensors = {f"{prefix}{name}.weight": random(*size) for name, size in matrices.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
            save(layer, tensors)
        ends = {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
        for name in ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"]):
            ends[name] = random(vocabulary, hidden)
        save(layers, ends)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **sizes,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        for file in tokenizer.iterdir():
            if COPIED.fullmatch(file.name):
                shutil.copyfile(file, folder / file.name)
    print(f"{total / 1e9:.2f} GB in {layers + 1} shards -> {out}")


if __name__ == "__main__":
    typer.run(main)
