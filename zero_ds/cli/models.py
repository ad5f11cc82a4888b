"""`zero-ds models`: the model types of the installed transformers, and whether each can be a decoder or an encoder."""

from __future__ import annotations

from typing import Annotated

import typer


def models(
    types: Annotated[
        list[str] | None,
        typer.Argument(help="Values of model_type in config.json. Default: all of transformers."),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Print a page like docs/models.md, with the verdicts alone.")
    ] = False,
) -> None:
    """List the decoders and vision encoders of the installed transformers: registered, verified, or refused, and why.

    Verdicts are kept in ~/.cache/zero_ds; the first list of all types takes some minutes.

    Example: zero-ds models qwen3_moe gpt_oss siglip2
    """
    from tqdm import tqdm

    from zero_ds.model.decoders import listing
    from zero_ds.model.encoders import listing as vision

    towers = vision.offered_types()
    listing.check_types([one for one in types or [] if one not in towers])
    known = listing.known_types()
    chosen = [one for one in types if one in known] if types else list(listing.offered_types())
    seeing = [one for one in types or towers if one in towers]
    few = len(chosen) + len(seeing) < 5
    verdicts = [listing.verdict(one) for one in tqdm(chosen, desc="verifying", disable=few, leave=False)]
    encoders = [vision.verdict(one) for one in tqdm(seeing, desc="verifying", disable=few, leave=False)]
    if page:
        print(listing.page(verdicts) + vision.section(encoders), end="")
        return
    for found, what in ((verdicts, "decoders"), (encoders, "vision encoders")):
        if verdicts and encoders:
            print(f"{what}:")
        for one in found:
            print(f"{one.model_type:28} {one.how:10}  {one.note}".rstrip())
        if len(found) > 1:
            print(f"{sum(one.how != 'refused' for one in found)} of {len(found)} types can be {what}.")
