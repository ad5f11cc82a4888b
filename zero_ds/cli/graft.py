"""`zero-ds graft`: checks that a trained vision encoder fits a full language model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.cli.options import TrustRemoteCodeOption

if TYPE_CHECKING:
    from zero_ds.grafting.compatibility import Check

Weights = Annotated[Path, typer.Option(help="Run or checkpoint folder with a trained vision encoder.")]
Target = Annotated[str, typer.Option(help="Folder or hub id of the full language model.")]


HASH = re.compile(r"(\d+-)?[0-9a-f]{32,}")


def graft(
    weights: Weights,
    target: Target,
    surrogate: Annotated[str | None, typer.Option(help="Folder of the run's surrogate, if it was moved.")] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(help="Name of a difference in the report to accept, such as tokenizer; repeatable."),
    ] = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Check that a trained vision encoder fits a full language model. The graft itself needs no training and no copy.

    Prints every property that is compared; the exit status is 2 if one differs and is not accepted.
    """
    from zero_ds.grafting.compatibility import graft as check_graft

    accept = accept or []
    checks = check_graft(
        weights, target, accept=accept, surrogate=surrogate, report=lambda checks: _print(checks, accept)
    )
    accepted = [check.name for check in checks if _is_accepted(check, accept)]
    unknown = [check.name for check in checks if check.fits is None]
    verdict = f"{weights} can be grafted into {target}"
    if accepted:
        verdict += f", with another {', '.join(accepted)}, which was accepted"
    if unknown:
        verdict += f"; not compared: {', '.join(unknown)}"
    print(f"{verdict}.")


def _print(checks: Sequence[Check], accept: Iterable[str]) -> None:
    """Prints a line for every check: the verdict, the name, and the value here, with that of training if it differs.

    Of a hash that fits nobody needs the digits.
    """
    for check in checks:
        verdict = {True: "fits", False: "DIFFERS", None: "unknown"}[check.fits]
        if _is_accepted(check, accept):
            verdict = "accepted"
        here = "the same as in training" if check.fits and HASH.fullmatch(check.here) else check.here
        line = f"{verdict:<10}{check.name:<13}{here}"
        if check.fits is False or (check.fits is None and check.trained_with != check.here):
            line += f" (trained with: {check.trained_with})"
        print(line)


def _is_accepted(check: Check, accept: Iterable[str]) -> bool:
    return check.fits is False and check.name in accept
