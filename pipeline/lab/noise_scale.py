"""The gradient noise scale N = tr(Sigma)/|G|^2, estimated from subsets at fixed weights, and while training runs.

The plain estimate takes the squared norm of a mean gradient for the signal, and so counts noise as signal. The unbiased one
takes it out (McCandlish et al. 2018, appendix A.1; `pipeline/training/noise_scale.py`). Beside them: the exact value from the
gradients of all rows, and the running estimate, which averages over the steps and so lags behind.

    python -m pipeline.lab.noise_scale --help
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_schemas.errors import ConfigError
from pipeline.lab.experiment import Cell, Finding, main_of
from pipeline.lab.figures import canvas, legend, log_counts, look, name_axes
from pipeline.lab.logistic import LogisticRows
from pipeline.lab.problems import F64, clicks, logistic_gradients
from pipeline.publishing.plots import BLUE, ORANGE
from pipeline.training.noise_scale import NoiseScale, spread_at_fixed_weights, spread_of

PIECES = 8
"""Micro-batches of a step, for the running estimate."""
GROUP = 16
"""Subsets of a plain estimate."""


def run(
    *,
    num_rows: int = 8192,
    subset_rows: int = 64,
    subsets: int = 2048,
    after_steps: tuple[int, ...] = (0, 10, 30, 100, 300, 1000),
    batch_size: int = 128,
    learning_rate: float = 0.5,
    seed: int = 0,
) -> Finding:
    """How large is the gradient noise scale, and how far is the plain estimate from the unbiased one?

    Args:
        num_rows: rows that batches and subsets are drawn from.
        subset_rows: b, rows of a subset.
        subsets: T, drawn with replacement at each point; the plain estimate takes 16 of them at a time.
        after_steps: of training, where the noise scale is estimated.
        batch_size: of training; a step has 8 micro-batches.
        learning_rate: of training.
        seed: of rows, batches and subsets.
    """
    data = clicks(num_rows, seed=seed)
    rows = LogisticRows.of(data)
    drawing = Drawing(subset_rows=subset_rows, subsets=subsets)
    path, running = _train(rows, after_steps, batch_size, learning_rate, [seed, 2])
    estimates = {
        f"{step:,} steps": _estimate(rows.gradients(path[step]), drawing, [seed, 1, step], running[step])
        for step in after_steps
    }
    last_RD = rows.gradients(path[max(after_steps)])
    strata = {
        name: _estimate(last_RD[chosen_R], drawing, [seed, 3, place])
        for place, (name, chosen_R) in enumerate(_strata(data.stratum_R[:num_rows]).items())
    }
    return _finding(after_steps, estimates, strata, drawing)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the noise scale is estimated at fixed weights."""

    subset_rows: int
    """b."""
    subsets: int
    """T, drawn with replacement; a multiple of `GROUP`."""

    def __post_init__(self) -> None:
        if self.subsets < GROUP or self.subsets % GROUP:
            raise ConfigError(f"subsets must be a multiple of {GROUP}, got {self.subsets}")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Noise scales in rows at the same weights."""

    exact: float
    unbiased: float
    """Of all subsets."""
    plain: float
    """Of `GROUP` subsets, mean over the groups."""
    running: float | None = None


def exact_noise_scale(gradients_RD: F64) -> float:
    """tr(Sigma)/|G|^2 over a population of rows.

    >>> exact_noise_scale(np.array([[1.0, 0.0], [3.0, 0.0]]))
    0.25
    """
    mean_D = gradients_RD.mean(axis=0)
    return float(np.square(gradients_RD - mean_D).sum(axis=1).mean() / (mean_D @ mean_D))


def subset_means(gradients_RD: F64, subset_rows: int, subsets: int, seed: Sequence[int]) -> F64:
    """`[T, D]` mean gradients of subsets drawn with replacement."""
    rng = np.random.default_rng(list(seed))
    return np.array([gradients_RD[rng.integers(len(gradients_RD), size=subset_rows)].mean(axis=0) for _ in range(subsets)])


def unbiased_noise_scale(means_TD: F64, subset_rows: int) -> float:
    """Noise over signal, both without bias; infinite where no signal was found."""
    spread = spread_at_fixed_weights(means_TD, subset_rows)
    return spread.noise / spread.signal if spread.signal > 0 else math.inf


def plain_noise_scale(means_TD: F64, subset_rows: int) -> float:
    """The same noise over |mean gradient|^2, which holds noise too: for T subsets it is N / (1 + N / (b T)) about."""
    mean_D = means_TD.mean(axis=0)
    return spread_at_fixed_weights(means_TD, subset_rows).noise / float(mean_D @ mean_D)


def _estimate(gradients_RD: F64, drawing: Drawing, seed: Sequence[int], running: float | None = None) -> Estimate:
    means_TD = subset_means(gradients_RD, drawing.subset_rows, drawing.subsets, seed)
    groups = np.split(means_TD, drawing.subsets // GROUP)
    return Estimate(
        exact=exact_noise_scale(gradients_RD),
        unbiased=unbiased_noise_scale(means_TD, drawing.subset_rows),
        plain=float(np.mean([plain_noise_scale(group, drawing.subset_rows) for group in groups])),
        running=running,
    )


def _train(
    rows: LogisticRows, after_steps: Sequence[int], batch_size: int, learning_rate: float, seed: Sequence[int]
) -> tuple[dict[int, F64], dict[int, float | None]]:
    """Weights after each of `after_steps`, and the running estimate there."""
    rng, running, weights_D = np.random.default_rng(list(seed)), NoiseScale(), rows.start_D
    path: dict[int, F64] = {}
    known: dict[int, float | None] = {}
    for step in range(max(after_steps) + 1):
        if step in after_steps:
            path[step], known[step] = weights_D, running.last
        chosen_B = rng.integers(len(rows.labels_R), size=batch_size)
        gradients_BD = logistic_gradients(rows.features_RD[chosen_B], rows.labels_R[chosen_B], weights_D)
        pieces = np.array_split(gradients_BD, PIECES)
        mean_D = gradients_BD.mean(axis=0)
        norms = [float(np.square(piece.mean(axis=0)).sum()) for piece in pieces]
        running.add(spread_of(norms, [len(piece) for piece in pieces], float(mean_D @ mean_D)))
        weights_D = weights_D - learning_rate * mean_D
    return path, known


def _strata(stratum_R: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.bool_]]:
    """Clicked, not clicked, and the three placements with most rows."""
    placement_R, clicked_R = stratum_R // 2, stratum_R % 2 == 1
    most = np.bincount(placement_R).argsort()[::-1][:3]
    return {"clicked": clicked_R, "not clicked": ~clicked_R} | {
        f"placement {number}": placement_R == place for number, place in enumerate(most, start=1)
    }


def _finding(
    after_steps: Sequence[int], estimates: dict[str, Estimate], strata: dict[str, Estimate], drawing: Drawing
) -> Finding:
    every = [*estimates.values(), *strata.values()]
    first, last = (estimates[f"{step:,} steps"] for step in (min(after_steps), max(after_steps)))
    off = float(np.median([abs(each.unbiased / each.exact - 1) for each in every]))
    low = float(np.median([each.plain / each.exact - 1 for each in every]))
    figure, (left, right) = canvas(2)
    name_axes(left, "Along training", "steps (+1)", "noise scale N (rows)")
    steps = [step + 1 for step in after_steps]
    for number, kind in enumerate(("exact", "unbiased", "plain", "running")):
        values = [getattr(each, kind) for each in estimates.values()]
        left.plot(steps, [np.nan if value is None else value for value in values], **look(number), label=kind)
    log_counts(left, "xy")
    legend(left)
    name_axes(right, f"By stratum, after {max(after_steps):,} steps", "noise scale N (rows)", "")
    places = np.arange(len(strata))
    right.barh(places + 0.2, [each.exact for each in strata.values()], 0.38, color=BLUE, label="exact")
    right.barh(places - 0.2, [each.unbiased for each in strata.values()], 0.38, color=ORANGE, label="unbiased", hatch="//")
    right.set_yticks(places, list(strata))
    right.set_xscale("log")
    right.invert_yaxis()
    legend(right)
    cells: list[tuple[Cell, ...]] = [
        (name, each.exact, each.unbiased, each.plain, each.running) for name, each in (estimates | strata).items()
    ]
    return Finding(
        name="noise_scale",
        question="How large is the gradient noise scale, and how far is the plain estimate from the unbiased one?",
        sentence=(
            f"N {'grows' if last.exact > first.exact else 'falls'} from {first.exact:.0f} to {last.exact:.0f} rows over "
            f"{max(after_steps):,} steps (exact). {drawing.subsets:,} subsets of {drawing.subset_rows} rows estimate it "
            f"without bias to {100 * off:.1f} % (median over {len(every)} places); the plain estimate from {GROUP} subsets is "
            f"{100 * abs(low):.0f} % too {'low' if low < 0 else 'high'}{_running(last)}."
        ),
        columns=("where", "exact (rows)", "unbiased (rows)", f"plain, {GROUP} subsets (rows)", "running (rows)"),
        rows=tuple(cells),
        figure=figure,
        metrics={
            "exact_first": first.exact,
            "exact_last": last.exact,
            "unbiased_last": last.unbiased,
            "unbiased_median_error": off,
            "plain_median_bias": low,
        },
    )


def _running(last: Estimate) -> str:
    if last.running is None:
        return ""
    return (
        f", and the running estimate of these batches ends at {last.running:.0f} rows, {last.running / last.exact:.2g} times it"
    )


if __name__ == "__main__":
    main_of(run)
