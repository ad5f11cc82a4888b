"""Models and samples for gpu.sh: random weights on the device, and small folders that need no network."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from zero_ds.config.loading import load_run
from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN

PADDING = 0
SHAPES = {"3b": ("llama-3.2-3b", None), "8b": ("llama-3.1-8b", "17:30"), "70b": ("llama-3.1-70b", "40:78")}
"""Folder of recipes of each size, and the layers that its surrogate replaces; None: the recipes have no surrogate."""

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# -- small folders -----------------------------------------------------------------------------------------------------


def write_small(folder: Path) -> None:
    """Writes a Llama of four layers with a tokenizer, a CLIP of two layers, and four image samples into `folder`.

    Heads have 64 dimensions, as flash attention and Liger expect of real models.
    """
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from zero_ds.data.demo import scenes

    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for number in range(4):
        scene = scenes.sample_scene(rng)
        scenes.draw(scene).save(folder / f"{number}.png")
        turns: list[dict[str, str]] = []
        for item in scenes.questions(scene, rng)[:2]:
            asked = item.question if turns else f"<image>\n{item.question}"
            turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": item.answer}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    words = _tokenizer(turn["value"] for record in records for turn in record["conversations"])
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,  # as in Llama-3.2-3B
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    LlamaForCausalLM(settings).save_pretrained(folder / "decoder")
    words.save_pretrained(folder / "decoder")
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=32,
        patch_size=16,
        projection_dim=64,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "encoder")
    side = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder / "encoder")


def _tokenizer(texts: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    words = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    words.chat_template = TEMPLATE
    return words


def small_run(folder: Path, stage: str = "decoder", **changes: Any) -> RunConfig:
    """Returns the configuration of a run on the models in `folder`, with the same four samples in each of three steps.

    A part of the encoder stays frozen. Stages with a surrogate expect its cut from elsewhere (`--replace`).
    """
    base: dict[str, Any] = {
        "stage": stage,
        "decoder": "target" if stage == "decoder" else "auto",
        "target": str(folder / "decoder"),
        "surrogate": None if stage == "decoder" else str(folder / "surrogate"),
        "encoder": {"path": str(folder / "encoder"), "train_last_layers": 1},
        "data": {"sources": [{"path": str(folder / "data.json")}], "max_length": 256},
        "optimizer": {"learning_rate": 3e-3, "warmup_ratio": 0.0},
        "global_batch": 4,
        "micro_batch": 2,
        "max_steps": 3,
        "log_every": 1,
        "out": str(folder / "run"),
    }
    return RunConfig.model_validate({**base, **changes})


def run_of(stage: str, size: str, small: Path | None, settings: list[str]) -> tuple[RunConfig, list[str]]:
    """Returns the configuration of a measured run, and the ranges that its surrogate replaces.

    size: a key of `SHAPES`; small: folder of `write_small`, which replaces every size; settings: key=value.
    """
    if small is not None:
        config = small_run(small, stage, zero="zero2", precision="auto")
        return config, [] if stage == "decoder" else ["1:2"]
    recipe, cut = SHAPES[size]
    config = load_run(f"{recipe}/{stage}", ["zero=zero2", "global_batch=32", "micro_batch=4", *settings])
    return config, [cut] if cut and config.surrogate and stage != "decoder" else []


# -- weights and samples -----------------------------------------------------------------------------------------------


def fill_(model: Any, device: Any, std: float = 0.02) -> None:
    """Gives a module of meta tensors memory on the device and random weights, and recomputes its computed buffers.

    Equal modules get equal weights.
    """
    import torch

    model.to_empty(device=device)
    for module in model.modules():  # memory is new for each name, also for those of one tensor
        if hasattr(module, "tie_weights"):
            module.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)  # norms; a bias of one does not change the measured time
            else:
                parameter.normal_(std=std, generator=generator)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "inv_freq"):
                with torch.device(device):
                    setattr(module, name, type(child)(child.config))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name == "position_ids":
                module.register_buffer(name, torch.arange(buffer.numel(), device=device).view(buffer.shape), False)


def samples(count: int, image_tokens: int, vocabulary: int, size: int, limit: int) -> list[Any]:
    """Returns random samples of the kind that a SampleEncoder makes, of at most `limit` positions each.

    An image of `image_tokens` positions and `size` pixels, and text of log-normal length, a third of it with loss.
    """
    import torch

    from zero_ds.data.samples import EncodedSample

    rng = random.Random(0)
    drawn = []
    for number in range(count):
        length = max(16, min(limit - image_tokens, int(rng.lognormvariate(5.3, 0.6))))
        supervised = max(1, length // 3)
        text = [rng.randrange(1, vocabulary) for _ in range(length)]
        blind = [-100] * (image_tokens + length - supervised)
        drawn.append(
            EncodedSample(
                input_ids=[IMAGE_TOKEN] * image_tokens + text,
                labels=blind + text[-supervised:],
                responses=[-1] * len(blind) + [0] * supervised,
                pixels=torch.zeros(1, 3, size, size),
                id=str(number),
            )
        )
    return drawn


def micro_batches(drawn: list[Any], rows: int, packed: bool, limit: int, size: int) -> list[Any]:
    """Returns the samples in micro-batches of `rows` rows, packed or padded."""
    from zero_ds.data.batches import collate, collate_rows, pack_rows

    if not packed:
        return [collate(drawn[start : start + rows], PADDING, size) for start in range(0, len(drawn), rows)]
    plan = pack_rows([len(sample.input_ids) for sample in drawn], limit, rows)
    filled = [[drawn[number] for number in row] for row in plan]
    return [collate_rows(filled[start : start + rows], PADDING, size) for start in range(0, len(filled), rows)]
