"""What do moving averages of gradients and of weights do to the steadiness of learning, and to accuracy?

In:  the synthetic stream, 23 hours by default, so that the last one has rows enough; generated.
Out: one table for each batch size: variance over steps of the log loss of 20,000 fixed rows that nobody learns, mean absolute
     change of AUC from hour to hour, and AUC before learning; beside each, by how much it differs, seed by seed, from the same
     optimizer without averages.

The variance is that around the straight trend of a window, of windows with three points or more. Two optimizers are here
because Adam smooths gradients itself: an average of gradients needs Adagrad, whose rate was the best of .01, .03 and .1 at
batch 256 on seed 100.

    python benchmarks/smoothing.py [--batches 256 4096] [--seeds 5]
    python benchmarks/smoothing.py --batches 4096 --weight-ema 0.5
"""

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from large_batch import synthetic_stream
from rich.console import Console
from rich.table import Table

from data_schemas.dataset import DatasetSpec
from pipeline.comparison.run import Probing, StrategyRun, run_strategy
from pipeline.comparison.statistics import Estimate, mean_with_interval, paired_difference
from pipeline.comparison.stream import RecordedWindow
from pipeline.comparison.summary import figures_of
from pipeline.config import UpdateConfig, overridden
from pipeline.evaluation.stability import variance_over_steps

ADAM = "training.weight_ema=0"
ADAGRAD = "training.weight_ema=0 training.dense_optimizer=adagrad training.dense_learning_rate=0.03"
VARIANTS: Mapping[str, Mapping[str, str]] = {
    "Adam": {
        "no average": ADAM,
        "weight EMA .95": f"{ADAM} training.weight_ema=0.95",
        "weight EMA .99": f"{ADAM} training.weight_ema=0.99",
        "weight EMA .95, of rows too": f"{ADAM} training.weight_ema=0.95 training.sparse_weight_ema=0.95",
    },
    "Adagrad": {
        "no average": ADAGRAD,
        "gradient EMA .9": f"{ADAGRAD} training.gradient_ema=0.9",
        "gradient EMA .9, of rows too": f"{ADAGRAD} training.gradient_ema=0.9 training.sparse_gradient_ema=0.9",
        "weight EMA .95": f"{ADAGRAD} training.weight_ema=0.95",
    },
}
"""Settings by optimizer and average; the first of each optimizer is what the others are measured against."""
PROBING = Probing(rows=20_000, places=8)
WARMUP_HOURS = 4
TARGET = -0.2
"""Share by which the variance or the change of AUC should fall."""


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--hours", type=int, default=23)
    cli.add_argument("--rows-per-hour", type=int, default=12_000)
    cli.add_argument("--batches", type=int, nargs="+", default=[256, 4096])
    cli.add_argument("--seeds", type=int, default=5)
    cli.add_argument("--first-seed", type=int, default=0)
    cli.add_argument("--weight-ema", type=float, help="averages of weights alone, of this decay, under Adam")
    options = cli.parse_args()
    variants = VARIANTS if options.weight_ema is None else {"Adam": _of_weights(options.weight_ema)}
    with synthetic_stream(options.hours, options.rows_per_hour) as (config, spec, stream):
        if stream[-1].num_rows < PROBING.rows:
            raise SystemExit(f"the last hour has {stream[-1].num_rows:,} rows, and the probe needs {PROBING.rows:,}")
        rows = sum(window.num_rows for window in stream)
        print(f"{rows:,} rows in {len(stream)} hours; {options.seeds} seeds from {options.first_seed}", flush=True)
        for batch in options.batches:
            seeds = range(options.first_seed, options.first_seed + options.seeds)
            own = overridden(config, [f"training.batch_size={batch}"])
            _show(batch, {name: _runs(own, spec, stream, averages, seeds) for name, averages in variants.items()})


def _of_weights(decay: float) -> dict[str, str]:
    dense = f"{ADAM} training.weight_ema={decay}"
    return {
        "no average": ADAM,
        f"weight EMA {decay}": dense,
        f"weight EMA {decay}, of rows too": f"{dense} training.sparse_weight_ema={decay}",
    }


def _runs(
    config: UpdateConfig, spec: DatasetSpec, stream: Sequence[RecordedWindow], averages: Mapping[str, str], seeds: Sequence[int]
) -> dict[str, list[dict[str, float]]]:
    """By average: the figures of each seed."""
    return {
        average: [
            _figures(run_strategy(average, own, spec, stream, seed=seed, probing=PROBING), stream[0].start) for seed in seeds
        ]
        for average, own in ((name, overridden(config, settings.split())) for name, settings in averages.items())
    }


def _figures(run: StrategyRun, first: int) -> dict[str, float]:
    figures = figures_of(run, first + WARMUP_HOURS)
    if figures is None:
        raise SystemExit(f"{run.strategy}, seed {run.seed}: {run.diverged}")
    later = range(WARMUP_HOURS, len(run.windows))
    losses = [[point.log_loss for point in run.probe if point.window == window] for window in later]
    variances = [variance_over_steps(loss_T) for loss_T in losses if len(loss_T) > 2]
    return {"auc": figures.auc, "variance": float(np.mean(variances)), "auc_change": figures.auc_change}


def _show(batch: int, runs: Mapping[str, Mapping[str, list[dict[str, float]]]]) -> None:
    table = Table(title=f"batch {batch}; in brackets 95 % intervals over seeds")
    for name in ("", "variance over steps", "to none", "hourly AUC change", "to none", "AUC", "less none"):
        table.add_column(name, justify="right" if name else "left")
    for optimizer, by_average in runs.items():
        reference = by_average["no average"]
        for average, figures in by_average.items():
            table.add_row(f"{optimizer}, {average}", *_cells(figures, None if figures is reference else reference))
    Console(width=200).print(table)
    for optimizer, by_average in runs.items():
        for average, figures in by_average.items():
            if average != "no average":
                print(f"batch {batch}, {optimizer}, {average}: {_verdict(figures, by_average['no average'])}", flush=True)


def _cells(figures: Sequence[dict[str, float]], reference: Sequence[dict[str, float]] | None) -> list[str]:
    def of(name: str) -> list[float]:
        return [one[name] for one in figures]

    changes = ["", ""] if reference is None else [_interval(_change(figures, reference, name), "+.0%") for name in _STEADINESS]
    auc = "" if reference is None else _interval(_auc_difference(figures, reference), "+.4f")
    variance, auc_change = np.mean(of("variance")), np.mean(of("auc_change"))
    return [f"{variance:.2e}", changes[0], f"{auc_change:.5f}", changes[1], f"{np.mean(of('auc')):.4f}", auc]


_STEADINESS = ("variance", "auc_change")


def _change(figures: Sequence[dict[str, float]], reference: Sequence[dict[str, float]], name: str) -> Estimate:
    """Of a figure, as a share of what it is without averages, seed by seed."""
    return mean_with_interval([own[name] / other[name] - 1 for own, other in zip(figures, reference, strict=True)])


def _auc_difference(figures: Sequence[dict[str, float]], reference: Sequence[dict[str, float]]) -> Estimate:
    return paired_difference([one["auc"] for one in figures], [one["auc"] for one in reference]).estimate


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _verdict(figures: Sequence[dict[str, float]], reference: Sequence[dict[str, float]]) -> str:
    changes = {name.replace("_", " "): _change(figures, reference, name) for name in _STEADINESS}
    reached = [name for name, change in changes.items() if change.mean <= TARGET and change.high < 0]
    keeps = _auc_difference(figures, reference).high >= 0
    steadier = f"{' and '.join(reached)} at least 20 % lower" if reached else "neither 20 % lower"
    return f"{steadier}, {'no loss of AUC beyond the interval' if keeps else 'AUC is lost'}"


if __name__ == "__main__":
    main()
