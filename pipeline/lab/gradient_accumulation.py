"""Is a batch that is accumulated from micro-batches the same as one big batch?

Enters: a batch, sizes of micro-batches, networks without and with normalisation. Leaves: how far the accumulated gradient is
from that of the big batch, and what runs with either come to.

The gradient of a mean is the mean of gradients: they are equal where a row's loss depends on that row alone. Layer
normalisation keeps that; batch normalisation (Ioffe & Szegedy 2015) takes mean and variance over whatever rows pass together.
"""

from typing import get_args

import numpy as np
import torch
from torch import nn

from data_schemas.errors import ConfigError
from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes, tick_sizes
from pipeline.lab.problems import Clicks, Normalisation, batches, clicks, log_loss, loss_and_auc, new_learner, small_net
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn

NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)
EQUAL = 1e-5
"""Relative distance up to which gradients count as equal: that of sums in another order."""


def run(
    *,
    batch_size: int = 128,
    micro_batch_sizes: tuple[int, ...] = (2, 8, 32, 64),
    learning_rate: float = 0.5,
    rows: int = 2048,
    seed: int = 0,
) -> Finding:
    """A batch accumulated from micro-batches equals one big batch.

    Args:
        batch_size: of the big batch, which every micro-batch size divides.
        micro_batch_sizes: the first is the one that runs are made with.
        learning_rate: of the big batch.
        rows: that each run learns.
        seed: of first weights and of the order of rows.
    """
    if uneven := [size for size in micro_batch_sizes if batch_size % size]:
        raise ConfigError(f"micro_batch_sizes must divide batch_size = {batch_size}, got {uneven[0]}; use {batch_size // 2}")
    data = clicks(4096)
    micro, pieces = micro_batch_sizes[0], batch_size // micro_batch_sizes[0]
    far = {
        kind: [distance_of(data, kind, batch_size=batch_size, micro_batch=size, seed=seed) for size in micro_batch_sizes]
        for kind in NORMALISATIONS
    }
    plans = {
        f"batch {batch_size}": (batch_size, 1, learning_rate),
        f"{micro} x {pieces} accumulated": (micro, pieces, learning_rate),
        f"batch {micro}": (micro, 1, learning_rate),
        f"batch {micro}, rate / {pieces}": (micro, 1, learning_rate / pieces),
    }
    losses = {
        kind: [
            _learned(data, kind, micro_batch=own, pieces=count, rate=rate, rows=rows, seed=seed)
            for own, count, rate in plans.values()
        ]
        for kind in NORMALISATIONS
    }
    own_step = distance_of_pipeline(data, batch_size=batch_size, micro_batch=micro, rows=4 * batch_size)
    figure, (axes,) = canvas()
    for number, kind in enumerate(NORMALISATIONS):
        shown = [max(value, 1e-9) for value in far[kind]]
        axes.plot(micro_batch_sizes, shown, **look(number), label=_name(kind))
    axes.axhline(EQUAL, color="#6b6b6b", lw=1, ls=":")
    tick_sizes(axes, micro_batch_sizes)
    axes.set_yscale("log")
    name_axes(
        axes, f"Accumulated against one batch of {batch_size}", "micro-batch (rows)", "relative distance of the gradients"
    )
    legend(axes)
    return Finding(
        name="gradient_accumulation",
        question="Is a batch that is accumulated from micro-batches the same as one big batch?",
        sentence=sentence(micro, batch_size, {kind: max(far[kind]) for kind in NORMALISATIONS}, losses, own_step),
        columns=(
            "normalisation",
            *(f"distance at {size}" for size in micro_batch_sizes),
            *(f"held-out nats: {name}" for name in plans),
        ),
        rows=tuple((kind, *far[kind], *losses[kind]) for kind in NORMALISATIONS),
        figure=figure,
        metrics={f"distance_{kind}": max(far[kind]) for kind in NORMALISATIONS} | {"distance_pipeline": own_step},
    )


def accumulated(net: nn.Module, features_BD: torch.Tensor, labels_B: torch.Tensor, micro_batch: int) -> torch.Tensor:
    """`[P]`: the gradient of the mean loss of the batch, backward by micro-batches of at most `micro_batch` rows."""
    net.zero_grad()
    for start in range(0, len(labels_B), micro_batch):
        part = slice(start, start + micro_batch)
        share = len(labels_B[part]) / len(labels_B)
        (share * log_loss(net, features_BD[part], labels_B[part])).backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])


def relative_distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|.

    >>> relative_distance(torch.tensor([3.0, 6.5]), torch.tensor([3.0, 4.0]))
    0.5
    """
    return float((found - wanted).norm() / wanted.norm())


def distance_of(data: Clicks, kind: Normalisation, *, batch_size: int, micro_batch: int, seed: int) -> float:
    """Between the accumulated gradient of one batch and that of all its rows at once."""
    net = small_net(data.features_RD.shape[1], normalisation=kind, seed=seed)
    rows = next(batches(data.learned, batch_size, seed=[seed]))
    features_BD, labels_B = data.features_RD[rows], data.labels_R[rows]
    wanted = accumulated(net, features_BD, labels_B, batch_size)
    return relative_distance(accumulated(net, features_BD, labels_B, micro_batch), wanted)


def distance_of_pipeline(data: Clicks, *, batch_size: int, micro_batch: int, rows: int) -> float:
    """Between the dense weights of the pipeline's own model, after steps in micro-batches and after the same steps at once."""
    kept_R = np.arange(data.window.num_rows) < rows
    weights = []
    for size in (micro_batch, batch_size):
        learner = new_learner([f"training.batch_size={batch_size}", f"training.micro_batch_size={size}"])
        policy = FixedBatch(batch_size=batch_size, learning_rate=learner.config.dense_learning_rate)
        learn(learner, data.window, seed=[0], policy=policy, kept_R=kept_R)
        weights.append(torch.cat([weight.flatten() for weight in learner.dense_weights(averaged=False).values()]))
    return relative_distance(weights[0], weights[1])


def sentence(
    micro: int, batch: int, furthest: dict[Normalisation, float], losses: dict[Normalisation, list[float]], own_step: float
) -> str:
    """The answer."""
    equal = [_name(kind) for kind, far in furthest.items() if far <= EQUAL]
    unequal = [f"{_name(kind)} (off by up to {far:.0%})" for kind, far in furthest.items() if far > EQUAL]
    same = f"Accumulated gradients equal those of one batch of {batch} to {EQUAL:g} with {' and '.join(equal) or 'no network'}"
    other = f", and not with {' and '.join(unequal)}" if unequal else ""
    ends = {kind: dict(zip(("whole", "accumulated", "alone", "slowed"), own, strict=True)) for kind, own in losses.items()}
    return (
        f"{same}{other}; the pipeline's own step differs by {own_step:.1g}. Held-out log loss of {micro} accumulated to "
        f"{batch} against a real {batch}: "
        + ", ".join(f"{end['accumulated']:.3f} against {end['whole']:.3f} with {_name(kind)}" for kind, end in ends.items())
        + f". A batch of {micro} alone ends at {ends['none']['alone']:.3f} without normalisation, and at "
        f"{ends['none']['slowed']:.3f} with its rate divided by {batch // micro}."
    )


def _learned(data: Clicks, kind: Normalisation, *, micro_batch: int, pieces: int, rate: float, rows: int, seed: int) -> float:
    """Held-out log loss after plain SGD over `rows` rows."""
    net = small_net(data.features_RD.shape[1], normalisation=kind, seed=seed)
    batch = micro_batch * pieces
    parameters = list(net.parameters())
    for _, chosen in zip(range(rows // batch), batches(data.learned, batch, seed=[seed]), strict=False):
        accumulated(net, data.features_RD[chosen], data.labels_R[chosen], micro_batch)
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.sub_(rate * parameter.grad)
    return loss_and_auc(net, data, data.held_out)[0]


def _name(kind: Normalisation) -> str:
    return "no normalisation" if kind == "none" else f"{kind} normalisation"


if __name__ == "__main__":
    main_of(run)
