"""Which batch size reaches a target loss soonest: K(b) = N_iter + C/b steps of f + d b seconds each.

The total (N_iter + C/b) (f + d b) is least at b_opt = sqrt(C f / (N_iter d)). Steps are counted by descents, each batch size
with its best learning rate; f and d are measured on the same steps. C/N_iter is a noise scale: it is put beside those that the
gradients give, tr(Sigma)/|G|^2 and, as the theory has it, tr(H Sigma)/G'HG with the Hessian H.

    python -m pipeline.lab.time_to_target --help
"""

import math
import time
from collections.abc import Sequence

import numpy as np

from pipeline.lab.best_rate import one_step_law
from pipeline.lab.data_efficiency import RATES, SIZES
from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import GREY, canvas, legend, log_counts, look, name_axes
from pipeline.lab.logistic import LogisticRows, descend_many, logistic_rows
from pipeline.lab.noise_scale import exact_noise_scale
from pipeline.lab.problems import F64
from pipeline.lab.targets import Hyperbola, Reached, fitted, steps_to_target
from pipeline.training.step_time import StepTime, line_through
from pipeline.training.threads import torch_threads


def run(
    *,
    num_rows: int = 4096,
    sizes: tuple[int, ...] = SIZES,
    share: float = 0.8,
    rates: tuple[float, ...] = RATES,
    seeds: int = 32,
    most_rows: int = 60_000,
    most_steps: int = 100,
    timed_steps: int = 200,
    seed: int = 0,
) -> Finding:
    """Which batch size reaches a target loss soonest?

    Args:
        num_rows: rows that batches are drawn from.
        sizes: batch sizes.
        share: of the way from the first loss to the least possible one that makes the target.
        rates: learning rates tried for each size.
        seeds: runs of each rate, fewer for large batches.
        most_rows: length of a run in rows.
        most_steps: or in steps, whichever is longer.
        timed_steps: steps of each size that are timed, fewer for large batches.
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
    curve = fitted({each.batch_size: each.steps for each in usable})
    rows = logistic_rows(num_rows, seed)
    with torch_threads(1):
        taken = {each.batch_size: step_seconds(rows, each.batch_size, timed_steps) for each in usable}
    line = line_through(taken)
    noise = mean_noise_scales(rows, target)
    return _finding(usable, curve, taken, line, noise, target)


def best_batch(curve: Hyperbola, line: StepTime) -> float:
    """sqrt(C f / (N_iter d)).

    >>> best_batch(Hyperbola(least_steps=10.0, least_rows=1000.0), StepTime(fixed_seconds=0.004, row_seconds=0.00001))
    200.0
    """
    return math.sqrt(curve.least_rows * line.fixed_seconds / (curve.least_steps * line.row_seconds))


def step_seconds(rows: LogisticRows, batch_size: int, steps: int) -> float:
    """CPU seconds of a step of one regression: the fastest of five runs."""
    count = max(steps * 64 // (64 + batch_size), 5)
    found = []
    for number in range(5):
        started = time.process_time()
        descend_many(rows, batch_size=batch_size, rates_W=[0.1], at_steps=[count], seeds=1, seed=[number])
        found.append((time.process_time() - started) / count)
    return min(found)


def mean_noise_scales(rows: LogisticRows, target: float, learning_rate: float = 2.0) -> tuple[float, float]:
    """Exact tr(Sigma)/|G|^2 and tr(H Sigma)/G'HG on the way to the target, means over the steps of full gradients.

    Each step is weighted by what it gains, as the critical batch of a whole run is (McCandlish et al. 2018, appendix D).
    """
    weights_D, loss = rows.start_D, float(rows.losses(rows.start_D[:, None])[0])
    scales: list[tuple[float, float]] = []
    gains: list[float] = []
    while loss > target and len(scales) < 500:
        gradients_RD = rows.gradients(weights_D)
        scales.append((exact_noise_scale(gradients_RD), one_step_law(gradients_RD, rows.hessian(weights_D)).noise))
        weights_D = weights_D - learning_rate * gradients_RD.mean(axis=0)
        after = float(rows.losses(weights_D[:, None])[0])
        gains.append(max(loss - after, 0.0))
        loss = after
    plain, weighted = np.average(scales, axis=0, weights=gains)
    return float(plain), float(weighted)


def _finding(
    usable: Sequence[Reached],
    curve: Hyperbola,
    taken: dict[int, float],
    line: StepTime,
    noise: tuple[float, float],
    target: float,
) -> Finding:
    sizes = [each.batch_size for each in usable]
    measured: F64 = np.array([each.steps * taken[each.batch_size] for each in usable])
    predicted = [curve.steps(b) * line.seconds(b) for b in sizes]
    best, optimum = sizes[int(np.argmin(measured))], best_batch(curve, line)
    lost = curve.steps(best) * line.seconds(best) / (curve.steps(optimum) * line.seconds(optimum)) - 1
    within = abs(math.log2(optimum / best)) <= 1
    figure, (left, right) = canvas(2)
    name_axes(left, "Steps to the target", "batch size b (rows)", "steps K")
    left.plot(sizes, [each.steps for each in usable], **(look(0) | {"linestyle": ""}), label="measured")
    left.plot(sizes, [curve.steps(b) for b in sizes], color=GREY, lw=1.8, label="N_iter + C/b")
    log_counts(left, "xy")
    legend(left)
    name_axes(right, "Time to the target", "batch size b (rows)", "CPU milliseconds")
    right.plot(sizes, 1000 * measured, **(look(1) | {"linestyle": ""}), label="measured")
    right.plot(sizes, [1000 * seconds for seconds in predicted], color=GREY, lw=1.8, label="(N_iter + C/b)(f + d b)")
    right.axvline(optimum, color=GREY, lw=1.2, ls=":", label="b_opt")
    log_counts(right, "xy")
    legend(right)
    return Finding(
        name="time_to_target",
        question="Which batch size reaches a target loss soonest?",
        sentence=(
            f"To a log loss of {target:.4f}, K(b) = {curve.least_steps:.1f} + {curve.least_rows:,.0f}/b steps of "
            f"{1e6 * line.fixed_seconds:.0f} + {1e6 * line.row_seconds:.2f} b microseconds put the best batch at {optimum:.0f} "
            f"rows; the fastest that was run has {best:,}, {'within' if within else 'not within'} a factor of two. "
            f"C/N_iter = {curve.critical_batch:,.0f} rows; the gradients' own noise scale on the way is {noise[0]:,.0f}, and "
            f"weighted by the Hessian {noise[1]:,.0f}: {_alike(curve.critical_batch, noise)}."
        ),
        columns=("batch size", "steps K", "N_iter + C/b", "us a step", "f + d b (us)", "ms to target", "predicted (ms)"),
        rows=tuple(
            (
                each.batch_size,
                each.steps,
                curve.steps(each.batch_size),
                1e6 * taken[each.batch_size],
                1e6 * line.seconds(each.batch_size),
                1e3 * milliseconds,
                1e3 * expected,
            )
            for each, milliseconds, expected in zip(usable, measured, predicted, strict=True)
        ),
        figure=figure,
        metrics={
            "least_steps": curve.least_steps,
            "least_rows": curve.least_rows,
            "best_predicted": optimum,
            "best_measured": float(best),
            "excess_of_best_measured": lost,
            "critical_batch": curve.critical_batch,
            "noise_scale": noise[0],
            "noise_scale_by_hessian": noise[1],
        },
    )


def _alike(critical_batch: float, noise: tuple[float, float]) -> str:
    """In words.

    >>> _alike(100.0, (150.0, 700.0)), _alike(100.0, (300.0, 700.0))
    ('the first is the same number within a factor of two', 'neither is the same number within a factor of two')
    """
    near = [0.5 <= each / critical_batch <= 2 for each in noise]
    which = "both are" if all(near) else "the first is" if near[0] else "the second is" if near[1] else "neither is"
    return f"{which} the same number within a factor of two"


if __name__ == "__main__":
    main_of(run)
