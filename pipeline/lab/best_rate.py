"""The best learning rate by batch size, against lr_max / (1 + N/B).

For one step from fixed weights the law holds exactly on a quadratic (McCandlish et al. 2018, eq. 2.6), with
lr_max = |G|^2 / G'HG and N = tr(H Sigma) / G'HG. For a run of many steps it is a claim. Linear scaling is its left end,
b << N; for optimizers like Adam the best rate is said to grow with the root of b.

    python -m pipeline.lab.best_rate --help
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import GREY, canvas, legend, log_counts, look, name_axes
from pipeline.lab.gradient_variance import slope
from pipeline.lab.logistic import LogisticRows, Rule, descend_many, logistic_rows, lowest, seeds_for
from pipeline.lab.problems import F64

SGD_RATES = tuple(round(float(rate), 4) for rate in np.geomspace(0.02, 12.8, 15))
ADAM_RATES = tuple(round(float(rate), 5) for rate in np.geomspace(0.0006, 0.4, 15))


def run(
    *,
    num_rows: int = 4096,
    sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    steps: int = 60,
    draws: int = 400,
    seeds: int = 24,
    sgd_rates: tuple[float, ...] = SGD_RATES,
    adam_rates: tuple[float, ...] = ADAM_RATES,
    seed: int = 0,
) -> Finding:
    """How does the best learning rate grow with the batch?

    Args:
        num_rows: rows that batches are drawn from.
        sizes: B, batch sizes.
        steps: of a run; the best rate has the lowest mean loss after them.
        draws: batches of each size for the best rate of a single step.
        seeds: runs of each rate, fewer for large batches.
        sgd_rates: tried with SGD.
        adam_rates: tried with Adam.
        seed: of rows and batches.
    """
    rows = logistic_rows(num_rows, seed)
    law = one_step_law(rows.gradients(rows.start_D), rows.hessian(rows.start_D))
    single = [best_single_step(rows, b, law.rate(b), draws, [seed, 1, b]) for b in sizes]
    sgd, adam = (
        [_best_of_run(rows, b, rates, steps, seeds_for(b, seeds), [seed, 2, b], rule) for b in sizes]
        for rule, rates in _rules(sgd_rates, adam_rates)
    )
    return _finding(sizes, steps, law, single, sgd, adam)


@dataclass(frozen=True, kw_only=True)
class RateLaw:
    """lr_max / (1 + N/B)."""

    most: float
    """lr_max."""
    noise: float
    """N in rows."""

    def rate(self, batch_size: float) -> float:
        """Best of a batch size.

        >>> RateLaw(most=1.0, noise=100.0).rate(100)
        0.5
        """
        return self.most / (1 + self.noise / batch_size)


def one_step_law(gradients_RD: F64, hessian_DD: F64) -> RateLaw:
    """Of a quadratic with this Hessian, from the gradients of all rows at the same weights."""
    mean_D = gradients_RD.mean(axis=0)
    centred_RD = gradients_RD - mean_D
    bend = float(mean_D @ hessian_DD @ mean_D)
    noise = float(np.einsum("rd,de,re->", centred_RD, hessian_DD, centred_RD, optimize=True)) / len(gradients_RD)
    return RateLaw(most=float(mean_D @ mean_D) / bend, noise=noise / bend)


def fitted_law(sizes: Sequence[int], rates: Sequence[float]) -> RateLaw:
    """Least squares of log rates, N on a fine grid.

    >>> law = fitted_law([10, 100, 1000], [RateLaw(most=2.0, noise=100.0).rate(b) for b in (10, 100, 1000)])
    >>> round(law.most, 2), round(law.noise)
    (2.0, 100)
    """
    log_rates, every = np.log(np.array(rates)), np.array(sizes, np.float64)
    found = []
    for noise in np.geomspace(1.0, 100 * max(sizes), 2401):
        shape = -np.log1p(noise / every)
        most = float((log_rates - shape).mean())
        found.append((float(np.square(log_rates - shape - most).sum()), float(np.exp(most)), float(noise)))
    _, most, noise = min(found)
    return RateLaw(most=most, noise=noise)


def best_single_step(rows: LogisticRows, batch_size: int, around: float, draws: int, seed: Sequence[int]) -> float:
    """Rate with the lowest mean loss after one step from the start, over `draws` batches."""
    rng, rates = np.random.default_rng(list(seed)), around * 2.0 ** np.arange(-2, 2.5, 0.5)
    gradients_RD = rows.gradients(rows.start_D)
    steps_DT = np.array([gradients_RD[rng.integers(len(gradients_RD), size=batch_size)].mean(axis=0) for _ in range(draws)]).T
    losses = np.array([rows.losses(rows.start_D[:, None] - rate * steps_DT).mean() for rate in rates])
    curve = np.polyfit(rates, losses, 2, w=1 / rates)
    return float(-curve[1] / (2 * curve[0]))


def linear_until(sizes: Sequence[int], rates: Sequence[float]) -> int | None:
    """First batch size whose best rate is below half of what linear scaling from the smallest one says; None: nowhere.

    >>> linear_until([1, 10, 100], [0.1, 0.9, 2.0])
    100
    """
    return next((b for b, rate in zip(sizes, rates, strict=True) if rate < 0.5 * rates[0] * b / sizes[0]), None)


def _rules(sgd_rates: Sequence[float], adam_rates: Sequence[float]) -> tuple[tuple[Rule, Sequence[float]], ...]:
    return ("sgd", sgd_rates), ("adam", adam_rates)


def _best_of_run(
    rows: LogisticRows, batch_size: int, rates: Sequence[float], steps: int, seeds: int, seed: Sequence[int], rule: Rule
) -> float:
    losses_TW = descend_many(rows, batch_size=batch_size, rates_W=rates, at_steps=[steps], seeds=seeds, seed=seed, rule=rule)
    return lowest(rates, losses_TW[0])[0]


def _finding(
    sizes: Sequence[int], steps: int, law: RateLaw, single: Sequence[float], sgd: Sequence[float], adam: Sequence[float]
) -> Finding:
    fit, stop = fitted_law(sizes, sgd), linear_until(sizes, sgd)
    off = max(abs(np.log(rate / fit.rate(b))) for b, rate in zip(sizes, sgd, strict=True))
    single_off = max(abs(rate / law.rate(b) - 1) for b, rate in zip(sizes, single, strict=True))
    small = [b for b in sizes if b <= fit.noise]
    growth = slope(small, adam[: len(small)]) if len(small) > 1 else float("nan")
    figure, (left, right) = canvas(2)
    name_axes(left, "One step from the start", "batch size B (rows)", "best learning rate")
    left.plot(sizes, single, **(look(0) | {"linestyle": ""}), label="measured")
    left.plot(sizes, [law.rate(b) for b in sizes], color=GREY, lw=1.8, label="from Hessian and noise")
    log_counts(left, "xy")
    legend(left)
    name_axes(right, f"Runs of {steps} steps", "batch size B (rows)", "best learning rate")
    right.plot(sizes, sgd, **(look(0) | {"linestyle": ""}), label="SGD")
    right.plot(sizes, [fit.rate(b) for b in sizes], color=GREY, lw=1.8, label="lr_max/(1 + N/B), fitted")
    right.plot(sizes, [sgd[0] * b / sizes[0] for b in sizes], color=GREY, lw=1.2, ls=":", label="linear")
    right.plot(sizes, adam, **look(1), label=f"Adam, slope {growth:.2f}")
    log_counts(right, "xy")
    right.set_ylim(0.5 * min(*sgd, *adam), 4 * max(*sgd, *adam))
    legend(right, fontsize=10)
    return Finding(
        name="best_rate",
        question="How does the best learning rate grow with the batch?",
        sentence=(
            f"For one step the best rates follow lr_max/(1 + N/B) with lr_max = {law.most:.2f} and N = {law.noise:.0f} rows "
            f"from Hessian and noise to {100 * single_off:.0f} %. For {steps} steps of SGD the law fits within a factor of "
            f"{np.exp(off):.2f} with lr_max = {fit.most:.2f} and N = {fit.noise:.0f}; "
            + (f"linear scaling is over by more than half at B = {stop:,}. " if stop else "linear scaling holds throughout. ")
            + f"Up to that N, Adam's best rate grows with B to the power {growth:.2f}, "
            + ("near the root that is claimed." if abs(growth - 0.5) <= 0.1 else "not with the root that is claimed.")
        ),
        columns=("batch size", "one step, measured", "one step, by the law", f"SGD, {steps} steps", "law, fitted", "Adam"),
        rows=tuple((b, single[i], law.rate(b), sgd[i], fit.rate(b), adam[i]) for i, b in enumerate(sizes)),
        figure=figure,
        metrics={
            "one_step_most": law.most,
            "one_step_noise": law.noise,
            "one_step_worst_error": float(single_off),
            "sgd_most": fit.most,
            "sgd_noise": fit.noise,
            "sgd_worst_factor": float(np.exp(off)),
            "adam_power": growth,
        },
    )


if __name__ == "__main__":
    main_of(run)
