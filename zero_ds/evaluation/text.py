"""Text tasks through lm-evaluation-harness: its own HFLM around our decoder, data-parallel over our ranks."""

from __future__ import annotations

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from zero_ds import distributed
from zero_ds.config import ConfigError
from zero_ds.evaluation.figures import task_scores
from zero_ds.evaluation.results import Measured, Score
from zero_ds.evaluation.suites import Request, Task
from zero_ds.named_model import LoadedModel
from zero_ds.vllm_engine import device_options

logger = logging.getLogger(__name__)


class Decoder(HFLM):
    """HFLM around a decoder in memory, with torch.distributed where it would ask accelerate."""

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


class LmEval:
    """lm-evaluation-harness with its own tasks, and those of a folder, which win over its own of the same name."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._local = TaskManager(include_path=str(folder), include_defaults=False) if folder is not None else None

    def knows(self, name: str) -> bool:
        return name in self._manager([name]).all_tasks

    def names(self) -> list[str]:
        return list(self._manager([]).all_tasks)

    def _manager(self, wanted: Collection[str]) -> TaskManager:
        """One that knows these; the harness's own index takes seconds, so the folder's is asked first."""
        if wanted and self._local is not None and set(wanted) <= set(self._local.all_tasks):
            return self._local
        return _whole(self._folder)

    def measure(self, loaded: LoadedModel, tasks: tuple[Task, ...], request: Request) -> Measured | None:
        """See `Backend.measure`. One call of the harness for each number of examples.

        Raises:
            ConfigError: data that is not in the cache and cannot be fetched, or fewer documents than ranks.
        """
        lm = _resident(loaded, request) if loaded.served is None else _served(loaded)
        by_shots: dict[int | None, list[Task]] = defaultdict(list)
        for task in tasks:
            by_shots[task.num_fewshot].append(task)
        scores: list[Score] = []
        samples: dict[str, Any] = {}
        for shots, group in by_shots.items():
            names = [task.name for task in group]
            manager = self._manager(names)
            self._check_documents(manager, names, request)
            found = simple_evaluate(
                model=lm,
                tasks=list(names),
                num_fewshot=shots,
                limit=request.limit,
                bootstrap_iters=request.bootstrap,
                task_manager=manager,
                apply_chat_template=request.chat_template,
                gen_kwargs={"max_gen_toks": request.max_new_tokens} if request.max_new_tokens else None,
            )
            if found is None:
                continue
            for task in group:
                scores += task_scores(found, task, task.name)
            if request.samples:
                samples |= found["samples"]
        order = {task.name: place for place, task in enumerate(tasks)}
        scores.sort(key=lambda score: order[score.task])
        return Measured(tuple(scores), samples) if distributed.is_rank_zero() else None

    def _check_documents(self, manager: TaskManager, names: list[str], request: Request) -> None:
        with distributed.rank_zero_first():  # which fetches what is not in the cache
            try:
                loaded = manager.load(list(names))
            except OSError as error:  # of the data set library and the hub's client
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ConfigError(
                    f"the data of {', '.join(names)} is not here and could not be fetched: {reason[:200]} "
                    "Check the network, or give local tasks with --tasks-folder."
                ) from None
        for name, task in loaded["tasks"].items():
            count = min(len(task.eval_docs), request.limit or math.inf)
            if count < distributed.world_size():
                raise ConfigError(
                    f"{name} has {count} documents for {distributed.world_size()} ranks; take fewer ranks."
                )


def _resident(loaded: LoadedModel, request: Request) -> LM:
    return Decoder(
        pretrained=loaded.model.decoder,
        tokenizer=loaded.encoder.template.tokenizer,
        batch_size=request.batch_size,
        max_length=loaded.encoder.max_length,
        softmax_dtype="float32",
    )


def _served(loaded: LoadedModel) -> LM:
    """The harness's own class for vLLM, on the decoder's folder."""
    from lm_eval.models.vllm_causallms import VLLM

    assert loaded.served is not None
    served = loaded.served
    return VLLM(
        pretrained=str(served.folder),
        dtype=cast(Any, served.dtype),
        max_length=served.max_length,
        tensor_parallel_size=served.tensor_parallel,
        **device_options(),
    )


@functools.lru_cache(maxsize=2)
def _whole(folder: Path | None) -> TaskManager:
    """The harness's own tasks and those of a folder; an index that nothing changes."""
    return TaskManager(include_path=str(folder) if folder is not None else None)
