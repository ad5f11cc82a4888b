"""The model `zero_ds` of lmms-eval: any model of ours behind that harness's interface.

lmms-eval --model zero_ds --model_args weights=RUN,target=MODEL --tasks mme --batch_size 8
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from zero_ds.data.conversations import PLACEHOLDER, Turn
from zero_ds.data.images import truncated_images_are_errors
from zero_ds.evaluation.suites.lookup import check_limit, raised_by_pillow, said
from zero_ds.grafting.engines.vllm import ENGINES, answerer, load_served
from zero_ds.grafting.generate import Choice, Query, Reply
from zero_ds.grafting.named_model import LoadedModel, find_model, load_model
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.precision import fast_dtype

logger = logging.getLogger(__name__)

LONGEST = 1024
"""Tokens of an answer to a task that sets no limit."""


class ZeroDs(lmms):
    """A target, surrogate, run, graft or export; answers are greedy."""

    is_simple = True

    def __init__(
        self,
        weights: str | LoadedModel,
        target: str | None = None,
        *,
        dtype: str = "auto",
        batch_size: int | str | None = 8,
        max_new_tokens: int | None = None,
        device: str | None = None,
        engine: str = "transformers",
        tensor_parallel: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """weights: what `zero-ds eval` calls MODEL, or a model in memory; target: the model that a run is plugged into;
        dtype: auto, float32 or bfloat16; max_new_tokens: in place of the tasks' own limits; device: of this rank if
        empty; engine: transformers or vllm; tensor_parallel: with vllm, how many GPUs share the model; max_batch_size:
        of no use here, for lmms-eval passes it to every model.

        Raises:
            ConfigError: as `find_model` and `load_model`, a batch size or limit below 1.
        """
        super().__init__()
        size = 1 if batch_size is None else batch_size
        for name, value in (("batch_size", size), ("max_new_tokens", max_new_tokens)):
            if value is not None and not (str(value).isdecimal() and int(value)):
                raise ConfigError(f"{name}={value}: a number, at least 1.")
        if isinstance(weights, str):
            kinds = {"auto": fast_dtype(), "float32": torch.float32, "bfloat16": torch.bfloat16}
            if dtype not in kinds:
                raise ConfigError(f"dtype={dtype} is not known; choose {' or '.join(kinds)}.")
            place = torch.device(device) if device else distributed.device()
            if engine not in ENGINES:
                raise ConfigError(f"engine={engine} is not known; choose {' or '.join(ENGINES)}.")
            named, kind = find_model(weights, target), kinds[dtype]
            if engine == "vllm":
                weights = load_served(named, dtype=kind, device=place, tensor_parallel=int(tensor_parallel))
            else:
                weights = load_model(named, dtype=kind, device=place)
        self.max_new_tokens = None if max_new_tokens is None else int(max_new_tokens)
        self.batch_size = int(size)
        self.answerer = answerer(weights, batch_size=self.batch_size)
        self._rank, self._world_size = distributed.rank(), distributed.world_size()

    @property
    def device(self) -> torch.device:
        return self.answerer.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, cut off at the task's stop strings."""
        if any(request.args[1].get("do_sample") for request in requests):
            logger.warning("a task asks for sampled answers; these are greedy")

        def query(request: Instance, turns: tuple[Turn, ...], images: tuple[int, ...]) -> Query:
            limit = self.max_new_tokens
            if limit is None:
                limit = check_limit(_name(request), request.args[1].get("max_new_tokens")) or LONGEST
            return Query(_name(request), turns, images, max_new_tokens=limit)

        return [_until(reply.text, request.args[1].get("until")) for request, reply in self._replies(requests, query)]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(loss, whether greedy decoding says it) of each continuation, without white space around it.

        As lmms-eval's own models do, and its scoring expects: the loss is the mean negative log-probability of the
        continuation's tokens, so that the smallest wins. The pair comes wrapped, for lmms-eval (0.7.3) makes a text of
        any bare one before it scores it.
        """
        counts = []

        def query(request: Instance, turns: tuple[Turn, ...], images: tuple[int, ...]) -> Query:
            wanted = request.args[1]
            text = str(wanted if isinstance(wanted, str) else wanted(self._document(request))).strip()
            counts.append(max(1, len(self.answerer.template.encode_text(text))))
            return Query(_name(request), turns, images, text, (Choice(0, text, (text,)),), max_new_tokens=1)

        replies = [reply for _, reply in self._replies(requests, query)]
        return [
            GenerationResult(cast(Any, (-reply.log_probs[0][0] / count, reply.begins_true)))
            for reply, count in zip(replies, counts, strict=True)
        ]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("zero_ds answers one question at a time; choose a task of one round.")

    def _document(self, request: Instance) -> Mapping[str, Any]:
        *_, number, task, split = request.args
        found: Mapping[str, Any] = self.task_dict[task][split][number]
        return found

    def _pictures(self, request: Instance) -> list[Image.Image]:
        """What the task shows with a document, read whole.

        Raises:
            ConfigError: something other than a picture, or one that cannot be read.
        """
        try:
            with truncated_images_are_errors():
                shown = list(request.args[2](self._document(request)) or ())
                for visual in shown:
                    if isinstance(visual, Image.Image):
                        visual.load()
        except Exception as error:
            if not (isinstance(error, OSError) or raised_by_pillow(error)):
                raise
            name = _name(request)
            raise ConfigError(f"the picture of {name} cannot be read: {said(error)}; mend the task's data.") from None
        for visual in shown:
            if not isinstance(visual, Image.Image):
                raise ConfigError(f"{_name(request)} shows a {type(visual).__name__}; this model reads pictures alone.")
        return shown

    def _replies(
        self,
        requests: Sequence[Instance],
        query: Callable[[Instance, tuple[Turn, ...], tuple[int, ...]], Query],
    ) -> Iterator[tuple[Instance, Reply]]:
        """Answers a few batches at a time, so that only their pictures are in memory; a document's are read once."""
        step = 8 * self.batch_size
        with tqdm(total=len(requests), desc="answering", disable=None if self.rank == 0 else True) as bar:
            for start in range(0, len(requests), step):
                part = requests[start : start + step]
                pictures: list[Image.Image] = []
                rows: dict[Any, tuple[int, ...]] = {}
                queries = []
                for request in part:
                    if (key := request.args[-3:]) not in rows:
                        shown = self._pictures(request)
                        rows[key] = tuple(range(len(pictures), len(pictures) + len(shown)))
                        pictures += shown
                    queries.append(query(request, (_asked(str(request.args[0]), len(rows[key])),), rows[key]))
                features = self.answerer.features(pictures) if pictures else ()
                yield from zip(part, self.answerer.examine(queries, features, bar.update), strict=True)


def _name(request: Instance) -> str:
    *_, number, task, _ = request.args
    return f"{task}/{number}"


def _asked(text: str, pictures: int) -> Turn:
    """A question; where its own placeholders do not stand for its pictures, they are put before it."""
    if text.count(PLACEHOLDER) == pictures:
        return Turn("user", text)
    bare = text.replace(PLACEHOLDER, "").strip()
    return Turn("user", PLACEHOLDER * pictures + "\n" * bool(pictures) + bare)


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first of the stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()
