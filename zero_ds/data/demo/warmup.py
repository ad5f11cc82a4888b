"""Trains a small CLIP vision transformer by classification: the demo's stand-in for CLIP's pre-training.

Real runs start from a released CLIP. Where none can be fetched, a vision encoder of about a million parameters learns
to classify the attributes of generated images, which is all that the demo needs of a pre-trained one.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from zero_ds.data.images import ImageProcessor, open_image
from zero_ds.runtime.files import new_folder

logger = logging.getLogger(__name__)

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
    "projection_dim": 128,
}
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
"""CLIP's colour statistics."""


def warm_up(data: Path, out: Path, *, steps: int = 2000, batch: int = 64, seed: int = 0) -> dict[str, float]:
    """Trains on the scenes of `data`/train.json, writes a Hugging Face folder and returns the accuracy by attribute.

    Accuracies are measured on the last 500 images, which are not trained on.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    records = json.loads((data / "train.json").read_text(encoding="utf-8"))
    process = ImageProcessor(SHAPE["image_size"], MEAN, STD)
    pixels = torch.cat([process(open_image(data / record["image"])) for record in records])
    attributes = [name for name in records[0]["scene"] if name != "jitter"]
    labels: dict[str, torch.Tensor] = {}
    widths: dict[str, int] = {}
    for name in attributes:
        values = sorted({str(record["scene"][name]) for record in records})
        labels[name] = torch.tensor([values.index(str(record["scene"][name])) for record in records])
        widths[name] = len(values)

    model = CLIPVisionModel(CLIPVisionConfig(**SHAPE))
    heads = nn.ModuleDict({name: nn.Linear(SHAPE["hidden_size"], width) for name, width in widths.items()})
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    train = max(1, len(records) - 500)
    generator = torch.Generator().manual_seed(seed)
    progress = tqdm(range(steps), desc="warming up the vision encoder", unit="step", mininterval=2)
    for _ in progress:
        chosen = torch.randint(0, train, (batch,), generator=generator)
        pooled = _pooled(model, pixels[chosen])
        loss = torch.stack([F.cross_entropy(heads[n](pooled), labels[n][chosen]) for n in attributes]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    with torch.no_grad():
        pooled = _pooled(model, pixels[train:])
        accuracy = {n: float((heads[n](pooled).argmax(-1) == labels[n][train:]).float().mean()) for n in attributes}
    processor = CLIPImageProcessor(
        size={"shortest_edge": SHAPE["image_size"]},
        crop_size={"height": SHAPE["image_size"], "width": SHAPE["image_size"]},
        image_mean=MEAN,
        image_std=STD,
    )
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "warmup.json").write_text(json.dumps({"steps": steps, "accuracy": accuracy}, indent=2) + "\n")
    return accuracy


def _pooled(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the mean feature of the patches: (images, 3, size, size) to (images, hidden)."""
    return model(pixel_values=pixels).last_hidden_state[:, 1:].mean(1)
