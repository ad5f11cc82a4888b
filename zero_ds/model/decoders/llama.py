"""Llama 3.x, and models with the same architecture (SmolLM2)."""

from zero_ds.model.decoders.base import Family

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    per_layer_config=(),
    image_tokens=("<|image|>", "<|reserved_special_token_0|>", "<reponame>"),
)
