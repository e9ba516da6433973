"""Logistic regressions on clicks, many at a time: those that differ only in their learning rate share their batches.

Letters: R rows, D features, W learning rates, S runs, B rows of a batch, T points in time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt

from pipeline.lab.problems import F64, Clicks, clicks, logistic_gradients

Rule = Literal["sgd", "adam"]


@dataclass(frozen=True, kw_only=True)
class LogisticRows:
    """The rows to learn; column 0 is constant."""

    features_RD: F64
    labels_R: F64

    @classmethod
    def of(cls, data: Clicks) -> "LogisticRows":
        """The learned rows of `data`."""
        return cls(
            features_RD=data.features_RD[data.learned].double().numpy(), labels_R=data.labels_R[data.learned].double().numpy()
        )

    @property
    def start_D(self) -> F64:
        """Weights that predict the click rate for every row, as a new model of the pipeline does."""
        rate = float(self.labels_R.mean())
        start_D = np.zeros(self.features_RD.shape[1])
        start_D[0] = np.log(rate / (1 - rate))
        return start_D

    def losses(self, weights_DW: F64) -> F64:
        """`[W]` log loss over all rows, to six digits; infinite where weights are not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            logits_RW = self._narrow_RD @ weights_DW.astype(np.float32)
            losses_RW = np.maximum(logits_RW, 0) + np.log(1 + np.exp(-np.abs(logits_RW)))
            losses_W = losses_RW.mean(axis=0, dtype=np.float64)
            losses_W -= (self.labels_R @ self.features_RD / len(self.labels_R)) @ weights_DW
        return np.where(np.isfinite(losses_W), losses_W, np.inf)

    @cached_property
    def _narrow_RD(self) -> npt.NDArray[np.float32]:
        return self.features_RD.astype(np.float32)

    def gradients(self, weights_D: F64) -> F64:
        """`[R, D]` of each row."""
        return logistic_gradients(self.features_RD, self.labels_R, weights_D)

    def hessian(self, weights_D: F64) -> F64:
        """`[D, D]` of the mean loss."""
        predicted_R = 1.0 / (1.0 + np.exp(-(self.features_RD @ weights_D)))
        return np.asarray((self.features_RD * (predicted_R * (1 - predicted_R))[:, None]).T @ self.features_RD) / len(
            self.labels_R
        )

    def least_loss(self, steps: int = 12) -> float:
        """By Newton's method with a slight ridge, since the columns of a field sum to the constant."""
        weights_D = self.start_D
        for _ in range(steps):
            ridge = 1e-6 * np.eye(len(weights_D))
            weights_D = weights_D - np.linalg.solve(self.hessian(weights_D) + ridge, self.gradients(weights_D).mean(axis=0))
        return float(self.losses(weights_D[:, None])[0])


def logistic_rows(num_rows: int, seed: int) -> LogisticRows:
    """Of generated clicks."""
    return LogisticRows.of(clicks(num_rows, seed=seed))


def descend_many(
    rows: LogisticRows,
    *,
    batch_size: int,
    rates_W: Sequence[float],
    at_steps: Sequence[int],
    seeds: int,
    seed: Sequence[int],
    rule: Rule = "sgd",
) -> F64:
    """`[T, W]` log loss over all rows after each of `at_steps`, one column a learning rate, mean over `seeds` runs.

    Batches are drawn with replacement, the same for all rates. `adam` is Kingma and Ba's (2015) with their constants.
    """
    rng, rates = np.random.default_rng(list(seed)), np.asarray(rates_W, np.float64)
    weights_SDW = np.tile(rows.start_D[None, :, None], (seeds, 1, len(rates)))
    first, second = np.zeros_like(weights_SDW), np.zeros_like(weights_SDW)
    losses, wanted = [], set(at_steps)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, max(at_steps) + 1):
            chosen_SB = rng.integers(len(rows.labels_R), size=(seeds, batch_size))
            gradient_SDW = _gradient(rows, weights_SDW, chosen_SB)
            match rule:
                case "sgd":
                    weights_SDW -= rates * gradient_SDW
                case "adam":
                    first = 0.9 * first + 0.1 * gradient_SDW
                    second = 0.999 * second + 0.001 * gradient_SDW**2
                    scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
                    weights_SDW -= rates * first / (1 - 0.9**step) / scale
                case _:
                    assert_never(rule)
            if step in wanted:
                flat_DX = weights_SDW.transpose(1, 0, 2).reshape(weights_SDW.shape[1], -1)
                losses.append(rows.losses(flat_DX).reshape(seeds, -1).mean(axis=0))
    return np.array(losses)


def seeds_for(batch_size: int, most: int) -> int:
    """Runs to average: `most` for small batches, fewer for large ones, whose runs differ less and cost more.

    >>> [seeds_for(size, 16) for size in (8, 256, 1024, 4096)]
    [16, 16, 4, 4]
    """
    return min(most, max(4, most * 256 // batch_size))


def spaced(most: int, points: int) -> list[int]:
    """Steps from 1 to `most`, evenly on a log scale, none twice.

    >>> spaced(100, 5)
    [1, 3, 10, 32, 100]
    """
    return sorted({round(step) for step in np.geomspace(1, most, points)})


def lowest(rates: Sequence[float], values: F64) -> tuple[float, float]:
    """Rate and value at the minimum of a parabola through the lowest value and its neighbours, over log rates.

    The lowest point itself where it is the first or last finite one, or where the parabola has no minimum near it.

    >>> rate, value = lowest([1, 2, 4, 8, 16], np.array([4.0, 1.0, 0.0, 1.0, 4.0]))
    >>> round(rate, 6), abs(round(value, 6))
    (4.0, 0.0)
    """
    best = int(np.argmin(values))
    near = [place for place in range(max(best - 1, 0), min(best + 2, len(rates))) if np.isfinite(values[place])]
    x = np.log2(np.array([rates[place] for place in near]) / rates[best])
    if best not in near or min(x) >= 0 or max(x) <= 0:
        return float(rates[best]), float(values[best])
    curve = np.polyfit(x, values[near], 2)
    if curve[0] <= 0 or abs(turn := -curve[1] / (2 * curve[0])) > 1.0:
        return float(rates[best]), float(values[best])
    return float(rates[best] * 2**turn), float(np.polyval(curve, turn))


def _gradient(rows: LogisticRows, weights_SDW: F64, chosen_SB: npt.NDArray[np.int64]) -> F64:
    """`[S, D, W]`."""
    features_SBD = rows.features_RD[chosen_SB]
    predicted_SBW = 1.0 / (1.0 + np.exp(-(features_SBD @ weights_SDW)))
    errors_SBW = predicted_SBW - rows.labels_R[chosen_SB][:, :, None]
    return np.asarray(features_SBD.transpose(0, 2, 1) @ errors_SBW / chosen_SB.shape[1], np.float64)
