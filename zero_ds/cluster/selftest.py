"""The test that `zero-ds doctor` runs on all ranks: exchange data, and train a small model under two ZeRO configs.

    deepspeed ... --module zero_ds.cluster.selftest REQUEST

The model is random and made from a config, so no file is read. Its gradients under the chosen DeepSpeed JSON have to
equal those under ZeRO-0, where every rank holds everything. So does the loss of a second step, which depends on the
update of the first.
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
from zero_ds.runtime.environment import take_devices
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages

MARK = "zero-ds-selftest:"
"""Text before the result in the output of rank 0."""
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 5e-2), "fp16": (2e-2, 5e-2)}
"""Precision -> relative differences of loss and gradient that another order of sums may cause."""
SIZE, PATCH = 32, 16
"""Side of an image, and of a patch, in pixels."""
VOCABULARY, HIDDEN = 1024, 256
"""Vocabulary and hidden size, large enough that ZeRO-3 partitions some weights and keeps others whole."""
ACCUMULATION = 2
STEPS = 2


def encode(request: dict[str, Any]) -> str:
    """Returns a request as one word that is safe in every shell."""
    return base64.urlsafe_b64encode(json.dumps(request).encode()).decode()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Runs both tests on every rank, and returns results that are the same on all ranks.

    request: `zero`, `precision` and `nvme_path` of the run.

    Raises:
        ConfigError: the DeepSpeed JSON cannot be used.
    """
    distributed.initialize()
    result: dict[str, Any] = {"ranks": distributed.world_size(), "device": distributed.device().type}
    result |= all_reduce()
    result |= parity(request["zero"], request["precision"], request.get("nvme_path"))
    return result


def all_reduce(rounds: int = 5) -> dict[str, Any]:
    """Sums a tensor over all ranks; returns whether the sum is right, the seconds, and the bus bandwidth.

    The bus bandwidth follows NCCL's definition for n ranks: 2 (n - 1) / n x bytes of the tensor / seconds.
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
    """Compares losses and gradients of the small model under `zero` with those under ZeRO-0.

    Returns the losses of both, the relative difference of the gradients, and as `agrees` whether both are within
    the tolerances. A collective.
    """
    reference, tested = _steps("zero0", precision), _steps(zero, precision, nvme_path)
    loss_tolerance, gradient_tolerance = TOLERANCES[precision]
    pairs = zip(tested["losses"], reference["losses"], strict=True)
    loss_differences = [abs(ours - theirs) / abs(theirs) for ours, theirs in pairs]
    theirs, ours = reference["gradients"], tested["gradients"]
    missing = sorted(set(theirs) ^ set(ours))
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    differences = [(ours[name] - theirs[name]).norm() for name in theirs if name in ours]
    difference = torch.stack(differences or [total]).norm() / total
    gradient, first, second, lost = distributed.max_over_ranks(
        float(difference), *loss_differences, float(len(missing))
    )
    # in the first update Adam turns the rounding of small gradients into whole steps, so later losses differ more
    losses_agree = first < loss_tolerance and second < 100 * loss_tolerance
    agrees = losses_agree and gradient < gradient_tolerance and not lost
    return {
        "zero": zero,
        "precision": precision,
        "losses": tested["losses"],
        "losses_zero0": reference["losses"],
        "gradient_difference": gradient,
        "missing_gradients": missing,
        "agrees": agrees,
    }


def _steps(zero: str, precision: str, nvme_path: str | None = None) -> dict[str, Any]:
    """Returns the losses of two steps, and the whole gradients of the first by name, in float32 on the CPU."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from zero_ds.model.losses import count_supervised
    from zero_ds.runtime.zero3 import begin_swapping, partition_
    from zero_ds.training.deepspeed import ds_config, release_disks, take_disks
    from zero_ds.training.engine import Engine
    from zero_ds.training.gathering import Units, follow_layers_
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
        follow_layers_(ds, Units(0, 0))
        take_disks(ds)
        for monitor in ("tensorboard", "wandb", "comet", "csv_monitor"):
            ds[monitor] = {"enabled": False}
        keep_alive = HfDeepSpeedConfig(ds) if ds["zero_optimization"]["stage"] == 3 else None
        begin_swapping()
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
        release_disks()
    return {"losses": losses, "gradients": caught}


def _catch_gradients(engine: Any, into: dict[str, torch.Tensor]) -> None:
    """Makes the engine copy the whole gradients of the first step into `into`, just before the update."""
    from deepspeed.utils import safe_get_full_grad

    inner: Callable[[], None] = engine.engine.step

    def step() -> None:
        if not into and engine.engine.is_gradient_accumulation_boundary():
            full = {name: safe_get_full_grad(p) for name, p in engine.named.items()}
            into.update({name: g.detach().float().cpu().flatten().clone() for name, g in full.items() if g is not None})
        inner()

    engine.engine.step = step


def _model(dtype: torch.dtype) -> Any:
    """Returns a random model, the same on every rank: two Llama layers, a CLIP of two layers, and an adapter."""
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
    """Returns the n-th sample of the global batch; every third one has no image."""
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
    """Runs the tests on this rank; rank 0 prints the result in one line."""
    take_devices()
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
