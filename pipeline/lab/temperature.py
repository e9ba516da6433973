"""Temperature: does lr/B decide how a run goes, or lr alone?

Noise enters a step of SGD with variance lr^2 Sigma/B, so that per unit of lr * steps it is lr/B, the temperature (Smith and Le
2018, arXiv:1710.06451). Runs with equal lr/B are put beside runs with equal lr, on the same rows.

    python -m pipeline.lab.temperature --help
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes, tick_sizes
from pipeline.lab.problems import F64, Clicks, clicks, descend, loss_and_auc, small_net
from pipeline.training.threads import torch_threads


def run(
    *,
    num_rows: int = 4096,
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512),
    temperature: float = 0.0125,
    rate: float = 0.2,
    passes: int = 12,
    seeds: int = 3,
    seed: int = 0,
) -> Finding:
    """Do runs with equal lr/B go the same way, and runs with equal lr differ?

    Args:
        num_rows: rows to learn.
        sizes: B, batch sizes.
        temperature: lr/B of the runs where it is equal.
        rate: lr of the runs where that is equal.
        passes: over the rows.
        seeds: runs of each kind.
        seed: of the rows, and the first of the runs.
    """
    data = clicks(num_rows, seed=seed)
    plan = {"equal lr/B": [temperature * b for b in sizes], "equal lr": [rate for _ in sizes]}
    with torch_threads(1):
        found = {
            kind: np.array(
                [
                    np.mean([final(data, b, lr, passes, seed + number) for number in range(seeds)], axis=0)
                    for b, lr in zip(sizes, rates, strict=True)
                ]
            )
            for kind, rates in plan.items()
        }
    return _finding(sizes, plan, found)


def final(data: Clicks, batch_size: int, rate: float, passes: int, seed: int) -> tuple[float, float, float]:
    """Training loss, held-out loss and held-out AUC of a small network, means of the last quarter of the passes.

    Each pass has `N // B` steps, so that all runs see the same rows.
    """
    net = small_net(data.features_RD.shape[1], seed=seed)
    in_pass = len(data.learned) // batch_size
    measured: list[tuple[float, float, float]] = []

    def look_at(step: int) -> None:
        if step % in_pass == 0 and step > 0.75 * passes * in_pass:
            held_loss, auc = loss_and_auc(net, data, data.held_out)
            measured.append((loss_and_auc(net, data, data.learned)[0], held_loss, auc))

    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    descend(net, data, batch_size=batch_size, steps=passes * in_pass, optimizer=optimizer, seed=[seed, 5], after=look_at)
    training, held, auc = np.mean(measured, axis=0)
    return float(training), float(held), float(auc)


def spread(values: Sequence[float] | F64) -> float:
    """Largest less smallest.

    >>> spread([1.0, 3.0, 2.0])
    2.0
    """
    return float(np.ptp(values))


def _finding(
    sizes: tuple[int, ...],
    plan: Mapping[str, Sequence[float]],
    found: Mapping[str, F64],
) -> Finding:
    equal, unequal = found["equal lr/B"][:, 0], found["equal lr"][:, 0]
    low, high = spread(equal), spread(unequal)
    near = [b for b, loss in zip(sizes, equal, strict=True) if abs(loss - equal[0]) <= 0.1 * high]
    figure, (left, right) = canvas(2)
    name_axes(left, "Training loss", "batch size B (rows)", "log loss")
    name_axes(right, "Held-out AUC", "batch size B (rows)", "AUC")
    for number, (kind, figures) in enumerate(found.items()):
        left.plot(sizes, figures[:, 0], **look(number), label=kind)
        right.plot(sizes, figures[:, 2], **look(number), label=kind)
    for axes in (left, right):
        tick_sizes(axes, sizes)
        legend(axes)
    return Finding(
        name="temperature",
        question="Do runs with equal lr/B go the same way, and runs with equal lr differ?",
        sentence=(
            f"{'Yes' if low < 0.25 * high else 'Only in part' if low < high else 'No'}: after the same rows the training loss "
            f"of batches of {sizes[0]} to {sizes[-1]} differs by {low:.4f} where lr/B is equal and by {high:.4f} where lr is "
            f"equal, {high / low:.1f} times as much; held-out AUC by {spread(found['equal lr/B'][:, 2]):.4f} and "
            f"{spread(found['equal lr'][:, 2]):.4f}. With equal lr/B the loss stays within a tenth of the latter up to "
            f"B = {max(near)}."
        ),
        columns=("runs", "batch size", "lr", "training loss", "held-out loss", "held-out AUC"),
        rows=tuple(
            (kind, b, plan[kind][i], *(float(value) for value in found[kind][i])) for kind in found for i, b in enumerate(sizes)
        ),
        figure=figure,
        metrics={"spread_equal_temperature": low, "spread_equal_rate": high, "largest_alike": float(max(near))},
    )


if __name__ == "__main__":
    main_of(run)
