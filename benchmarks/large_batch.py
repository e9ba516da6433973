"""What a larger batch costs, and which rule for the learning rate wins it back.

In:  the synthetic stream, 1 M rows in 120 hours by default, generated.
Out: one table: AUC before learning and its paired difference from the reference batch, for batches of 8 and 32 times its size.

The reference is the data set's own batch and rates; nothing is tuned again for a larger batch, a rule alone changes the rates.

    python benchmarks/large_batch.py [--hours 120] [--seeds 8] [--workers 2]
    python benchmarks/large_batch.py --times 32 --seeds 3
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from data_schemas.dataset import DatasetSpec, load_spec
from pipeline.comparison.side_by_side import jobs_of, run_jobs
from pipeline.comparison.strategies import Strategy
from pipeline.comparison.stream import RecordedWindow, recorded_stream
from pipeline.comparison.summary import Comparison, compare
from pipeline.config import UpdateConfig, load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.publishing.comparison_report import as_terminal_table

RULES = {
    "rates unscaled": "",
    "dense rate sqrt": "training.learning_rate_scaling=sqrt",
    "dense rate linear": "training.learning_rate_scaling=linear",
    "dense rate by noise scale": "training.learning_rate_scaling=noise_scale",
    "linear, warm-up": "training.learning_rate_scaling=linear training.warmup_steps=500",
    "all rates sqrt": "training.learning_rate_scaling=sqrt training.sparse_learning_rate_scaling=sqrt",
    "LARS": "training.dense_optimizer=lars training.dense_learning_rate=1.0 training.warmup_steps=500",
    "LAMB": "training.dense_optimizer=lamb training.learning_rate_scaling=sqrt",
    "CowClip": "training.cowclip=true training.learning_rate_scaling=sqrt",
}
"""Settings by the name of a rule; the reference batch is the data set's own."""
ALLOWED_LOSS = 0.003
"""AUC that 8 times the reference batch may lose."""


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--hours", type=int, default=120)
    cli.add_argument("--seeds", type=int, default=8)
    cli.add_argument("--times", type=int, nargs="+", default=[8], help="multiples of the reference batch")
    cli.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    cli.add_argument("--workers", type=int, default=2)
    options = cli.parse_args()
    if options.seeds < 2:
        cli.error(f"an interval needs --seeds of at least 2, got {options.seeds}")
    with synthetic_stream(options.hours) as (config, spec, stream):
        comparison = _run(config, spec, stream, options)
    Console(width=200).print(as_terminal_table(comparison))
    for line in comparison.lines:
        if line.auc_difference is not None:
            lost = line.auc_difference.estimate
            verdict = "within" if lost.mean >= -ALLOWED_LOSS else "NOT within"
            print(f"{line.strategy}: AUC {lost.mean:+.4f} [{lost.low:+.4f}, {lost.high:+.4f}], {verdict} {ALLOWED_LOSS}")


@contextmanager
def synthetic_stream(
    hours: int, rows_per_hour: int = SyntheticConfig().rows_per_hour
) -> Iterator[tuple[UpdateConfig, DatasetSpec, Sequence[RecordedWindow]]]:
    """The generated stream as its click log gives it, and the settings of an update."""
    with tempfile.TemporaryDirectory() as folder:
        places = [f"landing={folder}/landing", f"state_dir={folder}/state"]
        fixed = ["budget.min_reserve_seconds=0", "training.precision=fp32", "tracking.enabled=false"]
        config = load_config(None, ["dataset=synthetic", *places, *fixed])
        spec, generated = load_spec("synthetic"), SyntheticConfig(hours=hours, rows_per_hour=rows_per_hour)
        write_landing(generated, Path(config.landing))
        log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
        end = generated.hour_start(hours - 1) + timedelta(days=1)
        ingest_landing(config.landing, log, quarantine, spec, now=end)
        yield config, spec, recorded_stream(config, spec)


def _run(config: UpdateConfig, spec: DatasetSpec, stream: Sequence[RecordedWindow], options: argparse.Namespace) -> Comparison:
    batch = config.training.batch_size
    reference = f"batch {batch}"
    strategies = [Strategy(name=reference, overrides=())]
    for times in options.times:
        for rule in options.rules:
            own = (f"training.batch_size={times * batch}", f"training.reference_batch_size={batch}", *RULES[rule].split())
            strategies.append(Strategy(name=f"{times * batch}, {rule}", overrides=own))
    runs = []
    for run in run_jobs(jobs_of(config, strategies, options.seeds), spec, stream, workers=options.workers):
        runs.append(run)
        print(f"{len(runs)} of {len(strategies) * options.seeds}: {run.strategy}, seed {run.seed}", flush=True)
    names = [strategy.name for strategy in strategies]
    return compare(runs, strategies=names, reference=reference, warmup_hours=1)


if __name__ == "__main__":
    main()
