"""What frozen decoder layers in 8 bits change in a trained run: losses, and the gradient that reaches the pictures.

    python tools/bench/rounding.py runs/quickstart/encoder
    python tools/bench/rounding.py runs/quickstart/encoder --full --bitsandbytes

All contestants see the same batches and are held against float32. bf16 without 8 bits shows what rounding costs anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import report
import torch
import typer
import yaml
from torch import nn

from zero_ds.config.schema import RunConfig
from zero_ds.data.loader import Loader
from zero_ds.model.losses import count_supervised
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime import distributed
from zero_ds.training import stages
from zero_ds.training.checkpoint.checkpoint import find_checkpoint
from zero_ds.training.checkpoint.load import load_weights_
from zero_ds.training.options.int8 import quantize_
from zero_ds.training.setup import load_model, make_loader, seed_everything

CONTESTANTS = (("fp32", "native"), ("bf16", "native"), ("fp32", "int8"), ("bf16", "int8"))


def load(run: Path, precision: str, full: bool) -> tuple[VisionLanguageModel, Loader]:
    """The run's model with its trained weights, and those it started from, and its data."""
    config = RunConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    config = config.model_copy(
        update={
            "precision": precision,
            "decoder": "target" if full else config.decoder,
            "global_batch": config.micro_batch,
        }
    )
    seed_everything(config.seed)
    model = load_model(config, {"zero_optimization": {}})
    loader = make_loader(config, model, 1)
    for folder in (*stages.check_start(config), run):
        load_weights_(
            model.named_targets(),
            find_checkpoint(folder),
            skip=lambda name: stages.belongs_elsewhere(config, name),
        )
    stages.freeze_(model, config)
    return model.train(), loader


def learned(model: VisionLanguageModel, batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the supervised tokens, and the gradient at the image features, of all batches one behind the other."""
    tokens, gradients = [], []
    for batch in batches:
        features: list[torch.Tensor] = []
        handle = model.adapter.register_forward_hook(lambda *a, into=features: _keep(a[2], into))  # type: ignore[union-attr]
        outcome = model(**batch.inputs())
        (outcome.total / count_supervised(batch.labels)).backward()
        handle.remove()
        tokens.append(outcome.tokens)
        gradients.append(features[0].grad.float().flatten())  # type: ignore[union-attr]
    return torch.cat(tokens), torch.cat(gradients)


def _keep(output: torch.Tensor, into: list[torch.Tensor]) -> None:
    output.retain_grad()
    into.append(output)


def bitsandbytes_(model: VisionLanguageModel, threshold: float) -> None:
    """LLM.int8() in all decoder layers, by the product that bitsandbytes uses on GPUs."""
    import logging

    import bitsandbytes

    library: Any = bitsandbytes.nn
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for layer in model.family.layers(model.decoder):
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    sizes = (child.in_features, child.out_features, child.bias is not None)
                    theirs = library.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold)
                    theirs.bias = child.bias
                    weight = library.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
                    theirs.weight = weight.to("cpu")
                    setattr(module, name, theirs.eval())  # in training it multiplies otherwise on a CPU


def held(model: VisionLanguageModel) -> float:
    """Megabytes of the decoder's layers."""
    layers = model.family.layers(model.decoder)
    return sum(t.nbytes for layer in layers for t in (*layer.parameters(), *layer.buffers())) / 1e6


def compare(run: Path, batches: int, full: bool = False, with_bitsandbytes: bool = False) -> list[dict[str, Any]]:
    """A row for each contestant, the first of which is float32."""
    contestants = [*CONTESTANTS]
    if with_bitsandbytes:
        contestants += [(precision, f"bitsandbytes {t}") for precision in ("fp32", "bf16") for t in (0.0, 6.0)]
    rows: list[dict[str, Any]] = []
    base: tuple[torch.Tensor, torch.Tensor] | None = None
    for precision, kind in contestants:
        model, loader = load(run, precision, full)
        if kind == "int8":
            quantize_(model)
        elif kind != "native":
            bitsandbytes_(model, float(kind.split()[1]))
        found = learned(model, [micro[0] for micro in loader.steps(0, batches)])
        base = base or found
        rows.append(
            {
                "precision": precision,
                "frozen_weights": kind,
                "loss": float(found[0].mean()),
                "token_difference": float((found[0] - base[0]).square().mean().sqrt()),
                "gradient_difference": float((found[1] - base[1]).norm() / base[1].norm()),
                "megabytes": held(model),
            }
        )
    return rows


def main(
    run: Annotated[Path, typer.Argument(help="Run of the encoder stage.")],
    batches: int = 8,
    full: Annotated[bool, typer.Option("--full", help="Through the target instead of the surrogate.")] = False,
    bitsandbytes: Annotated[bool, typer.Option("--bitsandbytes", help="Beside LLM.int8(), where installed.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Losses and gradients with frozen layers in 8 bits, beside float32."""
    distributed.initialize()
    rows = compare(run, batches, full, bitsandbytes)
    head = ["precision", "frozen_weights", "loss", "of a token", "gradient", "layers, MB"]
    print(report.table(head, [list(row.values()) for row in rows]))
    report.write(out, {"run": str(run), "full": full, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
