"""Builds tiny random models and data, without network, caches or files of the repository other than its code.

A new family needs a builder in `FAMILIES`, and a new vision encoder one in `ENCODERS`; tests that run for every
registered family fail until it has one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from zero_ds.data.demo import scenes as demo

LAYERS = 6
HIDDEN = 32
IMAGE_SIZE = 32
PATCH = 16
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH) ** 2

SYSTEM = "You are tiny."
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's chat template with a shorter default system message."""
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
"""Gemma's chat template, with role `model` and without system messages; the special tokens of turns are renamed."""


def tokenizer(
    spare: tuple[str, ...] = ("<reponame>",),
    template: str | None = TEMPLATE,
    plain: tuple[str, ...] = (),
    named: dict[str, str] | None = None,
) -> Any:
    """Returns a byte-level BPE tokenizer of about 400 tokens, trained on the demo's sentences; it can encode any text.

    As in files of real models, few special tokens have names (`named`, such as bos_token), and the others are marked as
    special only in the tokenizer's own file. spare: unused special tokens, as real vocabularies have them; plain: added
    tokens that are not marked as special.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    corpus = []
    for _ in range(200):
        scene = demo.sample_scene(rng)
        corpus += [demo.caption(scene), *(f"{item.question} {item.answer}" for item in demo.questions(scene, rng))]
    corpus += ["system\nuser\nassistant\n", SYSTEM, "Based on the visual elements captured in this image of, "]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *spare]
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    named = named or {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    result = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|endoftext|>", clean_up_tokenization_spaces=False, **named
    )
    result.chat_template = template
    return result


# -- decoders and encoders ---------------------------------------------------------------------------------------------


def _decoder(out: Path, kind: str, words: Any, seed: int, **settings: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**_shape(words), **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    words.save_pretrained(out)


def _shape(words: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,  # far from linear, so that tests notice a missing or misplaced layer
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def llama(out: Path, *, tied: bool, layers: int = LAYERS, seed: int = 0, hidden: int = HIDDEN) -> None:
    _decoder(out, "llama", tokenizer(), seed, num_hidden_layers=layers, tie_word_embeddings=tied, hidden_size=hidden)


def qwen2(out: Path, *, tied: bool, layers: int = LAYERS, seed: int = 0) -> None:
    words = tokenizer(("<|image_pad|>",))
    _decoder(out, "qwen2", words, seed, num_hidden_layers=layers, tie_word_embeddings=tied)


def qwen3(out: Path, *, tied: bool, layers: int = LAYERS, seed: int = 0) -> None:
    words = tokenizer(("<|image_pad|>",))
    _decoder(out, "qwen3", words, seed, num_hidden_layers=layers, tie_word_embeddings=tied, head_dim=8)


GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
"""Settings of Gemma, with a window shorter than any sample, so that tests notice a layer of the wrong kind."""


def gemma2(out: Path, *, tied: bool, layers: int = LAYERS, seed: int = 0) -> None:
    words = tokenizer(("<unused0>",), GEMMA_TEMPLATE)
    _decoder(out, "gemma2", words, seed, num_hidden_layers=layers, tie_word_embeddings=tied, **GEMMA)
    _forget_layer_types(out)


def gemma3(out: Path, *, tied: bool, layers: int = LAYERS, seed: int = 0) -> None:
    words = tokenizer(("<unused0>",), GEMMA_TEMPLATE)
    more = {**GEMMA, "sliding_window_pattern": 3}
    _decoder(out, "gemma3_text", words, seed, num_hidden_layers=layers, tie_word_embeddings=tied, **more)
    _forget_layer_types(out, sliding_window_pattern=3)


def gemma3_multimodal(out: Path, *, tied: bool, layers: int = LAYERS, seed: int = 0) -> None:
    """Writes Gemma-3's class with a vision tower, under the published tensor names."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    words = tokenizer(("<unused0>",), GEMMA_TEMPLATE)
    torch.manual_seed(seed)
    text = {**_shape(words), **GEMMA, "num_hidden_layers": layers, "sliding_window_pattern": 3}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": IMAGE_SIZE, "patch_size": PATCH},
        mm_tokens_per_image=4,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(out)
    words.save_pretrained(out)


def _forget_layer_types(folder: Path, **more: Any) -> None:
    """Removes layer_types, which published configs do not have: the class decides which layers are global."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("layer_types")
    path.write_text(json.dumps({**config, **more}), encoding="utf-8")


def clip(out: Path, *, layers: int = 3, seed: int = 0, size: int = IMAGE_SIZE) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=size,
        patch_size=PATCH,
        projection_dim=24,
    )
    CLIPVisionModel(config).save_pretrained(out)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(out)


def siglip(out: Path, *, layers: int = 3, seed: int = 0) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    SiglipVisionModel(config).save_pretrained(out)
    SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(out)


FAMILIES: dict[str, Callable[..., None]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3": gemma3,
}
"""Builder of each family: builder(out, *, tied, layers, seed) writes a Hugging Face folder with a tokenizer."""

VARIANTS: dict[str, Callable[..., None]] = {"gemma3-multimodal": gemma3_multimodal}
"""Builders, with the same arguments, of other classes that a registered family reads."""

ENCODERS: dict[str, Callable[..., None]] = {"clip": clip, "siglip": siglip}
"""Builder of each vision encoder: builder(out, *, layers, seed) writes a folder with an image processor."""


# -- data --------------------------------------------------------------------------------------------------------------


def write_data(folder: Path, *, images: int = 6, texts: int = 2, seed: int = 0) -> Path:
    """Writes a LLaVA JSON file with drawn images and text-only samples among them, each of one to three short turns."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(images):
        scene = demo.sample_scene(rng)
        demo.draw(scene).save(folder / "images" / f"{number}.png")
        turns = [(item.question, item.answer) for item in demo.questions(scene, rng)][: rng.randint(1, 3)]
        records.append({**record(f"image-{number}", turns, f"images/{number}.png"), "scene": asdict(scene)})
    every = max(1, len(records) // max(1, texts))
    for number in range(texts):
        question, answer = demo.scene_in_words(demo.sample_scene(rng), rng)
        records.insert(number * (every + 1), record(f"text-{number}", [(question, answer)]))
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def record(name: str, turns: list[tuple[str, str]], image: str | None = None) -> dict[str, Any]:
    """Returns one sample in LLaVA's format."""
    conversations = []
    for number, (question, answer) in enumerate(turns):
        asked = f"<image>\n{question}" if image and number == 0 else question
        conversations += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": conversations}
