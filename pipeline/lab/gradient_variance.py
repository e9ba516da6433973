"""The mini-batch gradient is unbiased, and its variance is Sigma/b.

Batches are drawn at fixed weights, so that the gradient over all N rows, and the covariance Sigma of the gradient of one row,
are known exactly. With replacement the variance is tr(Sigma)/b; without, it is smaller by (N - b)/(N - 1) (Cochran 1977,
Sampling Techniques, eq. 2.9); batches that mirror strata leave out what differs between strata.

    python -m pipeline.lab.gradient_variance --help
"""

from collections.abc import Sequence
from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt

from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, log_counts, look, name_axes
from pipeline.lab.logistic import LogisticRows
from pipeline.lab.problems import F64, clicks
from sampling.minibatches import BatchCursor

Drawing = Literal["with", "without", "stratified"]
DRAWINGS: tuple[Drawing, ...] = ("with", "without", "stratified")
SLOPE, ALLOWED = -1.0, 0.05


def run(
    *,
    num_rows: int = 4096,
    sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    draws: int = 300,
    seed: int = 0,
) -> Finding:
    """Is the mini-batch gradient unbiased, with a variance of Sigma/b?

    Args:
        num_rows: N, the rows that batches are drawn from.
        sizes: b, the batch sizes.
        draws: batches of each size and kind.
        seed: of rows and batches.
    """
    data = clicks(num_rows, seed=seed)
    rows = LogisticRows.of(data)
    gradients_RD = rows.gradients(rows.start_D)
    means = {
        kind: [batch_gradients(gradients_RD, kind, b, draws, [seed, b, place], data.stratum_R[:num_rows]) for b in sizes]
        for place, kind in enumerate(DRAWINGS)
    }
    whole_D = gradients_RD.mean(axis=0)
    variances = {kind: [variance_around(whole_D, each) for each in means[kind]] for kind in DRAWINGS}
    trace = float(np.square(gradients_RD - whole_D).sum(axis=1).mean())
    return _finding(num_rows, sizes, draws, trace, variances, _largest_bias(whole_D, means, variances))


def batch_gradients(
    gradients_RD: F64, kind: Drawing, size: int, draws: int, seed: Sequence[int], stratum_R: npt.NDArray[np.int32]
) -> F64:
    """`[draws, D]` mean gradients of batches of `size` rows; those without replacement begin a pass of the loader."""
    rng, num_rows = np.random.default_rng(list(seed)), len(gradients_RD)
    found = []
    for draw in range(draws):
        match kind:
            case "with":
                chosen = rng.integers(num_rows, size=size)
            case "without":
                chosen = BatchCursor.of(num_rows, seed=[*seed, draw]).order_R[:size]
            case "stratified":
                chosen = BatchCursor.of(num_rows, seed=[*seed, draw], stratum_R=stratum_R).order_R[:size]
            case _:
                assert_never(kind)
        found.append(gradients_RD[chosen].mean(axis=0))
    return np.array(found)


def variance_around(whole_D: F64, means_TD: F64) -> float:
    """Mean squared distance of batch gradients from the gradient over all rows: the trace of their covariance, if unbiased."""
    return float(np.square(means_TD - whole_D).sum(axis=1).mean())


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of log values on log sizes, by least squares.

    >>> round(slope([1, 2, 4], [8.0, 4.0, 2.0]), 6)
    -1.0
    """
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def finite_correction(num_rows: int, size: int) -> float:
    """(N - b)/(N - 1): what drawing without replacement leaves of the variance.

    >>> finite_correction(101, 51)
    0.5
    """
    return (num_rows - size) / (num_rows - 1)


def _largest_bias(whole_D: F64, means: dict[Drawing, list[F64]], variances: dict[Drawing, list[float]]) -> float:
    """Squared distance of the mean over all draws from the whole gradient, over what chance alone is expected to make of it."""
    ratios = [
        float(np.square(each.mean(axis=0) - whole_D).sum()) / (variance / len(each))
        for kind in DRAWINGS
        for each, variance in zip(means[kind], variances[kind], strict=True)
    ]
    return float(np.mean(ratios))


def _finding(
    num_rows: int,
    sizes: tuple[int, ...],
    draws: int,
    trace: float,
    variances: dict[Drawing, list[float]],
    bias: float,
) -> Finding:
    corrections = [finite_correction(num_rows, b) for b in sizes]
    slopes = {
        "with": slope(sizes, variances["with"]),
        "without": slope(sizes, variances["without"]),
        "corrected": slope(sizes, [v / c for v, c in zip(variances["without"], corrections, strict=True)]),
    }
    shares = [1 - s / w for s, w in zip(variances["stratified"], variances["without"], strict=True)]
    met = abs(slopes["with"] - SLOPE) <= ALLOWED and abs(slopes["corrected"] - SLOPE) <= ALLOWED
    figure, (axes,) = canvas()
    name_axes(axes, "Variance of the mini-batch gradient", "batch size b (rows)", "trace of the covariance")
    for number, kind in enumerate(DRAWINGS):
        name = kind if kind == "stratified" else f"{kind} replacement"
        axes.plot(sizes, variances[kind], **look(number), label=name)
    axes.plot(sizes, [trace / b for b in sizes], color="#6b6b6b", lw=1.2, label="tr(Sigma)/b")
    log_counts(axes, "xy")
    legend(axes)
    return Finding(
        name="gradient_variance",
        question="Is the mini-batch gradient unbiased, with a variance of Sigma/b?",
        sentence=(
            f"{'Yes' if met and bias < 2 else 'Not quite'}: over {len(sizes)} batch sizes log variance falls on log b with "
            f"slope {slopes['with']:.3f} with replacement (-1 is claimed), {slopes['without']:.3f} without, and "
            f"{slopes['corrected']:.3f} without once (N-b)/(N-1) is divided out; the mean of {draws} batches is {bias:.2f} "
            f"times as far (squared) from the whole gradient as chance makes it. Stratified batches have {_less(shares[0])} "
            f"variance than plain ones at b = {sizes[0]:,}, and {_less(shares[-1])} at b = {sizes[-1]:,}."
        ),
        columns=("batch size", "with replacement", "tr(Sigma)/b", "without", "tr(Sigma)/b (N-b)/(N-1)", "stratified"),
        rows=tuple(
            (
                b,
                variances["with"][i],
                trace / b,
                variances["without"][i],
                trace / b * corrections[i],
                variances["stratified"][i],
            )
            for i, b in enumerate(sizes)
        ),
        figure=figure,
        metrics={f"slope_{name}": value for name, value in slopes.items()}
        | {"bias_over_chance": bias, "saved_by_strata": shares[-1]},
    )


def _less(share: float) -> str:
    """In words.

    >>> _less(0.2), _less(-0.01)
    ('20.0 % less', '1.0 % more')
    """
    return f"{100 * abs(share):.1f} % {'less' if share > 0 else 'more'}"


if __name__ == "__main__":
    main_of(run)
