"""Are batch sizes that are powers of two faster than others?

Enters: batch sizes, powers of two and others near them. Leaves: the time of a row in each, and how far each lies from the line
`t(b) = f + d b` that the sizes share.

Times are CPU times, medians over interleaved rounds, so that a disturbance of the machine falls on all sizes alike.

Letters: S sizes, T rounds.
"""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, name_axes, tick_sizes
from pipeline.lab.problems import log_loss, small_net
from pipeline.training.step_time import line_through

F64 = npt.NDArray[np.float64]


def run(
    *,
    powers: tuple[int, ...] = (6, 7, 8, 9),
    offsets: tuple[float, ...] = (0.9, 0.97, 1.03, 1.1, 1.27, 1.4),
    num_features: int = 64,
    rounds: int = 60,
    seed: int = 0,
) -> Finding:
    """Powers of two are faster than other batch sizes.

    Args:
        powers: of two that are timed.
        offsets: other sizes, as multiples of each power.
        num_features: of a row.
        rounds: of timings.
        seed: of the rows.
    """
    sizes = sorted({2**power for power in powers} | {round(times * 2**power) for power in powers for times in offsets})
    seconds_S = np.median(seconds_by_size(sizes, num_features=num_features, rounds=rounds, seed=seed), axis=0)
    excess_S = excess(sizes, seconds_S)
    power_S = np.array([is_power_of_two(size) for size in sizes])
    of_eight_S = np.array([size % 8 == 0 for size in sizes]) & ~power_S
    figure, (axes,) = canvas()
    micros_S = 1e6 * seconds_S / np.array(sizes)
    axes.plot(sizes, micros_S, color="#b0b0b0", lw=1, zorder=1)
    rest_S = ~power_S & ~of_eight_S
    for chosen_S, colour, marker, name in (
        (power_S, "#D55E00", "s", "power of two"),
        (of_eight_S, "#009E73", "^", "other multiple of 8"),
        (rest_S, "#0072B2", "o", "other"),
    ):
        axes.plot(np.array(sizes)[chosen_S], micros_S[chosen_S], marker, color=colour, ms=8, label=name)
    tick_sizes(axes, [2**power for power in powers])
    axes.set_ylim(bottom=0)
    name_axes(axes, "Forward and backward of a small network", "batch size (rows)", "CPU microseconds a row")
    legend(axes)
    own, other = excess_S[power_S], excess_S[~power_S]
    return Finding(
        name="power_of_two",
        question="Are batch sizes that are powers of two faster than others?",
        sentence=sentence(own, other),
        columns=("batch (rows)", "kind", "CPU microseconds a row", "CPU microseconds a step", "off the shared line"),
        rows=tuple(
            (size, _kind(size), float(micros_S[place]), float(1e6 * seconds_S[place]), float(excess_S[place]))
            for place, size in enumerate(sizes)
        ),
        figure=figure,
        metrics={"power_less_other": float(own.mean() - other.mean()), "spread_of_others": float(other.std(ddof=1))},
    )


def seconds_by_size(sizes: Sequence[int], *, num_features: int, rounds: int, seed: int) -> F64:
    """`[T, S]` CPU seconds of one forward and backward pass; each round takes the sizes in an order of its own."""
    rng = np.random.default_rng(seed)
    net = small_net(num_features, hidden=(64, 32), seed=seed)
    features_RD = torch.from_numpy(rng.normal(size=(max(sizes), num_features)).astype(np.float32))
    labels_R = torch.from_numpy((rng.random(max(sizes)) < 0.2).astype(np.float32))
    seconds_TS = np.empty((rounds + 1, len(sizes)))
    for number in range(rounds + 1):
        for place in rng.permutation(len(sizes)):
            seconds_TS[number, place] = _seconds(net, features_RD[: sizes[place]], labels_R[: sizes[place]])
    return seconds_TS[1:]


def excess(sizes: Sequence[int], seconds_S: F64) -> F64:
    """`[S]`: the share by which each size lies above the line through all.

    >>> [float(round(value, 9)) + 0.0 for value in excess([1, 2, 4], np.array([3.0, 5.0, 9.0]))]
    [0.0, 0.0, 0.0]
    """
    line = line_through({size: float(seconds) for size, seconds in zip(sizes, seconds_S, strict=True)})
    return np.asarray(seconds_S / [line.seconds(size) for size in sizes] - 1, np.float64)


def is_power_of_two(size: int) -> bool:
    """Of a size of at least 1.

    >>> [is_power_of_two(size) for size in (1, 64, 65, 96)]
    [True, True, False, False]
    """
    return size & (size - 1) == 0


def sentence(own: F64, other: F64) -> str:
    """The answer.

    Args:
        own: how far each power of two lies above the shared line.
        other: the same of other sizes.
    """
    difference = float(own.mean() - other.mean())
    error = float(np.sqrt(own.var(ddof=1) / len(own) + other.var(ddof=1) / len(other)))
    figures = f"{abs(difference):.1%} {'less' if difference < 0 else 'more'} time than the others on the line that all share"
    if abs(difference) <= 2 * error:
        return f"Powers of two take {figures}, less than two standard errors (of {error:.1%}): no difference was found."
    verdict = "faster" if difference < 0 else "slower"
    return f"Powers of two take {figures} (standard error {error:.1%}): here they are {verdict}."


def _seconds(net: nn.Module, features_BD: torch.Tensor, labels_B: torch.Tensor) -> float:
    started = time.process_time()
    log_loss(net, features_BD, labels_B).backward()
    net.zero_grad()
    return time.process_time() - started


def _kind(size: int) -> str:
    return "power of two" if is_power_of_two(size) else "multiple of 8" if size % 8 == 0 else "other"


if __name__ == "__main__":
    main_of(run)
