"""Rows a second of strata, thinning and order, one thread, by CPU time."""

import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from data_schemas.hashing import mix64
from sampling.counting import CountedIds
from sampling.minibatches import BatchCursor
from sampling.plan import Columns, Rules, sample_rows
from sampling.strata import StratifyBy
from sampling.thinning import Method

Work = Callable[[], object]


def run(rows: int, repeats: int) -> None:
    """Medians of interleaved repeats; what has to be counted is counted in each."""
    rng = np.random.default_rng(0)
    labels_R = (rng.random(rows) < 0.05).astype(np.float32)
    item_R = mix64((rng.zipf(1.3, rows) % 200_000 + 1).astype(np.uint64))
    user_R = mix64(rng.integers(1, 300_000, rows).astype(np.uint64))
    hour_R = np.zeros(rows, np.int64)

    def whole(*by: StratifyBy, keep: float = 0.1, draw: Method = "poisson", per_user: int = 0, per_item: int = 0) -> Work:
        rules = Rules(strata=by, negative_keep_rate=keep, draw=draw, max_rows_per_user=per_user, max_rows_per_item=per_item)

        def work() -> object:
            users, items = CountedIds(user_R), CountedIds(item_R)
            columns = Columns(
                labels_R=labels_R,
                users=users,
                items=items,
                hour_R=hour_R,
                popularity_R=items.occurrences_R if "item_popularity" in by else None,
                activity_R=users.occurrences_R if "user_activity" in by else None,
            )
            sample = sample_rows(rules, columns, (1,))
            return BatchCursor.of(rows, seed=[1], stratum_R=sample.strata.stratum_R, kept_R=sample.kept_R)

        return work

    works: dict[str, Work] = {
        "plain permutation": lambda: BatchCursor.of(rows, seed=[1]),
        "strata by label, order": whole("label", keep=1.0),
        "strata by label, keep .1, order": whole("label"),
        "the same, fixed size": whole("label", draw="fixed"),
        "by label and item_popularity, keep .1, order": whole("label", "item_popularity"),
        "by label and user_activity, keep .1, order": whole("label", "user_activity"),
        "by label, keep .1, at most 50 rows a user, order": whole("label", per_user=50),
        "by label, keep .1, at most 5 rows a user, order": whole("label", per_user=5),
        "by label, keep .1, at most 2,000 rows an item, order": whole("label", per_item=2000),
        "by label and item_popularity, keep .1, at most 2,000 rows an item, order": whole(
            "label", "item_popularity", per_item=2000
        ),
        "by label, item_popularity and user_activity, keep .1, both caps": whole(
            "label", "item_popularity", "user_activity", per_user=50, per_item=2000
        ),
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
