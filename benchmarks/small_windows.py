"""Are many small windows as good as few large ones?

In:  300 hours of the synthetic stream, generated: users, items and categories change their click rates all the time.
Out: one table: the same rows as 10, 30 and 100 windows; AUC of the model that learns each window after it was predicted, AUC
     of the one that stopped after the first tenth of the rows, and the gain of the fresh one over the frozen one.

AUC is that of all rows of a tenth of the stream, in which all three cuts end a window; its mean over the last nine tenths,
weighted by rows. The windows that a row is predicted in differ, the rows that are judged together do not.

    python benchmarks/small_windows.py --seeds 5
"""

import argparse
import tempfile
from collections.abc import Sequence

import numpy as np
from large_batch import synthetic_stream
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from models.id_table import SHARED_ROW
from pipeline.comparison.statistics import Estimate, mean_with_interval, paired_difference
from pipeline.comparison.stream import RecordedWindow, recorded_stream
from pipeline.config import UpdateConfig, overridden
from pipeline.evaluation.score import probabilities
from pipeline.model_state import restore_or_create
from pipeline.training.batch_size import batch_policy
from pipeline.training.learn import learn
from pipeline.training.learner import Learner
from pipeline.training.threads import torch_threads

HOURS, TENTHS = 300, 10
CUTS = (10, 30, 100)
"""Numbers of windows; the first is what the others are measured against."""


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rows-per-hour", type=int, default=600)
    cli.add_argument("--seeds", type=int, default=5)
    options = cli.parse_args()
    aucs: dict[int, list[tuple[float, float]]] = {}
    with synthetic_stream(HOURS, options.rows_per_hour) as (config, spec, hourly), torch_threads(1):
        print(f"{sum(window.num_rows for window in hourly):,} rows in {HOURS} hours, {options.seeds} seeds", flush=True)
        for windows in CUTS:
            hours = HOURS // windows
            cut = [f"window.hours={hours}", f"window.align_hour={hourly[0].start % hours}"]
            stream = recorded_stream(overridden(config, cut), spec)
            assert len(stream) == windows
            aucs[windows] = [fresh_and_frozen(config, spec, stream, seed) for seed in range(options.seeds)]
    _show(aucs)


def fresh_and_frozen(
    config: UpdateConfig, spec: DatasetSpec, stream: Sequence[RecordedWindow], seed: int
) -> tuple[float, float]:
    """AUC of the model that goes on learning and of the one that stops after a tenth, over the other nine."""
    fresh, frozen = (_new_learner(overridden(config, [f"training.seed={seed}"]), spec) for _ in range(2))
    a_tenth = len(stream) // TENTHS
    rows, aucs = [], []
    for start in range(0, len(stream), a_tenth):
        windows = stream[start : start + a_tenth]
        scored: dict[str, list[F32]] = {"fresh": [], "frozen": []}
        for window in windows:
            if start:
                scored["fresh"].append(_scores(fresh, window))
                scored["frozen"].append(_scores(frozen, window))
            else:
                _learn(frozen, window)
            _learn(fresh, window)
        if start:
            labels_R = np.concatenate([window.predicted.labels_R for window in windows])
            aucs.append([roc_auc_score(labels_R, np.concatenate(parts)) for parts in scored.values()])
            rows.append(len(labels_R))
    fresh_auc, frozen_auc = np.average(aucs, weights=rows, axis=0)
    return float(fresh_auc), float(frozen_auc)


def _new_learner(config: UpdateConfig, spec: DatasetSpec) -> Learner:
    with tempfile.TemporaryDirectory() as empty:
        return restore_or_create(overridden(config, [f"state_dir={empty}"]), spec).learner


def _scores(learner: Learner, window: RecordedWindow) -> F32:
    with learner.averaged() as dense_weights:
        return probabilities(learner.model, dense_weights, window.predicted, device=learner.device)


def _learn(learner: Learner, window: RecordedWindow) -> None:
    if window.fresh_rows:
        learner.model.tables.start_rows(window.fresh_rows, like=SHARED_ROW, add_up=learner.processes.add_up)
    learn(learner, window.learned, seed=[learner.config.seed, window.end], policy=batch_policy(learner.config))


def _show(aucs: dict[int, list[tuple[float, float]]]) -> None:
    table = Table(title="95 % intervals over seeds")
    for name in ("windows", "AUC fresh", "AUC frozen", "gain", f"gain less that of {CUTS[0]}", "AUC fresh, less"):
        table.add_column(name, justify="right")
    gains = {windows: [fresh - frozen for fresh, frozen in pairs] for windows, pairs in aucs.items()}
    fresh = {windows: [pair[0] for pair in pairs] for windows, pairs in aucs.items()}
    for windows, pairs in aucs.items():
        means = [mean_with_interval([pair[place] for pair in pairs]) for place in (0, 1)]
        less = [paired_difference(of[windows], of[CUTS[0]]).estimate for of in (gains, fresh)] if windows != CUTS[0] else []
        cells = [*(_interval(mean, ".4f") for mean in (*means, mean_with_interval(gains[windows])))]
        table.add_row(str(windows), *cells, *(_interval(one, "+.4f") for one in less))
    Console(width=200).print(table)
    change = paired_difference(gains[CUTS[-1]], gains[CUTS[0]]).estimate
    verdict = "does not fall" if change.high >= 0 else "FALLS"
    print(f"From {CUTS[0]} to {CUTS[-1]} windows the gain {verdict}: {_interval(change, '+.4f')}")


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


if __name__ == "__main__":
    main()
