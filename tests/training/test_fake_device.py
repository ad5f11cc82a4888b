"""A step on a device that this machine does not have: nothing lies on the wrong device, and nothing waits for it.

Tensors of torch's FakeTensorMode have a device and no values. An operation on tensors of two devices is refused as on a
GPU, and so is reading a value, for which the host would wait. The device is `lazy`, the only one but the CPU that a
build of torch without CUDA lets autograd use in this mode.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from zero_ds.config.schema import AdapterConfig, DistillConfig, EncoderConfig, LoraConfig
from zero_ds.data.batches import Batch, collate, collate_rows
from zero_ds.data.conversations import IGNORE, IMAGE_TOKEN
from zero_ds.data.samples import EncodedSample
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.distillation import Teacher
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.training.engine import Engine
from zero_ds.training.options.recompute import recompute_

DEVICE = "lazy"


def samples() -> list[EncodedSample]:
    found = []
    for number, (length, images) in enumerate([(30, 1), (11, 0), (20, 2)]):
        ids = [10 + n for n in range(length)]
        image_tokens = images * (tiny.TOKENS_PER_IMAGE + 2)  # with a learned embedding at either end
        ids[1 : 1 + image_tokens] = [IMAGE_TOKEN] * image_tokens
        labels = [token if n >= length - 5 else IGNORE for n, token in enumerate(ids)]
        responses = [0 if n >= length - 5 else -1 for n in range(length)]
        pixels = torch.zeros(images, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        found.append(EncodedSample(input_ids=ids, labels=labels, responses=responses, pixels=pixels, id=str(number)))
    return found


def move_(model: torch.nn.Module) -> None:
    """Replaces parameters and buffers by tensors on the device, without values; tied ones stay tied."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    other: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
                    if isinstance(tensor, torch.nn.Parameter):
                        other = torch.nn.Parameter(other, requires_grad=tensor.requires_grad)
                    moved[id(tensor)] = other
                tensors[name] = moved[id(tensor)]


def moved(value: Any) -> Any:
    """Returns the same, with tensors on the device in place of those on the meta device; refuses any in host memory."""
    if isinstance(value, torch.Tensor):
        assert value.device.type == "meta", "the engine left an input in host memory"
        return torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
    if isinstance(value, dict):
        return {name: moved(item) for name, item in value.items()}
    return tuple(map(moved, value)) if isinstance(value, tuple) else value


@pytest.fixture
def step(made: Callable[..., Path], small: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VisionLanguageModel]:
    """`step(batch, attention=...)`: forward and backward pass of a model on the device, with the engine's inputs."""

    def run(
        batch: Batch, *, attention: str = "sdpa", distilled: bool = False, lora: LoraConfig | None = None
    ) -> VisionLanguageModel:
        clip = made("clip")
        folder = DecoderFolder(small if distilled else made("llama", tied=True))
        model = build_model(
            ModelSpec(
                folder,
                clip,
                EncoderConfig(path=str(clip), patch_norm=True),
                AdapterConfig(boundary_tokens=True),
                attention=attention,
                lora=lora,
            )
        )
        if distilled:
            weights = DistillConfig(logits=1.0)
            model.teacher = Teacher(model, made("llama", tied=True), weights, torch.float32)
        model.train()
        recompute_(model, () if distilled else range(2))
        engine: Any = SimpleNamespace(engine=SimpleNamespace(device=torch.device("meta")), model=model)
        inputs = Engine._inputs(engine, batch)
        # transformers asks once a pass whether anything is padded, or packed; here the host answers
        monkeypatch.setattr(
            masking_utils,
            "find_packed_sequence_indices",
            lambda positions: positions.new_zeros(positions.shape) if batch.position_ids is not None else None,
        )
        monkeypatch.setattr(torch, DEVICE, torch.cpu, raising=False)  # recomputing looks for a module of the device
        with FakeTensorMode(allow_non_fake_inputs=True):
            move_(model)
            outcome = model(**moved(inputs))
            assert (outcome.total.device.type, outcome.tokens.device.type) == (DEVICE, DEVICE)
            outcome.total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert any(gradient is not None for gradient in gradients.values())
        assert all(g is None or g.device.type == DEVICE for g in gradients.values())
        return model

    return run


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", ["padded", "packed", "text"])
def test_a_step_uses_one_device_and_waits_for_nothing(
    step: Callable[..., VisionLanguageModel], attention: str, rows: str
) -> None:
    of = samples()
    batches = {
        "padded": collate(of, 0, tiny.IMAGE_SIZE),
        "packed": collate_rows([of[:2], of[2:]], 0, tiny.IMAGE_SIZE),
        "text": collate(of[1:2], 0, tiny.IMAGE_SIZE),
    }
    step(batches[rows], attention=attention)


def test_distillation_and_adapters_of_low_rank(step: Callable[..., VisionLanguageModel]) -> None:
    batch = collate(samples(), 0, tiny.IMAGE_SIZE)
    step(batch, distilled=True)
    step(batch, lora=LoraConfig(rank=2, alpha=4))
