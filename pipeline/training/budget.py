"""The deadline of an update, on a monotonic clock.

Enters: the budget and what earlier updates needed after learning. Leaves: how long learning may go on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_schemas.errors import ConfigError

Clock = Callable[[], float]
"""Seconds that only go forward; the wall clock may jump, so it is never asked."""

FIRST_RESERVE_SHARE = 0.2
"""Share of the budget kept back while no update has been measured."""
RESERVE_MARGIN = 1.5
"""Times the longest tail seen."""
GREATEST_RESERVE_SHARE = 0.5
"""Share of the budget that is kept back at most, so that one slow tail cannot stop learning."""


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """When learning must stop so that the update ends inside its budget."""

    started: float
    budget_seconds: float
    reserve_seconds: float
    """Kept for evaluation, checkpoint and publishing."""
    clock: Clock = time.monotonic

    def learning_seconds_left(self) -> float:
        """Until the reserve line; negative once it is passed."""
        return self.started + self.budget_seconds - self.reserve_seconds - self.clock()

    def seconds_used(self) -> float:
        """Since the update started."""
        return self.clock() - self.started


def reserve_seconds(tails: Sequence[float], *, budget_seconds: float, min_reserve_seconds: float) -> float:
    """Time to keep back after learning, from what the last updates needed there.

    >>> reserve_seconds([2.0, 4.0], budget_seconds=600, min_reserve_seconds=1)
    6.0

    Args:
        tails: seconds from the end of learning to the published model, of earlier updates; the last 20 count.

    Raises:
        ConfigError: the least reserve leaves no time to learn.
    """
    if min_reserve_seconds >= budget_seconds:
        raise ConfigError(
            f"budget.min_reserve_seconds = {min_reserve_seconds} leaves nothing of budget.seconds = {budget_seconds} to "
            f"learn; the budget must be above {min_reserve_seconds} s"
        )
    if not tails:
        return max(min_reserve_seconds, FIRST_RESERVE_SHARE * budget_seconds)
    longest = min(RESERVE_MARGIN * max(tails[-20:]), GREATEST_RESERVE_SHARE * budget_seconds)
    return max(min_reserve_seconds, longest)
