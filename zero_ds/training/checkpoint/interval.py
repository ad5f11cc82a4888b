"""When a checkpoint is due by time, and the share of the time that saving takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

NOTABLE = 0.1
"""Share of the time from which saving is worth a warning."""


@dataclass
class SaveClock:
    """Clock of a run's saves.

    The interval runs from the beginning of one save to that of the next, so that saving counts in it. But training goes
    on for at least as long as the last save took: a save that takes longer than the interval is not due again at once.
    """

    interval: float
    """Seconds between two saves."""
    now: Callable[[], float] = time.monotonic
    _started: float = field(init=False)
    _began: float = field(init=False)
    """When the last save began; before the first one, when the run did."""
    _ended: float = field(init=False)
    _cost: float = field(init=False, default=0.0)
    """Seconds for which training has waited for the last save."""
    _spent: float = field(init=False, default=0.0)
    """Seconds for which training has waited for all saves."""
    _entered: float | None = field(init=False, default=None)
    _said: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._started = self._began = self._ended = self.now()

    def is_due(self) -> bool:
        """Returns whether the interval has passed."""
        return self.now() > max(self._began + self.interval, self._ended + self._cost)

    @contextlib.contextmanager
    def saving(self, new: bool = False) -> Iterator[None]:
        """Counts the time of the block as a save's. new: whether a save begins, or else one goes on."""
        self._entered = self.now()
        if new:
            self._began, self._cost = self._entered, 0.0
        try:
            yield
        finally:
            self._ended = self.now()
            took, self._entered = self._ended - self._entered, None
            self._cost += took
            self._spent += took

    def seconds(self) -> float:
        """Returns for how long training has waited for the last save so far."""
        return self._cost + (0.0 if self._entered is None else self.now() - self._entered)

    def share(self) -> float | None:
        """Returns the share of the time that saves have taken, once, when it is notable; None otherwise."""
        share = self._spent / max(1e-9, self.now() - self._started)
        if self._said or share <= NOTABLE:
            return None
        self._said = True
        return share
