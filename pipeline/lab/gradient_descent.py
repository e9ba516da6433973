"""Full batch, single sample, mini-batch: the same network on the same rows, by loss over rows, steps and seconds.

The descent is written out on plain tensors, gradient included; a test holds it to `torch.optim.SGD`. Each batch size has the
best of a few learning rates.

Letters: B rows of a batch, D features, H hidden units, R rows.

    python -m pipeline.lab.gradient_descent --help
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, log_counts, look, name_axes
from pipeline.lab.logistic import spaced
from pipeline.lab.problems import Clicks, auc, batches, clicks
from pipeline.training.threads import torch_threads

Weights = list[torch.Tensor]
"""`[D, H]`, `[H]`, `[H]`, `[]`: first layer and its bias, second layer and its bias."""

LAST_POINTS = 8
"""Points in the last quarter of a run, whose standard deviation around a line is its wobble."""


def run(
    *,
    num_rows: int = 8192,
    sizes: tuple[int, ...] = (1, 32, 64, 256, 4096, 8192),
    rates: tuple[float, ...] = (0.01, 0.04, 0.16, 0.64, 2.56, 10.24),
    passes: float = 2.0,
    least_steps: int = 100,
    hidden: int = 32,
    seed: int = 0,
) -> Finding:
    """Full batch, single sample or mini-batch: which learns most from the same rows, steps and seconds?

    Args:
        num_rows: rows to learn; a batch of so many is the full batch.
        sizes: batch sizes.
        rates: learning rates; each size is shown with the one that ends lowest.
        passes: length of a run over the rows.
        least_steps: of a run, for sizes that take fewer steps in these passes.
        hidden: units of the network.
        seed: of rows, weights and batches.
    """
    data = clicks(num_rows, seed=seed)
    with torch_threads(1):
        runs = [_best(data, size, rates, passes, least_steps, hidden, seed) for size in sizes]
    return _finding(runs, num_rows, passes)


@dataclass(frozen=True, kw_only=True)
class Descent:
    """A run: training loss over all rows after some of its steps."""

    batch_size: int
    rate: float
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds_a_step: float
    """CPU seconds, looking at the loss not counted."""
    auc: float
    """On the rows that were held out, at the end."""
    diverged_rates: int
    """Of the rates that were tried."""

    @property
    def wobble(self) -> float:
        """Standard deviation of the loss around a line over the last quarter of the steps."""
        last = np.array(self.losses[-LAST_POINTS:])
        places = np.arange(len(last))
        return float(np.std(last - np.polyval(np.polyfit(places, last, 1), places))) if np.isfinite(last).all() else math.inf

    def loss_after(self, steps: float) -> float | None:
        """Between points linear in the logarithm of steps; None beyond the end."""
        if steps > self.steps[-1]:
            return None
        return float(np.interp(math.log(max(steps, 1)), np.log(self.steps), self.losses))


def new_weights(num_features: int, hidden: int, seed: int) -> Weights:
    """Normal first layer and second layer, scaled to their inputs; biases 0."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(num_features, hidden, generator=generator) / num_features**0.5
    second = torch.randn(hidden, generator=generator) / hidden**0.5
    return [first, torch.zeros(hidden), second, torch.zeros(())]


def logits(weights: Weights, features_BD: torch.Tensor) -> torch.Tensor:
    """`[B]`."""
    first, first_bias, second, second_bias = weights
    return torch.relu(features_BD @ first + first_bias) @ second + second_bias


def gradients(weights: Weights, features_BD: torch.Tensor, labels_B: torch.Tensor) -> Weights:
    """Of the mean log loss, by hand."""
    first, first_bias, second, second_bias = weights
    hidden_BH = torch.relu(features_BD @ first + first_bias)
    error_B = (torch.sigmoid(hidden_BH @ second + second_bias) - labels_B) / len(labels_B)
    back_BH = error_B[:, None] * second * (hidden_BH > 0)
    return [features_BD.T @ back_BH, back_BH.sum(dim=0), error_B @ hidden_BH, error_B.sum()]


def sgd_step(weights: Weights, features_BD: torch.Tensor, labels_B: torch.Tensor, rate: float) -> None:
    """w -= rate * gradient, in place."""
    for weight, gradient in zip(weights, gradients(weights, features_BD, labels_B), strict=True):
        weight -= rate * gradient


def _best(data: Clicks, size: int, rates: Sequence[float], passes: float, least_steps: int, hidden: int, seed: int) -> Descent:
    steps = max(round(passes * len(data.learned) / size), least_steps)
    runs = [_descend(data, size, rate, steps, hidden, seed) for rate in rates]
    ends = [float(np.mean(each.losses[-LAST_POINTS:])) for each in runs]
    best = runs[int(np.argmin([end if math.isfinite(end) else math.inf for end in ends]))]
    first = best.losses[0]
    diverged = sum(not math.isfinite(end) or end > 1.5 * first for end in ends)
    return Descent(**(vars(best) | {"diverged_rates": diverged}))


def _descend(data: Clicks, size: int, rate: float, steps: int, hidden: int, seed: int) -> Descent:
    weights = new_weights(data.features_RD.shape[1], hidden, seed)
    last = [round(steps * (0.75 + 0.25 * part / LAST_POINTS)) for part in range(1, LAST_POINTS + 1)]
    at = sorted({*spaced(max(round(0.75 * steps), 1), 14), *last})
    features_RD, labels_R = data.features_RD[data.learned], data.labels_R[data.learned]
    losses, seconds, wanted, started = [], 0.0, set(at), time.process_time()
    for step, chosen in zip(range(1, steps + 1), batches(data.learned, size, seed=[seed, 8]), strict=False):
        sgd_step(weights, data.features_RD[chosen], data.labels_R[chosen], rate)
        if step in wanted:
            seconds += time.process_time() - started
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(weights, features_RD), labels_R)
            losses.append(float(loss) if torch.isfinite(loss) else math.inf)
            started = time.process_time()
    finite = all(bool(torch.isfinite(weight).all()) for weight in weights)
    held_B = torch.sigmoid(logits(weights, data.features_RD[data.held_out]).double()).numpy()
    return Descent(
        batch_size=size,
        rate=rate,
        steps=tuple(at),
        losses=tuple(losses),
        seconds_a_step=seconds / steps,
        auc=auc(data.labels_R[data.held_out].numpy(), held_B) if finite else 0.5,
        diverged_rates=0,
    )


def _finding(runs: Sequence[Descent], num_rows: int, passes: float) -> Finding:
    by_rows = {each.batch_size: each.loss_after(passes * num_rows / each.batch_size) for each in runs}
    few = min(each.steps[-1] for each in runs)
    by_steps = {each.batch_size: each.loss_after(few) for each in runs}
    short = min(each.seconds_a_step * each.steps[-1] for each in runs)
    by_seconds = {each.batch_size: each.loss_after(short / each.seconds_a_step) for each in runs}
    steadiest = min(runs, key=lambda each: each.wobble)
    shakiest = max(runs, key=lambda each: each.wobble)
    figure, panels = canvas(3)
    axis_names = "rows learned", "steps", "CPU seconds"
    for axes, name, scale in zip(panels, axis_names, ("rows", "steps", "seconds"), strict=True):
        name_axes(axes, f"By {scale}", name, "training loss")
        for number, each in enumerate(runs):
            unit = {"rows": each.batch_size, "steps": 1.0, "seconds": each.seconds_a_step}[scale]
            label = "all rows" if each.batch_size == num_rows else f"batch {each.batch_size:,}"
            axes.plot([unit * step for step in each.steps], each.losses, **(look(number) | {"ms": 4}), label=label)
        if scale == "seconds":
            axes.set_xscale("log")
        else:
            log_counts(axes)
        axes.set_ylim(0.95 * min(min(each.losses) for each in runs), 0.5)
    legend(panels[0])
    return Finding(
        name="gradient_descent",
        question="Full batch, single sample or mini-batch: which learns most from the same rows, steps and seconds?",
        sentence=(
            f"After the same rows ({passes:g} passes) {_lowest(by_rows, num_rows)} has the lowest training loss, after "
            f"the same {few:,} steps {_lowest(by_steps, num_rows)}, after the same {short:.2g} CPU seconds "
            f"{_lowest(by_seconds, num_rows)}. At the end the loss wobbles most with {_name(shakiest.batch_size, num_rows)} "
            f"({shakiest.wobble:.2g}) and least with {_name(steadiest.batch_size, num_rows)} ({steadiest.wobble:.2g}); "
            f"held-out AUC there, after as many passes or {few:,} steps, is best with "
            f"{_name(max(runs, key=lambda each: each.auc).batch_size, num_rows)}."
        ),
        columns=(
            "batch size",
            "learning rate",
            "rates that diverged",
            f"loss after {passes:g} passes",
            f"loss after {few:,} steps",
            f"loss after {short:.2g} s",
            "wobble",
            "us a step",
            "held-out AUC",
        ),
        rows=tuple(
            (
                each.batch_size,
                each.rate,
                each.diverged_rates,
                by_rows[each.batch_size],
                by_steps[each.batch_size],
                by_seconds[each.batch_size],
                each.wobble,
                1e6 * each.seconds_a_step,
                each.auc,
            )
            for each in runs
        ),
        figure=figure,
        metrics={f"auc_of_{each.batch_size}": each.auc for each in runs}
        | {f"wobble_of_{each.batch_size}": each.wobble for each in runs},
    )


def _lowest(losses: dict[int, float | None], num_rows: int) -> str:
    size, loss = min(((size, loss) for size, loss in losses.items() if loss is not None), key=lambda pair: pair[1])
    return f"{_name(size, num_rows)} ({loss:.4f})"


def _name(size: int, num_rows: int) -> str:
    """In words.

    >>> _name(1, 100), _name(32, 100), _name(100, 100)
    ('a single sample', 'a batch of 32', 'the full batch')
    """
    return "a single sample" if size == 1 else "the full batch" if size == num_rows else f"a batch of {size:,}"


if __name__ == "__main__":
    main_of(run)
