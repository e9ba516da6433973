"""What is choosing the batch while learning worth, against the best fixed batch that could be known in hindsight?

In:  a recorded stream, and CPU seconds for each window.
Out: one table: AUC before learning of fixed batches and of `deadline` and `goodput`, and their paired difference from the best
     fixed one, which is picked after all runs by its own mean AUC.

All have the same seconds a window; what the last step takes beyond them, the next window has less. What a fixed batch does not
come to in them is left out; the others plan what to leave out.
`--seconds` of 1000 is time enough for everything; little is overload. In all of them the dense rate follows the batch as
`--scaling` says, from that of the data set's own batch.

    python benchmarks/dynamic.py synthetic --seconds 1000
    python benchmarks/dynamic.py synthetic --hours 24 --rows-per-hour 40000 --seconds 0.1
    python benchmarks/dynamic.py brunch --hours 36 --seconds 1000 --fixed 128 256 512 1024
    python benchmarks/dynamic.py brunch --hours 144 --window-hours 24 --seconds 0.8 --fixed 512 1024 2048
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from large_batch import synthetic_stream
from rich.console import Console

from data_schemas.dataset import DatasetSpec
from pipeline.comparison.run import Probing
from pipeline.comparison.side_by_side import jobs_of, run_jobs
from pipeline.comparison.strategies import Strategy
from pipeline.comparison.stream import RecordedWindow, recorded_stream
from pipeline.comparison.summary import compare
from pipeline.config import RateScaling, UpdateConfig, load_config, spec_of
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.publishing.comparison_report import as_terminal_table

BRUNCH = Path(__file__).parents[1] / "../shared/data/brunch/impressions"
TOLERANCE = 0.001
"""AUC below the best fixed batch."""
UNDISTURBED = Probing(places=0)
"""No prediction in mid-pass, at each eighth of the rows that are passed by: its time is not counted, but it empties caches for
the next step, most where a pass leaves rows out and so comes to all eighths."""


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("dataset", choices=("synthetic", "brunch"))
    cli.add_argument("--seconds", type=float, required=True, help="CPU seconds of learning for each window")
    cli.add_argument("--hours", type=int, default=24)
    cli.add_argument("--window-hours", type=int, default=1, help="of brunch")
    cli.add_argument("--rows-per-hour", type=int, default=8_334, help="of the synthetic stream")
    cli.add_argument("--seeds", type=int, default=5)
    cli.add_argument("--workers", type=int, default=2)
    cli.add_argument("--scaling", choices=get_args(RateScaling), default="sqrt")
    cli.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of all strategies")
    cli.add_argument("--fixed", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    options = cli.parse_args()
    if options.seeds < 2:
        cli.error(f"an interval needs --seeds of at least 2, got {options.seeds}")
    if options.dataset == "synthetic" and options.window_hours != 1:
        cli.error(f"--window-hours is of brunch, got {options.window_hours} with the synthetic stream; leave it out")
    if options.dataset == "synthetic":
        opened = synthetic_stream(options.hours, options.rows_per_hour)
    else:
        opened = _brunch(options.hours, options.window_hours, options.set)
    with opened as (config, spec, stream):
        _compare(config, spec, stream, options)


def _compare(config: UpdateConfig, spec: DatasetSpec, stream: Sequence[RecordedWindow], options: argparse.Namespace) -> None:
    own = config.training.batch_size
    of_all = (f"budget.seconds={options.seconds}", *options.set)
    largest = f"training.max_batch_size={max(options.fixed)}"
    rates = (f"training.reference_batch_size={own}", f"training.learning_rate_scaling={options.scaling}")
    fixed = [Strategy(name=f"fixed {b}", overrides=(*of_all, *rates, f"training.batch_size={b}")) for b in options.fixed]
    chosen = [
        Strategy(name=how, overrides=(*of_all, *rates, largest, f"training.batch_policy={how}"))
        for how in ("deadline", "goodput")
    ]
    jobs = jobs_of(config, [*fixed, *chosen], options.seeds, probing=UNDISTURBED)
    runs = []
    for run in run_jobs(jobs, spec, stream, workers=options.workers):
        runs.append(run)
        print(f"{len(runs)} of {len(jobs)}: {run.strategy}, seed {run.seed}", flush=True)
    names = [strategy.name for strategy in (*fixed, *chosen)]
    first = compare(runs, strategies=names, reference=names[0], warmup_hours=min(24, options.hours // 6))
    best = max((line for line in first.lines if line.strategy.startswith("fixed") and line.auc), key=lambda one: one.auc.mean)  # type: ignore[union-attr]
    result = compare(runs, strategies=names, reference=best.strategy, warmup_hours=min(24, options.hours // 6))
    Console(width=200).print(as_terminal_table(result))
    for how in ("deadline", "goodput"):
        difference = result.line(how).auc_difference
        assert difference is not None
        lost = difference.estimate
        verdict = "within" if lost.mean >= -TOLERANCE else "NOT within"
        print(
            f"{how}: AUC {lost.mean:+.4f} [{lost.low:+.4f}, {lost.high:+.4f}] from {best.strategy}, the best fixed batch in "
            f"hindsight: {verdict} {TOLERANCE}"
        )


@contextmanager
def _brunch(
    hours: int, window_hours: int, settings: Sequence[str]
) -> Iterator[tuple[UpdateConfig, DatasetSpec, Sequence[RecordedWindow]]]:
    if not BRUNCH.is_dir():
        raise SystemExit(f"there is no folder {BRUNCH}")
    with tempfile.TemporaryDirectory() as folder:
        landing = Path(folder) / "landing"
        landing.mkdir()
        for file in sorted(BRUNCH.glob("*.parquet"))[:hours]:
            (landing / file.name).symlink_to(file.resolve())
        fixed = [
            "budget.min_reserve_seconds=0",
            "training.precision=fp32",
            "tracking.enabled=false",
            f"window.hours={window_hours}",
        ]
        config = load_config(None, ["dataset=brunch", f"landing={landing}", f"state_dir={folder}/state", *fixed, *settings])
        spec = spec_of(config)
        log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
        ingest_landing(str(landing), log, quarantine, spec, now=datetime.now(UTC))
        yield config, spec, recorded_stream(config, spec, hours=hours)


if __name__ == "__main__":
    main()
