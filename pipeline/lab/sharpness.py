"""Sharp and flat minima: does a large batch end where the loss is sharper, and does it generalise worse for it?

Small networks learn the same rows in small and in large batches, with the same learning rate and until the
training loss is the same (Keskar et al. 2017). Sharpness is the largest eigenvalue of the Hessian of the training
loss, by power iteration with double backward, and the loss along random directions. Beside it the simplest model of a step's
noise: a quadratic of curvature k, where x ends with the variance lr / (k (2 - lr k)) times that of the gradient.

    python -m pipeline.lab.sharpness --help
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.lab.experiment import Cell, Finding, main_of
from pipeline.lab.figures import GREY, canvas, legend, log_counts, look, name_axes
from pipeline.lab.problems import F64, Clicks, NoisyQuadratic, clicks, descend, log_loss, loss_and_auc, small_net
from pipeline.training.threads import torch_threads


def run(
    *,
    num_rows: int = 4096,
    sizes: tuple[int, ...] = (16, 128, 1024),
    rate: float = 0.3,
    small_passes: int = 12,
    most_steps: int = 4000,
    seeds: int = 3,
    radius: float = 0.5,
    directions: int = 6,
    quadratic_rates: tuple[float, ...] = (0.05, 0.2, 0.5, 1.0, 1.5, 1.8),
    seed: int = 0,
) -> Finding:
    """Do large batches end in sharper minima, and generalise worse?

    Args:
        num_rows: rows to learn.
        sizes: batch sizes, the smallest first.
        rate: learning rate of all.
        small_passes: of the smallest batch; the others learn until they have its training loss.
        most_steps: of a run at most.
        seeds: runs of each size.
        radius: of the walk along random directions, in shares of the weights' norm.
        directions: random directions, each walked both ways.
        quadratic_rates: learning rates of the noisy quadratic of curvature 1; below 2.
        seed: of the rows, and the first of the runs.
    """
    data = clicks(num_rows, seed=seed)
    with torch_threads(1):
        ends = [
            end
            for number in range(seeds)
            for end in _ends(data, sizes, rate, small_passes, most_steps, radius, directions, seed + number)
        ]
    quadratic = NoisyQuadratic()
    steady = {rate: quadratic_variance(quadratic, rate, seed=seed) for rate in quadratic_rates}
    return _finding(sizes, ends, quadratic, steady, radius)


@dataclass(frozen=True, kw_only=True)
class End:
    """Where a run came to rest."""

    batch_size: int
    steps: int
    training_loss: float
    held_out_loss: float
    auc: float
    sharpness: float
    """Largest eigenvalue of the Hessian of the training loss."""
    along: F64
    """Mean rise of the training loss at `PLACES` of the radius along random directions."""

    @property
    def gap(self) -> float:
        """Held-out loss less training loss."""
        return self.held_out_loss - self.training_loss


PLACES = np.linspace(0.0, 1.0, 6)


def largest_eigenvalue(
    net: nn.Module, features_BD: torch.Tensor, labels_B: torch.Tensor, *, iterations: int = 30, seed: int = 0
) -> float:
    """Of the Hessian of the mean loss in absolute value, by power iteration; a Hessian-vector product is a double backward."""
    parameters = list(net.parameters())
    loss = log_loss(net, features_BD, labels_B)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(each.shape, generator=generator) for each in parameters]
    value = 0.0
    for _ in range(iterations):
        norm = torch.nn.utils.get_total_norm(vector)
        vector = [each / norm for each in vector]
        inner = sum(((g * v).sum() for g, v in zip(gradients, vector, strict=True)), start=torch.zeros(()))
        product = torch.autograd.grad(inner, parameters, retain_graph=True)
        value = float(sum((p * v).sum() for p, v in zip(product, vector, strict=True)))
        vector = [each.detach() for each in product]
    return value


@torch.no_grad()
def rise_along(net: nn.Module, data: Clicks, radius: float, directions: int, seed: int) -> F64:
    """Mean rise of the training loss at `PLACES` of the radius, over random directions and both ways.

    A direction has, for each tensor of weights, `radius` times that tensor's norm (Li et al. 2018, by tensors, not by filters).
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = list(net.parameters())
    start = [each.clone() for each in parameters]
    rises = []
    for _ in range(directions):
        random = [torch.randn(each.shape, generator=generator) for each in parameters]
        step = [radius * each * begun.norm() / each.norm() for each, begun in zip(random, start, strict=True)]
        for way in (1.0, -1.0):
            losses = []
            for place in PLACES:
                for parameter, begun, part in zip(parameters, start, step, strict=True):
                    parameter.copy_(begun + way * float(place) * part)
                losses.append(float(log_loss(net, data.features_RD[data.learned], data.labels_R[data.learned])))
            rises.append(np.array(losses) - losses[0])
    for parameter, begun in zip(parameters, start, strict=True):
        parameter.copy_(begun)
    return np.asarray(np.mean(rises, axis=0), np.float64)


def quadratic_variance(quadratic: NoisyQuadratic, rate: float, *, seed: int, steps: int = 400, particles: int = 2000) -> float:
    """Of many particles over the last half of the steps: measured, to compare with `steady_variance`."""
    places = quadratic.descend(rate, steps=steps, particles=particles, seed=[seed, round(1000 * rate)])
    return float(np.square(places[steps // 2 :]).mean())


def _ends(
    data: Clicks,
    sizes: Sequence[int],
    rate: float,
    small_passes: int,
    most_steps: int,
    radius: float,
    directions: int,
    seed: int,
) -> list[End]:
    ends: list[End] = []
    for size in sizes:
        target = ends[0].training_loss if ends else None
        net = small_net(data.features_RD.shape[1], seed=seed)
        in_pass = max(len(data.learned) // size, 1)
        most = small_passes * in_pass if target is None else most_steps
        steps = _learn_to(net, data, size, rate, most, target, seed)
        training, _ = loss_and_auc(net, data, data.learned)
        held_out, auc = loss_and_auc(net, data, data.held_out)
        ends.append(
            End(
                batch_size=size,
                steps=steps,
                training_loss=training,
                held_out_loss=held_out,
                auc=auc,
                sharpness=largest_eigenvalue(net, data.features_RD[data.learned], data.labels_R[data.learned]),
                along=rise_along(net, data, radius, directions, seed),
            )
        )
    return ends


def _learn_to(net: nn.Sequential, data: Clicks, size: int, rate: float, most: int, target: float | None, seed: int) -> int:
    """Steps until the training loss is at most `target`, looked at every 2 %; `most` where there is no target."""
    done = 0

    def reached(step: int) -> bool:
        nonlocal done
        done = step
        look_every = max(step // 50, 1)
        return target is not None and step % look_every == 0 and loss_and_auc(net, data, data.learned)[0] <= target

    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    descend(net, data, batch_size=size, steps=most, optimizer=optimizer, seed=[seed, 6], after=reached)
    return done


def _finding(
    sizes: Sequence[int], ends: Sequence[End], quadratic: NoisyQuadratic, steady: dict[float, float], radius: float
) -> Finding:
    groups = {size: [end for end in ends if end.batch_size == size] for size in sizes}
    small, large = groups[sizes[0]], groups[sizes[-1]]
    sharper = _mean_with_error([b.sharpness / a.sharpness for a, b in zip(small, large, strict=True)])
    wider = _mean_with_error([b.gap - a.gap for a, b in zip(small, large, strict=True)])
    off = max(abs(value / quadratic.steady_variance(rate) - 1) for rate, value in steady.items())
    figure, (left, middle, right) = canvas(3)
    name_axes(left, "Sharpness", "batch size (rows)", "largest eigenvalue")
    for number in range(len(small)):
        left.plot(sizes, [groups[size][number].sharpness for size in sizes], **look(number), label=f"seed {number}")
    log_counts(left)
    legend(left)
    name_axes(middle, "Along random directions", "distance / norm of weights", "rise of the training loss")
    for number, (size, group) in enumerate(groups.items()):
        middle.plot(radius * PLACES, np.mean([end.along for end in group], axis=0), **look(number), label=f"batch {size:,}")
    legend(middle)
    name_axes(right, "Noisy quadratic", "learning rate (k = 1)", "variance of x")
    rates = np.linspace(min(steady) / 2, max(steady), 200)
    right.plot(list(steady), list(steady.values()), **(look(0) | {"linestyle": ""}), label="measured")
    right.plot(
        rates, [quadratic.steady_variance(float(each)) for each in rates], color=GREY, lw=1.8, label="lr / (k (2 - lr k))"
    )
    right.set_yscale("log")
    legend(right)
    rows: list[tuple[Cell, ...]] = []
    for size, group in groups.items():
        figures = [(e.steps, e.training_loss, e.held_out_loss, e.gap, e.auc, e.sharpness, e.along[-1]) for e in group]
        rows.append((f"batch {size:,}", *(float(value) for value in np.mean(figures, axis=0)), None))
    for rate, value in steady.items():
        rows.append((f"lr {rate:g}", None, None, None, None, None, value, None, quadratic.steady_variance(rate)))
    return Finding(
        name="sharpness",
        question="Do large batches end in sharper minima, and generalise worse?",
        sentence=(
            f"At the same training loss and learning rate, batches of {sizes[-1]:,} end {sharper[0]:.2f} times "
            f"(+/- {sharper[1]:.2f}) as sharp as batches of {sizes[0]}: "
            f"{_verdict(sharper[0] - 1, sharper[1], 'sharper', 'flatter')}. "
            f"Their generalisation gap differs by {wider[0]:+.4f} (+/- {wider[1]:.4f}) of log loss: "
            f"{_verdict(wider[0], wider[1], 'worse', 'better')}. The noisy quadratic ends with the variance of the closed form "
            f"to {100 * off:.1f} %."
        ),
        columns=(
            "run",
            "steps",
            "training loss",
            "held-out loss",
            "gap",
            "held-out AUC",
            "sharpness, or variance",
            "rise at the radius",
            "closed form",
        ),
        rows=tuple(rows),
        figure=figure,
        metrics={
            "sharpness_ratio": sharper[0],
            "gap_difference": wider[0],
            "quadratic_worst_error": off,
        },
    )


def _mean_with_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and twice its standard error; that is infinite for a single value."""
    error = 2 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return float(np.mean(values)), error


def _verdict(difference: float, error: float, above: str, below: str) -> str:
    """In words.

    >>> _verdict(0.3, 0.1, "sharper", "flatter"), _verdict(-0.3, 0.4, "sharper", "flatter")
    ('sharper, as is claimed', 'no difference beyond chance, against the claim')
    """
    if abs(difference) <= error:
        return "no difference beyond chance, against the claim"
    return f"{above}, as is claimed" if difference > 0 else f"{below}, against the claim"


if __name__ == "__main__":
    main_of(run)
