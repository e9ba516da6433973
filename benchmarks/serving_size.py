"""What narrow tables save in a served model, and what they cost: size, speed, AUC and log loss.

In:  a synthetic stream, or, with --dataset and --landing, another click log; a model learns its first hours in a temporary
     folder.
Out: one line a precision: bytes of the served folder and of the tables in memory, seconds to load, rows/s predicted from
     examples, AUC and log loss on the hours after, and how far probabilities are from fp32's.

    python benchmarks/serving_size.py [--hours 24] [--test-hours 3] [--rows 20000] [--repetitions 5] [--seed 0]
    python benchmarks/serving_size.py --dataset brunch --landing FOLDER --hours 48 --test-hours 6

The precisions predict in turns, each from its own export of the same checkpoint; seconds are medians. In memory, fp32 tables
have a sum of squares beside each wide weight, which is counted, and accumulators of embeddings, which are not.
"""

import argparse
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import numpy as np

from data_schemas.dataset import load_spec
from data_schemas.examples import F32, Examples, concatenate
from models.narrow_tables import NarrowTables
from pipeline.config import TablePrecision, UpdateConfig, load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.data.windows import next_window, read_window
from pipeline.evaluation.metrics import measure
from pipeline.model_state import restore_or_create
from pipeline.publishing.predictor import Predictor, export_predictor, load_predictor
from pipeline.training.processes import Processes
from pipeline.update import run_update

PRECISIONS: tuple[TablePrecision, ...] = get_args(TablePrecision)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--dataset", default="synthetic")
    cli.add_argument("--landing", help="of the data set; without it, synthetic clicks are generated")
    cli.add_argument("--hours", type=int, default=24, help="windows that are learned")
    cli.add_argument("--test-hours", type=int, default=3, help="windows after them that are predicted")
    cli.add_argument("--rows", type=int, default=20_000, help="synthetic rows an hour")
    cli.add_argument("--repetitions", type=int, default=5)
    cli.add_argument("--seed", type=int, default=0)
    options = cli.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        landing = options.landing
        if landing is None:
            landing = folder / "landing"
            hours = options.hours + options.test_hours
            write_landing(SyntheticConfig(seed=options.seed, hours=hours, rows_per_hour=options.rows), landing)
        quiet = ["tracking.enabled=false", "gate.action=off", "alarms.action=off", "training.precision=fp32"]
        places = [f"dataset={options.dataset}", f"landing={landing}", f"state_dir={folder / 'state'}"]
        config = load_config(overrides=[*places, *quiet, f"training.seed={options.seed}"])
        _learn(config, options.hours)
        examples = _next_hours(config, options.test_hours)
        for precision in PRECISIONS:
            _export(config, folder / precision, precision)
        _compare(folder, examples, options.repetitions)


def _learn(config: UpdateConfig, hours: int) -> None:
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))
    for hour in range(hours):
        report = run_update(config)
        if report is None:
            sys.exit(f"the stream has only {hour} hours; lower --hours")
    assert report is not None
    print(f"learned {hours} windows of {config.dataset}, the last of {report.rows:,} rows", file=sys.stderr)


def _next_hours(config: UpdateConfig, hours: int) -> Examples:
    spec = load_spec(config.dataset)
    log, cursor = ClickLog.open_or_create(config.log_path, spec), restore_or_create(config, spec, Processes()).cursor
    parts = []
    for _ in range(hours):
        window = next_window(log, cursor, config.window, datetime.now(UTC))
        if window is None:
            sys.exit("no hour is left to predict; lower --hours or --test-hours")
        parts.append(to_examples(read_window(log, window, columns_to_read(spec)), spec))
        cursor = window.cursor_after()
    return concatenate(parts)


def _export(config: UpdateConfig, folder: Path, precision: TablePrecision) -> None:
    spec = load_spec(config.dataset)
    export_predictor(restore_or_create(config, spec, Processes()), spec, config.model, folder, table_precision=precision)


def _compare(folder: Path, examples: Examples, repetitions: int) -> None:
    loaded, load_seconds, seconds = dict[str, Predictor](), dict[str, float](), {name: list[float]() for name in PRECISIONS}
    probabilities: dict[str, F32] = {}
    for name in PRECISIONS:
        started = time.perf_counter()
        loaded[name] = load_predictor(folder / name)
        load_seconds[name] = time.perf_counter() - started
    for _ in range(repetitions):
        for name in PRECISIONS:
            started = time.perf_counter()
            probabilities[name] = loaded[name].predict_examples(examples)
            seconds[name].append(time.perf_counter() - started)
    print(f"{examples.num_rows:,} rows predicted, {int(examples.labels_R.sum()):,} clicks")
    print(
        f"{'tables':8} {'weights MB':>11} {'folder MB':>10} {'in memory MB':>14} {'load s':>7} {'rows/s':>9} {'AUC':>8} "
        f"{'change':>9} {'log loss':>9} {'change':>9} {'mean |dp|':>10} {'max |dp|':>9}"
    )
    exact = probabilities["fp32"]
    base = measure(examples.labels_R, exact, examples.user_R)
    for name in PRECISIONS:
        figures = measure(examples.labels_R, probabilities[name], examples.user_R)
        assert figures.auc is not None, "the test hours have one class only"
        assert base.auc is not None
        difference = np.abs(probabilities[name] - exact)
        files = sum(path.stat().st_size for path in (folder / name).iterdir())
        print(
            f"{name:8} {(folder / name / 'weights.safetensors').stat().st_size / 1e6:11.2f} {files / 1e6:10.2f} "
            f"{_bytes_of_tables(loaded[name]) / 1e6:14.2f} {load_seconds[name]:7.2f} "
            f"{examples.num_rows / statistics.median(seconds[name]):9,.0f} {figures.auc:8.5f} {figures.auc - base.auc:+9.6f} "
            f"{figures.log_loss:9.5f} {figures.log_loss - base.log_loss:+9.6f} {difference.mean():10.6f} "
            f"{difference.max():9.6f}"
        )


def _bytes_of_tables(predictor: Predictor) -> int:
    tables = predictor.model.tables
    if isinstance(tables, NarrowTables):
        return tables.nbytes("deep") + tables.nbytes("wide")
    collections = (tables.deep.state_dict(), tables.wide.state_dict())
    return sum(tensor.nbytes for collection in collections for tensor in collection.values())


if __name__ == "__main__":
    main()
