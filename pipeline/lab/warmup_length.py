"""How long must the warm-up be, for which batch?

Enters: generated clicks, batch sizes, lengths of the warm-up as shares of a run. Leaves: the held-out loss of each, with rates
in proportion to the batch (Goyal et al. 2017), and the shortest warm-up that is as good as any.

Runs of one batch size differ in nothing but warm-up and seed, and are trained side by side.

Letters: K runs.
"""

from collections.abc import Sequence
from itertools import pairwise, product

import torch

from pipeline.lab.checks import need_batches
from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes
from pipeline.lab.many_nets import ManyNets, descend, log_losses, shuffled
from pipeline.lab.problems import Clicks, clicks
from pipeline.training.learning_rate import scaled
from pipeline.training.optimizers import warmed_up

TOLERANCE = 0.001
"""Nats by which a warm-up may be worse than the best one and still count as good."""


def run(
    *,
    batch_sizes: tuple[int, ...] = (128, 512, 1024, 2048),
    shares: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8),
    learning_rate: float = 0.5,
    num_rows: int = 8192,
    passes: int = 8,
    seeds: int = 4,
) -> Finding:
    """The larger the batch, the longer the warm-up must be.

    Args:
        batch_sizes: the first is the one that the learning rate belongs to.
        shares: of the steps of a run over which the rate rises; 0 for none.
        learning_rate: of SGD at the first batch; in proportion to the batch.
        num_rows: to learn.
        passes: over the rows.
        seeds: of first weights and of the order of rows.
    """
    need_batches(batch_sizes, num_rows)
    data = clicks(num_rows)
    losses, lengths = [], []
    for batch in batch_sizes:
        steps = passes * (num_rows // batch)
        warmups = [round(share * steps) for share in shares]
        rate = learning_rate * scaled("linear", batch, batch_sizes[0], None)
        losses.append(held_out_losses(data, batch_size=batch, rate=rate, warmups=warmups, passes=passes, seeds=seeds))
        lengths.append(warmups)
    best = [shortest_good(found) for found in losses]
    gain = [found[0] - min(found) for found in losses]
    figure, (axes,) = canvas()
    for number, (batch, found) in enumerate(zip(batch_sizes, losses, strict=True)):
        axes.plot([100 * share for share in shares], found, **look(number), label=f"batch {batch}")
        axes.plot(100 * shares[best[number]], found[best[number]], "o", ms=14, mfc="none", mec="#000000", mew=1.6)
    name_axes(axes, "Ringed: the shortest that is good enough", "warm-up (% of the steps)", "held-out log loss (nats)")
    legend(axes)
    return Finding(
        name="warmup_length",
        question="How long must the warm-up be, for which batch?",
        sentence=sentence(batch_sizes, [shares[place] for place in best], gain),
        columns=("batch (rows)", "steps", "shortest good (steps)", *(f"held-out nats at {share:.0%}" for share in shares)),
        rows=tuple(
            (batch, passes * (num_rows // batch), lengths[place][best[place]], *losses[place])
            for place, batch in enumerate(batch_sizes)
        ),
        figure=figure,
        metrics={f"best_share_{batch}": shares[best[place]] for place, batch in enumerate(batch_sizes)}
        | {f"gain_{batch}": gain[place] for place, batch in enumerate(batch_sizes)},
    )


def shortest_good(losses: Sequence[float]) -> int:
    """Place of the first loss that is within `TOLERANCE` of the least.

    >>> shortest_good([0.5, 0.4005, 0.4])
    1
    """
    return next(place for place, loss in enumerate(losses) if loss <= min(losses) + TOLERANCE)


def held_out_losses(
    data: Clicks, *, batch_size: int, rate: float, warmups: Sequence[int], passes: int, seeds: int
) -> list[float]:
    """For each length of the warm-up in steps: mean over seeds of the held-out log loss, nats."""
    grid = list(product(warmups, range(seeds)))
    seeds_K = [seed for _, seed in grid]
    features_RD, labels_R = data.features_RD[: len(data.learned)], data.labels_R[: len(data.learned)]
    nets = ManyNets.of(seeds_K, inputs=features_RD.shape[1], hidden=32)
    step = 0
    for number in range(passes):
        order_KR = shuffled([1000 * number + seed for seed in seeds_K], len(labels_R))
        for start in range(0, len(labels_R) - batch_size + 1, batch_size):
            rows_KB = order_KR[:, start : start + batch_size]
            rate_K = torch.tensor([warmed_up(rate, step, warmup) for warmup, _ in grid])
            descend(nets, features_RD[rows_KB], labels_R[rows_KB], rate_K)
            step += 1
    with torch.no_grad():
        loss_K = log_losses(nets.logits(data.features_RD[None, data.held_out]), data.labels_R[None, data.held_out])
    return [float(value) for value in loss_K.view(len(warmups), seeds).mean(dim=1)]


def sentence(batch_sizes: Sequence[int], best: Sequence[float], gain: Sequence[float]) -> str:
    """The answer.

    Args:
        best: the shortest good warm-up of each batch, as a share of the steps.
        gain: nats over no warm-up.
    """
    each = ", ".join(
        f"{share:.0%} of the steps at batch {batch} (worth {won:.4f} nats)"
        for batch, share, won in zip(batch_sizes, best, gain, strict=True)
    )
    grows = all(before <= after for before, after in pairwise(best)) and best[-1] > best[0]
    needed = [batch for batch, won in zip(batch_sizes, gain, strict=True) if won > TOLERANCE]
    who = f"batches of {' and '.join(map(str, needed))} alone need one" if needed else "no batch needs one"
    verdict = "it grows with the batch, as claimed" if grows else "it does not grow with the batch, against the claim"
    return f"The shortest warm-up within {TOLERANCE} nats of the best is {each}: {who}; {verdict}."


if __name__ == "__main__":
    main_of(run)
