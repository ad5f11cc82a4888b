"""Two ways to train the same stage, as ranks that take turns: this package, and transformers' Trainer with Llava.

Both are ordinary uses: `zero_ds.train.train` on a recipe, and a script around `Trainer`,
`LlavaForConditionalGeneration` and its processor, with the same DeepSpeed JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from turns import Turn

ROLES = {"human": "user", "gpt": "assistant"}
"""Role in LLaVA's JSON -> role in a chat template."""


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
                    positions=batch.attention_mask.numel(),
                    supervised=count_supervised(batch.labels),
                    images=0 if batch.pixel_values is None else len(batch.pixel_values),
                )
            yield step

    Loader.steps = in_turns  # type: ignore[method-assign]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train(load_run(recipe, [*overrides, "max_steps=1000000"]))


@dataclass(frozen=True)
class LlavaOptions:
    """Settings of Trainer on Llava."""

    model: str
    """Folder of a Llava with its processor."""
    data: str
    """File in LLaVA's JSON format; its images are relative to its folder."""
    zero: str
    """DeepSpeed JSON file."""
    micro_batch: int
    accumulation: int
    """Number of micro-batches of a step on each rank."""
    precision: str
    """bf16 or fp32."""
    out: str
    """Output folder of Trainer."""
    trains: list[str] = field(default_factory=list)
    """Parts of the names of the parameters that train; if empty, all parameters train."""
    attention: str = "sdpa"
    checkpointing: bool = False
    """True if activations are recomputed in the backward pass."""

    def training_arguments(self) -> Any:
        """Returns Trainer's arguments. While they exist, models are loaded under their DeepSpeed config."""
        from transformers import TrainingArguments

        ds = json.loads(Path(self.zero).read_text(encoding="utf-8"))
        for key in ("stage3_prefetch_bucket_size", "stage3_max_live_parameters"):  # accelerate does not fill these in
            if ds["zero_optimization"].get(key) == "auto":
                del ds["zero_optimization"][key]  # which means DeepSpeed's default
        ds["data_types"] = {"grad_accum_dtype": "fp32"}
        ds["zero_allow_untested_optimizer"] = True
        return TrainingArguments(
            output_dir=self.out,
            per_device_train_batch_size=self.micro_batch,
            gradient_accumulation_steps=self.accumulation,
            max_steps=1_000_000,
            learning_rate=1e-5,
            bf16=self.precision == "bf16",
            deepspeed=ds,
            gradient_checkpointing=self.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if self.checkpointing else None,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10,
        )

    def load_model(self) -> Any:
        """Loads the Llava, and freezes the parameters that do not train."""
        import torch
        from transformers import LlavaForConditionalGeneration

        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        load = cast(Any, LlavaForConditionalGeneration).from_pretrained
        model = load(self.model, dtype=dtype, attn_implementation=self.attention)
        model.config.use_cache = False
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not self.trains or any(part in name for part in self.trains))
        return model


class LlavaCollator:
    """Makes padded batches of LLaVA records with Llava's processor, with labels at the answers, and counts them."""

    def __init__(self, options: LlavaOptions, turn: Turn) -> None:
        from transformers import AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(options.model)
        self.processor.tokenizer.padding_side = "right"
        self.folder = Path(options.data).parent
        self.turn = turn

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        from PIL import Image

        texts = [self.processor.apply_chat_template(_messages(record), tokenize=False) for record in records]
        images = [Image.open(self.folder / record["image"]).convert("RGB") for record in records if "image" in record]
        batch = self.processor(
            text=texts, images=images or None, padding=True, add_special_tokens=False, return_tensors="pt"
        )
        labels = self._labels(batch["input_ids"])
        lengths = batch["attention_mask"].sum(1).double()
        self.turn.count(
            samples=len(lengths),
            tokens=float(lengths.sum()),
            pairs=float((lengths**2).sum()),
            positions=batch["attention_mask"].numel(),
            supervised=int((labels[:, 1:] != -100).sum()),
            images=len(images),
        )
        return {**batch, "labels": labels}

    def _labels(self, input_ids: Any) -> Any:
        """Returns labels (rows, length): the ids of the assistant's turns and their closing tokens, -100 elsewhere."""
        import torch

        tokenizer = self.processor.tokenizer
        labels = torch.full_like(input_ids, -100)
        start = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        for row, ids in enumerate(input_ids.tolist()):
            position = 0
            while position < len(ids):
                if ids[position : position + len(start)] == start:
                    first = position + len(start)
                    last = ids.index(end, first) if end in ids[first:] else len(ids) - 1
                    labels[row, first : last + 1] = input_ids[row, first : last + 1]
                    position = last
                position += 1
        return labels


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a LLaVA record as messages of a chat template."""
    return [{"role": ROLES[turn["from"]], "content": _content(turn["value"])} for turn in record["conversations"]]


def _content(value: str) -> list[dict[str, str]]:
    if "<image>" not in value:
        return [{"type": "text", "text": value}]
    return [{"type": "image"}, {"type": "text", "text": value.replace("<image>", "").strip()}]


def _let_trainer_use_deepspeed_on_a_cpu() -> None:
    """Lets Trainer run DeepSpeed without a GPU.

    Its `use_cpu` excludes DeepSpeed, and without `use_cpu` it asks for a GPU, although nothing else in it needs one.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    cast(Any, training_args).is_torch_bf16_gpu_available = lambda: True
    cast(Any, PartialState)._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)


def _set_up_process() -> None:
    """Joins the process group, on CPUs with the settings under which Trainer accepts them."""
    import deepspeed
    import torch

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in this package: no kernel is compiled
        _let_trainer_use_deepspeed_on_a_cpu()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)


def llava(turn: Turn, options: LlavaOptions, after_step: Callable[[Any], None] | None = None) -> None:
    """Runs Trainer on Llava, and waits between steps for its turn.

    after_step: called with the trainer after each step, instead of waiting for a turn.
    """
    records = json.loads(Path(options.data).read_text(encoding="utf-8"))

    def collator() -> Any:
        return LlavaCollator(options, turn)

    def wait(_: Any) -> None:
        turn.step()

    run_trainer(options, options.load_model, records, collator, after_step or wait, None if after_step else turn.step)


def run_trainer(
    options: LlavaOptions,
    load_model: Callable[[], Any],
    records: list[Any],
    make_collator: Callable[[], Any],
    after_step: Callable[[Any], None],
    at_start: Callable[[], None] | None = None,
) -> None:
    """Runs Trainer with the arguments of `options`, until `after_step` raises.

    load_model: called under the DeepSpeed config; make_collator: returns a function from records to a batch;
    after_step: called with the trainer after each step; at_start: called before the first one.
    """
    from transformers import Trainer, TrainerCallback

    _set_up_process()
    arguments = options.training_arguments()
    model = load_model()

    class Calls(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if at_start is not None:
                at_start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step(trainer)

    trainer = Trainer(
        model=model, args=arguments, train_dataset=records, data_collator=make_collator(), callbacks=[Calls()]
    )
    trainer.train()
