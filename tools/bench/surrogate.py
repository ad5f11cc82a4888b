"""Compares a step against a surrogate with a step against the full model, in time and in FLOPs, for several cuts.

    python tools/bench/surrogate.py --target MODEL --out surrogate.json

Measured: the decoder's part of an encoder-stage step (forward from embeddings, logits and loss at the labels, backward
to the embeddings through frozen weights), with all cuts in turns in one process. `pass` is the ratio of times divided
by the ratio of FLOPs. Planned: the encoder stage of the paper's three models against the frozen full model, on a named
GPU; there the ratio of FLOPs counts the vision encoder as well.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import report
import typer

CUTS = ("24:28", "18:28", "12:28", "6:28", "1:28", "19:20")
PAPER = ("llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b")


class Decoder:
    """A frozen decoder with random weights, in the shape of a target or a cut of it, and its step."""

    def __init__(self, target: Path, cut: str | None, dtype: Any, attention: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from zero_ds.model.decoders.cut import cut_config
        from zero_ds.model.decoders.folder import DecoderFolder
        from zero_ds.model.layer_plan import LayerPlan, Replaced

        folder = DecoderFolder(target)
        config: Any = folder.text_config()
        self.depth = config.num_hidden_layers
        self.family = folder.family
        if cut is not None:
            config = cut_config(config, self.family, LayerPlan(self.depth, (Replaced.parse(cut),)).sources)
        self.layers = config.num_hidden_layers
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        self.model: Any = model.requires_grad_(False)
        self.hidden, self.vocabulary, self.dtype = config.hidden_size, config.vocab_size, dtype

    def step(self, batch: int, length: int, supervised: int) -> None:
        """Runs a step on random numbers: `batch` sequences of `length` tokens, of which `supervised` carry loss."""
        import torch

        from zero_ds.model.losses import next_token_sum, supervised_rows

        labels = torch.full((batch, length), -100)
        labels[:, -supervised:] = torch.randint(0, self.vocabulary, (batch, supervised))
        embeddings = torch.randn(batch, length, self.hidden, dtype=self.dtype).requires_grad_(True)
        states = self.family.hidden_states(self.model, embeddings, torch.ones(batch, length, dtype=torch.long))
        rows = supervised_rows(labels)
        next_token_sum(self.family.logits(self.model, states[rows]), labels, rows).backward()

    def flops(self, batch: int, length: int, supervised: int) -> float:
        """Returns the FLOPs of such a step, by PyTorch's own counter."""
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with counter:
            self.step(batch, length, supervised)
        return float(counter.get_total_flops())


def depth(target: Path) -> int:
    """Returns the number of layers of the full model."""
    from zero_ds.model.decoders.folder import DecoderFolder

    return DecoderFolder(target).depth


def measured(
    target: Path, cuts: list[str], shape: tuple[int, int, int], rounds: int, steps: int, precision: str
) -> list[dict[str, Any]]:
    """Returns a row for the full model and for each cut."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    decoders = {cut: Decoder(target, cut, dtype, "eager") for cut in (None, *cuts)}
    seconds: dict[str | None, list[float]] = {cut: [] for cut in decoders}
    flops = {cut: decoder.flops(*shape) for cut, decoder in decoders.items()}  # also the first step, which is not timed
    for _ in range(rounds):
        for cut, decoder in decoders.items():
            started = time.perf_counter()
            for _ in range(steps):
                decoder.step(*shape)
            seconds[cut].append((time.perf_counter() - started) / steps)
    rows = []
    for cut, decoder in decoders.items():
        # each round's ratio, because a machine that is slow for a while slows both
        ratios = [mine / full for mine, full in zip(seconds[cut], seconds[None], strict=True)]
        by_flops = flops[cut] / flops[None]
        rows.append(
            {
                "cut": f"T({cut.replace(':', ',')})" if cut else "full",
                "layers": decoder.layers,
                "seconds": seconds[cut],
                "time_ratio": report.median(ratios),
                "flop_ratio": by_flops,
                "time_over_flops": report.median(ratios) / by_flops,
                "gflops_per_second": flops[cut] / report.median(seconds[cut]) / 1e9,
            }
        )
    return rows


def planned(models: list[str], gpus: int, gpu_memory: float, gpu: str) -> list[dict[str, Any]]:
    """Returns planned costs of the encoder stage on surrogate and full model, with the fastest config of each."""
    from zero_ds.config.loading import load_run
    from zero_ds.training.planning.cluster import Cluster, find_gpu
    from zero_ds.training.planning.recipe import plan_run

    name, peak, link = find_gpu(gpu)
    cluster = Cluster(gpus, min(8, gpus), gpu_memory, name, peak, inside=0.8 * link)
    rows = []
    for model in models:
        small = plan_run(load_run(f"{model}/encoder"), cluster)
        full = plan_run(load_run(f"{model}/full-encoder"), cluster)
        if not small.fitting or not full.fitting:
            raise SystemExit(f"{model} does not fit {gpus} GPUs of {gpu_memory:g} GiB; name more of them.")
        mine, whole = small.fitting[0], full.fitting[0]
        by_flops, by_time = mine.step.flops / whole.step.flops, mine.step.seconds / whole.step.seconds
        cost = {
            "model": model,
            "surrogate": next(s for s in small.size.sources if s.startswith("surrogate")),
            "zero": f"{mine.zero}, full {whole.zero}",
            "seconds": [mine.step.seconds, whole.step.seconds],
            "time_ratio": by_time,
            "flop_ratio": by_flops,
            "time_over_flops": by_time / by_flops,
        }
        rows.append(cost)
    return rows


def main(
    target: Annotated[Path, typer.Option(help="Folder of a model; only its config.json is read, weights are random.")],
    cut: Annotated[list[str] | None, typer.Option(help="Layers that one translator replaces, first:last.")] = None,
    batch: int = 4,
    length: int = 64,
    supervised: Annotated[int, typer.Option(help="Tokens with loss in a sequence.")] = 24,
    rounds: int = 7,
    steps: Annotated[int, typer.Option(help="Steps of each cut in a round.")] = 2,
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    model: Annotated[list[str] | None, typer.Option(help="Recipes to plan; the paper's models by default.")] = None,
    gpus: int = 128,
    gpu_memory: float = 80.0,
    gpu: str = "A100",
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare the costs of steps."""
    rows = measured(target.expanduser(), cut or list(CUTS), (batch, length, supervised), rounds, steps, precision)
    keys = ["time_ratio", "flop_ratio", "time_over_flops"]
    cells = [
        [r["cut"], r["layers"], report.spread(r["seconds"], 3), *(r[k] for k in keys), r["gflops_per_second"]]
        for r in rows
    ]
    print(report.table(["cut", "layers", "s a step", "time", "FLOPs", "time / FLOPs", "GFLOP/s"], cells))
    plans = planned(model or list(PAPER), gpus, gpu_memory, gpu)
    cells = [[p["model"], p["zero"], *p["seconds"], *(p[k] for k in keys)] for p in plans]
    head = ["by plan", "config", "s, surrogate", "s, full", "time", "FLOPs", "time / FLOPs"]
    print("\n" + report.table(head, cells))
    report.write(out, {"shape": [batch, length, supervised], "precision": precision, "cuts": rows, "planned": plans})


if __name__ == "__main__":
    typer.run(main)
