"""How often alarms call an ordinary window suspicious, and how often they see a fault.

In:  the hours of a landing folder (the brunch week by default), or of the synthetic stream.
Out: ordinary windows that raise an alarm, each compared with those before it; and, of 100 windows with a fault put in, those
     that do.

Faults: nine rows of ten are missing; three times as many clicks; an id without a value in any row; a number in other units; ten
users who clicked in the window have twenty times their clicks, as further rows; half of the rows have items never seen.

    python benchmarks/alarms.py brunch --landing ../shared/data/brunch/impressions
    python benchmarks/alarms.py synthetic
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.examples import Examples, concatenate
from data_schemas.hashing import MISSING, mix64
from models.memory import Memory
from pipeline.config import load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine, RowRange
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.evaluation.alarms import Alarm, Past, alarms_of
from pipeline.evaluation.profile import profile_of

Fault = Callable[[Examples, DatasetSpec, np.random.Generator], Examples]


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("dataset")
    cli.add_argument("--landing", default="")
    cli.add_argument("--windows", type=int, default=100, help="with each fault")
    cli.add_argument("--hours", type=int, default=168, help="of the synthetic stream")
    options = cli.parse_args()
    spec = load_spec(options.dataset)
    with tempfile.TemporaryDirectory() as temporary:
        landing = options.landing
        if options.dataset == "synthetic":
            landing = f"{temporary}/landing"
            write_landing(SyntheticConfig(hours=options.hours, rows_per_hour=4000), Path(landing))
        hours = list(hours_of(landing, spec, Path(temporary)))
    own = load_config().alarms
    judged, rng = range(own.min_windows, len(hours)), np.random.default_rng(0)
    faults = faults_of(spec)
    chosen = {name: Counter(rng.choice(judged, options.windows).tolist()) for name in faults}
    ordinary, raised = [], {name: [] for name in faults}
    memory, past = Memory(spec), []
    for place, (hour, examples) in enumerate(hours):
        window = Past(hour=hour, profile=profile_of(examples, spec, memory))
        if place in judged:
            ordinary.append(_alarms(window, past))
        for name, fault in faults.items():
            for _ in range(chosen[name][place]):
                broken = profile_of(fault(examples, spec, rng), spec, memory)
                raised[name].append(_alarms(Past(hour=hour, profile=broken), past))
        past.append(window)
        memory.add(examples, hour)
    table = Table("windows", "count", "with an alarm", "what raised it")
    for name, found in {"as they are": ordinary, **raised}.items():
        table.add_row(name, str(len(found)), str(sum(map(bool, found))), _raised(found))
    Console(width=120).print(table)


def faults_of(spec: DatasetSpec) -> dict[str, Fault]:
    """Those that the data set's features allow."""
    found: dict[str, Fault] = {
        "a tenth of the rows": _tenth,
        "three times the clicks": _clicked_more,
        "an id without values": _missing,
        "items never seen": _new_items,
    }
    if spec.numeric:
        found["a number in other units"] = _other_units
    return found | {"ten users, twenty times their clicks": _burst}


def hours_of(landing: str, spec: DatasetSpec, folder: Path) -> Iterator[tuple[int, Examples]]:
    """The hours of a landing folder, in order."""
    log = ClickLog.open_or_create(folder / "log", spec)
    ingest_landing(landing, log, Quarantine.open_or_create(folder / "quarantine"), spec, now=datetime.now(UTC))
    by_hour: dict[int, list[RowRange]] = {}
    for file in log.files():
        by_hour.setdefault(file.hour, []).append(RowRange.whole(file))
    for hour, ranges in sorted(by_hour.items()):
        yield hour, to_examples(log.read(ranges, columns_to_read(spec)), spec)


def _alarms(window: Past, past: list[Past]) -> tuple[Alarm, ...]:
    own = load_config().alarms
    return alarms_of(
        window.profile,
        window.hour,
        past,
        deviations=own.deviations,
        burst_factor=own.burst_factor,
        min_windows=own.min_windows,
    )


def _raised(alarms: Iterable[tuple[Alarm, ...]]) -> str:
    counts = Counter(alarm.figure for raised in alarms for alarm in raised)
    return ", ".join(f"{figure} {count}" for figure, count in counts.most_common(4))


def _tenth(examples: Examples, spec: DatasetSpec, rng: np.random.Generator) -> Examples:
    return examples.take(np.flatnonzero(rng.random(examples.num_rows) < 0.1))


def _clicked_more(examples: Examples, spec: DatasetSpec, rng: np.random.Generator) -> Examples:
    rate = min(2 * examples.labels_R.mean() / max(1 - examples.labels_R.mean(), 1e-9), 1)
    return replace(examples, labels_R=np.maximum(examples.labels_R, rng.random(examples.num_rows) < rate).astype(np.float32))


def _missing(examples: Examples, spec: DatasetSpec, rng: np.random.Generator) -> Examples:
    names = [feature.name for feature in spec.logged_categorical() if feature.name in examples.single_ids]
    name = str(rng.choice(names))
    empty = np.full(examples.num_rows, MISSING, np.uint64)
    return replace(examples, single_ids={**examples.single_ids, name: empty})


def _new_items(examples: Examples, spec: DatasetSpec, rng: np.random.Generator) -> Examples:
    item = spec.item or spec.categorical[0].name
    other = np.where(rng.random(examples.num_rows) < 0.5, mix64(examples.single_ids[item]), examples.single_ids[item])
    return replace(examples, single_ids={**examples.single_ids, item: other})


def _other_units(examples: Examples, spec: DatasetSpec, rng: np.random.Generator) -> Examples:
    numbers = examples.numeric_NR.copy()
    numbers[int(rng.integers(len(numbers)))] *= 100
    return replace(examples, numeric_NR=numbers)


def _burst(examples: Examples, spec: DatasetSpec, rng: np.random.Generator) -> Examples:
    clickers = np.unique(examples.user_R[examples.labels_R > 0])
    users = rng.choice(clickers, min(10, len(clickers)), replace=False)
    rows = np.flatnonzero(np.isin(examples.user_R, users) & (examples.labels_R > 0))
    return concatenate([examples, examples.take(np.repeat(rows, 19))])


if __name__ == "__main__":
    main()
