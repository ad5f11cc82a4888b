"""Gemma-2 and Gemma-3, with scaled embeddings and alternating attention; also Gemma-3's multimodal classes."""

from zero_ds.model.decoders.base import Family

GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    image_tokens=("<unused0>",),
    wrong_attentions=("sdpa",),  # it cannot soft-cap attention scores
)
GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    towers=(
        ("language_model.model.", "model."),  # as published
        ("model.language_model.", "model."),  # as transformers 5 names it in memory
        ("language_model.lm_head.", "lm_head."),
        ("lm_head.", "lm_head."),
    ),
    tower_in_class="model.language_model.",
    image_tokens=("<unused0>",),
)
