"""Rows a second of strata, thinning and order, one thread, by CPU time."""

import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from sampling.minibatches import BatchCursor
from sampling.plan import Columns, Rules, sample_rows
from sampling.strata import occurrences

Work = Callable[[], object]


def run(rows: int, repeats: int) -> None:
    """Medians of interleaved repeats."""
    rng = np.random.default_rng(0)
    labels_R = (rng.random(rows) < 0.05).astype(np.float32)
    item_R = (rng.zipf(1.3, rows) % 200_000 + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    user_R = rng.integers(1, 300_000, rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hour_R = np.zeros(rows, np.int64)
    popularity_R = occurrences(item_R)

    def whole(rules: Rules, *, count_items: bool = False) -> Work:
        def work() -> object:
            counted = occurrences(item_R) if count_items else popularity_R
            columns = Columns(labels_R=labels_R, user_R=user_R, item_R=item_R, hour_R=hour_R, popularity_R=counted)
            sample = sample_rows(rules, columns, (1,))
            return BatchCursor.of(rows, seed=[1], stratum_R=sample.strata.stratum_R, kept_R=sample.kept_R)

        return work

    both = ("label", "item_popularity")
    works: dict[str, Work] = {
        "plain permutation": lambda: BatchCursor.of(rows, seed=[1]),
        "strata by label, order": whole(Rules(strata=("label",))),
        "strata by label, keep .1, order": whole(Rules(strata=("label",), negative_keep_rate=0.1)),
        "the same, fixed size": whole(Rules(strata=("label",), negative_keep_rate=0.1, draw="fixed")),
        "strata by label and popularity, keep .1, order": whole(Rules(strata=both, negative_keep_rate=0.1)),
        "the same, with the counting of items": whole(Rules(strata=both, negative_keep_rate=0.1), count_items=True),
        "the first and a cap on users": whole(Rules(strata=("label",), negative_keep_rate=0.1, max_rows_per_user=50)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    table = Table(title=f"{rows:,} rows, CPU time of one thread, median of {repeats} interleaved repeats")
    for head in ("", "seconds", "M rows/s"):
        table.add_column(head, justify="right" if head else "left")
    for name, taken in seconds.items():
        median = float(np.median(taken))
        table.add_row(name, f"{median:.3f}", f"{rows / median / 1e6:.1f}")
    Console().print(table)
