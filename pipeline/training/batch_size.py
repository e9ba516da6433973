"""How many rows the next step takes, and at which learning rate.

Enters: how far the pass is. Leaves: a `Decision`; the sequence of changed decisions is the plan trace, which replays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.outcome import PlanRecord


@dataclass(frozen=True, kw_only=True)
class Decision:
    """For one step."""

    batch_size: int
    """At most this many rows, over all processes."""
    learning_rate: float
    """Of the dense optimizer, before warm-up."""
    reason: str


class BatchPolicy(Protocol):
    """Decides each step."""

    def decide(self, *, step: int, position: int) -> Decision | None:
        """For step `step` after `position` rows of the window; None ends the pass."""


@dataclass(frozen=True, kw_only=True)
class FixedBatch:
    """The same batch size and rate all along."""

    batch_size: int
    learning_rate: float

    def decide(self, *, step: int, position: int) -> Decision | None:
        """Always the same."""
        return Decision(batch_size=self.batch_size, learning_rate=self.learning_rate, reason="fixed")


@dataclass(frozen=True, kw_only=True)
class RecordedPlan:
    """Repeats the plan trace of an earlier update, and stops where that one stopped."""

    records: Sequence[PlanRecord]
    stopped_at: int
    """Rows of the permutation that the recorded update had handed out when it ended: the manifest's `permutation_position`."""

    def decide(self, *, step: int, position: int) -> Decision | None:
        """What was decided then."""
        if position >= self.stopped_at:
            return None
        record = [r for r in self.records if r.step <= step][-1]
        return Decision(batch_size=record.batch_size, learning_rate=record.learning_rate, reason=record.reason)
