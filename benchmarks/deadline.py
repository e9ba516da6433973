"""Does an update end inside its budget, whatever comes, and does it use the time that it has?

In:  a simulated machine whose steps take f + d * b seconds, and stall; or, with --real, this machine.
Out: one table a policy: hours that ended in time, reserve, and rows learned as a share of those that were affordable.

50 simulated hours of a 600-second budget: traffic from 0.2 to 20 times what fits at the smallest batch, stalls of up to 30 s in
which everything takes 1 to 4 times as long, the tail after learning (evaluation, checkpoint, publishing) too. The policies are
the ones of an update, on a simulated clock. Affordable is what steps of the largest batch that the policy took in the hour
would have learned in the very same time with the very same stalls, known in advance.

    python benchmarks/deadline.py [--hours 50] [--seed 0]
    python benchmarks/deadline.py --real

`--real` runs 6 hours of synthetic clicks through the whole update with a budget of 20 s each.
"""

import argparse
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from data_schemas.dataset import load_spec
from pipeline.config import TrainingConfig, load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.training.batch_size import batch_policy
from pipeline.training.budget import reserve_seconds
from pipeline.training.noise_scale import LEAST_MEASUREMENTS, NoiseScale, Spread
from pipeline.training.step_time import StepTime, StepTimeFit
from pipeline.update import run_update

BUDGET_SECONDS = 600.0
STEP = StepTime(fixed_seconds=0.002, row_seconds=1 / 60_000)
"""Of the simulated machine, undisturbed."""
TAIL_SECONDS = 4.0
"""Work after learning, undisturbed."""
NOISE_SCALE = 3_000.0
TRAINING = {"micro_batch_size": 128, "min_batch_size": 128, "max_batch_size": 8192, "sparse_step_rows": 0}
"""Each step stands alone here."""
WARM_TAILS = 5
"""Hours before the first, whose tails the reserve is learned from."""


@dataclass
class Machine:
    """A clock that work moves on, slower in stalls."""

    rng: np.random.Generator
    now: float = 0.0
    _stall: tuple[float, float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._stall = self._next_stall(0.0)

    def work(self, seconds: float) -> None:
        """Takes `seconds` of an undisturbed machine."""
        while seconds > 0:
            start, end, factor = self._stall
            if self.now >= end:
                self._stall = self._next_stall(end)
                continue
            slower = factor if self.now >= start else 1.0
            until = (end if self.now >= start else start) - self.now
            done = min(seconds, until / slower)
            self.now += done * slower
            seconds -= done

    def _next_stall(self, after: float) -> tuple[float, float, float]:
        start = after + self.rng.exponential(90.0)
        return start, start + self.rng.uniform(1.0, 30.0), self.rng.uniform(1.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Hour:
    """What one simulated update did."""

    rows: int
    learned: int
    affordable: int
    seconds: float
    reserve: float
    unreached: int


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--hours", type=int, default=50)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--real", action="store_true")
    options = cli.parse_args()
    if options.real:
        _real()
        return
    table = Table(title=f"{options.hours} simulated hours of {BUDGET_SECONDS:.0f} s, seed {options.seed}")
    for name in (
        "policy",
        "in time",
        "longest, s",
        "greatest reserve",
        "overloaded",
        "least share learned",
        "mean share learned",
    ):
        table.add_column(name, justify="right")
    for how in ("deadline", "goodput"):
        table.add_row(how, *_row(_simulate(how, options.hours, options.seed)))  # type: ignore[arg-type]
    Console(width=140).print(table)


def _row(hours: list[Hour]) -> list[str]:
    shares = [hour.learned / hour.affordable for hour in hours]
    return [
        f"{sum(hour.seconds <= BUDGET_SECONDS for hour in hours)} of {len(hours)}",
        f"{max(hour.seconds for hour in hours):.1f}",
        f"{max(hour.reserve for hour in hours) / BUDGET_SECONDS:.1%}",
        str(sum(hour.affordable < hour.rows for hour in hours)),
        f"{min(shares):.1%}",
        f"{np.mean(shares):.1%}",
    ]


def _simulate(how: Literal["deadline", "goodput"], num_hours: int, seed: int) -> list[Hour]:
    rng = np.random.default_rng([seed, 1])
    fitting = (BUDGET_SECONDS - 30) / (STEP.fixed_seconds / 128 + STEP.row_seconds)
    tails = [TAIL_SECONDS * rng.uniform(1, 3) for _ in range(WARM_TAILS)]
    prior, hours = STEP, []
    for number in range(num_hours):
        rows = round(fitting * np.exp(rng.uniform(np.log(0.2), np.log(20.0))))
        hour, tail, prior = _hour(how, rows, tails, prior, seed=[seed, number])
        tails.append(tail)
        hours.append(hour)
    return hours


def _hour(
    how: Literal["deadline", "goodput"], rows: int, tails: list[float], prior: StepTime, *, seed: list[int]
) -> tuple[Hour, float, StepTime]:
    reserve = reserve_seconds(tails, budget_seconds=BUDGET_SECONDS, min_reserve_seconds=1.0)
    line = BUDGET_SECONDS - reserve
    machine, fit = Machine(np.random.default_rng(seed)), StepTimeFit(prior=prior)
    training = TrainingConfig(batch_policy=how, **TRAINING)  # type: ignore[arg-type]
    noise = NoiseScale()
    for _ in range(LEAST_MEASUREMENTS):
        noise.add(Spread(noise=NOISE_SCALE, signal=1.0))
    policy = batch_policy(training, fit=fit, noise=noise)
    position, learned, step, largest = 0, 0, 0, 1
    while position < rows and machine.now < line:
        decision = policy.decide(step=step, position=position, remaining=rows - position, seconds_left=line - machine.now)
        assert decision is not None
        batch = min(decision.batch_size, max(round((rows - position) * decision.keep_rate), 1))
        started = machine.now
        machine.work(STEP.seconds(batch))
        policy.observe(steps=1, rows=batch, seconds=machine.now - started)
        learned, step, largest = learned + batch, step + 1, max(largest, batch)
        position = min(position + max(round(batch / decision.keep_rate), batch), rows)
    stopped = machine.now
    machine.work(TAIL_SECONDS)
    affordable = _affordable(rows, largest, line, seed)
    hour = Hour(
        rows=rows, learned=learned, affordable=affordable, seconds=machine.now, reserve=reserve, unreached=rows - position
    )
    return hour, machine.now - stopped, fit.for_the_next or prior


def _affordable(rows: int, batch: int, line: float, seed: list[int]) -> int:
    """Rows that steps of `batch` learn until the reserve line on the same machine, with the same stalls at the same times."""
    machine, learned = Machine(np.random.default_rng(seed)), 0
    while learned < rows and machine.now < line:
        size = min(batch, rows - learned)
        machine.work(STEP.seconds(size))
        learned += size
    return learned


def _real() -> None:
    table = Table(title="6 real hours, budget 20 s each")
    for name in ("hour", "rows", "learned", "thinned", "pending", "batches", "seconds", "AUC before"):
        table.add_column(name, justify="right")
    stream = SyntheticConfig(hours=6, rows_per_hour=500_000, traffic_ratio=17.0)
    with tempfile.TemporaryDirectory() as folder:
        settings = ["budget.seconds=20", "training.batch_policy=deadline", "training.max_batch_size=512"]
        places = [f"landing={folder}/landing", f"state_dir={folder}/state", "tracking.enabled=false"]
        config = load_config(None, ["dataset=synthetic", *places, *settings])
        write_landing(stream, Path(config.landing))
        spec, end = load_spec("synthetic"), stream.hour_start(6) + timedelta(days=1)
        log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
        ingest_landing(config.landing, log, quarantine, spec, now=end)
        while report := run_update(config, now=end):
            sizes = sorted({record.batch_size for record in report.plan})
            table.add_row(
                f"{report.window_start:%H}",
                f"{report.rows:,}",
                f"{report.rows_learned:,}",
                f"{report.rows_thinned:,}",
                f"{report.rows_pending:,}",
                f"{sizes[0]} to {sizes[-1]}",
                f"{report.total_seconds:.1f}",
                f"{report.before.auc:.4f}" if report.before and report.before.auc else "-",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
