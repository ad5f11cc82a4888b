"""Text tasks through lm-evaluation-harness: its own HFLM around our decoder, data-parallel over our ranks."""

from __future__ import annotations

import gc
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from zero_ds.data.conversations import Role, Turn
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.tokens import ConversationError
from zero_ds.evaluation.suites.lookup import TaskLookup, check_counts, check_limit, reading_data
from zero_ds.evaluation.suites.results import Measured, Score
from zero_ds.evaluation.suites.scores import task_scores
from zero_ds.evaluation.suites.tasks import SuiteOptions, Task
from zero_ds.grafting.engines.vllm import device_options, name_cpu_build, starting
from zero_ds.grafting.named_model import LoadedModel
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError

MEDIA = ("doc_to_visual", "doc_to_image", "doc_to_audio", "doc_to_video")
"""Keys of a task file that show something other than text."""


class RunPrompts:
    """Prompts of a model as its run wrote them: its chat template, system prompt, date and thoughts."""

    encoder: SampleEncoder

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text, up to where its next answer begins or its last one goes on."""
        turns = [Turn(cast(Role, message["role"]), message["content"]) for message in chat_history]
        template, options = self.encoder.template, {"generate": add_generation_prompt, "ends": add_generation_prompt}
        try:
            return template.render(self.encoder.with_system(turns), **options)
        except ConversationError:
            if turns[0].role != "system":
                raise
            # some templates refuse a task's description as a system message; the harness then leaves it out
            return template.render(turns[1:], **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the text of the chat template, which the result records."""
        return self.encoder.template.source if chat_template else None

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer; none if a model without a chat template names none."""
        try:
            return list(self.encoder.template.ends())
        except ConversationError:
            return []


class Decoder(RunPrompts, HFLM):
    """HFLM around a decoder in memory. It uses torch.distributed where HFLM would use accelerate."""

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if self.ends:
            options.setdefault("eos_token_id", self.ends)
        generated: torch.Tensor = super()._model_generate(context, *arguments, **options)
        return generated

    @property
    def rank(self) -> int:
        return distributed.rank()

    @property
    def world_size(self) -> int:
        return distributed.world_size()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def barrier(self) -> None:
        distributed.barrier()


def _manager(folder: Path | None, defaults: bool) -> TaskManager:
    return TaskManager(include_path=str(folder) if folder is not None else None, include_defaults=defaults)


class LmEval(TaskLookup[TaskManager]):
    """lm-evaluation-harness with its own tasks and those of a folder, except tasks with images, audio or video."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(_manager, folder)

    def knows(self, name: str) -> bool:
        """See `Harness.knows`."""
        return super().knows(name) and not _shows_media(self.manager([name]), name)

    def check(self, tasks: tuple[Task, ...], options: SuiteOptions) -> None:
        """See `Harness.check`."""
        names = [task.name for task in tasks]
        try:
            with reading_data(names):
                found = self.manager(names).load(list(names))["tasks"]
        except ValueError as error:
            if not str(error).startswith("Duplicate task"):
                raise
            raise ConfigError(f"{error}; name it only once, by itself or by its group.") from None
        for name, task in found.items():
            if options.max_new_tokens is None:
                check_limit(name, (task.config.generation_kwargs or {}).get("max_gen_toks"))
        check_counts({name: len(task.eval_docs) for name, task in found.items()}, options.limit)

    def measure(self, loaded: LoadedModel, tasks: tuple[Task, ...], options: SuiteOptions) -> Measured | None:
        """See `Harness.measure`. Calls the harness once for each number of examples in the prompt."""
        if options.chat_template:
            loaded.encoder.template.ends()  # refuses a model whose answers would not end
        lm = _resident(loaded, options) if loaded.served is None else _served(loaded, options)
        by_shots: dict[int | None, list[Task]] = defaultdict(list)
        for task in tasks:
            by_shots[task.num_fewshot].append(task)
        scores: list[Score] = []
        samples: dict[str, Any] = {}
        for shots, group in by_shots.items():
            names = [task.name for task in group]
            found = simple_evaluate(
                model=lm,
                tasks=list(names),
                num_fewshot=shots,
                limit=options.limit,
                bootstrap_iters=options.bootstrap,
                task_manager=self.manager(names),
                apply_chat_template=bool(options.chat_template),
                gen_kwargs={"max_gen_toks": options.max_new_tokens} if options.max_new_tokens else None,
            )
            if found is None:
                continue
            for task in group:
                scores += task_scores(found, task, task.name)
            if options.samples:
                samples |= found["samples"]
        if loaded.served is not None:
            # this engine is the harness's own and holds the devices, which the next suite needs for its own engine
            del lm
            gc.collect()
        order = {task.name: index for index, task in enumerate(tasks)}
        scores.sort(key=lambda score: order[score.task])
        return Measured(tuple(scores), samples) if distributed.is_rank_zero() else None


def _shows_media(manager: TaskManager, name: str) -> bool:
    """Returns whether a task, or a task of a group, shows images, audio or video, which a text model would not get."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    config = entry.cfg or {}
    if any(config.get(key) is not None for key in MEDIA):
        return True
    members = config.get("task")
    if not isinstance(members, list):
        return False
    return any(_shows_media(manager, member) for member in members if isinstance(member, str))


def _resident(loaded: LoadedModel, options: SuiteOptions) -> LM:
    """Returns the harness's model around a decoder in memory."""
    lm = Decoder(
        pretrained=loaded.model.decoder,
        tokenizer=loaded.encoder.template.tokenizer,
        batch_size=options.batch_size,
        max_length=loaded.encoder.max_length,
        softmax_dtype="float32",
        add_bos_token=False if options.chat_template else None,  # the chat template has written it
    )
    lm.encoder = loaded.encoder
    return lm


def _served(loaded: LoadedModel, options: SuiteOptions) -> LM:
    """Starts the harness's own class for vLLM on the decoder's folder."""
    name_cpu_build()
    assert loaded.served is not None
    served = loaded.served
    with starting():
        from lm_eval.models.vllm_causallms import VLLM

        class Served(RunPrompts, VLLM):
            """The harness's class, with the prompts of the run."""

            def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
                for each in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
                    if generate and each is not None:
                        each.stop_token_ids = self.ends
                return super()._model_generate(requests, generate, sampling_params)

        lm = Served(
            pretrained=str(served.folder),
            dtype=cast(Any, served.dtype),
            max_length=served.max_length,
            tensor_parallel_size=served.tensor_parallel,
            add_bos_token=False if options.chat_template else None,
            **device_options(served),
        )
    lm.encoder = loaded.encoder
    return lm
