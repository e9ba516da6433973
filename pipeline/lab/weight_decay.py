"""Does a large batch need more weight decay than a small one?

Enters: few generated clicks, batch sizes, weight decays. Leaves: the decay that is best on held-out rows for each batch, at one
rate for all and at rates in proportion to the batch.

The noise of small batches regularises by itself; where it is missing, the claim goes, an explicit term must take its place.
Runs of one batch size differ in nothing but decay, rate and seed, and are trained side by side.

Letters: K runs.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch

from pipeline.lab.checks import need_batches
from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes, tick_sizes
from pipeline.lab.many_nets import ManyNets, descend, log_losses, shuffled
from pipeline.lab.problems import Clicks, clicks

ONE_RATE, IN_PROPORTION = "one rate for all", "rate in proportion"


def run(
    *,
    batch_sizes: tuple[int, ...] = (8, 32, 128, 512),
    decays: tuple[float, ...] = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1),
    learning_rate: float = 0.1,
    most_rate: float = 2.0,
    num_rows: int = 1024,
    passes: int = 24,
    seeds: int = 3,
) -> Finding:
    """A large batch needs more weight decay, for it has less noise that regularises.

    Args:
        batch_sizes: of the runs; the second is the one that the learning rate belongs to.
        decays: weight decays that are tried, from small to large.
        learning_rate: of SGD.
        most_rate: that a rate in proportion is held to.
        num_rows: to learn: few, so that runs overfit.
        passes: over the rows.
        seeds: of first weights and of the order of rows.
    """
    need_batches(batch_sizes, num_rows, least=2)
    data = clicks(num_rows, seed=1)
    losses: dict[str, list[list[float]]] = {ONE_RATE: [], IN_PROPORTION: []}
    for batch in batch_sizes:
        rates = (learning_rate, min(learning_rate * batch / batch_sizes[1], most_rate))
        grid = held_out_losses(data, batch_size=batch, rates=rates, decays=decays, passes=passes, seeds=seeds)
        for name, per_decay in zip(losses, grid, strict=True):
            losses[name].append(per_decay)
    best = {name: [decays[int(np.argmin(found))] for found in of] for name, of in losses.items()}
    gain = {name: [found[0] - min(found) for found in of] for name, of in losses.items()}
    figure, (upper, lower) = canvas(2)
    for number, name in enumerate(losses):
        upper.plot(batch_sizes, best[name], **look(number), label=name)
        lower.plot(batch_sizes, [min(found) for found in losses[name]], **look(number), label=f"{name}, best decay")
        lower.plot(
            batch_sizes,
            [found[0] for found in losses[name]],
            color=look(number)["color"],
            ls=":",
            lw=1.6,
            label=f"{name}, smallest decay",
        )
    for axes in (upper, lower):
        tick_sizes(axes, batch_sizes)
    upper.set_yscale("log")
    upper.set_yticks(decays, [f"{decay:g}" for decay in decays])
    upper.set_ylim(decays[0] * 0.7, decays[-1] * 1.4)
    upper.minorticks_off()
    name_axes(upper, "Best weight decay", "batch size (rows)", "weight decay")
    name_axes(lower, "What it is worth: dotted, next to none", "batch size (rows)", "held-out log loss (nats)")
    legend(upper)
    legend(lower, fontsize=9.5)
    return Finding(
        name="weight_decay",
        question="Does a large batch need more weight decay than a small one?",
        sentence=sentence(batch_sizes, best, gain),
        columns=("batch (rows)", "rates", "best decay", *(f"held-out nats at {decay:g}" for decay in decays)),
        rows=tuple(
            (batch, name, best[name][place], *losses[name][place]) for name in losses for place, batch in enumerate(batch_sizes)
        ),
        figure=figure,
        metrics={
            f"best_decay_{key}_{batch}": best[name][place]
            for name, key in ((ONE_RATE, "one_rate"), (IN_PROPORTION, "in_proportion"))
            for place, batch in enumerate(batch_sizes)
        },
    )


def held_out_losses(
    data: Clicks, *, batch_size: int, rates: Sequence[float], decays: Sequence[float], passes: int, seeds: int
) -> list[list[float]]:
    """For each rate and each decay: mean over seeds of the held-out log loss, nats."""
    grid = list(product(rates, decays, range(seeds)))
    seeds_K = [seed for _, _, seed in grid]
    rate_K, decay_K = (torch.tensor([row[place] for row in grid]) for place in (0, 1))
    features_RD, labels_R = data.features_RD[: len(data.learned)], data.labels_R[: len(data.learned)]
    nets = ManyNets.of(seeds_K, inputs=features_RD.shape[1], hidden=32)
    for number in range(passes):
        order_KR = shuffled([1000 * number + seed for seed in seeds_K], len(labels_R))
        for start in range(0, len(labels_R) - batch_size + 1, batch_size):
            rows_KB = order_KR[:, start : start + batch_size]
            descend(nets, features_RD[rows_KB], labels_R[rows_KB], rate_K, decay_K)
    with torch.no_grad():
        loss_K = log_losses(nets.logits(data.features_RD[None, data.held_out]), data.labels_R[None, data.held_out])
    return [[float(value) for value in row] for row in loss_K.view(len(rates), len(decays), seeds).mean(dim=2)]


def sentence(batch_sizes: Sequence[int], best: Mapping[str, Sequence[float]], gain: Mapping[str, Sequence[float]]) -> str:
    """The answer."""
    parts = []
    for name, decays in best.items():
        first, last = decays[0], decays[-1]
        moved = "more decay than" if last > first else "less decay than" if last < first else "as much decay as"
        parts.append(
            f"with {name} a batch of {batch_sizes[-1]} wants {moved} one of {batch_sizes[0]} ({last:g} against {first:g}, "
            f"worth {gain[name][-1]:.3f} and {gain[name][0]:.3f} nats)"
        )
    text = "; ".join(parts)
    held = [decays[-1] > decays[0] for decays in best.values()]
    verdict = "as claimed" if all(held) else "the claim holds for one of them" if any(held) else "against the claim"
    return f"{text[0].upper()}{text[1:]}: {verdict}."


if __name__ == "__main__":
    main_of(run)
