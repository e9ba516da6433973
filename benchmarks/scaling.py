"""How far does it go: processes, memory, network, storage and cost for so many rows an hour and so many parameters.

    python benchmarks/scaling.py measure --processes 1 --processes 2 --processes 4
    python benchmarks/scaling.py far --rows-per-core-second 20000 --window-bytes 300

`measure`: rows/s and CPU seconds of a pass over the synthetic stream by 1, 2 and 4 processes of this machine, in turn; and what
a row, an id and a key take. `far`: arithmetic alone, from such figures.

How a step is timed: `B / (N r) + bytes / bandwidth + rounds * latency`, for B rows of a batch, N processes, r rows/s of one.
What a process sends for embeddings of F features of D numbers, there and back, in float32: where tables are cut by rows,
partial sums for every row of the batch, whoever has it, `2 * 4 F D B (N-1)/N` (torchrec's reduce-scatter); whole tables and
columns only what others asked for, `1/N` of that. Gradients of W dense weights, all-reduced in a ring: `2 * 4 W (N-1)/N`.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil, log2
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

app = App(help="Measure one machine; then the arithmetic from there.")

Cut = Literal["rows", "columns"]
"""Cut by columns: whole tables, and where there are more processes than tables, pieces of at least 4 columns."""
LEAST_COLUMNS = 4
GIB = 2**30
ROUNDS = 4
"""Exchanges that wait for each other in a step: ids, embeddings, their gradients, dense gradients."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Here:
    """What was measured; `measure` prints them."""

    rows_per_core_second: float
    """Learned by one process of one thread."""
    window_bytes: float
    """Of a row of a window in memory, hashed and encoded."""
    log_bytes: float = 31.5
    """Of a row in the click log, on disk."""
    id_bytes: float = 28.0
    """Of an admitted id's row, beside the embedding."""
    key_bytes: float = 40.0
    """Of a key of a counter."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The task, and the machines for it."""

    rows_per_hour: float = 1e9
    parameters: float = 1e11
    """Of the embeddings."""
    dim: int = 16
    features: int = 26
    dense_weights: int = 500_000
    batch: int = 65_536
    """Rows of a step over all processes; what the gradient noise scale allows, not what processes there are."""
    counter_keys: float = 1e9
    distinct_share: float = 0.02
    """Rows of tables that an hour touches for the first time in it, of all that it looks up."""
    log_days: float = 30.0
    full_checkpoints: int = 2
    learning_share: float = 0.5
    """Of an hour, for learning; the rest is for everything else."""
    memory_gib: float = 8.0
    """Of one process: of a machine's memory, its share by cores."""
    gigabytes_per_second: float = 0.4
    """Of network, of one process: of a machine's, its share by cores; 25 GbE over 8 processes."""
    latency_seconds: float = 1e-4
    """Of one round of an exchange; times log2 of the processes."""
    disk_gigabytes_per_second: float = 0.2
    """To write checkpoints, of one process."""
    gpu_rows_per_second: float = 0.0
    """Learned by one GPU, to count GPUs by; 0 for none."""
    price_core_hour: float = 0.0
    price_gpu_hour: float = 0.0
    price_gib_month: float = 0.0
    """Of storage. Any currency; 0 leaves money out."""

    @property
    def table_rows(self) -> float:
        """Of all tables."""
        return self.parameters / self.dim


def step_seconds(here: Here, wanted: Wanted, processes: int, cut: Cut) -> float:
    """Of one step of the whole batch.

    >>> step_seconds(Here(rows_per_core_second=1000, window_bytes=1), Wanted(batch=2000), 1, "rows")
    2.0
    """
    exchanged = step_bytes(wanted, processes, cut) / (wanted.gigabytes_per_second * 1e9)
    waited = ROUNDS * wanted.latency_seconds * log2(processes)
    return wanted.batch / (processes * here.rows_per_core_second) + exchanged + waited


def step_bytes(wanted: Wanted, processes: int, cut: Cut) -> float:
    """That one process sends in a step."""
    others = (processes - 1) / processes
    rows = wanted.batch if cut == "rows" else wanted.batch / processes
    embeddings = 2 * 4 * rows * wanted.features * wanted.dim
    ids = 8 * wanted.batch / processes * wanted.features
    return others * (embeddings + ids + 2 * 4 * wanted.dense_weights)


def processes_needed(here: Here, wanted: Wanted, cut: Cut) -> int | None:
    """The fewest that hold the tables in half of their memory and learn an hour's rows in their share of it; None where no
    number does.

    >>> wanted = Wanted(rows_per_hour=5e7, parameters=1e6, learning_share=1)
    >>> processes_needed(Here(rows_per_core_second=1e4, window_bytes=1), wanted, "columns")
    2
    """
    steps = wanted.rows_per_hour / wanted.batch
    allowed = 3600 * wanted.learning_share / steps
    most = wanted.batch  # one row each
    by_memory = ceil(table_bytes(wanted, cut) / (0.5 * wanted.memory_gib * GIB))
    fewest = max(by_memory, ceil(wanted.batch / (here.rows_per_core_second * allowed)))
    candidates = np.unique(np.geomspace(fewest, most, 2000).astype(np.int64)).tolist() if fewest <= most else []
    return next((n for n in candidates if step_seconds(here, wanted, n, cut) <= allowed), None)


def table_bytes(wanted: Wanted, cut: Cut) -> float:
    """Embeddings with a sum of squares a row, or a number where rows are cut; and a wide weight a row with its own; float32."""
    sums = wanted.table_rows if cut == "rows" else wanted.parameters
    return 4 * (wanted.parameters + sums + 2 * wanted.table_rows)


def delta_bytes(wanted: Wanted, cut: Cut) -> float:
    """Of the rows that an hour touches: number, embedding, its sums of squares as in `table_bytes`, wide weight and its own."""
    touched = min(wanted.table_rows, wanted.rows_per_hour * wanted.features * wanted.distinct_share)
    sums = 1 if cut == "rows" else wanted.dim
    return touched * (8 + 4 * wanted.dim + 4 * sums + 8)


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Something that can run out."""

    name: str
    needed: float
    available: float
    unit: str

    @property
    def times_over(self) -> float:
        """Above 1 it breaks."""
        return self.needed / self.available


def resources(here: Here, wanted: Wanted, processes: int, cut: Cut) -> list[Resource]:
    """Of one process, what breaks first at the top."""
    memory, hour = wanted.memory_gib, 3600 * (1 - wanted.learning_share)
    tables, rows = table_bytes(wanted, cut), wanted.rows_per_hour
    disk, network = processes * wanted.disk_gigabytes_per_second * 1e9, wanted.gigabytes_per_second * 1e9
    learning = step_seconds(here, wanted, processes, cut) * wanted.rows_per_hour / wanted.batch
    in_each = {
        "window": rows * here.window_bytes,
        "admitted ids": wanted.table_rows * here.id_bytes,
        "counters": wanted.counter_keys * here.key_bytes,
    }
    in_memory = {f"memory: {name}, in each": size for name, size in in_each.items()}
    pieces = processes if cut == "rows" else min(processes, wanted.features * wanted.dim // LEAST_COLUMNS)
    in_memory |= {"memory: tables, cut": tables / pieces, "memory: published model, whole in the first": tables}
    in_time = {
        "time: the window's rows to each": rows * here.window_bytes / network,
        "time: full checkpoint": tables / disk,
        "time: delta checkpoint": delta_bytes(wanted, cut) / disk,
    }
    found = [
        *(Resource(name=name, needed=size / GIB, available=memory, unit="GiB") for name, size in in_memory.items()),
        *(Resource(name=name, needed=seconds, available=hour, unit="s") for name, seconds in in_time.items()),
        Resource(name="time: learning", needed=learning, available=3600 * wanted.learning_share, unit="s"),
    ]
    return sorted(found, key=lambda resource: -resource.times_over)


@app.command
def far(here: Here, wanted: Wanted = Wanted()) -> None:
    """Prints what a task needs, for both ways to cut tables."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"{wanted.rows_per_hour:.0e} rows an hour, {wanted.parameters:.0e} parameters ({wanted.table_rows:.2e} rows of "
        f"{wanted.dim}), batches of {wanted.batch:,}"
    )
    for cut in ("rows", "columns"):
        needed = processes_needed(here, wanted, cut)
        if needed is None:
            floor = step_bytes(wanted, wanted.batch, cut) / (wanted.gigabytes_per_second * 1e9)
            steps = wanted.rows_per_hour / wanted.batch
            console.print(
                f"\n[bold]tables cut by {cut}[/bold]: no number of processes learns it in "
                f"{3600 * wanted.learning_share:.0f} s: the network alone takes {floor * steps:,.0f} s"
            )
            continue
        console.print(f"\n[bold]tables cut by {cut}[/bold]", *_needs(here, wanted, needed, cut), sep="\n  ")
        table = Table("what, of one process", "needs", "has", "times over")
        for resource in resources(here, wanted, needed, cut):
            need, has = (f"{value:,.1f} {resource.unit}" for value in (resource.needed, resource.available))
            table.add_row(resource.name, need, has, f"{resource.times_over:,.2f}")
        console.print(table)


def _needs(here: Here, wanted: Wanted, processes: int, cut: Cut) -> list[str]:
    steps, sent = wanted.rows_per_hour / wanted.batch, step_bytes(wanted, processes, cut)
    seconds = step_seconds(here, wanted, processes, cut)
    computing = wanted.batch / (processes * here.rows_per_core_second) / seconds
    tables = table_bytes(wanted, cut)
    log_bytes = wanted.rows_per_hour * 24 * wanted.log_days * here.log_bytes
    stored = log_bytes + wanted.full_checkpoints * tables
    lines = [
        f"processes: {processes:,}, {wanted.batch / processes:,.1f} rows of a step each; {computing:.0%} of it computing",
        f"network: {sent / 1e6:,.1f} MB a process and step, {steps * sent * processes / 1e12:,.1f} TB an hour over all",
        f"memory: tables {tables / GIB:,.0f} GiB over all",
        f"storage: click log {log_bytes / 1e12:,.1f} TB for {wanted.log_days:g} days, full checkpoint {tables / 1e12:,.2f} TB, "
        f"delta {delta_bytes(wanted, cut) / 1e12:,.3f} TB",
        f"cost of an hour: {processes * steps * seconds / 3600:,.0f} core-hours of learning, {processes:,} with cores kept",
    ]
    if wanted.gpu_rows_per_second:
        gpus = wanted.rows_per_hour / (3600 * wanted.learning_share * wanted.gpu_rows_per_second)
        lines[-1] += f", or {gpus * wanted.learning_share:,.1f} GPU-hours on {ceil(gpus)} GPUs, the network left out"
        if wanted.price_gpu_hour:
            lines.append(f"price of an hour on GPUs: {gpus * wanted.learning_share * wanted.price_gpu_hour:,.2f}")
    if wanted.price_core_hour:
        lines.append(f"price of an hour of cores that are kept: {processes * wanted.price_core_hour:,.2f}")
    if wanted.price_gib_month:
        lines.append(f"price of storage: {stored / GIB * wanted.price_gib_month:,.0f} a month")
    return lines


@app.command
def measure(*, processes: list[int] | None = None, rows: int = 60_000, batch: int = 4096, repetitions: int = 3) -> None:
    """Prints rows/s of some numbers of processes on this machine, and bytes.

    Args:
        processes: Numbers of processes; may be given several times.
        rows: Of the window.
        batch: Of a step, over all processes.
        repetitions: Of each, in turn.
    """
    from pipeline.launch import run_together

    counts = processes or [1, 2, 4]
    found: dict[int, list[list[dict[str, float]]]] = {count: [] for count in counts}
    for _ in range(repetitions):
        for count in counts:
            found[count].append(run_together("scaling:learn_here", count, {"rows": rows, "batch": batch}))
    table = Table("processes", "rows/s", "of one", "CPU s per 1 M rows, all processes", title=f"{os.cpu_count()} cores")
    first = None
    for count in counts:
        rate = statistics.median(rows / max(one["seconds"] for one in run) for run in found[count])
        spent = statistics.median(sum(one["cpu"] for one in run) / rows * 1e6 for run in found[count])
        first = first or rate
        table.add_row(str(count), f"{rate:,.0f}", f"{rate / first:.2f}", f"{spent:.1f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(*(f"{name}: {value:,.1f}" for name, value in sizes(rows).items()), sep="\n")


def learn_here(rows: int, batch: int) -> dict[str, float]:
    """One of the processes: learns a window twice, and times the second pass."""
    from pipeline.config import load_config
    from pipeline.model_state import restore_or_create
    from pipeline.training.batch_size import FixedBatch
    from pipeline.training.learn import learn

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(overrides=[f"state_dir={folder}", "training.precision=fp32", f"training.batch_size={batch}"])
        state = restore_or_create(config, _spec())
        window = _window(rows, state)
        for warm in (True, False):
            state.learner.processes.wait()
            started, spent = time.perf_counter(), time.process_time()
            learn(state.learner, window, seed=[warm], policy=FixedBatch(batch_size=batch, learning_rate=0.001))
        return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - spent}


def sizes(rows: int) -> dict[str, float]:
    """Bytes: of a row of a window, of a row of the click log, of an admitted id, of a key of a counter."""
    from pipeline.config import load_config
    from pipeline.data.ingest import ingest_landing
    from pipeline.data.lake import ClickLog, Quarantine
    from pipeline.data.synthetic import SyntheticConfig, write_landing
    from pipeline.model_state import restore_or_create

    spec = _spec()
    with tempfile.TemporaryDirectory() as folder:
        state = restore_or_create(load_config(overrides=[f"state_dir={folder}/state", "training.precision=fp32"]), spec)
        window = _window(rows, state)
        write_landing(SyntheticConfig(hours=1, rows_per_hour=rows), Path(folder) / "landing")
        log = ClickLog.open_or_create(Path(folder) / "log", spec)
        quarantine = Quarantine.open_or_create(Path(folder) / "quarantine")
        ingest_landing(f"{folder}/landing", log, quarantine, spec, now=datetime.now(UTC))
        stored = sum(log.size_of(file) for file in log.files()) / sum(file.num_rows for file in log.files())
    return {
        "window_bytes": _bytes_of(window) / window.num_rows,
        "log_bytes": stored,
        "id_bytes": _bytes_of(state.ids) / sum(f.capacity for f in spec.categorical if f.ids == "admitted"),
        "key_bytes": _bytes_of(state.memory) / sum(counter.capacity for counter in spec.counters),
    }


def _spec() -> Any:
    """The synthetic data set, with items that are admitted and counted."""
    from data_schemas.dataset import Counter, load_spec

    spec = load_spec("synthetic")
    admitted = [f.model_copy(update={"ids": "admitted"}) if f.name == "item_id" else f for f in spec.categorical]
    return spec.model_copy(update={"categorical": tuple(admitted), "counters": (Counter(over=("item_id",)),)})


def _window(rows: int, state: Any) -> Any:
    from pipeline.data.encode import encode
    from pipeline.data.loader import to_examples
    from pipeline.data.synthetic import SyntheticConfig, SyntheticStream

    stream = SyntheticStream(SyntheticConfig(hours=1, rows_per_hour=rows, traffic_ratio=1.0))
    examples = to_examples(stream.hour(0).table.slice(0, rows), _spec())
    return encode(examples, _spec(), state.memory, state.moments, hour=0, ids=state.ids)


def _bytes_of(thing: Any, seen: set[int] | None = None) -> int:
    """Of all arrays that an object holds."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    match thing:
        case np.ndarray():
            return thing.nbytes
        case dict():
            return sum(_bytes_of(value, seen) for value in thing.values())
        case str() | bytes():
            return 0
        case Sequence():
            return sum(_bytes_of(value, seen) for value in thing)
    return sum(_bytes_of(value, seen) for value in getattr(thing, "__dict__", {}).values())


if __name__ == "__main__":
    app()
