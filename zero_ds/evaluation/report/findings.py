"""The findings of a report: plain sentences with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zero_ds.evaluation.heldout.summary import SHUFFLED


def findings(scores: Mapping[str, Any]) -> list[str]:
    """Returns the findings of a summary: the accuracy, whether the graft sees, and the graft against the surrogate.

    scores: Result of `zero_ds.evaluation.heldout.summary.summary`.
    """
    accuracy = scores["accuracy"]
    differences = {(entry["first"], entry["second"]): entry for entry in scores["differences"]["free"]}
    grafted, control = percent(accuracy["grafted"]), percent(accuracy["grafted" + SHUFFLED])
    return [
        f"Grafted into the full model without further training, the vision encoder lets the model get {grafted} of the "
        "scored words right in free answers about held-out images; shown another image, the same model gets "
        f"{control}.",
        _sight(differences["grafted", "grafted" + SHUFFLED]),
        _graft_against_surrogate(percent(accuracy["surrogate"]), differences["grafted", "surrogate"]),
    ]


def _sight(difference: Mapping[str, float]) -> str:
    """Says whether the graft uses the image. difference: with the correct image, minus with another one."""
    if difference["low"] > 0:
        return f"The grafted model sees: the correct image is worth {points(difference)}."
    if difference["high"] < 0:
        return (
            f"The grafted model does worse with the correct image than with another one, by {points(difference, -1)}."
        )
    return (
        "The evaluation does not show that the grafted model sees: the correct image and another one differ by "
        f"{points(difference)}."
    )


def _graft_against_surrogate(share: str, difference: Mapping[str, float]) -> str:
    """Compares the graft with the surrogate. share: accuracy on the surrogate; difference: graft minus surrogate."""
    start = f"On the surrogate that the encoder was trained with, the share is {share}"
    if difference["low"] > 0:
        return f"{start}; the graft is better by {points(difference)}."
    if difference["high"] < 0:
        return f"{start}; the graft is worse by {points(difference, -1)}."
    return f"{start}; the two do not differ significantly ({points(difference)})."


def percent(entry: Mapping[str, float]) -> str:
    """Formats a share with its interval, as `71.3 % [68.9, 73.6]`."""
    return f"{100 * entry['value']:.1f} % [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def points(entry: Mapping[str, float], sign: int = 1) -> str:
    """Formats a difference of shares, multiplied by `sign`, as `12.3 points [10.1, 14.5]`."""
    low, high = sorted((sign * entry["low"], sign * entry["high"]))
    return f"{100 * sign * entry['value']:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
