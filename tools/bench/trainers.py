"""Two ways to train the same stage, as ranks that take turns: this package, and transformers' Trainer with Llava.

Each is what a user would run: `zero_ds.train.train` on a recipe, and a script around `Trainer`,
`LlavaForConditionalGeneration` and its processor, with the same DeepSpeed JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from turns import Turn


def ours(turn: Turn, recipe: str, overrides: list[str]) -> None:
    """Runs a recipe, and waits between steps for its turn."""
    import torch

    from zero_ds.config.loading import load_run
    from zero_ds.data.loader import Loader
    from zero_ds.model.losses import count_supervised
    from zero_ds.training.train import train

    plain = Loader.steps

    def in_turns(self: Loader, first: int, last: int) -> Iterator[Any]:
        batches = plain(self, first, last)
        while True:
            turn.step()
            step = next(batches)
            for batch in step:
                lengths = batch.lengths.double()
                turn.count(
                    samples=len(lengths),
                    tokens=float(lengths.sum()),
                    pairs=float((lengths**2).sum()),
                    places=batch.attention_mask.numel(),
                    supervised=count_supervised(batch.labels),
                    pictures=0 if batch.pixel_values is None else len(batch.pixel_values),
                )
            yield step

    Loader.steps = in_turns  # type: ignore[method-assign]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train(load_run(recipe, [*overrides, "max_steps=1000000"]))


def _let_trainer_use_deepspeed_on_a_cpu() -> None:
    """Its `use_cpu` leaves DeepSpeed out, and without that it asks for a GPU, though nothing else in it needs one."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    cast(Any, training_args).is_torch_bf16_gpu_available = lambda: True
    cast(Any, PartialState)._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)


def llava(
    turn: Turn,
    model: str,
    data: str,
    zero: str,
    trains: list[str],
    micro_batch: int,
    accumulation: int,
    precision: str,
    out: str,
    attention: str = "sdpa",
    checkpointing: bool = False,
    behind: Callable[[Any], None] | None = None,
) -> None:
    """Trainer on Llava: pictures and text through its processor, batches padded, labels at the answers.

    model: folder with processor; data: LLaVA's JSON; zero: DeepSpeed JSON; trains: beginnings of the names of what
    trains, all of it if empty; behind: called with the trainer after each step, in place of waiting for a turn.
    """
    import deepspeed
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as ours: no kernel is compiled
        _let_trainer_use_deepspeed_on_a_cpu()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)
    ds = json.loads(Path(zero).read_text(encoding="utf-8"))
    ds["data_types"] = {"grad_accum_dtype": "fp32"}
    ds["zero_allow_untested_optimizer"] = True
    arguments = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1_000_000,
        learning_rate=1e-5,
        bf16=precision == "bf16",
        deepspeed=ds,
        gradient_checkpointing=checkpointing,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10,
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    whole = cast(Any, LlavaForConditionalGeneration).from_pretrained(model, dtype=dtype, attn_implementation=attention)
    whole.config.use_cache = False
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(not trains or any(part in name for part in trains))
    processor: Any = AutoProcessor.from_pretrained(model)
    processor.tokenizer.padding_side = "right"
    roles = {"human": "user", "gpt": "assistant"}
    folder = Path(data).parent

    def messages(record: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": roles[t["from"]], "content": _content(t["value"])} for t in record["conversations"]]

    def _content(value: str) -> Any:
        if "<image>" not in value:
            return [{"type": "text", "text": value}]
        return [{"type": "image"}, {"type": "text", "text": value.replace("<image>", "").strip()}]

    def collate(records: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [processor.apply_chat_template(messages(record), tokenize=False) for record in records]
        images = [Image.open(folder / record["image"]).convert("RGB") for record in records if "image" in record]
        batch = processor(
            text=texts, images=images or None, padding=True, add_special_tokens=False, return_tensors="pt"
        )
        labels = torch.full_like(batch["input_ids"], -100)
        start = processor.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        for row, ids in enumerate(batch["input_ids"].tolist()):
            place = 0
            while place < len(ids):
                if ids[place : place + len(start)] == start:
                    first = place + len(start)
                    last = ids.index(end, first) if end in ids[first:] else len(ids) - 1
                    labels[row, first : last + 1] = batch["input_ids"][row, first : last + 1]
                    place = last
                place += 1
        lengths = batch["attention_mask"].sum(1).double()
        turn.count(
            samples=len(lengths),
            tokens=float(lengths.sum()),
            pairs=float((lengths**2).sum()),
            places=batch["attention_mask"].numel(),
            supervised=int((labels[:, 1:] != -100).sum()),
            pictures=len(images),
        )
        return {**batch, "labels": labels}

    class InTurns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if behind is None:
                turn.step()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if behind is None:
                turn.step()
            else:
                behind(trainer)

    records = json.loads(Path(data).read_text(encoding="utf-8"))
    trainer = Trainer(model=whole, args=arguments, train_dataset=records, data_collator=collate, callbacks=[InTurns()])
    trainer.train()
