"""How many rows a second go from Parquet to `MiniBatch`, and how many by the way that one would write first?

In:  nothing; a click log of Zipf-distributed ids is generated in a temporary folder. Out: one table, a line a stage: wall time,
     CPU time of all threads, rows a second; the click log's way, then pandas' for the same rows.

    python benchmarks/loading.py [--rows 2000000] [--repetitions 5] [--seed 0]

20 single-id columns, 10 of integers and 10 of strings, of 10 to 1,000,000 distinct ids each. Every page's checksum is verified,
which pandas cannot be asked for. Mini-batches are of 4096 rows, in an order shuffled over all rows. The two ways take turns;
figures are medians. The ids of both go to rows of tables of 2^20.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch

from data_schemas.dataset import Categorical, DatasetSpec, LabelColumn, TimeColumn
from data_schemas.hashing import mix64
from models.memory import Memory
from pipeline.data.encode import encode
from pipeline.data.lake import ClickLog, RowRange
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.normalise import RunningMoments

I64 = npt.NDArray[np.int64]

BATCH_ROWS = 4096
NUM_HOURS = 24
FIRST_HOUR = 20_000 * 24
CAPACITY = 2**20
CARDINALITIES = tuple(int(count) for count in np.geomspace(10, 1_000_000, 10).round())
ZIPF_EXPONENT = 1.05
"""Probability of the k-th most frequent id is proportional to k^-1.05."""

LEAST_ROWS_PER_SECOND = 2_000_000
"""By so much the whole way has to go on two quiet cores."""


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rows", type=int, default=2_000_000)
    cli.add_argument("--repetitions", type=int, default=5)
    cli.add_argument("--seed", type=int, default=0)
    options = cli.parse_args()
    spec = _make_spec()
    with tempfile.TemporaryDirectory() as folder:
        log = ClickLog.open_or_create(folder, spec)
        print(f"writing {options.rows:,} rows", file=sys.stderr)
        _write_log(log, spec, options.rows, np.random.default_rng(options.seed))
        order_R = np.random.default_rng(options.seed).permutation(options.rows)
        ways: dict[str, Callable[[_Stopwatch], None]] = {
            "tidemark": lambda watch: _load(log, spec, order_R, watch),
            "pandas": lambda watch: _load_with_pandas(log, spec, order_R, watch),
        }
        watches = {name: _Stopwatch() for name in ways}
        for _ in range(options.repetitions):
            for name, way in ways.items():
                gc.collect()
                way(watches[name])
    for name, watch in watches.items():
        _print_table(name, watch, options.rows)
    rate = options.rows / statistics.median(watches["tidemark"].wall["whole way"])
    verdict = "reached" if rate >= LEAST_ROWS_PER_SECOND else "missed: judge by CPU time where other work ran on these cores"
    print(f"wanted: {LEAST_ROWS_PER_SECOND:,} rows/s on two quiet cores; {verdict}")


@dataclass(kw_only=True)
class _Stopwatch:
    """Wall and CPU seconds of each stage, one a repetition."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall.setdefault(stage, []).append(time.perf_counter() - wall)
        self.cpu.setdefault(stage, []).append(time.process_time() - cpu)


def _make_spec() -> DatasetSpec:
    integers = [Categorical(name=f"integer_{count}", type="integer", capacity=CAPACITY) for count in CARDINALITIES]
    strings = [Categorical(name=f"string_{count}", capacity=CAPACITY) for count in CARDINALITIES]
    return DatasetSpec(
        name="loading",
        time=TimeColumn(column="at"),
        label=LabelColumn(column="label"),
        user=integers[-1].name,
        item=strings[-1].name,
        event_key=("*",),
        categorical=(*integers, *strings),
    )


def _write_log(log: ClickLog, spec: DatasetSpec, num_rows: int, rng: np.random.Generator) -> None:
    files = log.write()
    for number, rows in enumerate(np.array_split(np.arange(num_rows), NUM_HOURS)):
        hour = FIRST_HOUR + number
        micros_R = hour * 3_600_000_000 + np.sort(rng.integers(0, 3_600_000_000, len(rows)))
        columns = {
            "event_time": pa.array(micros_R).cast(pa.timestamp("us", tz="UTC")),
            "label": pa.array((rng.random(len(rows)) < 0.1).astype(np.int8)),
            "event_key": pa.array(mix64(rows.astype(np.uint64)).view(np.int64)),
        }
        for feature, count in zip(spec.categorical, 2 * CARDINALITIES, strict=True):
            columns[feature.name] = _draw_ids(feature, count, len(rows), rng)
        files.add(hour, pa.table(columns, schema=log.schema))
    log.append(files.close(), "generated", rows_read=num_rows)


def _draw_ids(feature: Categorical, count: int, num_rows: int, rng: np.random.Generator) -> pa.Array:
    """Integers are scattered over 63 bits, strings are 13 to 15 bytes long."""
    cumulative = np.cumsum(np.arange(1, count + 1) ** -ZIPF_EXPONENT)
    rank_R = np.searchsorted(cumulative, rng.random(num_rows) * cumulative[-1])
    scattered_R = mix64(rank_R.astype(np.uint64)) >> np.uint64(1)
    if feature.type == "integer":
        return pa.array(scattered_R.astype(np.int64))
    distinct, index_R = np.unique(scattered_R, return_inverse=True)
    return pa.array([f"id-{number % 10**12}" for number in distinct.tolist()]).take(pa.array(index_R))


def _load(log: ClickLog, spec: DatasetSpec, order_R: I64, watch: _Stopwatch) -> None:
    with watch.time("whole way"):
        with watch.time("read and verify"):
            ranges = [RowRange.whole(file) for file in log.files()]
            table = log.read(ranges, columns_to_read(spec))
        with watch.time("hash ids"):
            examples = to_examples(table, spec)
        with watch.time("find table rows"):
            window = encode(examples, spec, Memory(spec), RunningMoments.nothing_seen(0), hour=0)
        with watch.time("cut mini-batches"):
            for start in range(0, len(order_R), BATCH_ROWS):
                window.minibatch(order_R[start : start + BATCH_ROWS])


def _load_with_pandas(log: ClickLog, spec: DatasetSpec, order_R: I64, watch: _Stopwatch) -> None:
    names = [feature.name for feature in spec.categorical]
    with watch.time("whole way"):
        with watch.time("read"):
            paths = [log.root / file.path for file in log.files()]
            frame = pd.concat([pd.read_parquet(path, columns=["label", *names], partitioning=None) for path in paths])
        with watch.time("hash ids and find table rows"):
            hashes = [pd.util.hash_array(frame[name].to_numpy()) for name in names]
            ids_RF = torch.from_numpy(np.stack([hash_ % CAPACITY for hash_ in hashes], axis=1).astype(np.int64))
            labels_R = torch.from_numpy(frame["label"].to_numpy(np.float32))
        with watch.time("cut mini-batches"):
            for start in range(0, len(order_R), BATCH_ROWS):
                rows_B = torch.from_numpy(order_R[start : start + BATCH_ROWS])
                _ = ids_RF[rows_B], labels_R[rows_B]


def _print_table(way: str, watch: _Stopwatch, num_rows: int) -> None:
    print(f"{way:32} {'wall s':>8} {'CPU s per 1M rows':>18} {'rows/s':>12}")
    for stage in sorted(watch.wall, key=lambda stage: stage == "whole way"):
        wall, cpu = statistics.median(watch.wall[stage]), statistics.median(watch.cpu[stage])
        print(f"  {stage:30} {wall:8.2f} {cpu / num_rows * 1e6:18.3f} {num_rows / wall:12,.0f}")


if __name__ == "__main__":
    main()
