"""Steps and rows to a target loss: does (S / S_min - 1) (E / E_min - 1) = 1 hold?

McCandlish et al. 2018, eq. 2.11: few steps cost many rows, and few rows many steps. Every batch size has its
best learning rate.

    python -m pipeline.lab.data_efficiency --help
"""

import math

import numpy as np

from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import GREY, canvas, legend, log_counts, look, name_axes
from pipeline.lab.targets import LEAST_EXCESS, Hyperbola, Reached, fitted, log_r2, log_rows_r2, steps_to_target

RATES = tuple(round(float(rate), 4) for rate in np.geomspace(0.05, 12.8, 15))
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def run(
    *,
    num_rows: int = 4096,
    sizes: tuple[int, ...] = SIZES,
    share: float = 0.8,
    rates: tuple[float, ...] = RATES,
    seeds: int = 32,
    most_rows: int = 60_000,
    most_steps: int = 100,
    seed: int = 0,
) -> Finding:
    """Do steps and rows to a target loss lie on a hyperbola?

    Args:
        num_rows: rows that batches are drawn from.
        sizes: batch sizes.
        share: of the way from the first loss to the least possible one that makes the target.
        rates: learning rates tried for each size.
        seeds: runs of each rate, fewer for large batches; their mean loss has to reach the target.
        most_rows: length of a run in rows.
        most_steps: or in steps, whichever is longer.
        seed: of rows and batches.
    """
    reached, target = steps_to_target(
        num_rows=num_rows,
        sizes=sizes,
        share=share,
        rates=rates,
        seeds=seeds,
        most_rows=most_rows,
        most_steps=most_steps,
        seed=seed,
    )
    usable = [each for each in reached if np.isfinite(each.steps)]
    steps_by_size = {each.batch_size: each.steps for each in usable}
    curve = fitted(steps_by_size)
    all_sizes = log_r2(curve, steps_by_size, least_excess=1e-9)
    fits = log_r2(curve, steps_by_size), log_rows_r2(curve, steps_by_size)
    return _finding(reached, usable, curve, fits, all_sizes, target)


def _finding(
    reached: tuple[Reached, ...],
    usable: list[Reached],
    curve: Hyperbola,
    fits: tuple[float, float],
    all_sizes: float,
    target: float,
) -> Finding:
    figure, (axes,) = canvas()
    name_axes(axes, f"To a log loss of {target:.4f}", "steps S", "rows E")
    axes.plot(
        [each.steps for each in usable], [each.rows for each in usable], **(look(0) | {"linestyle": ""}), label="measured"
    )
    steps = np.geomspace(1.02 * curve.least_steps, 1.2 * max(each.steps for each in usable), 100)
    rows = curve.least_rows * (1 + 1 / (steps / curve.least_steps - 1))
    axes.plot(steps, rows, color=GREY, lw=1.8, label="(S/Smin - 1)(E/Emin - 1) = 1")
    for each in usable:
        axes.annotate(f"{each.batch_size}", (each.steps, each.rows), xytext=(6, 5), textcoords="offset points", fontsize=10)
    log_counts(axes, "xy")
    legend(axes)
    missed = [str(each.batch_size) for each in reached if not np.isfinite(each.steps)]
    fit, fit_rows = fits
    return Finding(
        name="data_efficiency",
        question="Do steps and rows to a target loss lie on a hyperbola?",
        sentence=(
            f"{'Yes' if min(fits) >= 0.9 else 'Not quite'}: over batches of {usable[0].batch_size:,} to "
            f"{usable[-1].batch_size:,} rows the law "
            f"explains {100 * fit_rows:.1f} % of the variance of log E, and "
            f"{100 * fit:.1f} % on the form log(S/S_min - 1) = -log(E/E_min - 1) where both sides are measurable (excess of "
            f"{LEAST_EXCESS:.0%} or more; {_share(all_sizes)} over all sizes), with S_min = {curve.least_steps:.1f} steps and "
            f"E_min = {curve.least_rows:,.0f} rows; a batch of {curve.critical_batch:,.0f} rows takes twice the least of both."
            + (f" Batches of {', '.join(missed)} did not reach the target." if missed else "")
        ),
        columns=("batch size", "steps S", "rows E", "S by the law", "best learning rate", "(S/Smin - 1)(E/Emin - 1)"),
        rows=tuple(
            (
                each.batch_size,
                each.steps if np.isfinite(each.steps) else None,
                each.rows if np.isfinite(each.steps) else None,
                curve.steps(each.batch_size),
                f"{each.learning_rate:.3g}{' (edge)' if each.at_edge else ''}",
                (each.steps / curve.least_steps - 1) * (each.rows / curve.least_rows - 1) if np.isfinite(each.steps) else None,
            )
            for each in reached
        ),
        figure=figure,
        metrics={
            "log_r2": fit,
            "log_rows_r2": fit_rows,
            "log_r2_all_sizes": all_sizes,
            "least_steps": curve.least_steps,
            "least_rows": curve.least_rows,
            "critical_batch": curve.critical_batch,
        },
    )


def _share(fit: float) -> str:
    """In words.

    >>> _share(0.7), _share(float("-inf"))
    ('70.0 %', 'not defined')
    """
    return f"{100 * fit:.1f} %" if math.isfinite(fit) else "not defined"


if __name__ == "__main__":
    main_of(run)
