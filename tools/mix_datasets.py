"""Mixes data sets into one pre-shuffled file: each is put into a seeded random order and spread evenly over the file.

python tools/mix_datasets.py data/genqa_500k.json data/llava_v1_5_mix665k.json:data/images --out data/mixed.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.config.loading import validate
from zero_ds.config.schema import SourceConfig
from zero_ds.data.formats import DataError
from zero_ds.data.mixing import mix
from zero_ds.runtime.errors import ConfigError


def main(
    sources: Annotated[
        list[str], typer.Argument(help="Data files, FILE:ROOT if the images are elsewhere, or registered names.")
    ],
    out: Annotated[Path, typer.Option(help="New file, .json or .jsonl, in a folder that contains all images.")],
    seed: Annotated[int, typer.Option(help="Seed of the random order within each source.", min=0)] = 0,
    shuffle: Annotated[bool, typer.Option(help="Shuffle each source before mixing.")] = True,
    limit: Annotated[list[int] | None, typer.Option(help="Samples of a source, 0 for all; one per source.")] = None,
) -> None:
    """Mix data sets into one file, each spread evenly over it."""
    try:
        limits = limit or [0] * len(sources)
        if len(limits) != len(sources):
            raise ConfigError(f"--limit: {len(limits)} given for {len(sources)} sources; give one for each, 0 for all.")
        if min(limits) < 0:
            raise ConfigError(f"--limit {min(limits)} is negative; give the number of samples, 0 for all.")
        chosen = []
        for name, most in zip(sources, limits, strict=True):
            path, _, root = name.partition(":")
            source = validate(SourceConfig, path, what=name)
            update = {"root": root or source.root, "limit": most or source.limit}
            chosen.append(source.model_copy(update=update))
        count = mix(chosen, out, seed=seed, shuffle=shuffle)
    except (ConfigError, DataError) as error:
        print(f"mix_datasets: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(f"{out}: {count:,} samples")


if __name__ == "__main__":
    typer.run(main)
