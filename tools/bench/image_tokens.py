"""Measures an encoder step by the number of tokens that an image becomes, on the demo's language model and data.

    launch/quickstart.sh          # once: demo data and surrogate
    python tools/bench/image_tokens.py --runs runs --steps 2 --rounds 3 --out image_tokens.json

The demo's vision encoder cuts an image into 16 patches, too few for the adapter to matter. Here a random encoder of the
same width and depth cuts the demo's images, enlarged, into 24 x 24 as CLIP ViT-L/14-336 does, so that `mlp` makes 576
image tokens, and the adapters that merge squares of 2 x 2 and 3 x 3 patches make 144 and 64. All contestants are alive
together and take turns. `by formula` is the ratio of the FLOPs that `zero-ds plan` counts.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import report
import step
import trainers
import typer
from turns import Group

ADAPTERS = ("mlp", "pixel_shuffle:2", "pixel_shuffle:3")
"""Adapters that are compared, as `kind` or `kind:factor`; the first one is the base."""


def write_encoder(out: Path, side: int) -> None:
    """Writes a random vision encoder of the demo's shape that cuts an image into side x side patches."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    from zero_ds.data.demo.warmup import MEAN, SHAPE, STD

    torch.manual_seed(0)
    size = side * SHAPE["patch_size"]
    CLIPVisionModel(CLIPVisionConfig(**{**SHAPE, "image_size": size})).save_pretrained(out)
    given: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    CLIPImageProcessor(**given, image_mean=MEAN, image_std=STD).save_pretrained(out)


def tokens_of(overrides: list[str], recipe: str) -> int:
    """Returns the number of tokens of an image."""
    from zero_ds.config.loading import load_run
    from zero_ds.training.planning.architecture import architecture

    return architecture(load_run(recipe, overrides)).model.tokens_per_image()


def main(
    runs: Annotated[Path, typer.Option(help="Folder with demo/ and quickstart/, as launch/quickstart.sh leaves it.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="kind or kind:factor of a contestant; repeatable, the base first.")
    ] = None,
    side: Annotated[int, typer.Option(help="Patches in height and width of an image.")] = 24,
    model: Annotated[str, typer.Option(help="Folder of recipes.")] = "smollm2-135m",
    setting: Annotated[list[str] | None, typer.Option(help="key=value for all contestants; repeatable.")] = None,
    zero: str = "zero3_resident",
    precision: str = "bf16",
    ranks: int = 2,
    global_batch: int = 8,
    micro_batch: int = 4,
    steps: Annotated[int, typer.Option(help="Steps of a turn.")] = 2,
    rounds: int = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare steps of the encoder stage by the number of image tokens."""
    runs, recipe = runs.resolve(), f"{model}/encoder"
    common, _ = step.settings(runs, zero, precision, global_batch, micro_batch, ranks)
    longest = side**2 + 448  # as much text as the demo's samples have at most, whatever the number of image tokens
    common += [f"surrogate={runs / 'quickstart/surrogate'}", "init_from=[]", "attention=sdpa"]
    common += [f"data.max_length={longest}", *(setting or [])]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_encoder(folder / "encoder", side)
        groups: dict[str, Any] = {}
        methods: dict[str, dict[str, Any]] = {}
        for number, text in enumerate(adapter or ADAPTERS):
            kind, _, factor = text.partition(":")
            own = [f"encoder.path={folder / 'encoder'}", f"adapter.kind={kind}", f"out={folder / f'run-{number}'}"]
            own += [f"adapter.factor={factor}"] if factor else []
            methods[text] = {"recipe": recipe, "overrides": [*common, *own]}
            groups[text] = stack.enter_context(Group(text, trainers.ours, ranks, folder, **methods[text]))
            print(f"{text}: warm-up {groups[text].turn(steps)['seconds']:.1f} s", file=sys.stderr, flush=True)
        for _ in range(rounds):
            for group in groups.values():
                print(f"{group.name}: {group.turn(steps)['seconds']:.1f} s", file=sys.stderr, flush=True)
        rows = [row(group, methods[text], groups, methods) for text, group in groups.items()]
    head = ["adapter", "tokens per image", "s a step", "time", "by formula", "peak GiB"]
    keys = ("adapter", "tokens_per_image", "seconds", "times", "flops", "peak_gib")
    cells = [[report.spread(one[key]) if key == "seconds" else one[key] for key in keys] for one in rows]
    print(report.table(head, cells))
    report.write(out, {"ranks": ranks, "zero": zero, "precision": precision, "settings": setting, "rows": rows})


def row(group: Any, method: dict[str, Any], groups: dict[str, Any], methods: dict[str, Any]) -> dict[str, Any]:
    """Returns the results of a contestant, compared with the first one. The first turn was the warm-up."""
    base, base_method = next(iter(groups.values())), next(iter(methods.values()))
    seconds = [turn["seconds"] / turn["steps"] for turn in group.found[1:]]
    others = [turn["seconds"] / turn["steps"] for turn in base.found[1:]]
    counted = group.found[-1]["counted"]
    flops = step.flops_per_sample(method, counted)
    return {
        "adapter": group.name,
        "tokens_per_image": tokens_of(method["overrides"], method["recipe"]),
        "seconds": seconds,
        # ratios of each round, because a machine that is slow for a while slows both
        "times": report.median([one / other for one, other in zip(seconds, others, strict=True)]),
        "flops": flops / step.flops_per_sample(base_method, base.found[-1]["counted"]),
        "peak_gib": group.found[-1]["peak_gib"],
    }


if __name__ == "__main__":
    typer.run(main)
