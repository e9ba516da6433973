"""Does the noise of small batches carry a run out of a poor minimum?

Enters: a loss with two basins, batch sizes, a learning rate. Leaves: the share of runs that left the poor basin, beside what
Kramers' law says of it.

With a small rate the run is a Langevin process of temperature `T = lr * variance / (2 b)` in the time `lr * steps`, and it
leaves at the rate `sqrt(f''(poor) |f''(top)|) / (2 pi) * exp(-(f(top) - f(poor)) / T)` (Kramers 1940): the batch size matters
through lr / b alone.

Letters: B batch sizes.
"""

import math
from collections.abc import Sequence

import numpy as np

from data_schemas.errors import ConfigError
from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes, tick_sizes
from pipeline.lab.problems import TwoBasins


def run(
    *,
    batch_sizes: tuple[int, ...] = (8, 12, 16, 24, 48),
    learning_rate: float = 0.02,
    noise_deviation: float = 8.0,
    tilt: float = -0.15,
    rows: int = 60_000,
    runs: int = 300,
    seed: int = 0,
) -> Finding:
    """Small batches leave a poor minimum that large ones stay in.

    Args:
        batch_sizes: the first is the one that the learning rate belongs to.
        learning_rate: of the first batch size.
        noise_deviation: standard deviation of the gradient of a single row.
        tilt: of the loss, from -1.5 to 0: the nearer to -1.5, the lower the barrier.
        rows: that each run learns.
        runs: for each batch size.
        seed: of the noise.
    """
    if not -1.5 < tilt < 0:
        raise ConfigError(f"tilt must be between -1.5 and 0, so that there are a poor and a good minimum; got {tilt}")
    loss = TwoBasins(height=0.25, tilt=tilt, noise_variance=noise_deviation**2)
    first_steps = rows // batch_sizes[0]
    plans = {
        "same rate, same steps": [(batch, learning_rate, first_steps) for batch in batch_sizes],
        "same rate, same rows": [(batch, learning_rate, rows // batch) for batch in batch_sizes],
        "rate in proportion, same rows": [
            (batch, learning_rate * batch / batch_sizes[0], rows // batch) for batch in batch_sizes
        ],
    }
    measured = {
        name: [
            share_that_left(loss, batch_size=batch, rate=rate, steps=steps, runs=runs, seed=[seed, place, number])
            for place, (batch, rate, steps) in enumerate(plan)
        ]
        for number, (name, plan) in enumerate(plans.items())
    }
    expected = {
        name: [expected_share(loss, batch_size=batch, rate=rate, steps=steps) for batch, rate, steps in plan]
        for name, plan in plans.items()
    }
    figure, (axes,) = canvas()
    for number, name in enumerate(plans):
        axes.plot(batch_sizes, measured[name], **look(number), label=name)
        axes.plot(batch_sizes, expected[name], color="#6b6b6b", lw=1, zorder=1, label="Kramers' law" if not number else None)
    tick_sizes(axes, batch_sizes)
    axes.set_ylim(-0.03, 1.03)
    name_axes(axes, "Which runs leave the poor minimum", "batch size (rows)", "share of the runs")
    legend(axes)
    furthest = max(abs(a - b) for name in plans for a, b in zip(measured[name], expected[name], strict=True))
    return Finding(
        name="escape",
        question="Does the noise of small batches carry a run out of a poor minimum?",
        sentence=sentence(batch_sizes, *measured.values()),
        columns=("batch (rows)", *(f"{name}{what}" for name in plans for what in ("", ": Kramers"))),
        rows=tuple(
            (batch, *(value for name in plans for value in (measured[name][place], expected[name][place])))
            for place, batch in enumerate(batch_sizes)
        ),
        figure=figure,
        metrics={
            "left_smallest": measured["same rate, same steps"][0],
            "left_largest": measured["same rate, same steps"][-1],
            "left_largest_rate_in_proportion": measured["rate in proportion, same rows"][-1],
            "furthest_from_kramers": furthest,
        },
    )


def temperature(loss: TwoBasins, *, batch_size: int, rate: float) -> float:
    """T of the Langevin process.

    >>> temperature(TwoBasins(noise_variance=4.0), batch_size=4, rate=0.1)
    0.05
    """
    return rate * loss.noise_variance / (2 * batch_size)


def expected_share(loss: TwoBasins, *, batch_size: int, rate: float, steps: int) -> float:
    """By Kramers' law, which holds while the temperature is well below the barrier."""
    poor, top, _ = loss.stationary()
    height = float(np.diff(loss.loss(np.array([poor, top])))[0])
    attempts = math.sqrt(_curvature(loss, poor) * abs(_curvature(loss, top))) / (2 * math.pi)
    leaving = attempts * math.exp(-height / temperature(loss, batch_size=batch_size, rate=rate))
    return 1 - math.exp(-leaving * rate * steps)


def share_that_left(loss: TwoBasins, *, batch_size: int, rate: float, steps: int, runs: int, seed: Sequence[int]) -> float:
    """Share of `runs` that came to the good minimum at least once within `steps` steps."""
    places = loss.descend(rate, batch_size=batch_size, steps=steps, particles=runs, seed=seed)
    return float((places.max(axis=0) > loss.stationary()[2]).mean())


def sentence(
    batch_sizes: Sequence[int], same_steps: Sequence[float], same_rows: Sequence[float], in_proportion: Sequence[float]
) -> str:
    """The answer."""
    small, large = batch_sizes[0], batch_sizes[-1]
    claim = (
        f"At the same rate and number of steps {same_steps[0]:.0%} of the runs left with a batch of {small} and "
        f"{same_steps[-1]:.0%} with {large}"
    )
    if same_steps[0] - same_steps[-1] < 0.1:
        return f"{claim}: small batches did not help to leave."
    if abs(in_proportion[-1] - in_proportion[0]) < 0.5 * (same_steps[0] - same_steps[-1]):
        return (
            f"{claim}; with the rate in proportion to the batch it is {in_proportion[-1]:.0%} with {large}, so that what "
            "lets a run leave is the ratio of rate to batch, not the small batch itself."
        )
    return f"{claim}; with the rate in proportion to the batch it is {in_proportion[-1]:.0%}: the batch itself matters."


def _curvature(loss: TwoBasins, place: float) -> float:
    return loss.height * (12 * place**2 - 4)


if __name__ == "__main__":
    main_of(run)
