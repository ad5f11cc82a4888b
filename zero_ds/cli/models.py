"""`zero-ds models`: the model types of the installed transformers, and whether each can be a decoder."""

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
    """List the decoders of the installed transformers: registered, verified by their structure, or refused, and why.

    Verdicts are kept in ~/.cache/zero_ds; the first list of all types takes some minutes.

    Example: zero-ds models qwen3_moe gpt_oss
    """
    from tqdm import tqdm

    from zero_ds.model.decoders import listing

    listing.check_types(types or [])
    chosen = types or list(listing.offered_types())
    verdicts = [listing.verdict(one) for one in tqdm(chosen, desc="verifying", disable=len(chosen) < 5, leave=False)]
    if page:
        print(listing.page(verdicts), end="")
        return
    for one in verdicts:
        print(f"{one.model_type:28} {one.how:10}  {one.note}".rstrip())
    if len(verdicts) > 1:
        print(f"{sum(one.how != 'refused' for one in verdicts)} of {len(verdicts)} types can be decoders.")
