"""Does raising the batch do what decaying the learning rate does?

Enters: generated clicks, a batch and a rate, marks in passes. Leaves: the held-out loss along runs that divide the rate at each
mark, multiply the batch, or do neither.

The noise of SGD goes with lr / b, so both lower it alike, and the larger batch needs fewer steps (Smith et al. 2018, *Don't
Decay the Learning Rate, Increase the Batch Size*).

Letters: S seeds, T points along a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.comparison.statistics import Estimate, PairedDifference, mean_with_interval, paired_difference
from pipeline.lab.checks import need_batches, need_seeds
from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes
from pipeline.lab.problems import Clicks, clicks, descend, loss_and_auc, small_net

POINTS_A_PASS = 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A batch and a rate for each pass."""

    batch_size: int
    learning_rate: float
    factor: int
    """At each mark."""
    marks: tuple[int, ...]
    """Passes before which a change comes."""
    decays: bool = False
    grows: bool = False

    def at(self, number: int) -> tuple[int, float]:
        """Batch and rate of pass `number`, from 0.

        >>> Schedule(batch_size=64, learning_rate=0.4, factor=4, marks=(2,), grows=True).at(2)
        (256, 0.4)
        """
        times = self.factor ** sum(mark <= number for mark in self.marks)
        return self.batch_size * (times if self.grows else 1), self.learning_rate / (times if self.decays else 1)

    def steps(self, passes: int, num_rows: int) -> int:
        """Of the whole run."""
        return sum(num_rows // self.at(number)[0] for number in range(passes))


def run(
    *,
    batch_size: int = 64,
    learning_rate: float = 1.0,
    factor: int = 4,
    marks: tuple[int, ...] = (3, 5),
    passes: int = 7,
    num_rows: int = 8192,
    seeds: int = 6,
) -> Finding:
    """Raising the batch does what decaying the learning rate does, in fewer steps.

    Args:
        batch_size: before the first mark.
        learning_rate: of SGD, before the first mark.
        factor: on the batch, or under the rate, at each mark.
        marks: passes before which a change comes.
        passes: over the rows.
        num_rows: to learn.
        seeds: of first weights and of the order of rows; at least 2.
    """
    need_seeds(seeds)
    need_batches([batch_size * factor ** sum(mark < passes for mark in marks)], num_rows)
    data = clicks(num_rows)
    fixed = {"batch_size": batch_size, "learning_rate": learning_rate, "factor": factor, "marks": marks}
    schedules = {
        "neither": Schedule(**fixed),  # type: ignore[arg-type]
        f"rate / {factor}": Schedule(**fixed, decays=True),  # type: ignore[arg-type]
        f"batch x {factor}": Schedule(**fixed, grows=True),  # type: ignore[arg-type]
    }
    losses = {
        name: np.array([curve(data, schedule, passes=passes, seed=seed) for seed in range(seeds)])
        for name, schedule in schedules.items()
    }
    neither_ST, decayed_ST, grown_ST = losses.values()
    last = {name: loss_ST[:, -POINTS_A_PASS:].mean(axis=1) for name, loss_ST in losses.items()}
    neither_S, decayed_S, grown_S = last.values()
    difference, gain = paired_difference(grown_S, decayed_S), paired_difference(decayed_S, neither_S)
    steps = [schedule.steps(passes, num_rows) for schedule in schedules.values()]
    figure, (axes,) = canvas()
    at = np.arange(1, neither_ST.shape[1] + 1) / POINTS_A_PASS
    for number, (name, loss_ST) in enumerate(losses.items()):
        axes.plot(at, loss_ST.mean(axis=0), **look(number), label=name)
    for mark in marks:
        axes.axvline(mark, color="#6b6b6b", lw=1, ls=":")
    name_axes(axes, "Dotted: the rate falls, or the batch grows", "passes over the rows", "held-out log loss (nats)")
    legend(axes)
    return Finding(
        name="decay_or_grow",
        question="Does raising the batch do what decaying the learning rate does?",
        sentence=sentence(steps, difference, gain, widest(grown_ST, decayed_ST)),
        columns=(
            "at each mark",
            "steps",
            "held-out nats, last pass",
            "low",
            "high",
            "last batch (rows)",
            "last rate",
        ),
        rows=tuple(
            (name, count, found.mean, found.low, found.high, *schedule.at(passes - 1))
            for (name, schedule), count in zip(schedules.items(), steps, strict=True)
            for found in (mean_with_interval(last[name]),)
        ),
        figure=figure,
        metrics={
            "grown_less_decayed": difference.estimate.mean,
            "decayed_less_neither": gain.estimate.mean,
            "widest_gap": widest(grown_ST, decayed_ST),
            "steps_decayed": float(steps[1]),
            "steps_grown": float(steps[2]),
        },
    )


def curve(data: Clicks, schedule: Schedule, *, passes: int, seed: int) -> list[float]:
    """`[T]` held-out log loss, `POINTS_A_PASS` a pass."""
    net = small_net(data.features_RD.shape[1], seed=seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=schedule.learning_rate)
    losses: list[float] = []
    for number in range(passes):
        batch, rate = schedule.at(number)
        steps = len(data.learned) // batch
        looks = {steps * (part + 1) // POINTS_A_PASS for part in range(POINTS_A_PASS)}

        def look_at(step: int, looks: set[int] = looks) -> None:
            if step in looks:
                losses.append(loss_and_auc(net, data, data.held_out)[0])

        descend(
            net,
            data,
            batch_size=batch,
            steps=steps,
            optimizer=optimizer,
            seed=[seed, number],
            rate_at=lambda _, rate=rate: rate,  # type: ignore[misc]
            after=look_at,
        )
    return losses


def widest(one_ST: npt.NDArray[np.float64], other_ST: npt.NDArray[np.float64]) -> float:
    """The largest gap along the run between the means over seeds."""
    return float(np.abs(one_ST.mean(axis=0) - other_ST.mean(axis=0)).max())


def sentence(steps: Sequence[int], difference: PairedDifference, gain: PairedDifference, gap: float) -> str:
    """The answer.

    Args:
        steps: of the run that does neither, that decays and that grows.
        difference: the loss in the last pass of the one that grows, less that of the one that decays.
        gain: the loss in the last pass of the one that decays, less that of the one that does neither.
        gap: the largest along the run between the two.
    """
    found, fell = difference.estimate, gain.estimate
    helped = "helps" if fell.high < 0 else "does harm" if fell.low > 0 else "makes no certain difference"
    same = found.low <= 0 <= found.high
    verdict = "the same within its interval" if same else f"not the same: {'worse' if found.mean > 0 else 'better'}"
    return (
        f"Decaying the rate {helped} ({_signed(fell)} nats); raising the batch instead ends {_signed(found)} nats from it, "
        f"{verdict}, in {steps[2]:,} steps in place of {steps[1]:,}; along the run the two are at most {gap:.4f} apart."
    )


def _signed(found: Estimate) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


if __name__ == "__main__":
    main_of(run)
