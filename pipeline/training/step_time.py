"""How long a step of b rows takes, `f + d * b`, fitted while it runs.

Enters: rows and seconds of steps. Leaves: the fixed cost of a step `f` and the cost of a row `d`, undisturbed, and how much
longer steps take than that at present.

The fit is by low quantiles, so that a stall, which only ever makes a step longer, does not move it. That stalls happen is
kept apart, as `pace`: a plan made with it counts on as many of them as there were.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

QUANTILE = 0.25
"""Of the seconds of like steps: it stays undisturbed while less than three quarters of them are."""
KEPT = 256
"""Measurements that set the scale."""
PRIOR_COUNTS = 16
"""Measurements of each size that an earlier update's line counts as."""
REMEMBERED = 120.0
"""Seconds of learning that they are spread over at most: less than three quarters of them lie in a stall of a minute. A size
that was not met for so long may have been met in a stall alone: it does not tell f from d, as long as others do, or an earlier
update did."""
REFIT_EVERY = 8
"""Measurements from one fit to the next."""
KEPT_A_SIZE = 64
"""Measurements of one batch size, which set the ratio of f to d."""
STALLED = 1.25
"""Times what steps of a size take at which they do not tell f from d, nor do those of a new size right after them: a size that
is first taken in a stall would look dear. What stays slow tells again once `REMEMBERED` is over."""
CREDIBLE = 2.0
"""From one update to the next the ratio of f to d changes by so much at most: more is taken for the mark of a stall."""
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


def line_through(seconds_by_size: Mapping[int, float], weights: Sequence[float] | None = None) -> StepTime:
    """The line with the least mean square of relative errors, with f >= 0 and d > 0.

    >>> line_through({100: 0.003, 300: 0.005})
    StepTime(fixed_seconds=0.002, row_seconds=1e-05)

    Args:
        seconds_by_size: at least one; with a single size all of its cost counts as cost of rows.
        weights: of the sizes, in their order; the same for all where they are not given.
    """
    sizes, seconds = (np.array(list(part), float) for part in (seconds_by_size.keys(), seconds_by_size.values()))
    if len(sizes) > 1:
        design = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
        root = np.sqrt(np.ones_like(sizes) if weights is None else np.array(weights, float))
        fixed, row = np.linalg.lstsq(design * root[:, None], root, rcond=None)[0]
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
    """As an earlier update measured it; without a fixed cost it was not told from that of rows, and counts for nothing."""
    pace: float = 1.0
    """Seconds that steps took over those of undisturbed steps, at least 1."""
    _latest: "_Spread" = field(default_factory=lambda: _Spread(KEPT))
    _by_size: dict[int, "_Spread"] = field(default_factory=dict)
    _steps_of: dict[int, int] = field(default_factory=dict)
    _met_at: dict[int, float] = field(default_factory=dict)
    _makeshift: set[int] = field(default_factory=set)
    """Sizes that were met where steps are not comparable alone: they tell f from d until others do."""
    _now: float = 0.0
    _slow: bool = False
    _told: StepTime | None = None
    """The last line that sizes told which were met together, where it is credible beside that of an earlier update."""
    _line: StepTime | None = None
    _added: int = 0
    _took: float = PACE_MEMORY
    _expected: float = PACE_MEMORY
    _took_in_all: float = PACE_MEMORY
    _expected_in_all: float = PACE_MEMORY

    def add(self, *, steps: int, rows: int, seconds: float, comparable: bool = True) -> None:
        """Counts in `steps` steps over `rows` rows altogether, which took `seconds`.

        Args:
            steps: 0 is nothing.
            rows: 0 is nothing.
            seconds: 0 is nothing.
            comparable: they bore as much of what steps share as others do; else they do not tell f from d, as long as
                others or an earlier update do.
        """
        if steps < 1 or rows < 1 or seconds <= 0:
            return
        size = rows / steps
        like = round(size)
        self._now += seconds
        self._latest.add(size, seconds / steps, took=seconds)
        if self._tells(like, comparable=comparable) and not self._stalls(like, seconds / steps):
            if not self._met_lately(like) or (comparable and like in self._makeshift):
                self._by_size[like], self._steps_of[like] = _Spread(KEPT_A_SIZE), 0
                self._makeshift.discard(like)
            if not comparable:
                self._makeshift.add(like)
            self._by_size[like].add(size, seconds / steps, took=seconds)
            self._steps_of[like] += steps
            self._met_at[like] = self._now
        self._added += 1
        if self._added <= REFIT_EVERY or self._added % REFIT_EVERY == 0:
            self._line = None
        self._measure_pace(steps * self.line.seconds(size), seconds)

    @property
    def _earlier(self) -> StepTime | None:
        return self.prior if self.prior is not None and self.prior.fixed_seconds > 0 else None

    @property
    def measured(self) -> bool:
        """Whether the line is more than an earlier one, and f and d can be told apart."""
        return bool(self._latest.kept) and self.known

    @property
    def for_the_next(self) -> StepTime | None:
        """What a later fit starts from: the line, where it tells f from d; else what this one started from."""
        return self.line if self.measured and self.line.fixed_seconds > 0 else self.prior

    @property
    def known(self) -> bool:
        """Whether f and d can be told apart."""
        return self._earlier is not None or _apart(self._typical())

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
            low = seconds.low()
            yield size, StepTime(fixed_seconds=low, row_seconds=LEAST_ROW_SHARE * low / size)

    def _fitted(self) -> StepTime:
        shape = self._shape()
        if not self._latest.kept:
            return shape
        return shape.slower(self._scale(shape))

    def _scale(self, shape: StepTime) -> float:
        """Seconds of undisturbed steps over those of `shape`; an earlier line counts as one measurement, so that a pass which
        begins in a short stall is not taken for slow."""
        measured = list(self._latest.kept)
        if self._earlier is not None:
            size = measured[0][0]
            measured.append((size, self._earlier.seconds(size)))
        return _low([seconds / shape.seconds(size) for size, seconds in measured])

    def _shape(self) -> StepTime:
        """f and d up to a common factor."""
        if _apart(typical := self._typical()):
            line = line_through(*self._with_prior(typical))
            if self._earlier is not None and 1 / CREDIBLE <= _ratio(line) / _ratio(self._earlier) <= CREDIBLE:
                self._told = line
            return line
        if self._earlier is not None:
            return self._told or self._earlier
        return line_through({size: of.low() for size, of in self._by_size.items()})

    def _with_prior(self, typical: Mapping[int, float]) -> tuple[dict[int, float], list[float]]:
        """The sizes with their numbers of measurements; and the earlier line at today's scale, for `PRIOR_COUNTS` of each: a
        size that was met a few times only, when all was slow, does not upset it."""
        if self._earlier is None:
            return dict(typical), [float(len(self._by_size[size].kept)) for size in typical]
        scale = self._scale(self._earlier)
        mean: dict[int, float] = {}
        weights: list[float] = []
        for size, seconds in typical.items():
            count, before = len(self._by_size[size].kept), scale * self._earlier.seconds(size)
            mean[size] = (count * seconds + PRIOR_COUNTS * before) / (count + PRIOR_COUNTS)
            weights.append(count + PRIOR_COUNTS)
        return mean, weights

    def _typical(self) -> dict[int, float]:
        """Seconds by batch size, of those of which at least two steps were measured; lately, where these or an earlier update
        tell f from d."""
        every = {size: of.low() for size, of in self._by_size.items() if self._steps_of[size] > 1}
        comparable = {size: low for size, low in every.items() if size not in self._makeshift}
        every = comparable if _apart(comparable) else every
        lately = {size: low for size, low in every.items() if self._met_lately(size)}
        return lately if self._earlier is not None or _apart(lately) else every

    def _tells(self, size: int, *, comparable: bool) -> bool:
        """Whether it may tell f from d: where it is not comparable, as a makeshift alone, and not beside comparable ones of its
        size."""
        return comparable or not (self.known or (self._met_lately(size) and size not in self._makeshift))

    def _stalls(self, size: int, seconds: float) -> bool:
        """Whether a step is slow for its size; of a size that is new, whether the last one of a known size was."""
        if self._met_lately(size) and self._steps_of[size] > 1:
            self._slow = seconds > STALLED * self._by_size[size].low()
        elif not any(self._met_lately(known) for known in self._met_at):
            self._slow = False
        return self._slow

    def _met_lately(self, size: int) -> bool:
        return size in self._met_at and self._now - self._met_at[size] <= REMEMBERED

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


@dataclass
class _Spread:
    """So many measurements at most, evenly spread over the latest seconds of learning: all of them while they are few."""

    most: int
    kept: deque[tuple[float, float]] = field(default_factory=deque)
    """Rows and seconds of a step."""
    _at: deque[float] = field(default_factory=deque)
    _now: float = 0.0
    _apart: float = 0.0
    """Seconds between two that are kept, at least."""

    def add(self, size: float, seconds: float, *, took: float) -> None:
        """Keeps it, where enough time went by."""
        self._now += took
        if self._at and self._now - self._at[-1] < self._apart:
            return
        self._at.append(self._now)
        self.kept.append((size, seconds))
        if len(self.kept) > self.most:
            self._thin()

    def low(self) -> float:
        """The low quantile of the seconds."""
        return _low(seconds for _, seconds in self.kept)

    def _thin(self) -> None:
        self._apart = min(2 * (self._now - self._at[0]), REMEMBERED) / self.most
        kept, at = deque[tuple[float, float]](), deque[float]()
        for when, measured in zip(self._at, self.kept, strict=True):
            if not at or when - at[-1] >= self._apart:
                at.append(when)
                kept.append(measured)
        if len(kept) > self.most:
            kept.popleft()
            at.popleft()
        self.kept, self._at = kept, at


def _ratio(line: StepTime) -> float:
    return line.fixed_seconds / line.row_seconds


def _apart(seconds_by_size: Mapping[int, float]) -> bool:
    """Whether sizes differ by enough to tell the cost of a step from that of a row."""
    return bool(seconds_by_size) and max(seconds_by_size) > 1.25 * min(seconds_by_size)


def _low(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[int(QUANTILE * (len(ordered) - 1))]
