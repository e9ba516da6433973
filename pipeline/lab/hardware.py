"""What a batch buys on this machine: time per row, matrix products in pieces, and the line t(b) = f + d b.

The step is that of the project's own model; the line is fitted as the pipeline fits it (`pipeline/training/step_time.py`).

    python -m pipeline.lab.hardware --help
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, assert_never

import numpy as np
import torch

from pipeline.lab.experiment import Cell, Finding, main_of
from pipeline.lab.figures import canvas, legend, log_counts, look, name_axes
from pipeline.lab.problems import F64, clicks, new_learner
from pipeline.publishing.plots import BLUE
from pipeline.training.step_time import StepTime, line_through
from pipeline.training.threads import torch_threads

Pieces = Literal["element", "column", "block", "whole"]
PIECES: tuple[Pieces, ...] = ("element", "column", "block", "whole")
LOW = 0.25
"""Quantile of the seconds of like steps: what disturbs the machine only ever makes a step longer."""


def run(
    *,
    sizes: tuple[int, ...] = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    rounds: int = 12,
    matrix: int = 192,
    block: int = 48,
    seed: int = 0,
) -> Finding:
    """What does a row cost in a larger batch, and is the time of a step f + d b?

    Args:
        sizes: b, rows of a step.
        rounds: steps of each size, one a round.
        matrix: rows and columns of the matrices that are multiplied.
        block: columns of a block.
        seed: of the model and the numbers.
    """
    with torch_threads(1):
        steps = step_seconds(sizes, rounds, seed)
        products = product_seconds(matrix, block, rounds, seed)
    typical = {size: float(np.quantile(each, LOW)) for size, each in steps.items()}
    line = line_through(typical)
    errors = [line.seconds(size) / seconds - 1 for size, seconds in typical.items()]
    return _finding(typical, products, line, errors, matrix)


def step_seconds(sizes: Sequence[int], rounds: int, seed: int) -> dict[int, list[float]]:
    """CPU seconds of a step of the project's model by its rows, without the first round, which warms up."""
    data, learner = clicks(max(max(sizes), 512), seed=seed), new_learner(seed=seed)
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds + 1):
        for size in sizes:
            started = time.process_time()
            chunk = learner.look_up(data.window.minibatch(data.learned[:size]))
            learner.step(chunk, slice(0, size), divisor=size, learning_rate=1e-4)
            learner.finish(chunk)
            taken[size].append(time.process_time() - started)
    return {size: each[1:] for size, each in taken.items()}


def product(left: torch.Tensor, right: torch.Tensor, pieces: Pieces, block: int) -> torch.Tensor:
    """`left @ right`, computed an element, a column or a block of columns at a time."""
    result = torch.empty(left.shape[0], right.shape[1])
    match pieces:
        case "element":
            for i in range(left.shape[0]):
                for j in range(right.shape[1]):
                    result[i, j] = torch.dot(left[i], right[:, j])
        case "column":
            for j in range(right.shape[1]):
                result[:, j] = torch.mv(left, right[:, j])
        case "block":
            for j in range(0, right.shape[1], block):
                result[:, j : j + block] = left @ right[:, j : j + block]
        case "whole":
            torch.mm(left, right, out=result)
        case _:
            assert_never(pieces)
    return result


def product_seconds(size: int, block: int, rounds: int, seed: int) -> dict[Pieces, float]:
    """CPU seconds of the product of two square matrices; the one by elements is timed once."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    return {
        pieces: _timed(partial(product, left, right, pieces, block), 1 if pieces == "element" else rounds) for pieces in PIECES
    }


def _timed(work: Callable[[], object], rounds: int) -> float:
    """Of one call; a round has as many as take a millisecond at least, since the clock is coarse."""
    started = time.process_time()
    work()
    once = max(time.process_time() - started, 1e-6)
    calls = max(1, round(0.001 / once))
    seconds = []
    for _ in range(rounds if calls > 1 or rounds > 1 else 0):
        started = time.process_time()
        for _ in range(calls):
            work()
        seconds.append((time.process_time() - started) / calls)
    return float(np.quantile(seconds, LOW)) if seconds else once


def _finding(
    typical: Mapping[int, float], products: Mapping[Pieces, float], line: StepTime, errors: Sequence[float], matrix: int
) -> Finding:
    sizes = list(typical)
    per_row: F64 = np.array([typical[size] / size for size in sizes])
    rates = {pieces: 2 * matrix**3 / seconds / 1e9 for pieces, seconds in products.items()}
    worst, median = max(abs(error) for error in errors), float(np.median(np.abs(errors)))
    half = line.fixed_seconds / line.row_seconds
    figure, (left, right) = canvas(2)
    name_axes(left, "A step of the model", "batch size b (rows)", "microseconds a row")
    left.plot(sizes, 1e6 * per_row, **look(0), label="measured")
    left.plot(sizes, [1e6 * line.seconds(b) / b for b in sizes], **(look(1) | {"marker": ""}), label="(f + d b) / b")
    log_counts(left, "xy")
    legend(left)
    name_axes(right, f"{matrix} x {matrix} matrix product", "billion operations a second", "")
    right.barh(list(rates), list(rates.values()), color=BLUE)
    right.set_xscale("log")
    right.invert_yaxis()
    rows: list[tuple[Cell, ...]] = [
        (f"step of {b:,} rows", 1000 * typical[b], 1e6 * typical[b] / b, 1000 * line.seconds(b), None) for b in sizes
    ]
    rows += [(f"product by {pieces}", 1000 * products[pieces], None, None, rates[pieces]) for pieces in PIECES]
    return Finding(
        name="hardware",
        question="What does a row cost in a larger batch, and is the time of a step f + d b?",
        sentence=(
            f"A row costs {1e6 * per_row[0]:.0f} us in a batch of {sizes[0]:,} and {1e6 * per_row[-1]:.1f} us in one of "
            f"{sizes[-1]:,}, {per_row[0] / per_row[-1]:.0f} times less; f = {1e3 * line.fixed_seconds:.2f} ms and "
            f"d = {1e6 * line.row_seconds:.2f} us fit all sizes to {100 * worst:.0f} % ({100 * median:.0f} % in "
            f"the median), so that from b = {half:.0f} rows on a step costs more for its rows than for being a step. The "
            f"whole product runs at {rates['whole']:.3g} billion operations a second, {rates['whole'] / rates['element']:,.0f} "
            f"times the rate of the product by elements and {rates['whole'] / rates['column']:.1f} times that by columns."
        ),
        columns=("work", "CPU ms", "us a row", "f + d b (ms)", "billion operations a second"),
        rows=tuple(rows),
        figure=figure,
        metrics={
            "fixed_ms": 1e3 * line.fixed_seconds,
            "row_us": 1e6 * line.row_seconds,
            "worst_error": worst,
            "first_row_over_last": float(per_row[0] / per_row[-1]),
        },
    )


if __name__ == "__main__":
    main_of(run)
