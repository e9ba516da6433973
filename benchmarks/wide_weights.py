"""What do wide weights cost in one vector, and in fused tables?

In:  nothing; ids are drawn, 26 features of --ids each, Zipf.
Out: a line a number of rows: milliseconds of looking all weights up and of stepping them, of both, and their ratio.

    python benchmarks/wide_weights.py [--rows 512 4096 32768] [--ids 100000] [--repetitions 100] [--threads 0]

Both take turns, batch by batch; seconds are medians.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as RichTable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.embeddings import WIDE_DIM, fused_wide_tables
from models.tables import Table, TableLayout
from models.wide_weights import WideWeights

FEATURES = 26
ZIPF_EXPONENT = 1.05
BATCHES = 20
WARM_UP = 5
RATE, BETA = 0.1, 1.0


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rows", type=int, nargs="+", default=[512, 4096, 32_768])
    cli.add_argument("--ids", type=int, default=100_000, help="of a feature")
    cli.add_argument("--repetitions", type=int, default=100)
    cli.add_argument("--threads", type=int, default=0, help="for tensors; 0 for torch's own choice")
    options = cli.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shown = RichTable(title=f"{FEATURES} weights a row, ms; {torch.get_num_threads()} threads")
    for name in ("rows", "vector: look up", "step", "fused: look up", "step", "fused / vector"):
        shown.add_column(name, justify="right")
    for rows in options.rows:
        vector, fused = _measured(_batches(rows, options.ids), options.ids, options.repetitions)
        milliseconds = [f"{1e3 * seconds:.2f}" for seconds in (*vector, *fused)]
        shown.add_row(f"{rows:,}", *milliseconds, f"{sum(fused) / sum(vector):.1f}")
    Console(width=100).print(shown)


def _batches(rows: int, ids: int) -> list[KeyedJaggedTensor]:
    """Popular ids stand anywhere in their table, as hashed ones do."""
    rng = np.random.default_rng(0)
    cumulative = np.cumsum(np.arange(1, ids + 1) ** -ZIPF_EXPONENT)
    place_FI = [rng.permutation(ids) for _ in range(FEATURES)]
    made = []
    for _ in range(BATCHES):
        drawn = [np.searchsorted(cumulative, rng.random(rows) * cumulative[-1]).clip(max=ids - 1) for _ in range(FEATURES)]
        values = np.concatenate([place_I[ids_B] for place_I, ids_B in zip(place_FI, drawn, strict=True)])
        lengths = torch.ones(FEATURES * rows, dtype=torch.int32)
        batch = KeyedJaggedTensor(keys=_names(), values=torch.from_numpy(values), lengths=lengths, stride=rows)
        batch.offsets()  # which an update's batches have from the start
        batch.length_per_key()
        made.append(batch)
    return made


def _measured(
    batches: Sequence[KeyedJaggedTensor], ids: int, repetitions: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of a lookup and of a step: in one vector, in fused tables."""
    tables = tuple(Table(name=name, rows=ids, dim=1, lookups=(name,)) for name in _names())
    vector = WideWeights(tables, learning_rate=RATE, beta=BETA, weighted=False)
    layout = TableLayout(deep=(), wide=tables, weighted=False)
    fused = fused_wide_tables(layout, learning_rate=RATE, beta=BETA, device=torch.device("cpu"))
    gradient_BK = 1e-3 * torch.randn(batches[0].stride(), FEATURES)
    laps: dict[str, list[tuple[float, float]]] = {"vector": [], "fused": []}
    for number in range(WARM_UP + repetitions):
        batch = batches[number % len(batches)]
        started = time.perf_counter()
        looked_up = vector(batch).values()
        between = time.perf_counter()
        looked_up.backward(gradient_BK)
        laps["vector"].append((between - started, time.perf_counter() - between))
        started = time.perf_counter()
        looked_up = fused._emb_modules[0]._emb_module(batch.values(), batch.offsets())[:, ::WIDE_DIM]
        between = time.perf_counter()
        looked_up.backward(gradient_BK)
        laps["fused"].append((between - started, time.perf_counter() - between))
    first, second = (tuple(statistics.median(column) for column in zip(*lap[WARM_UP:], strict=True)) for lap in laps.values())
    return (first[0], first[1]), (second[0], second[1])


def _names() -> list[str]:
    return [f"f{number:02}" for number in range(FEATURES)]


if __name__ == "__main__":
    main()
