"""With or without replacement; and what happens where every row is there twice.

Enters: rows of a linear regression. Leaves: how far from the least-squares solution runs come to rest, by the way their rows
are drawn and by rate; and the loss along full-batch, mini-batch and single-row descent on rows, and on the same rows doubled.

Drawn with replacement, the steady squared distance is in proportion to the rate. In an order without replacement the noise of a
pass adds up to almost nothing, and it falls faster than the rate (Mishchenko et al. 2020, *Random Reshuffling*). Doubling
every row does not change the mean gradient, so full-batch descent takes the same steps; descent by batches takes twice as many.

Letters: S runs, R rows, D features, b rows of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_schemas.errors import ConfigError
from pipeline.lab.experiment import Cell, Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes
from pipeline.lab.problems import LinearRegression

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

Drawing = Literal["with replacement", "reshuffled each pass", "one order for all passes"]
DRAWINGS: tuple[Drawing, ...] = ("with replacement", "reshuffled each pass", "one order for all passes")


def run(
    *,
    num_rows: int = 256,
    num_features: int = 8,
    batch_size: int = 8,
    learning_rates: tuple[float, ...] = (0.02, 0.04, 0.08, 0.16),
    noise: float = 1.0,
    runs: int = 32,
    passes: int = 60,
    seed: int = 0,
) -> Finding:
    """Sampling without replacement learns better; doubling all rows changes nothing.

    Args:
        num_rows: of the problem; a multiple of the batch.
        num_features: of a row.
        batch_size: of the mini-batches.
        learning_rates: of the runs that are compared by drawing; the last one is that of the doubled rows.
        noise: standard deviation of the labels.
        runs: for each rate and drawing, each with first weights of its own.
        passes: over the rows; at the smallest rate.
        seed: of rows and draws.
    """
    if num_rows % batch_size:
        rounded = max(num_rows // batch_size, 1) * batch_size
        raise ConfigError(f"num_rows must be a multiple of batch_size = {batch_size}, got {num_rows}; use {rounded}")
    problem = LinearRegression.of(num_features, condition=4.0, noise=noise, seed=seed)
    features_RD, labels_R = problem.rows(num_rows, [seed, 2])
    floors = {
        drawing: [
            floor(
                features_RD,
                labels_R,
                drawing=drawing,
                batch_size=batch_size,
                rate=rate,
                runs=runs,
                passes=max(round(passes * learning_rates[0] / rate), 12),
                seed=[seed, place],
            )
            for place, rate in enumerate(learning_rates)
        ]
        for drawing in DRAWINGS
    }
    slopes = {drawing: log_slope(learning_rates, found) for drawing, found in floors.items()}
    doubled = doubled_losses(features_RD, labels_R, batch_size=batch_size, rate=learning_rates[-1] / 2, runs=runs, seed=seed)
    figure, (upper, lower) = canvas(2)
    for number, drawing in enumerate(DRAWINGS):
        upper.plot(learning_rates, floors[drawing], **look(number), label=f"{drawing}")
    upper.set_xscale("log")
    upper.set_yscale("log")
    upper.set_xticks(learning_rates, [f"{rate:g}" for rate in learning_rates])
    upper.minorticks_off()
    name_axes(upper, "Where runs come to rest", "learning rate", "squared distance from the best")
    legend(upper)
    for number, (name, (once, twice)) in enumerate(doubled.items()):
        style = look(number)
        lower.plot(range(len(once)), once, color=style["color"], lw=2.4, marker=style["marker"], ms=6, label=name)
        lower.plot(range(len(twice)), twice, color=style["color"], lw=2, ls=":", marker=style["marker"], ms=6, mfc="white")
    lower.set_yscale("log")
    lower.set_xticks(range(max(len(once) for once, _ in doubled.values())))
    name_axes(lower, "Dotted: every row doubled", "passes over the rows", "loss above the best")
    legend(lower)
    speeds = {name: (once[1], twice[1], once[2]) for name, (once, twice) in doubled.items()}
    together = together_distance(features_RD, labels_R, batch_size=batch_size, rate=learning_rates[-1] / 2, seed=seed)
    by_drawing: list[tuple[Cell, ...]] = [
        (f"squared distance, {drawing}", *floors[drawing], slopes[drawing]) for drawing in DRAWINGS
    ]
    none = (None,) * (len(learning_rates) - 1)
    by_doubling: list[tuple[Cell, ...]] = [
        (f"loss after {what}, {name}", *none, value, None)
        for name, found in speeds.items()
        for what, value in zip(("1 pass", "1 pass, doubled", "2 passes"), found, strict=True)
    ]
    return Finding(
        name="replacement",
        question="Sampling with or without replacement, and every row doubled: what changes?",
        sentence=sentence(floors, slopes, speeds, together),
        columns=("what", *(f"at rate {rate:g}" for rate in learning_rates), "power of the rate"),
        rows=(*by_drawing, *by_doubling),
        figure=figure,
        metrics={
            "slope_with_replacement": slopes["with replacement"],
            "slope_reshuffled": slopes["reshuffled each pass"],
            "floor_ratio": floors["with replacement"][0] / floors["reshuffled each pass"][0],
            "doubled_full_change": abs(speeds["full batch"][1] - speeds["full batch"][0]),
            "doubled_together_change": together,
        },
    )


def least_squares(features_RD: F64, labels_R: F64) -> F64:
    """`[D]`: the best weights."""
    return np.asarray(np.linalg.lstsq(features_RD, labels_R, rcond=None)[0], np.float64)


def descend(weights_SD: F64, features_RD: F64, labels_R: F64, rows_Sb: I64, rate: float) -> F64:
    """One step of each run, on rows of its own."""
    own_SbD = features_RD[rows_Sb]
    error_Sb = np.einsum("sbd,sd->sb", own_SbD, weights_SD) - labels_R[rows_Sb]
    return np.asarray(weights_SD - rate / rows_Sb.shape[1] * np.einsum("sbd,sb->sd", own_SbD, error_Sb), np.float64)


def orders(drawing: Drawing, *, runs: int, num_rows: int, seed: Sequence[int]) -> Callable[[], I64]:
    """Gives `[S, R]` rows in the order of the next pass."""
    rng = np.random.default_rng([*seed, DRAWINGS.index(drawing)])
    fixed_SR = _permutations(rng, runs, num_rows)
    match drawing:
        case "with replacement":
            return lambda: rng.integers(num_rows, size=(runs, num_rows))
        case "reshuffled each pass":
            return lambda: _permutations(rng, runs, num_rows)
        case "one order for all passes":
            return lambda: fixed_SR


def floor(
    features_RD: F64,
    labels_R: F64,
    *,
    drawing: Drawing,
    batch_size: int,
    rate: float,
    runs: int,
    passes: int,
    seed: Sequence[int],
) -> float:
    """Mean squared distance from the best weights at the ends of the second half of the passes, of runs that start there."""
    best_D = least_squares(features_RD, labels_R)
    weights_SD = np.tile(best_D, (runs, 1))
    next_order = orders(drawing, runs=runs, num_rows=len(labels_R), seed=seed)
    squares = []
    for number in range(passes):
        order_SR = next_order()
        for start in range(0, len(labels_R), batch_size):
            weights_SD = descend(weights_SD, features_RD, labels_R, order_SR[:, start : start + batch_size], rate)
        if number >= passes // 2:
            squares.append(float(np.square(weights_SD - best_D).sum(axis=1).mean()))
    return float(np.mean(squares))


def doubled_losses(
    features_RD: F64, labels_R: F64, *, batch_size: int, rate: float, runs: int, seed: int, passes: int = 4
) -> Mapping[str, tuple[list[float], list[float]]]:
    """For each way to descend: mean loss above the best after each pass over the rows, and over the rows doubled."""
    twice_RD, twice_R = np.tile(features_RD, (2, 1)), np.tile(labels_R, 2)
    best = _loss(least_squares(features_RD, labels_R)[None], features_RD, labels_R)
    found = {}
    for name, size in (("full batch", 0), (f"batch of {batch_size}", batch_size), ("single row", 1)):
        own_rate = rate / batch_size if size == 1 else rate
        pair = []
        for own_RD, own_R in ((features_RD, labels_R), (twice_RD, twice_R)):
            weights_SD = np.zeros((runs, features_RD.shape[1]))
            losses = [_loss(weights_SD, features_RD, labels_R) - best]
            next_order = orders("reshuffled each pass", runs=runs, num_rows=len(own_R), seed=[seed, 5])
            for _ in range(passes):
                order_SR = next_order()
                for start in range(0, len(own_R), size or len(own_R)):
                    rows_Sb = order_SR[:, start : start + (size or len(own_R))]
                    weights_SD = descend(weights_SD, own_RD, own_R, rows_Sb, own_rate)
                losses.append(_loss(weights_SD, features_RD, labels_R) - best)
            pair.append(losses)
        found[name] = (pair[0], pair[1])
    return found


def together_distance(features_RD: F64, labels_R: F64, *, batch_size: int, rate: float, seed: int) -> float:
    """Largest difference of a weight after a pass in batches, from one over doubled rows in batches twice as large whose copies
    stay together."""
    order_SR = orders("reshuffled each pass", runs=1, num_rows=len(labels_R), seed=[seed, 6])()
    once_SD = twice_SD = np.zeros((1, features_RD.shape[1]))
    for start in range(0, len(labels_R), batch_size):
        rows_Sb = order_SR[:, start : start + batch_size]
        once_SD = descend(once_SD, features_RD, labels_R, rows_Sb, rate)
        twice_SD = descend(twice_SD, features_RD, labels_R, np.repeat(rows_Sb, 2, axis=1), rate)
    return float(np.abs(once_SD - twice_SD).max())


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of log y over log x.

    >>> round(log_slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def sentence(
    floors: Mapping[Drawing, Sequence[float]],
    slopes: Mapping[Drawing, float],
    speeds: Mapping[str, tuple[float, float, float]],
    together: float,
) -> str:
    """The answer.

    Args:
        speeds: loss after one pass, after one over the doubled rows, and after two.
        together: how far a weight moves where copies stay together in batches twice as large.
    """
    ratio = floors["with replacement"][0] / floors["reshuffled each pass"][0]
    better = f"{ratio:.3g} times nearer to the best than" if ratio > 1 else f"no nearer to the best ({ratio:.2f} times) than"
    powers = slopes["reshuffled each pass"], slopes["with replacement"]
    same = [name for name, (once, twice, _) in speeds.items() if abs(twice - once) <= 1e-9 * once]
    moved = [name for name in speeds if name not in same]
    alike = [f"{speeds[name][1] / speeds[name][2]:.2f} ({name})" for name in moved]
    pairs = f"one doubled pass ends at {' and '.join(alike)} times the loss of two passes; " if alike else ""
    return (
        f"At the smallest rate reshuffled rows come to rest {better} rows drawn with replacement, and the squared distance "
        f"goes with the power {powers[0]:.2f} of the rate against {powers[1]:.2f}. Doubling every row leaves the steps of "
        f"{' and '.join(same) or 'none'} as they were and changes those of {' and '.join(moved) or 'none'}: {pairs}in batches "
        f"twice as large with both copies together no weight moves by more than {together:.0e}."
    )


def _permutations(rng: np.random.Generator, runs: int, num_rows: int) -> I64:
    return np.asarray(rng.permuted(np.tile(np.arange(num_rows), (runs, 1)), axis=1), np.int64)


def _loss(weights_SD: F64, features_RD: F64, labels_R: F64) -> float:
    """Half the mean squared error, over rows and runs."""
    return 0.5 * float(np.square(weights_SD @ features_RD.T - labels_R).mean())


if __name__ == "__main__":
    main_of(run)
