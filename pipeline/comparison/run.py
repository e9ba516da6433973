"""One strategy with one seed over a recorded stream: predict a window, then learn it, by the functions that an update calls.

Enters: settings, windows. Leaves: a `StrategyRun`: the figures of every window, and the loss of a fixed set of rows on the way.

The last window is predicted and not learned: nothing comes after it. Some of its rows are the probe: no strategy ever learns
them, so that their log loss, taken before every window and at some places in it, moves with the weights alone.

What differs from an update: rows over `window.max_rows`, and rows that a pass did not come to in `budget.seconds`, are not
learned later; counters and histories know of all rows. `budget.seconds` is learning alone: there is nothing to keep a reserve
for; what the last step of a window takes beyond it, the next window has less, so that all strategies have the same seconds.
Seconds are CPU seconds of this process, so that other work on the machine does not count; on a GPU they are elapsed ones.
Where several processes train one model, all of them run this side by side, and seconds are added up over them: of the budget
each has its share.

Letters: R rows of a window, P rows of the probe.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import LearningDiverged
from data_schemas.examples import I64
from models.id_table import SHARED_ROW
from pipeline.comparison.strategies import refuse_unheeded
from pipeline.comparison.stream import RecordedWindow
from pipeline.config import UpdateConfig, overridden
from pipeline.evaluation.metrics import LEAST_PROBABILITY, Metrics, measure
from pipeline.evaluation.score import probabilities
from pipeline.model_state import restore_or_create
from pipeline.training.batch_size import BatchPolicy, batch_policy
from pipeline.training.budget import Clock, Deadline
from pipeline.training.learn import Learned, learn
from pipeline.training.learner import Learner
from pipeline.training.room import keep_freed_memory
from pipeline.training.sampling import sample_window
from pipeline.training.step_time import StepTimeFit
from pipeline.training.threads import torch_threads

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How closely the loss of the fixed rows is followed."""

    rows: int = 1_000
    """Of the probe, at most."""
    places: int = 8
    """In a window, at most: after the step that reaches each eighth of its rows; 0: at its start alone."""


EVERY_EIGHTH = Probing()
"""Of a comparison, unless it says otherwise."""


@dataclass(frozen=True, kw_only=True)
class WindowRun:
    """What happened to one window."""

    start: int
    """Hours since 1970."""
    rows: int
    before: Metrics | None
    """On all rows, before any was learned; None for the first window, of which a new model knows nothing."""
    rows_learned: int
    """In this window."""
    rows_left: int
    """Over the cap, thinned, or out of time."""
    seconds: float
    """Of learning it."""
    steps: int
    """Steps that were learned."""
    skipped_steps: int
    batch_size: int
    """Rows of the last step; 0 where there was none."""


@dataclass(frozen=True, kw_only=True)
class ProbePoint:
    """The log loss of the probe at one moment."""

    window: int
    """Position in the stream of the window that was being learned."""
    place: float
    """In windows: the position, and the share of the window that was passed by then."""
    rows: int
    """Learned since the start of the stream."""
    seconds: float
    """Of learning since the start of the stream."""
    log_loss: float


@dataclass(frozen=True, kw_only=True)
class StrategyRun:
    """A strategy with a seed, from the first window to the last."""

    strategy: str
    seed: int
    windows: tuple[WindowRun, ...]
    probe: tuple[ProbePoint, ...]
    diverged: str = ""
    """Why learning was given up, where it was; `windows` ends there."""


def run_strategy(
    strategy: str,
    config: UpdateConfig,
    spec: DatasetSpec,
    stream: Sequence[RecordedWindow],
    *,
    seed: int,
    probing: Probing = EVERY_EIGHTH,
) -> StrategyRun:
    """Learns the stream with a new model of these settings, with one thread.

    Raises:
        ConfigError: settings that contradict each other, or that no run heeds.
    """
    config = overridden(config, [f"training.seed={seed}"])
    refuse_unheeded(config)
    keep_freed_memory()
    with torch_threads(1):
        entrant = _Entrant(config, spec, probing, probe=stream[-1], num_windows=len(stream))
        diverged = ""
        try:
            for number, window in enumerate(stream):
                entrant.take(number, window)
        except LearningDiverged as error:
            diverged = str(error)
    return StrategyRun(
        strategy=strategy, seed=seed, windows=tuple(entrant.windows), probe=tuple(entrant.probe), diverged=diverged
    )


class _Entrant:
    """The model of a run, and what is written down about it."""

    def __init__(
        self, config: UpdateConfig, spec: DatasetSpec, probing: Probing, *, probe: RecordedWindow, num_windows: int
    ) -> None:
        with tempfile.TemporaryDirectory() as empty:
            self._state = restore_or_create(overridden(config, [f"state_dir={empty}"]), spec)
        self._config = config
        self._spec = spec
        self._num_windows = num_windows
        self._probe_window = probe
        self._places = probing.places
        self._probe_rows: I64 = np.random.default_rng(0).permutation(probe.num_rows)[: probing.rows]
        self._clock = _LearningClock(self.learner.device)
        self._fit = StepTimeFit()
        self._rows, self._seconds, self._owed = 0, 0.0, 0.0
        self.windows: list[WindowRun] = []
        self.probe: list[ProbePoint] = []

    @property
    def learner(self) -> Learner:
        """The model that learns."""
        return self._state.learner

    def take(self, number: int, window: RecordedWindow) -> None:
        """Test, then train."""
        before = self._measure(window) if number else None
        learned, seconds, steps = (None, 0.0, 0) if number == self._num_windows - 1 else self._learn(number, window)
        self.windows.append(
            WindowRun(
                start=window.start,
                rows=window.num_rows,
                before=before,
                rows_learned=learned.rows if learned else 0,
                rows_left=window.num_rows - learned.rows if learned else 0,
                seconds=seconds,
                steps=steps,
                skipped_steps=learned.skipped_steps if learned else 0,
                batch_size=learned.last_batch_size if learned else 0,
            )
        )

    def _measure(self, window: RecordedWindow) -> Metrics:
        encoded = window.predicted
        scored = self._score(window, np.arange(window.num_rows))
        return measure(encoded.labels_R, scored, encoded.user_R, encoded.weights_R)

    def _score(self, window: RecordedWindow, rows: I64) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """By the weights that an update would publish."""
        learner = self.learner
        with learner.averaged() as dense_weights:
            return probabilities(
                learner.model, dense_weights, window.predicted, rows, device=learner.device, processes=learner.processes
            )

    def _learn(self, number: int, window: RecordedWindow) -> tuple[Learned, float, int]:
        learner, clock = self.learner, self._clock
        if window.fresh_rows:
            learner.model.tables.start_rows(window.fresh_rows, like=SHARED_ROW, add_up=learner.processes.add_up)
        count = learner.processes.count
        started, steps_before, budget = clock(), learner.steps, self._config.budget.seconds / count
        seed = (self._config.training.seed, window.end)
        sampled = sample_window(self._config.sampling, window.examples, window.learned, self._spec, seed=seed)
        kept_R = _capped(sampled.kept_R, window.num_rows, self._config.window.max_rows, seed)
        marks = _Marks(window.num_rows if kept_R is None else int(kept_R.sum()), self._places)
        with clock.paused():
            self._probe(number, passed=0.0, rows=self._rows, seconds=self._seconds)

        def along(done: int, rows: int) -> None:
            if marks.reached(done):
                seconds = self._seconds + learner.processes.total(clock() - started)
                with clock.paused():
                    self._probe(number, passed=done / marks.rows, rows=self._rows + done, seconds=seconds)

        learned = learn(
            learner,
            sampled.window,
            seed=seed,
            policy=self._policy(),
            deadline=Deadline(started=started - self._owed, budget_seconds=budget, reserve_seconds=0.0, clock=clock),
            progress=along,
            stratum_R=sampled.stratum_R,
            kept_R=kept_R,
            ahead=False,
        )
        seconds = learner.processes.total(clock() - started)
        self._owed = max(self._owed + seconds / count - budget, 0.0)
        self._rows += learned.rows
        self._seconds += seconds
        return learned, seconds, learner.steps - steps_before

    def _policy(self) -> BatchPolicy:
        """A new one for each window, that knows how long steps took in the window before."""
        self._fit = StepTimeFit(prior=self._fit.for_the_next)
        return batch_policy(self._config.training, fit=self._fit, noise=self.learner.noise_scale)

    def _probe(self, number: int, *, passed: float, rows: int, seconds: float) -> None:
        labels_P = self._probe_window.predicted.labels_R[self._probe_rows]
        scored_P = self._score(self._probe_window, self._probe_rows).astype(np.float64)
        right_P = np.clip(np.where(labels_P == 1, scored_P, 1 - scored_P), LEAST_PROBABILITY, 1.0)
        loss = float(-np.log(right_P).mean())
        self.probe.append(ProbePoint(window=number, place=number + passed, rows=rows, seconds=seconds, log_loss=loss))


@dataclass
class _Marks:
    """The places of a window at which something is measured."""

    rows: int
    places: int
    next: int = 1

    def reached(self, done: int) -> bool:
        """True once for every place, or for several that are passed at once."""
        before = self.next
        while self.next <= self.places and done * self.places >= self.next * self.rows:
            self.next += 1
        return self.next > before


@dataclass
class _LearningClock:
    """CPU seconds of this process, but for what is spent on measuring; elapsed seconds where a GPU does the work."""

    device: torch.device
    excluded: float = field(default=0.0, init=False)

    def __call__(self) -> float:
        return self._raw() - self.excluded

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside takes no time."""
        started = self._raw()
        try:
            yield
        finally:
            self.excluded += self._raw() - started

    def _raw(self) -> float:
        clock: Clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        return clock()


def _capped(kept_R: Bools | None, num_rows: int, max_rows: int, seed: tuple[int, ...]) -> Bools | None:
    """`[R]` the kept rows, or a uniform sample of `max_rows` of them where they are more; None: all rows."""
    rows = np.arange(num_rows) if kept_R is None else np.flatnonzero(kept_R)
    if len(rows) <= max_rows:
        return kept_R
    capped_R = np.zeros(num_rows, bool)
    capped_R[np.random.default_rng([*seed, 2]).permutation(rows)[:max_rows]] = True
    return capped_R
