"""The number of ranks that can share a run's global batch, for launch/train.sh on one machine.

    python -m zero_ds.cluster.share DEVICES RECIPE [key=value ...]

prints the number of ranks: one per device, or fewer if so many cannot share the global batch evenly.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from zero_ds.config.batches import largest_divisor
from zero_ds.config.loading import load_run
from zero_ds.runtime.errors import ConfigError


def ranks_for(devices: int, recipe: str, overrides: Sequence[str]) -> tuple[int, str | None]:
    """Returns the number of ranks for a run on so many devices, and a sentence if these are not all.

    A recipe that cannot be read gets all devices; the ranks then report the error.
    """
    try:
        batch = load_run(recipe, list(overrides)).global_batch
    except ConfigError:
        return devices, None
    ranks = largest_divisor(batch, devices)
    if ranks == devices:
        return devices, None
    return ranks, (
        f"{ranks} of {devices} devices train, because global_batch={batch} is not a multiple of {devices}; set it to "
        "one to use all of them."
    )


if __name__ == "__main__":
    number, sentence = ranks_for(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    if sentence:
        sys.stderr.write(f"zero-ds: {sentence}\n")
    sys.stdout.write(f"{number}\n")
