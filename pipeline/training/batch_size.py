"""How many rows the next step takes, which share of the coming rows it is taken from, and at which learning rate.

Enters: how far the pass is, the seconds left, and what was measured. Leaves: a `Decision`; the sequence of changed decisions is
the plan trace, which replays.

With a step of b rows taking `f + d*b` seconds and a row of it worth `1 / (1 + b/N)` ideal ones to the dense network (N its
gradient noise scale, McCandlish et al. 2018), the dense network's progress a second is greatest at `b* = sqrt(N*f/d)`; Qiao et
al. 2021 (Pollux) call it goodput. Here it is planned anew inside a pass, against its deadline. We depart in one thing: a table
row meets few examples of a batch, whatever its size, so that to the tables a row is worth the same in every batch (`worth`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pipeline.config import TrainingConfig
from pipeline.outcome import PlanRecord
from pipeline.training.learning_rate import JUMP, Rates
from pipeline.training.noise_scale import NoiseScale
from pipeline.training.step_time import StepTime, StepTimeFit

FLOOR_SHARE = 9
"""In a batch of N/9 a row gains less than 10 % from a smaller one."""
TABLES_SHARE = 0.5
"""Of what a row teaches, what it teaches table rows. Batches of 16 and 32 times the reference learn from the same rows what a
half to two thirds as many would teach one by one (docs/budget.md), where the dense noise scale alone says a third and less."""
TYPICAL_NOISE_SCALE = 1000.0
"""What the dense noise scale is taken for, as far as its measurements allow: batches of 128 to 2,048 lose on both data sets of
docs/budget.md about what this and `TABLES_SHARE` say."""
PLANNED_SHARE = 0.97
"""Of the seconds left, so that a small disturbance does not leave rows unreached."""
CALM_SHARE = 0.85
"""Of the seconds left, as long as there are enough of them: stalls to come use up the rest, before rows must be left out."""
PLANS = 200
"""A pass is planned anew so many times, as rows go by."""
WORTH_CHANGING = 0.1
"""A batch that could be smaller by less than this share stays as it is."""
PROBED_APART = 4
"""Of the two sizes by which costs are first measured, the larger is so many times the smaller, where bounds allow."""
COMPARABLE_SHARE = 0.5
"""Of the rows that are looked up together: over fewer, steps cost more than others of their size do."""
LEAST_KEEP_RATE = 1e-4
NEAR = 1.1
"""Batches are split evenly, so that a step has somewhat fewer rows than planned: this much longer it takes at most."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """For one step."""

    batch_size: int
    """At most this many rows, over all processes."""
    learning_rate: float
    """Of the dense optimizer, before warm-up."""
    reason: str
    keep_rate: float = 1.0
    """Share of the coming rows that is learned, in (0, 1]."""
    sparse_rate_factor: float = 1.0
    """On the rates of the embeddings and of the wide part."""
    rows: int = 0
    """To be learned from here on, as planned."""


class BatchPolicy(Protocol):
    """Decides each step."""

    def decide(self, *, step: int, position: int, remaining: int, seconds_left: float) -> Decision | None:
        """For step `step` after `position` rows of the window; None ends the pass.

        Args:
            remaining: rows still to come, at least 1.
            seconds_left: until the reserve line; infinite without a deadline. The same in all processes.
        """

    def observe(self, *, steps: int, rows: int, seconds: float) -> None:
        """What some steps took; the same in all processes."""


@dataclass(frozen=True, kw_only=True)
class FixedBatch:
    """The same batch size and rate all along."""

    batch_size: int
    learning_rate: float

    def decide(self, *, step: int, position: int, remaining: int, seconds_left: float) -> Decision | None:
        """Always the same."""
        return Decision(batch_size=self.batch_size, learning_rate=self.learning_rate, reason="fixed")

    def observe(self, *, steps: int, rows: int, seconds: float) -> None:
        """Nothing depends on it."""


@dataclass(frozen=True, kw_only=True)
class RecordedPlan:
    """Repeats the plan trace of an earlier update, and stops where that one stopped."""

    records: Sequence[PlanRecord]
    stopped_at: int
    """Rows of the permutation that the recorded update had come to when it ended: the manifest's `permutation_position`."""

    def decide(self, *, step: int, position: int, remaining: int, seconds_left: float) -> Decision | None:
        """What was decided then."""
        if position >= self.stopped_at:
            return None
        then = vars([r for r in self.records if r.step <= step][-1])
        return Decision(**{name: value for name, value in then.items() if name not in ("step", "position")})

    def observe(self, *, steps: int, rows: int, seconds: float) -> None:
        """Nothing depends on it."""


def worth(batch_size: float, noise_scale: float) -> float:
    """What a row teaches in a batch, as a share of what it would alone: half of it goes to the tables, in every batch.

    >>> worth(3000, 3000.0), round(worth(1e12, 3000.0), 6)
    (0.75, 0.5)
    """
    return TABLES_SHARE + (1 - TABLES_SHARE) / (1 + batch_size / noise_scale)


def quickest_batch(noise_scale: float, step_time: StepTime) -> float:
    """The batch with the greatest progress a second, `b * worth(b) / (f + d*b)`; infinite where that grows without end.

    With s for `TABLES_SHARE` its derivative is zero where `((1-s)*N*d - s*f) * b^2 - 2*s*N*f*b - f*N^2 = 0`; with s = 0 that
    is `sqrt(N*f/d)`.
    """
    n, s, f, d = noise_scale, TABLES_SHARE, step_time.fixed_seconds, step_time.row_seconds
    bend = (1 - s) * n * d - s * f
    return n * (s * f + math.sqrt((s * f) ** 2 + bend * f)) / bend if bend > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Size:
    """A batch size and the share of rows, without a rate."""

    batch_size: int
    keep_rate: float = 1.0
    reason: str
    all_rows: bool = False
    """There is time for all rows at a batch that gains enough."""


class Sizes(Protocol):
    """Chooses the size of a batch; `Planned` adds the rates."""

    def choose(self, *, position: int, remaining: int, seconds_left: float) -> Size:
        """As `BatchPolicy.decide`."""

    def observe(self, *, steps: int, rows: int, seconds: float) -> None:
        """As `BatchPolicy.observe`."""


@dataclass(frozen=True, kw_only=True)
class FixedSize:
    """The same all along."""

    batch_size: int

    def choose(self, *, position: int, remaining: int, seconds_left: float) -> Size:
        """Always the same."""
        return Size(batch_size=self.batch_size, reason="fixed")

    def observe(self, *, steps: int, rows: int, seconds: float) -> None:
        """Nothing depends on it."""


@dataclass(frozen=True, kw_only=True)
class LinearRamp:
    """Grows over the pass at a constant rate, instead of a decay of the rate (Smith et al. 2018)."""

    first: int
    last: int
    micro_batch: int

    def choose(self, *, position: int, remaining: int, seconds_left: float) -> Size:
        """By the share of rows that is done, in hundredths."""
        progress = math.floor(100 * position / (position + remaining)) / 100
        wanted = self.first + (self.last - self.first) * progress
        size = min(max(whole(wanted, self.micro_batch), self.first), self.last)
        return Size(batch_size=size, reason=f"grows from {self.first:,} to {self.last:,} over the pass")

    def observe(self, *, steps: int, rows: int, seconds: float) -> None:
        """Nothing depends on it."""


def whole(rows: float, micro_batch: int) -> int:
    """The least size of at least `rows`: whole micro-batches, or one half, a quarter ... of one.

    >>> whole(700, 512), whole(200, 512), whole(3, 500)
    (1024, 256, 125)
    """
    if rows > micro_batch:
        return math.ceil(rows / micro_batch) * micro_batch
    size = micro_batch
    while size % 2 == 0 and size // 2 >= rows:
        size //= 2
    return size


def best_size(
    how: Literal["deadline", "goodput"],
    *,
    remaining: int,
    seconds_left: float,
    step_time: StepTime,
    noise_scale: float,
    at_least: float,
    smallest: int,
    reference: int,
    largest: int,
    micro_batch: int,
) -> Size:
    """The size and the share of rows that suit the time that is left.

    `b_deadline = R*f / (T - R*d)` is the smallest batch that still sees all rows. Up to `b*` there is time enough: the smallest
    that still gains is taken. Above the reference batch it goes only as far as the rows need: more would save time that nobody
    asks for, at a rate that nobody tuned. Beyond `b*` time is short: `goodput` takes `b*` and leaves rows out, `deadline` takes
    `b_deadline`, and only where the largest batch is not enough for all rows does as `goodput`. `b*` is here the better of the
    two allowed sizes beside it.

    Args:
        remaining: R, at least 1.
        seconds_left: T; infinite without a deadline.
        noise_scale: N, above 0.
        at_least: what N is surely; as long as time is plentiful, it is taken for N, since a batch that is too small costs
            mostly time.
        smallest: batch.
        reference: batch, for which the rates were set.
        largest: batch.
        micro_batch: sizes are whole ones, or halves, quarters ... of one.
    """
    f, d = step_time.fixed_seconds, step_time.row_seconds

    def allowed(rows: float) -> int:
        return min(max(whole(min(rows, largest), micro_batch), smallest), largest)

    def sees_all(seconds: float) -> float:
        spare = seconds - remaining * d
        return remaining * f / spare if spare > 0 else math.inf

    needed, calm = sees_all(seconds_left), sees_all(CALM_SHARE * seconds_left)
    best = max(quickest_batch(noise_scale, step_time), smallest)
    if needed <= min(best, largest):
        size = allowed(max(needed, min(calm, best), min(at_least / FLOOR_SHARE, reference), smallest))
        return Size(
            batch_size=size, reason=f"time for all {remaining:,} rows; the smallest batch that still gains", all_rows=True
        )
    if how == "deadline" and needed <= largest:
        size = allowed(needed)
        why = f"short of time; {size:,} sees all rows"
    else:
        above = allowed(best)
        below = allowed(above - micro_batch if above > micro_batch else above / 2)
        size = max(above, below, key=lambda rows: rows * worth(rows, noise_scale) / step_time.seconds(rows))
        why = f"short of time; {size:,} gains most a second where the noise scale is {noise_scale:,.0f}"
    affordable = max(seconds_left, 0.0) * size / (f + d * size)
    keep_rate = min(max(affordable / remaining, LEAST_KEEP_RATE), 1.0)
    if keep_rate < 1:
        why += f", and {affordable:,.0f} of {remaining:,} rows are learned"
    return Size(batch_size=size, keep_rate=keep_rate, reason=why)


@dataclass(kw_only=True)
class PlannedSize:
    """`deadline` and `goodput`: plans anew from what was measured, every 200th of the pass.

    Once a plan leaves rows out, `deadline` does as `goodput` until the best batch sees all rows that are left: as every plan
    keeps some of the time back, the largest batch would soon see them, and rows would have been left out for nothing.
    """

    how: Literal["deadline", "goodput"]
    smallest: int
    largest: int
    reference: int
    micro_batch: int
    fit: StepTimeFit
    noise: NoiseScale
    """As measured so far, and on."""
    chunk_rows: int = 0
    """Looked up together at least, but for the last ones of a window."""
    _current: Size | None = None
    _planned_at: int = 0
    _chunks: int = 0
    _planned_chunk: int = -1

    def choose(self, *, position: int, remaining: int, seconds_left: float) -> Size:
        """The plan in force, renewed where measurements came in and rows went by."""
        if self._current is not None and self._planned_chunk == self._chunks:
            return self._current
        due = self._current is None or position - self._planned_at >= (position + remaining) / PLANS
        if self._current is not None and not due and self._current.reason != _PROBE:
            return self._current
        if self.fit.known:
            self._current = self._settled(self._plan(remaining, seconds_left, self.fit.line))
        else:
            self._current = self._unmeasured(remaining, seconds_left)
        self._planned_at, self._planned_chunk = position, self._chunks
        return self._current

    def observe(self, *, steps: int, rows: int, seconds: float) -> None:
        """For the next plan. The first steps warm caches up, and do not count; those of the rest of a window bear alone what it
        costs to look ids up together and to step their rows."""
        self._chunks += 1
        if self._chunks > 1:
            self.fit.add(steps=steps, rows=rows, seconds=seconds, comparable=rows >= COMPARABLE_SHARE * self.chunk_rows)

    def _unmeasured(self, remaining: int, seconds_left: float) -> Size:
        """While the cost of a step and that of a row cannot be told apart: where there is time enough even if rows cost
        nothing, so that a smaller batch costs most, they need not be; else they are measured.
        """
        for size, line in self.fit.slowest_lines():
            plan = self._plan(remaining, seconds_left, line.slower(NEAR))
            if plan.all_rows and plan.batch_size <= min(NEAR * size, self._base):
                return self._settled(plan)
        return self._probe()

    @property
    def _base(self) -> int:
        return min(max(whole(self.reference, self.micro_batch), self.smallest), self.largest)

    def _probe(self) -> Size:
        """Two sizes in turn, until the cost of a step and that of a row can be told apart."""
        other = bool(self._chunks) and self._chunks % 2 == 0
        return Size(batch_size=self._probed_beside_base() if other else self._base, reason=_PROBE)

    def _probed_beside_base(self) -> int:
        """Far from the base: the nearer two sizes lie, the more an error of either's seconds makes of the cost of a step."""
        base = self._base
        smaller = max(whole(base / PROBED_APART, self.micro_batch), self.smallest)
        larger = min(PROBED_APART * base, self.largest)
        if PROBED_APART * smaller <= base:
            return smaller
        if larger >= 2 * base:
            return larger
        return smaller if 2 * smaller <= base else max(base // 2, 1)

    def _plan(self, remaining: int, seconds_left: float, line: StepTime) -> Size:
        step_time = line.slower(self.fit.pace_over(seconds_left))
        at_least = self.noise.at_least
        if at_least is None:
            at_least = 0.0 if self.noise.measurable else FLOOR_SHARE * self.reference
        left_out = self._current is not None and self._current.keep_rate < 1
        return best_size(
            "goodput" if left_out else self.how,
            remaining=remaining,
            seconds_left=PLANNED_SHARE * seconds_left,
            step_time=step_time,
            noise_scale=self.noise.believed(TYPICAL_NOISE_SCALE),
            at_least=at_least,
            smallest=self.smallest,
            reference=self.reference,
            largest=self.largest,
            micro_batch=self.micro_batch,
        )

    def _settled(self, wanted: Size) -> Size:
        """What is in force, where the new plan is hardly another."""
        now = self._current
        if now is None or now.reason == _PROBE:
            return wanted
        near = now.batch_size * (1 - WORTH_CHANGING) <= wanted.batch_size <= now.batch_size
        same = near and abs(wanted.keep_rate / now.keep_rate - 1) < 0.01 and (wanted.keep_rate == 1) == (now.keep_rate == 1)
        return now if same else wanted


_PROBE = "measuring what a step and what a row costs"


@dataclass(kw_only=True)
class Planned:
    """A choice of sizes, with the rates that follow it."""

    sizes: Sizes
    rates: Rates
    noise: NoiseScale = field(default_factory=NoiseScale)
    rewarm_steps: int = 0
    _last: Decision | None = None
    _size: Size | None = None
    _settled_noise: float | None = None
    _risen_from: float = 0.0
    _jumped_at: int = 0
    _rows_planned: int = 0

    def decide(self, *, step: int, position: int, remaining: int, seconds_left: float) -> Decision | None:
        """Size first, then the rates."""
        size = self.sizes.choose(position=position, remaining=remaining, seconds_left=seconds_left)
        if size is not self._size:
            self._settled_noise = self.noise.last
            self._rows_planned = round(size.keep_rate * remaining)
        progress = position / (position + remaining)
        rate = self.rates.dense(size.batch_size, self._settled_noise, progress)
        if self._last is not None and size.batch_size >= JUMP * self._last.batch_size:
            self._risen_from, self._jumped_at = self._last.learning_rate, step
        self._size = size
        self._last = Decision(
            batch_size=size.batch_size,
            learning_rate=self._rewarmed(rate, step),
            reason=size.reason,
            keep_rate=size.keep_rate,
            sparse_rate_factor=self.rates.sparse_factor(size.batch_size, self._settled_noise),
            rows=self._rows_planned,
        )
        return self._last

    def observe(self, *, steps: int, rows: int, seconds: float) -> None:
        """For the sizes to come."""
        self.sizes.observe(steps=steps, rows=rows, seconds=seconds)

    def _rewarmed(self, rate: float, step: int) -> float:
        """From the rate before the jump to the new one, step by step; never above the new one."""
        since = step - self._jumped_at
        if not self.rewarm_steps or not self._risen_from or since >= self.rewarm_steps or rate <= self._risen_from:
            return rate
        return self._risen_from + (rate - self._risen_from) * (since + 1) / self.rewarm_steps


def batch_policy(
    training: TrainingConfig,
    *,
    fit: StepTimeFit | None = None,
    noise: NoiseScale | None = None,
) -> BatchPolicy:
    """The policy that the settings ask for.

    Args:
        training: settings.
        fit: of the step time, with what an earlier update measured.
        noise: looked at whenever a plan is made; None: never measured.
    """
    noise = noise or NoiseScale()
    micro, sizes = training.micro_batch, FixedSize(batch_size=training.batch_size)
    match training.batch_policy:
        case "fixed":
            chosen: Sizes = sizes
        case "linear_ramp":
            chosen = LinearRamp(first=training.batch_size, last=training.max_batch_size, micro_batch=micro)
        case "deadline" | "goodput" as how:
            chosen = PlannedSize(
                how=how,
                smallest=min(whole(training.min_batch_size, micro), training.max_batch_size),
                largest=training.max_batch_size,
                reference=training.reference,
                micro_batch=micro,
                fit=fit or StepTimeFit(),
                noise=noise,
                chunk_rows=training.sparse_step_rows,
            )
    return Planned(sizes=chosen, rates=Rates.of(training), noise=noise, rewarm_steps=training.rewarm_steps)
