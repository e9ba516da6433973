"""What do measuring, smoothing and probing add to the time of learning?

In:  an hour of the synthetic stream, generated.
Out: two tables: CPU time of a step with one thing more than a plain one, and what the probes add to a whole window.

A pass of 16 steps, in which the noise scale is measured once, is timed for each kind in turn, so that what slows the machine
meets all alike; shares are of the same round's plain pass. Medians over rounds, with 95 % intervals (bootstrap over rounds).
CPU seconds of one thread, no deadline.

    python benchmarks/step_cost.py --batch 256 --rounds 100
    python benchmarks/step_cost.py --batch 4096 --rounds 16
"""

import argparse
import tempfile
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from large_batch import synthetic_stream
from rich.console import Console
from rich.table import Table

from data_schemas.dataset import DatasetSpec
from pipeline.comparison.stream import RecordedWindow
from pipeline.config import UpdateConfig, overridden
from pipeline.model_state import restore_or_create
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.noise_scale import MEASURE_EVERY
from pipeline.training.threads import torch_threads

F64 = npt.NDArray[np.float64]

PLAIN = "plain"
STEPS: Mapping[str, str] = {
    PLAIN: "",
    "plain again": "",
    "noise scale": "training.learning_rate_scaling=noise_scale",
    "gradient EMA": "training.gradient_ema=0.9",
    "weight EMA": "training.weight_ema=0.95",
    "gradient EMA of rows": "training.sparse_gradient_ema=0.9",
    "weight EMA of rows": "training.sparse_weight_ema=0.95",
}
"""Settings of each kind; 'plain again' tells how much is chance."""
WINDOWS: Mapping[str, str] = {PLAIN: "", "probes on 256 rows": "evaluation.probe_rows=256"}
BASE = "training.dense_optimizer=adagrad training.dense_learning_rate=0.03 training.weight_ema=0 evaluation.probe_rows=0"
"""Adagrad, for it goes with every kind."""
TARGET = 0.03
"""Share of the step time that measuring the noise scale may cost."""


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--batch", type=int, default=256)
    cli.add_argument("--rounds", type=int, default=100)
    options = cli.parse_args()
    batch, rows = options.batch, MEASURE_EVERY * options.batch
    with synthetic_stream(1, max(2 * rows, 40_000)) as (config, spec, stream), torch_threads(1):
        (window,) = stream
        own = overridden(config, [*BASE.split(), f"training.batch_size={batch}"])
        _show_steps(batch, _timed(own, spec, window, STEPS, options.rounds, rows=rows))
        _show_windows(window.num_rows, _timed(own, spec, window, WINDOWS, options.rounds // 4, rows=window.num_rows))


class Pass:
    """Learns the same rows again and again with the settings of one kind."""

    def __init__(self, config: UpdateConfig, spec: DatasetSpec, window: RecordedWindow, rows: int) -> None:
        with tempfile.TemporaryDirectory() as empty:
            self._learner = restore_or_create(overridden(config, [f"state_dir={empty}"]), spec).learner
        self._window, self._probe_rows = window.learned, config.evaluation.probe_rows
        self._kept_R = np.arange(window.num_rows) < rows
        training = config.training
        self._policy = FixedBatch(batch_size=training.batch_size, learning_rate=training.dense_learning_rate)

    def seconds(self, number: int) -> float:
        """CPU time of one pass."""
        started = time.process_time()
        learn(
            self._learner,
            self._window,
            seed=[number],
            policy=self._policy,
            kept_R=self._kept_R,
            probe_rows=self._probe_rows,
        )
        return time.process_time() - started


def _timed(
    config: UpdateConfig, spec: DatasetSpec, window: RecordedWindow, kinds: Mapping[str, str], rounds: int, *, rows: int
) -> dict[str, F64]:
    """Seconds of a pass by kind, one a round; the round that warms up is not among them."""
    if rows > window.num_rows:
        raise SystemExit(f"the hour has {window.num_rows:,} rows, and a pass needs {rows:,}")
    passes = {name: Pass(overridden(config, settings.split()), spec, window, rows) for name, settings in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(passes[name].seconds(number))
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}


def _show_steps(batch: int, seconds: Mapping[str, F64]) -> None:
    plain = seconds[PLAIN]
    table = Table(title=f"steps of {batch} rows, {len(plain)} rounds; in brackets 95 % intervals")
    for name in ("", "CPU ms a step", "more than plain"):
        table.add_column(name, justify="right" if name else "left")
    for name, taken in seconds.items():
        share = "" if name == PLAIN else "{:+.1%} [{:+.1%}, {:+.1%}]".format(*_median_with_interval(taken / plain - 1))
        table.add_row(name, f"{1000 * np.median(taken) / MEASURE_EVERY:.2f}", share)
    Console(width=120).print(table)
    cost, _, _ = _median_with_interval(seconds["noise scale"] / plain - 1)
    print(
        f"the noise scale costs {cost:+.1%} of a step: {'within' if cost <= TARGET else 'NOT within'} {TARGET:.0%}", flush=True
    )


def _show_windows(rows: int, seconds: Mapping[str, F64]) -> None:
    plain = seconds[PLAIN]
    table = Table(title=f"a window of {rows:,} rows, {len(plain)} rounds; in brackets 95 % intervals")
    for name in ("", "CPU ms", "ms more than plain"):
        table.add_column(name, justify="right" if name else "left")
    for name, taken in seconds.items():
        more = "" if name == PLAIN else "{:.0f} [{:.0f}, {:.0f}]".format(*_median_with_interval(1000 * (taken - plain)))
        table.add_row(name, f"{1000 * np.median(taken):.0f}", more)
    Console(width=120).print(table)


def _median_with_interval(values: F64) -> tuple[float, float, float]:
    medians = np.median(np.random.default_rng(0).choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


if __name__ == "__main__":
    main()
