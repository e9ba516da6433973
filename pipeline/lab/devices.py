"""What do devices come to that share their weights at every step, now and then, or never?

Enters: generated clicks, a number of workers, how many steps they make between two averages. Leaves: the held-out loss of their
mean weights, of single workers and of their mean prediction, and how far the workers have drifted apart.

Each worker learns rows of its own with plain SGD, and now and then all take the mean of their weights: local SGD (Stich 2019).
Averaged at every step it is SGD on the batch of all workers, to rounding.

Letters: K networks: G groups of N workers each; S seeds, P inputs, B rows of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from data_schemas.errors import ConfigError
from pipeline.lab.checks import need_batches
from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes
from pipeline.lab.many_nets import ManyNets, descend, log_losses
from pipeline.lab.problems import Clicks, clicks


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How workers share."""

    every: int | None
    """Steps from one average to the next; None for never."""
    apart: bool = False
    """Workers start from different weights."""

    def __str__(self) -> str:
        if self.every is None:
            return "never, started apart" if self.apart else "never"
        return "every step" if self.every == 1 else f"every {self.every} steps"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one way of sharing; log losses on held-out rows in nats, means over seeds."""

    mean_weights: float
    single: float
    mean_prediction: float
    spread: float
    """Root mean square distance of the workers from their mean, over the length of that."""


def run(
    *,
    workers: int = 8,
    batch_size: int = 32,
    periods: tuple[int, ...] = (4, 16, 64),
    learning_rate: float = 1.0,
    num_rows: int = 16_384,
    passes: int = 3,
    seeds: int = 2,
) -> Finding:
    """Devices that do not share their gradients come to worse models.

    Args:
        workers: each with its own share of the rows.
        batch_size: of each worker.
        periods: steps between two averages, each above 1, beside averages at every step and never.
        learning_rate: of SGD.
        num_rows: to learn, over all workers.
        passes: over the rows.
        seeds: of first weights and of the order of rows.
    """
    need_batches([workers * batch_size], num_rows)
    if wrong := [period for period in periods if period < 2]:
        raise ConfigError(f"periods must be at least 2, beside every step, which is always there; got {wrong[0]}")
    data = clicks(num_rows)
    ways = [*(Sharing(every=period) for period in (1, *periods)), Sharing(every=None), Sharing(every=None, apart=True)]
    nets = trained(data, ways, workers=workers, batch_size=batch_size, rate=learning_rate, passes=passes, seeds=seeds)
    found = dict(zip(map(str, ways), outcomes(nets, data, workers=workers, seeds=seeds), strict=True))
    steps = passes * (num_rows // workers // batch_size)
    figure, (axes,) = canvas(panel_inches=4.4)
    for number, (name, values) in enumerate(
        {
            "mean of the weights": [one.mean_weights for one in found.values()],
            "a single worker": [one.single for one in found.values()],
            "mean of the predictions": [one.mean_prediction for one in found.values()],
        }.items()
    ):
        axes.plot(range(len(found)), values, **look(number), label=name)
    axes.set_xticks(range(len(found)), [name.replace(" ", "\n", 1).replace(", ", ",\n") for name in found])
    axes.tick_params(axis="x", labelsize=9.5)
    name_axes(axes, f"{workers} workers that average their weights", "", "held-out log loss (nats)")
    legend(axes)
    return Finding(
        name="devices",
        question="What do devices come to that share at every step, now and then, or never?",
        sentence=sentence(workers, found),
        columns=("averaged", "averages", "mean weights (nats)", "single worker (nats)", "mean prediction (nats)", "spread"),
        rows=tuple(
            (name, steps // way.every if way.every else 0, one.mean_weights, one.single, one.mean_prediction, one.spread)
            for way, (name, one) in zip(ways, found.items(), strict=True)
        ),
        figure=figure,
        metrics={f"loss_{name.replace(', ', '_').replace(' ', '_')}": one.mean_weights for name, one in found.items()}
        | {"single_never": found["never"].single, "prediction_never": found["never"].mean_prediction},
    )


def trained(
    data: Clicks, ways: Sequence[Sharing], *, workers: int, batch_size: int, rate: float, passes: int, seeds: int
) -> ManyNets:
    """All workers of all ways and seeds, side by side: those of a group are neighbours, and ways with the same seed see the
    same rows."""
    groups = [(way, seed) for way in ways for seed in range(seeds)]
    starts = [seed + (1000 * (worker + 1) if way.apart else 0) for way, seed in groups for worker in range(workers)]
    features_RD, labels_R = data.features_RD[: len(data.learned)], data.labels_R[: len(data.learned)]
    nets = ManyNets.of(starts, inputs=features_RD.shape[1], hidden=32)
    rate_K = torch.full((len(starts),), rate)
    share = len(labels_R) // workers
    step = 0
    for number in range(passes):
        order_SNR = [shard_orders(workers, share, seed=seed, number=number) for seed in range(seeds)]
        order_KR = torch.cat([order_SNR[seed] for _, seed in groups])
        for start in range(0, share - batch_size + 1, batch_size):
            rows_KB = order_KR[:, start : start + batch_size]
            descend(nets, features_RD[rows_KB], labels_R[rows_KB], rate_K)
            step += 1
            due_G = torch.tensor([way.every is not None and step % way.every == 0 for way, _ in groups])
            average(nets, due_G)
    return nets


def shard_orders(workers: int, share: int, *, seed: int, number: int) -> torch.Tensor:
    """`[N, share]`: for each worker its own rows, always the same ones, in the order of pass `number`."""
    shards_NR = torch.randperm(workers * share, generator=torch.Generator().manual_seed(seed)).view(workers, share)
    generator = torch.Generator().manual_seed(10_000 * (number + 1) + seed)
    return torch.stack([shard_R[torch.randperm(share, generator=generator)] for shard_R in shards_NR])


@torch.no_grad()
def average(nets: ManyNets, due_G: torch.Tensor) -> None:
    """Gives all workers of the groups that are due the mean of their weights."""
    if not due_G.any():
        return
    for weight in nets.parameters:
        of_group = weight.view(len(due_G), -1, *weight.shape[1:])
        of_group[due_G] = of_group[due_G].mean(dim=1, keepdim=True)


@torch.no_grad()
def outcomes(nets: ManyNets, data: Clicks, *, workers: int, seeds: int) -> list[Outcome]:
    """One a way of sharing."""
    inputs, labels = data.features_RD[None, data.held_out], data.labels_R[None, data.held_out]
    logits_KB = nets.logits(inputs)
    single_G = log_losses(logits_KB, labels).view(-1, workers).mean(dim=1)
    probability_GB = torch.sigmoid(logits_KB).view(-1, workers, logits_KB.shape[1]).mean(dim=1)
    prediction_G = log_losses(torch.logit(probability_GB), labels)
    means = [weight.view(-1, workers, *weight.shape[1:]).mean(dim=1) for weight in nets.parameters]
    merged_G = log_losses(ManyNets.holding(means).logits(inputs), labels)
    flat_GNP = torch.cat([weight.flatten(1) for weight in nets.parameters], dim=1).view(len(single_G), workers, -1)
    middle_GP = flat_GNP.mean(dim=1)
    spread_G = (flat_GNP - middle_GP[:, None]).square().sum(dim=2).mean(dim=1).sqrt() / middle_GP.norm(dim=1)
    per_way = [values.view(-1, seeds).mean(dim=1).tolist() for values in (merged_G, single_G, prediction_G, spread_G)]
    return [
        Outcome(mean_weights=merged, single=single, mean_prediction=prediction, spread=spread)
        for merged, single, prediction, spread in zip(*per_way, strict=True)
    ]


def sentence(workers: int, found: Mapping[str, Outcome]) -> str:
    """The answer."""
    shared = {name: one for name, one in found.items() if name.startswith("every")}
    best = min(shared, key=lambda name: shared[name].mean_weights)
    rarest = list(shared)[-1]
    every, never, apart = found["every step"], found["never"], found["never, started apart"]
    alone = never.single - every.mean_weights
    return (
        f"{workers} devices that never share end {abs(alone):.4f} nats {'worse' if alone > 0 else 'better'} each than if they "
        f"average at every step ({every.mean_weights:.4f}); the least loss is that of averaging {best} "
        f"({found[best].mean_weights:.4f}), {rarest} gives {found[rarest].mean_weights:.4f}. Averaged once at the end, weights "
        f"from one start give {never.mean_weights:.4f} and weights from different starts {apart.mean_weights:.4f}; the mean of "
        f"their predictions gives {never.mean_prediction:.4f} and {apart.mean_prediction:.4f}."
    )


if __name__ == "__main__":
    main_of(run)
