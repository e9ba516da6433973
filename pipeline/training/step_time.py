"""How long a step of b rows takes, `f + d * b`, fitted while it runs.

Enters: rows and seconds of steps. Leaves: the fixed cost of a step `f` and the cost of a row `d`, undisturbed, and how much
longer steps take than that at present.

The fit is by low quantiles, so that a stall, which only ever makes a step longer, does not move it. That stalls happen is
kept apart, as `pace`: a plan made with it counts on as many of them as there were.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

QUANTILE = 0.25
"""Of the seconds of like steps: it stays undisturbed while less than three quarters of them are."""
KEPT = 256
"""Latest measurements that set the scale."""
REFIT_EVERY = 8
"""Measurements from one fit to the next."""
KEPT_A_SIZE = 64
"""Latest measurements of one batch size, which set the ratio of f to d."""
LEAST_ROW_SHARE = 0.01
"""Of the seconds of a step that its rows are taken to cost at least, whatever the clock says."""
PACE_MEMORY = 20.0
"""Seconds of learning by which the pace remembers; at first it takes as many undisturbed ones for granted."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step as a line over its rows."""

    fixed_seconds: float
    """f, at least 0."""
    row_seconds: float
    """d, above 0."""

    def seconds(self, rows: float) -> float:
        """Of a step of `rows`."""
        return self.fixed_seconds + self.row_seconds * rows

    def slower(self, factor: float) -> "StepTime":
        """All costs times `factor`."""
        return StepTime(fixed_seconds=self.fixed_seconds * factor, row_seconds=self.row_seconds * factor)


def line_through(seconds_by_size: Mapping[int, float]) -> StepTime:
    """The line with the least relative error, with f >= 0 and d > 0.

    >>> line_through({100: 0.003, 300: 0.005})
    StepTime(fixed_seconds=0.002, row_seconds=1e-05)

    Args:
        seconds_by_size: at least one; with a single size all of its cost counts as cost of rows.
    """
    sizes, seconds = (np.array(list(part), float) for part in (seconds_by_size.keys(), seconds_by_size.values()))
    if len(sizes) > 1:
        design = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
        fixed, row = np.linalg.lstsq(design, np.ones_like(sizes), rcond=None)[0]
        if row * sizes.mean() < LEAST_ROW_SHARE * seconds.mean():
            least = LEAST_ROW_SHARE * seconds
            return StepTime(fixed_seconds=float((seconds - least).mean()), row_seconds=float((least / sizes).mean()))
        if fixed >= 0:
            return StepTime(fixed_seconds=round(float(fixed), 12), row_seconds=round(float(row), 15))
    return StepTime(fixed_seconds=0.0, row_seconds=float((seconds / sizes).mean()))


@dataclass(kw_only=True)
class StepTimeFit:
    """The line so far."""

    prior: StepTime | None = None
    """As an earlier update measured it."""
    pace: float = 1.0
    """Seconds that steps took over those of undisturbed steps, at least 1."""
    _latest: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    _by_size: dict[int, deque[float]] = field(default_factory=dict)
    _line: StepTime | None = None
    _added: int = 0
    _took: float = PACE_MEMORY
    _expected: float = PACE_MEMORY

    def add(self, *, steps: int, rows: int, seconds: float) -> None:
        """Counts in `steps` steps over `rows` rows altogether, which took `seconds`."""
        if steps < 1 or rows < 1 or seconds <= 0:
            return
        size = rows / steps
        self._latest.append((size, seconds / steps))
        self._by_size.setdefault(round(size), deque(maxlen=KEPT_A_SIZE)).append(seconds / steps)
        self._added += 1
        if self._added <= REFIT_EVERY or self._added % REFIT_EVERY == 0:
            self._line = None
        self._measure_pace(steps * self.line.seconds(size), seconds)

    @property
    def measured(self) -> bool:
        """Whether the line is more than an earlier one, and f and d can be told apart."""
        return bool(self._latest) and self.known

    @property
    def sizes_seen(self) -> int:
        """Different batch sizes, among those of which at least two steps were measured."""
        return sum(len(seconds) > 1 for seconds in self._by_size.values())

    @property
    def known(self) -> bool:
        """Whether f and d can be told apart."""
        return self.prior is not None or self.sizes_seen > 1

    @property
    def line(self) -> StepTime:
        """Of undisturbed steps; something must have been measured, here or before."""
        if self._line is None:
            self._line = self._fitted()
        return self._line

    def _fitted(self) -> StepTime:
        shape = self._shape()
        if not self._latest:
            return shape
        return shape.slower(_low([seconds / shape.seconds(size) for size, seconds in self._latest]))

    def _shape(self) -> StepTime:
        """f and d up to a common factor."""
        if self.sizes_seen > 1:
            typical = {size: _low(seconds) for size, seconds in self._by_size.items() if len(seconds) > 1}
            if max(typical) > 1.25 * min(typical):
                return line_through(typical)
        if self.prior is not None:
            return self.prior
        return line_through({size: _low(seconds) for size, seconds in self._by_size.items()})

    def _measure_pace(self, expected: float, took: float) -> None:
        keep = float(np.exp(-took / PACE_MEMORY))
        self._took, self._expected = keep * self._took + took, keep * self._expected + expected
        self.pace = max(self._took / self._expected, 1.0)


def _low(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[int(QUANTILE * (len(ordered) - 1))]
