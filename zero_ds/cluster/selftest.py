"""What `zero-ds doctor` lets ranks do: exchange data, and make one step under two ZeRO configs.

    deepspeed ... --module zero_ds.cluster.selftest REQUEST

The step is that of a small random model, made from a config: no file is read. Gradients under the chosen DeepSpeed JSON
must be those of ZeRO-0, where every rank holds everything; so must the loss of a second step, which reads what the
first has written.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from zero_ds.config.schema import RunConfig
from zero_ds.data.batches import Batch, collate
from zero_ds.data.samples import EncodedSample
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages

MARK = "zero-ds-selftest:"
"""Stands before the result in what rank 0 prints."""
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 5e-2), "fp16": (2e-2, 5e-2)}
"""Precision -> relative difference that the loss, and the gradient, may show for the order of sums."""
SIZE, PATCH = 32, 16
VOCABULARY, HIDDEN = 1024, 256
"""Large enough that ZeRO-3 partitions some of the weights and keeps others whole."""
ACCUMULATION = 2
STEPS = 2


def encode(request: dict[str, Any]) -> str:
    """One word, safe in every shell."""
    return base64.urlsafe_b64encode(json.dumps(request).encode()).decode()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Both tests, on every rank; request: zero, precision, nvme_path. Figures are the same on all ranks.

    Raises:
        ConfigError: the DeepSpeed JSON cannot be used.
    """
    distributed.initialize()
    result: dict[str, Any] = {"ranks": distributed.world_size(), "device": distributed.device().type}
    result |= all_reduce()
    result |= parity(request["zero"], request["precision"], request.get("nvme_path"))
    return result


def all_reduce(rounds: int = 5) -> dict[str, Any]:
    """Sums a tensor over all ranks: whether the sum is right, seconds, and bus bandwidth.

    The bus bandwidth is NCCL's: 2 (n - 1) / n times the bytes of the tensor over the seconds, n ranks.
    """
    import torch.distributed as dist

    device, world = distributed.device(), distributed.world_size()
    elements = 2**26 if device.type == "cuda" else 2**20
    tensor = torch.ones(elements, device=device)
    dist.all_reduce(tensor)
    right = bool((tensor == world).all())
    tensor.fill_(0)
    distributed.barrier()
    started = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = distributed.max_over_ranks((time.perf_counter() - started) / rounds)[0]
    size = tensor.numel() * tensor.element_size()
    return {
        "sum_is_right": distributed.sum_over_ranks(float(right))[0] == world,
        "mebibytes": size / 2**20,
        "seconds": seconds,
        "gigabytes_per_second": 2 * (world - 1) / world * size / seconds / 1e9,
    }


def parity(zero: str, precision: str, nvme_path: str | None = None) -> dict[str, Any]:
    """Losses and gradient of the small model under `zero` beside those under ZeRO-0.

    Returns losses of both, the gradients' relative difference, and `alike`. A collective.
    """
    expected, wanted = _steps("zero0", precision), _steps(zero, precision, nvme_path)
    of_loss, of_gradient = TOLERANCES[precision]
    apart = [abs(a - b) / abs(b) for a, b in zip(wanted["losses"], expected["losses"], strict=True)]
    theirs, ours = expected["gradients"], wanted["gradients"]
    missing = sorted(set(theirs) ^ set(ours))
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    difference = torch.stack([(ours[n] - theirs[n]).norm() for n in theirs if n in ours] or [total]).norm() / total
    gradient, first, second, lost = distributed.max_over_ranks(float(difference), *apart, float(len(missing)))
    # behind the update Adam has turned rounding of small gradients into whole steps
    alike = first < of_loss and gradient < of_gradient and second < 100 * of_loss and not lost
    return {
        "zero": zero,
        "precision": precision,
        "losses": wanted["losses"],
        "losses_zero0": expected["losses"],
        "gradient_difference": gradient,
        "missing_gradients": missing,
        "alike": alike,
    }


def _steps(zero: str, precision: str, nvme_path: str | None = None) -> dict[str, Any]:
    """Losses of two steps, and the gradient of the first by name, whole and in float32 on the CPU."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from zero_ds.model.losses import count_supervised
    from zero_ds.runtime.zero3 import partition_
    from zero_ds.training.deepspeed import ds_config
    from zero_ds.training.engine import Engine
    from zero_ds.training.setup import seed_everything

    world = distributed.world_size()
    with tempfile.TemporaryDirectory(prefix="zero_ds-") as out:
        config = RunConfig.model_validate(
            {
                "stage": "decoder",
                "target": "random",
                "encoder": {"path": "random"},
                "zero": zero,
                "nvme_path": nvme_path,
                "precision": precision,
                "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.0},
                "global_batch": ACCUMULATION * world,
                "activation_checkpointing": False,
                "out": out,
            }
        )
        ds = ds_config(config, world)
        ds["tensorboard"] = {"enabled": False}
        keep_alive = HfDeepSpeedConfig(ds) if ds["zero_optimization"]["stage"] == 3 else None
        seed_everything(0)
        model = _model({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
        partition_(model)
        del keep_alive
        groups = stages.freeze_(model, config)
        model.train()
        engine = Engine(config, model, groups, 100, ds)
        caught: dict[str, torch.Tensor] = {}
        _catch_gradients(engine, caught)
        losses = []
        for step in range(STEPS):
            micro = [_batch(distributed.rank() * ACCUMULATION + number) for number in range(ACCUMULATION)]
            labelled = distributed.sum_over_ranks(sum(count_supervised(batch.labels) for batch in micro))[0]
            losses.append(distributed.sum_over_ranks(engine.step(micro, step, labelled).share)[0])
        engine.engine.destroy()
    return {"losses": losses, "gradients": caught}


def _catch_gradients(engine: Any, into: dict[str, torch.Tensor]) -> None:
    """Keeps the whole gradients of the first step, just before the update."""
    from deepspeed.utils import safe_get_full_grad

    inner: Callable[[], None] = engine.engine.step

    def step() -> None:
        if not into and engine.engine.is_gradient_accumulation_boundary():
            full = {name: safe_get_full_grad(p) for name, p in engine.named.items()}
            into.update({name: g.detach().float().cpu().flatten().clone() for name, g in full.items() if g is not None})
        inner()

    engine.engine.step = step


def _model(dtype: torch.dtype) -> Any:
    """Two Llama layers, a CLIP of two layers, an adapter: random, alike on every rank."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from zero_ds.config.schema import EncoderConfig
    from zero_ds.model.build import ModelSpec, Modules, build_model
    from zero_ds.model.decoders import FAMILIES
    from zero_ds.model.encoders import ENCODERS

    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
    )
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=64,
        )
    )
    modules = Modules(decoder, FAMILIES["llama"], encoder, ENCODERS["clip"])
    return build_model(ModelSpec(modules, encoder_config=EncoderConfig(path="random"))).to(dtype)


def _batch(number: int) -> Batch:
    """The n-th sample of the global batch; every third one is text alone."""
    from zero_ds.data.conversations import IMAGE_TOKEN

    draw = torch.Generator().manual_seed(number)
    length = 24 + number % 7
    ids = torch.randint(0, VOCABULARY, (length,), generator=draw)
    pixels = torch.randn(0 if number % 3 == 1 else 1, 3, SIZE, SIZE, generator=draw)
    tokens = (SIZE // PATCH) ** 2
    if len(pixels):
        ids[1 : 1 + tokens] = IMAGE_TOKEN
    answer = torch.arange(length) >= length // 2
    sample = EncodedSample(
        id=str(number),
        input_ids=ids.tolist(),
        labels=torch.where(answer, ids, -100).tolist(),
        responses=torch.where(answer, 0, -1).tolist(),
        pixels=pixels,
    )
    return collate([sample], 0, SIZE)


def main(arguments: list[str]) -> int:
    """Entry point of every rank; rank 0 says the result in one line."""
    (word,) = [argument for argument in arguments if not argument.startswith("--local_rank")]
    try:
        result = run(json.loads(base64.urlsafe_b64decode(word)))
    except ConfigError as error:
        result = {"error": str(error)}
    if distributed.is_rank_zero():
        sys.stdout.write(f"{MARK}{json.dumps(result)}\n")
        sys.stdout.flush()
    distributed.shutdown()
    return 2 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
