"""The deadline of an update, on a monotonic clock.

Enters: the budget and what earlier updates needed after learning. Leaves: how long learning may go on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_schemas.errors import ConfigError
from pipeline.config import UpdateConfig
from pipeline.training.step_time import StepTime

Clock = Callable[[], float]
"""Seconds that only go forward; the wall clock may jump, so it is never asked."""

FIRST_RESERVE_SHARE = 0.2
"""Share of the budget kept back while no update has been measured."""
RESERVE_MARGIN = 1.5
"""Times the longest tail seen."""
SLOWEST_TAIL = 5.0
"""Times the shortest tail seen: a machine that has not stalled yet may stall the next time."""
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

    >>> reserve_seconds([2.0, 2.0, 8.0], budget_seconds=600, min_reserve_seconds=1)
    12.0
    >>> reserve_seconds([2.0, 2.0, 2.0], budget_seconds=600, min_reserve_seconds=1)
    10.0

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
    last = tails[-20:]
    wanted = max(RESERVE_MARGIN * max(last), SLOWEST_TAIL * min(last))
    return max(min_reserve_seconds, min(wanted, GREATEST_RESERVE_SHARE * budget_seconds))


def earlier_step_time(history: Sequence[Mapping[str, Any]]) -> StepTime | None:
    """As the latest update that told the cost of a step from that of its rows reported; None if none did."""
    for record in reversed(history):
        fixed, row = record.get("fixed_seconds"), record.get("row_seconds")
        if fixed and row:
            return StepTime(fixed_seconds=fixed, row_seconds=row)
    return None


def refuse_too_small(config: UpdateConfig, deadline: Deadline, step_time: StepTime | None) -> None:
    """A budget that does not hold one batch beside the reserve would never learn a row.

    Raises:
        ConfigError: names the settings, and the least budget that works.
    """
    if step_time is None or not config.training.plans_batches:
        return
    rows = config.training.min_batch_size
    step, reserve = step_time.seconds(rows), deadline.reserve_seconds
    if reserve + step > deadline.budget_seconds:
        raise ConfigError(
            f"budget.seconds = {deadline.budget_seconds:g} does not hold the reserve of {reserve:.3g} s and one batch of "
            f"training.min_batch_size = {rows}, which takes {step:.3g} s; use budget.seconds of at least {reserve + step:.3g}, "
            "or a smaller training.min_batch_size"
        )
