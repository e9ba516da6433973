"""Iterations and epochs: how many steps a pass over N rows takes in batches of b, and what becomes of the last, short batch.

As the loader of the pipeline counts (`sampling/minibatches.py`), beside plain slices of b rows.

    python -m pipeline.lab.epochs --help
"""

from collections.abc import Sequence

import numpy as np

from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes, tick_sizes
from sampling.minibatches import BatchCursor


def run(
    *,
    num_rows: tuple[int, ...] = (1_000, 4_097, 8_334, 10_000),
    sizes: tuple[int, ...] = (1, 16, 64, 256, 1000, 4096, 16384),
    seed: int = 0,
) -> Finding:
    """How many iterations has an epoch, and how large is its last batch?

    Args:
        num_rows: N, rows of an epoch.
        sizes: b, batch sizes.
        seed: of the order of rows.
    """
    counted = {(n, b): loader_batches(n, b, seed=[seed]) for n in num_rows for b in sizes}
    sliced = {(n, b): sliced_batches(n, b) for n in num_rows for b in sizes}
    agree = sum(len(each) == iterations(*key) == len(sliced[key]) for key, each in counted.items())
    whole = sum(sum(each) == key[0] for key, each in counted.items())
    split = [key for key, each in counted.items() if len(each) > 1]
    least_even = min(min(counted[key]) / max(counted[key]) for key in split)
    least_sliced = min(min(sliced[key]) / max(sliced[key]) for key in split)
    worst = min(split, key=lambda key: min(sliced[key]) / max(sliced[key]))
    figure, (axes,) = canvas()
    name_axes(axes, f"Last batch of a pass over {max(num_rows):,} rows", "batch size b (rows)", "last batch / largest batch")
    for number, (name, found) in enumerate({"even split, as the loader": counted, "plain slices": sliced}.items()):
        axes.plot(
            sizes, [found[max(num_rows), b][-1] / max(found[max(num_rows), b]) for b in sizes], **look(number), label=name
        )
    tick_sizes(axes, sizes)
    axes.set_ylim(0, 1.3)
    legend(axes, loc="upper left", ncols=2)
    return Finding(
        name="epochs",
        question="How many iterations has an epoch, and how large is its last batch?",
        sentence=(
            f"The loader takes ceil(N/b) iterations an epoch in {agree} of {len(counted)} cases and hands out every row once "
            f"in {whole}. Plain slices can leave a last batch of {100 * least_sliced:.2g} % of the others "
            f"({min(sliced[worst]):,} of {worst[1]:,} rows at N = {worst[0]:,}, b = {worst[1]:,}); split evenly, the smallest "
            f"batch has {100 * least_even:.1f} % of the rows of the largest."
        ),
        columns=("N", "b", "ceil(N/b)", "iterations", "last batch, even split", "last batch, plain slices"),
        rows=tuple((n, b, iterations(n, b), len(counted[n, b]), counted[n, b][-1], sliced[n, b][-1]) for n, b in counted),
        figure=figure,
        metrics={
            "cases": float(len(counted)),
            "cases_as_counted": float(agree),
            "least_even_share": least_even,
            "least_sliced_share": least_sliced,
        },
    )


def iterations(num_rows: int, batch_size: int) -> int:
    """ceil(N/b).

    >>> iterations(10, 4)
    3
    """
    return -(-num_rows // batch_size)


def loader_batches(num_rows: int, batch_size: int, *, seed: Sequence[int]) -> list[int]:
    """Rows of each batch of a pass, as the loader makes them."""
    cursor, found = BatchCursor.of(num_rows, seed=seed), []
    while cursor.remaining:
        found.append(len(cursor.next_rows(batch_size)))
    return found


def sliced_batches(num_rows: int, batch_size: int) -> list[int]:
    """Rows of each batch where every one but the last is full.

    >>> sliced_batches(10, 4)
    [4, 4, 2]
    """
    starts = np.arange(0, num_rows, batch_size)
    return [int(size) for size in np.minimum(starts + batch_size, num_rows) - starts]


if __name__ == "__main__":
    main_of(run)
