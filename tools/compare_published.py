"""Compares step times that others have published with those that `zero-ds plan` assumes for the same runs.

    python tools/compare_published.py

Nothing is fitted: all rows use the same defaults of `zero-ds plan` (40 % of the peak, 80 % of the links). Every run is
planned as its source describes it. `--mfu` at which the plan would give the published time follows in the last column.
The sources are named in docs/planning.md, which holds this table. Lengths of samples are the assumptions of a plan
where the source does not state them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from zero_ds.config.loading import load_run  # noqa: E402
from zero_ds.training.planning.cluster import Cluster, bandwidths, find_gpu  # noqa: E402
from zero_ds.training.planning.data import DataOverrides  # noqa: E402
from zero_ds.training.planning.recipe import RunPlan, plan_run  # noqa: E402
from zero_ds.training.planning.route import PAPER_GROUP, PAPER_STEP, shard_groups  # noqa: E402
from zero_ds.training.planning.speed import Step, work  # noqa: E402
from zero_ds.training.planning.tables import number  # noqa: E402

VICUNA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""Entries that the config.json of Vicuna and Llama 2 have in every size."""
SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
"""Sizes of Vicuna and Llama 2."""

MIX = ["data.sources=[{name: llava-1.5-665k}]", "data.max_length=2048", "encoder.train_last_layers=1"]
"""LLaVA-1.5's second stage: 665K samples. Its encoder is frozen; here at least one layer of it has to train."""
CAPTIONS = ["stage=adapter", "decoder=target", "init_from=[]", "data.sources=[{path: lcs558k.json, images_only: true}]"]
"""LLaVA-1.5's first stage: 558K images with captions, which train the adapter alone."""
TEXT = ["encoder=null", "init_from=[]", "data.sources=[{name: genqa-500k}]"]
"""A language model that trains alone, on text."""


@dataclass(frozen=True)
class Published:
    """A step time that somebody has published, and the run that it belongs to."""

    what: str
    seconds: float
    recipe: str
    overrides: tuple[str, ...]
    gpus: int
    gpu: str
    zero: str
    """Config of ds_configs/ with the same shards."""
    batch: int
    """Global batch."""
    recomputed: float
    """Share of the decoder's layers that are recomputed."""
    memory: float = 80.0
    """GiB of a GPU."""
    shape: str | None = None
    """Entry of SHAPES in place of the recipe's target."""
    data: DataOverrides = field(default_factory=DataOverrides)


def llava(size: str, hours: float, samples: int, batch: int, memory: float) -> Published:
    """Returns a stage of LLaVA-1.5, for which its README gives the hours on 8 A100."""
    second = batch == 128
    return Published(
        f"LLaVA-1.5-{size}, {'all but the encoder' if second else 'adapter'}, 8 A100",
        hours * 3600 / -(-samples // batch),
        "llama-3.2-3b/decoder",
        tuple(MIX if second else CAPTIONS),
        8,
        "A100",
        "zero3" if second else "zero2",
        batch,
        1.0,
        memory,
        size,
        DataOverrides() if second else DataOverrides(samples=samples, tokens=30, supervised=20),
    )


def titan(what: str, tokens_per_second: float, recipe: str, gpus: int, gpu: str, recomputed: float) -> Published:
    """Returns a run of torchtitan, whose docs/performance.md gives the tokens that a GPU reads in a second."""
    length, each = 8192, 2 if gpu == "H100" else 1
    text = (f"data.max_length={length}", *TEXT)
    whole = DataOverrides(tokens=length, supervised=length)
    seconds = each * length / tokens_per_second
    return Published(what, seconds, recipe, text, gpus, gpu, "zero3", gpus * each, recomputed, data=whole)


RUNS = (
    llava("7B", 3.5, 558_128, 256, 80.0),
    llava("13B", 5.5, 558_128, 256, 80.0),
    llava("7B", 10.0, 665_298, 128, 40.0),
    llava("13B", 20.0, 665_298, 128, 80.0),
    titan("Llama-3-8B, torchtitan, 64 A100", 2904, "llama-3.1-8b/decoder", 64, "A100", 0.5),
    titan("Llama-3-70B, torchtitan, 64 A100", 331, "llama-3.1-70b/decoder", 64, "A100", 1.0),
    titan("Llama-3.1-8B, torchtitan, 8 H100", 5762, "llama-3.1-8b/decoder", 8, "H100", 0.5),
    titan("Llama-3.1-8B, torchtitan, compiled, 8 H100", 6667, "llama-3.1-8b/decoder", 8, "H100", 0.5),
)
"""Published runs besides the paper's."""


@dataclass(frozen=True)
class Row:
    """A published step time and the planned one."""

    what: str
    published: float
    planned: float
    mfu: float | None
    """Value of --mfu at which both are equal; None if no value is, because the plan waits for its collectives."""

    @property
    def error(self) -> float:
        """Error of the planned time, as a share of the published one."""
        return self.planned / self.published - 1


def cluster_of(gpus: int, gpu: str, memory: float) -> Cluster:
    """Returns the machines as `zero-ds plan` assumes them."""
    name, peak, link = find_gpu(gpu)
    inside, between = bandwidths(None, link)
    return Cluster(gpus, memory_gib=memory, name=name, peak=peak, inside=inside, between=between)


def row(what: str, seconds: float, step: Step, cluster: Cluster) -> Row:
    """Returns the row of a published time; step: the planned one."""
    room = seconds - step.update - step.exposed
    mfu = step.computing * cluster.mfu / room if room > max(0.0, step.communication - step.exposed) else None
    return Row(what, seconds, step.seconds, mfu if mfu is not None and mfu <= 1 else None)


def planned(one: Published, folder: Path) -> Row:
    """Plans a published run. folder: a folder for the config.json of a model that does not come with zero-ds."""
    overrides = [*one.overrides, f"global_batch={one.batch}", f"micro_batch={one.batch // one.gpus}"]
    overrides.append(f"activation_checkpointing={str(one.recomputed > 0).lower()}")
    if one.shape is not None:
        target = folder / one.shape
        target.mkdir(exist_ok=True)
        (target / "config.json").write_text(json.dumps({**VICUNA, **SHAPES[one.shape]}), encoding="utf-8")
        overrides.append(f"target={target}")
    cluster = cluster_of(one.gpus, one.gpu, one.memory)
    plan = plan_run(load_run(one.recipe, overrides), cluster, data=one.data)
    (option,) = (option for option in plan.options if option.zero == one.zero)
    flops = work(plan.size, plan.sample, plan.config.global_batch, one.recomputed).computed
    computing = flops / (cluster.gpus * cluster.peak * cluster.mfu)
    return row(one.what, one.seconds, replace(option.step, computing=computing), cluster)


def paper() -> Row:
    """Plans the step of the full Llama-70B that A.4 of the paper gives, in its own shards."""
    cluster = cluster_of(128, "A100", 80.0)
    plan: RunPlan = plan_run(load_run("llama-3.1-70b/baseline-decoder", ["activation_checkpointing=true"]), cluster)
    step = shard_groups(plan, cluster, PAPER_GROUP).step
    return row("Llama-3.1-70B with CLIP, the paper, 128 A100", PAPER_STEP, step, cluster)


def rows() -> Iterator[Row]:
    """Yields all rows, the paper's first."""
    yield paper()
    with tempfile.TemporaryDirectory() as folder:
        for one in RUNS:
            yield planned(one, Path(folder))


def main() -> None:
    print("| run | published, s | planned, s | error | equal at `--mfu` |")
    print("|---|---|---|---|---|")
    for one in rows():
        mfu = "no value" if one.mfu is None else f"{one.mfu:.2f}"
        print(f"| {one.what} | {number(one.published)} | {number(one.planned)} | {100 * one.error:+.0f} % | {mfu} |")


if __name__ == "__main__":
    main()
