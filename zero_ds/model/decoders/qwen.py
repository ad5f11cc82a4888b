"""Qwen2.5 and Qwen3, dense."""

from zero_ds.model.decoders.base import Family

IMAGE_TOKENS = ("<|image_pad|>", "<|vision_pad|>")

QWEN2 = Family(name="qwen2", model_types=("qwen2",), image_tokens=IMAGE_TOKENS)
QWEN3 = Family(name="qwen3", model_types=("qwen3",), image_tokens=IMAGE_TOKENS)
