"""How long a step of b rows takes, `f + d * b`, fitted while it runs.

Enters: rows and seconds of steps. Leaves: the fixed cost of a step `f` and the cost of a row `d`, undisturbed, and how much
longer steps take than that at present.

The fit is by low quantiles, so that a stall, which only ever makes a step longer, does not move it. That stalls happen is
kept apart, as `pace`: a plan made with it counts on as many of them as there were.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
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
"""Seconds of learning by which the pace remembers, and by which a stall is taken to pass; at first so many undisturbed ones are
taken for granted."""


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
    _steps_of: dict[int, int] = field(default_factory=dict)
    _line: StepTime | None = None
    _added: int = 0
    _took: float = PACE_MEMORY
    _expected: float = PACE_MEMORY
    _took_in_all: float = PACE_MEMORY
    _expected_in_all: float = PACE_MEMORY

    def add(self, *, steps: int, rows: int, seconds: float) -> None:
        """Counts in `steps` steps over `rows` rows altogether, which took `seconds`."""
        if steps < 1 or rows < 1 or seconds <= 0:
            return
        size = rows / steps
        self._latest.append((size, seconds / steps))
        self._by_size.setdefault(round(size), deque(maxlen=KEPT_A_SIZE)).append(seconds / steps)
        self._steps_of[round(size)] = self._steps_of.get(round(size), 0) + steps
        self._added += 1
        if self._added <= REFIT_EVERY or self._added % REFIT_EVERY == 0:
            self._line = None
        self._measure_pace(steps * self.line.seconds(size), seconds)

    @property
    def measured(self) -> bool:
        """Whether the line is more than an earlier one, and f and d can be told apart."""
        return bool(self._latest) and self.known

    @property
    def known(self) -> bool:
        """Whether f and d can be told apart."""
        return self.prior is not None or _apart(self._typical())

    @property
    def line(self) -> StepTime:
        """Of undisturbed steps; something must have been measured, here or before."""
        if self._line is None:
            self._line = self._fitted()
        return self._line

    def slowest_lines(self) -> Iterator[tuple[int, StepTime]]:
        """Batch sizes that were measured, the smallest first, each with the line by which no smaller batch takes longer: all of
        its cost is taken as that of a step."""
        for size, seconds in sorted(self._by_size.items()):
            low = _low(seconds)
            yield size, StepTime(fixed_seconds=low, row_seconds=LEAST_ROW_SHARE * low / size)

    def _fitted(self) -> StepTime:
        shape = self._shape()
        if not self._latest:
            return shape
        return shape.slower(_low([seconds / shape.seconds(size) for size, seconds in self._latest]))

    def _shape(self) -> StepTime:
        """f and d up to a common factor."""
        if _apart(typical := self._typical()):
            return line_through(typical)
        if self.prior is not None:
            return self.prior
        return line_through({size: _low(seconds) for size, seconds in self._by_size.items()})

    def _typical(self) -> dict[int, float]:
        """Seconds by batch size, of those of which at least two steps were measured."""
        return {size: _low(seconds) for size, seconds in self._by_size.items() if self._steps_of[size] > 1}

    def pace_over(self, seconds: float) -> float:
        """Expected mean pace of the coming `seconds`, at least 1: today's, which returns to that of the whole pass.

        With deviations that fade as `exp(-t / m)` the mean of the coming T is `m/T * (1 - exp(-T/m))` of today's (an
        Ornstein-Uhlenbeck process): a stall that goes by leaves a plan for ten minutes nearly as it is, and fills one for ten
        seconds.

        Args:
            seconds: infinite or negative too.
        """
        usual = max(self._took_in_all / self._expected_in_all, 1.0)
        ahead = max(seconds, 0.0) / PACE_MEMORY
        share = -np.expm1(-ahead) / ahead if ahead > 0 else 1.0
        return usual + (self.pace - usual) * float(share)

    def _measure_pace(self, expected: float, took: float) -> None:
        keep = float(np.exp(-took / PACE_MEMORY))
        self._took, self._expected = keep * self._took + took, keep * self._expected + expected
        self.pace = max(self._took / self._expected, 1.0)
        self._took_in_all, self._expected_in_all = self._took_in_all + took, self._expected_in_all + expected


def _apart(seconds_by_size: Mapping[int, float]) -> bool:
    """Whether sizes differ by enough to tell the cost of a step from that of a row."""
    return bool(seconds_by_size) and max(seconds_by_size) > 1.25 * min(seconds_by_size)


def _low(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[int(QUANTILE * (len(ordered) - 1))]
