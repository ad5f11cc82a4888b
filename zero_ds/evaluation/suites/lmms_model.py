"""The model `zero_ds` of lmms-eval, which makes every model of this package available through that harness.

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
from zero_ds.data.images import (
    ImageError,
    converted_as_in_training,
    open_image,
    truncated_images_are_errors,
    unreadable_metadata_is_none,
)
from zero_ds.data.read_image import WHITE
from zero_ds.evaluation.suites.lookup import check_limit, first_line, raised_by_pillow
from zero_ds.grafting.engines.vllm import ENGINES, answerer, load_served
from zero_ds.grafting.generate import Choice, Query, Reply
from zero_ds.grafting.named_model import LoadedModel, find_model, load_model
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.precision import fast_dtype

logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 1024
"""Length limit of an answer, in tokens, for tasks that set none."""

MakeQuery = Callable[[Instance, tuple[Turn, ...], tuple[int, ...]], Query]
"""(request, its conversation, rows of its images' features) -> query."""


class ZeroDs(lmms):
    """A target, surrogate, run, graft or export as a model of lmms-eval; its answers are greedy."""

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
        """Loads the model unless it is in memory. The parameters are the keys of lmms-eval's --model_args.

        weights: MODEL of `zero-ds eval`, or a loaded model. target: Language model that the run is plugged into.
        dtype: auto, float32 or bfloat16. max_new_tokens: Length limit in place of the tasks' own. device: Device of
        the model; this rank's own if None. engine: transformers or vllm. tensor_parallel: With vllm, number of GPUs
        that share the model. max_batch_size: Ignored; lmms-eval passes it to every model.

        Raises:
            ConfigError: as `find_model` and `load_model`, or a batch size or limit is below 1.
        """
        super().__init__()
        size = 1 if batch_size is None else batch_size
        for name, value in (("batch_size", size), ("max_new_tokens", max_new_tokens)):
            if value is not None and not (str(value).isdecimal() and int(value)):
                raise ConfigError(f"{name}={value} is not allowed; give a whole number of at least 1.")
        if isinstance(weights, str):
            weights = _load(weights, target, dtype, device, engine, int(tensor_parallel))
        self.max_new_tokens = None if max_new_tokens is None else int(max_new_tokens)
        self.batch_size = int(size)
        self.answerer = answerer(weights, batch_size=self.batch_size)
        processor = weights.encoder.processor
        self._background = WHITE if processor is None else processor.background
        self._rank, self._world_size = distributed.rank(), distributed.world_size()

    @property
    def device(self) -> torch.device:
        return self.answerer.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns greedy answers, cut off at the task's stop strings."""
        if any(request.args[1].get("do_sample") for request in requests):
            logger.warning("a task asks for sampled answers; the answers are greedy instead")

        def query(request: Instance, turns: tuple[Turn, ...], images: tuple[int, ...]) -> Query:
            limit = self.max_new_tokens
            if limit is None:
                limit = check_limit(_name(request), request.args[1].get("max_new_tokens")) or DEFAULT_LIMIT
            return Query(_name(request), turns, images, max_new_tokens=limit)

        answers = []
        for request, reply in self._replies(requests, query):
            answers.append(_cut_off(reply.text, request.args[1].get("until")))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Returns (loss, whether greedy decoding gives it) of each continuation, stripped of surrounding white space.

        The loss is the mean negative log-probability of the continuation's tokens, so the smallest one wins. This is
        what lmms-eval's own models return and its scoring expects. Each pair is wrapped in a GenerationResult because
        lmms-eval (0.7.3) converts a bare pair to a string before scoring it.
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
        raise NotImplementedError("zero_ds supports tasks with a single round only; choose another task.")

    def _document(self, request: Instance) -> Mapping[str, Any]:
        *_, number, task, split = request.args
        found: Mapping[str, Any] = self.task_dict[task][split][number]
        return found

    def _images(self, request: Instance) -> list[Image.Image]:
        """Reads the images that the task shows with a document.

        Raises:
            ConfigError: the task shows something other than an image, or an image that cannot be read.
        """
        try:
            with (
                truncated_images_are_errors(),
                unreadable_metadata_is_none(),
                converted_as_in_training(self._background),
            ):
                shown = list(request.args[2](self._document(request)) or ())
                for number, visual in enumerate(shown):
                    if isinstance(visual, Image.Image):
                        shown[number] = open_image(visual, self._background)
        except Exception as error:
            if not (isinstance(error, OSError | ImageError) or raised_by_pillow(error)):
                raise
            _, _, reason = first_line(error).rpartition("cannot be read: ")  # ImageError calls the image by its file
            raise ConfigError(
                f"the image of {_name(request)} cannot be read: {reason}; repair the task's data."
            ) from None
        for visual in shown:
            if not isinstance(visual, Image.Image):
                raise ConfigError(
                    f"{_name(request)} shows a {type(visual).__name__}, but this model reads only images; choose "
                    "another task."
                )
        return shown

    def _replies(self, requests: Sequence[Instance], make_query: MakeQuery) -> Iterator[tuple[Instance, Reply]]:
        """Answers requests in chunks of eight batches, so that only the images of one chunk are in memory.

        The images of a document are read once per chunk, however many requests are about it.
        """
        chunk_size = 8 * self.batch_size
        with tqdm(total=len(requests), desc="answering", disable=None if self.rank == 0 else True) as bar:
            for start in range(0, len(requests), chunk_size):
                chunk = requests[start : start + chunk_size]
                images: list[Image.Image] = []
                rows: dict[Any, tuple[int, ...]] = {}
                queries = []
                for request in chunk:
                    document = request.args[-3:]  # number, task and split
                    if document not in rows:
                        shown = self._images(request)
                        rows[document] = tuple(range(len(images), len(images) + len(shown)))
                        images += shown
                    turn = _question(str(request.args[0]), len(rows[document]))
                    queries.append(make_query(request, (turn,), rows[document]))
                features = self.answerer.features(images) if images else ()
                yield from zip(chunk, self.answerer.examine(queries, features, bar.update), strict=True)


def _load(
    weights: str, target: str | None, dtype: str, device: str | None, engine: str, tensor_parallel: int
) -> LoadedModel:
    """Loads the model that --model_args names; see `ZeroDs`."""
    dtypes = {"auto": fast_dtype(), "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ConfigError(f"dtype={dtype} is unknown; choose {' or '.join(dtypes)}.")
    place = torch.device(device) if device else distributed.device()
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine} is unknown; choose {' or '.join(ENGINES)}.")
    named = find_model(weights, target)
    if engine == "vllm":
        return load_served(named, dtype=dtypes[dtype], device=place, tensor_parallel=tensor_parallel)
    return load_model(named, dtype=dtypes[dtype], device=place)


def _name(request: Instance) -> str:
    """Returns the name of a request's document, as `TASK/NUMBER`."""
    *_, number, task, _ = request.args
    return f"{task}/{number}"


def _question(text: str, images: int) -> Turn:
    """Returns the user's turn. Unless the text has one placeholder per image, the placeholders are put before it."""
    if text.count(PLACEHOLDER) == images:
        return Turn("user", text)
    bare = text.replace(PLACEHOLDER, "").strip()
    if images == 0:
        return Turn("user", bare)
    return Turn("user", PLACEHOLDER * images + "\n" + bare)


def _cut_off(text: str, stops: str | Sequence[str] | None) -> str:
    """Returns the text before the first stop string, stripped of white space."""
    if isinstance(stops, str):
        stops = [stops]
    for stop in stops or ():
        if stop:
            text = text.split(stop)[0]
    return text.strip()
