"""Batch normalisation, layer normalisation and dropout against the batch size.

Enters: generated clicks, networks of one shape with and without these layers, batch sizes. Leaves: the held-out AUC of each,
and how far the mean of a batch is from that of all rows, which batch normalisation (Ioffe & Szegedy 2015) takes it for.

A batch of b rows has a mean with the standard deviation `sigma / sqrt(b)` around the mean of all rows; drawn without
replacement from R rows, times `sqrt((R - b) / (R - 1))`. Layer normalisation (Ba et al. 2016) and dropout (Srivastava et al.
2014) look at one row alone.

Letters: S seeds.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pipeline.comparison.statistics import paired_difference
from pipeline.lab.checks import need_batches, need_seeds
from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes, tick_sizes
from pipeline.lab.problems import Clicks, Normalisation, clicks, descend, loss_and_auc, small_net
from pipeline.training.learning_rate import scaled

KINDS: Mapping[str, tuple[Normalisation, float]] = {
    "plain": ("none", 0.0),
    "batch normalisation": ("batch", 0.0),
    "layer normalisation": ("layer", 0.0),
    "dropout": ("none", 0.2),
}
"""Normalisation and the share of hidden units dropped."""


def run(
    *,
    batch_sizes: tuple[int, ...] = (4, 16, 64, 256),
    learning_rate: float = 0.008,
    num_rows: int = 4096,
    passes: int = 1,
    seeds: int = 3,
) -> Finding:
    """Batch normalisation fails with small batches; layer normalisation and dropout do not care.

    Args:
        batch_sizes: at least 2 rows each; the last is the one that the learning rate belongs to.
        learning_rate: of Adam; scaled with the root of the batch.
        num_rows: to learn.
        passes: over the rows.
        seeds: of first weights and of the order of rows; at least 2.
    """
    need_seeds(seeds)
    need_batches(batch_sizes, num_rows)
    data = clicks(num_rows)
    rates = [learning_rate * scaled("sqrt", batch, batch_sizes[-1], None) for batch in batch_sizes]
    found = {
        name: [
            [held_out_auc(data, name, batch_size=batch, rate=rate, passes=passes, seed=seed) for seed in range(seeds)]
            for batch, rate in zip(batch_sizes, rates, strict=True)
        ]
        for name in KINDS
    }
    means = {name: [float(np.mean(auc_S)) for auc_S in by_batch] for name, by_batch in found.items()}
    deviation = [deviation_of_means(data, batch) for batch in batch_sizes]
    expected = [expected_deviation(batch, len(data.learned)) for batch in batch_sizes]
    figure, (upper, lower) = canvas(2)
    for number, (name, auc_B) in enumerate(means.items()):
        upper.plot(batch_sizes, auc_B, **look(number), label=name)
    lower.plot(batch_sizes, deviation, "o", color="#0072B2", ms=8, label="measured")
    lower.plot(batch_sizes, expected, color="#000000", lw=1.4, label="1 / sqrt(b), all rows known")
    for axes in (upper, lower):
        tick_sizes(axes, batch_sizes)
    lower.set_yscale("log")
    lower.set_yticks(expected, [f"{value:.2g}" for value in expected])
    lower.minorticks_off()
    name_axes(upper, "Layers by batch size", "batch size (rows)", "held-out AUC")
    name_axes(lower, "How wrong a batch's mean is", "batch size (rows)", "standard deviations of a row")
    legend(upper)
    legend(lower)
    furthest = max(abs(a / b - 1) for a, b in zip(deviation, expected, strict=True))
    return Finding(
        name="normalisation",
        question="What do batch normalisation, layer normalisation and dropout do at small and at large batches?",
        sentence=sentence(batch_sizes, found),
        columns=("batch (rows)", *(f"AUC, {name}" for name in KINDS), "deviation of a batch's mean", "by 1 / sqrt(b)"),
        rows=tuple(
            (batch, *(auc_B[place] for auc_B in means.values()), deviation[place], expected[place])
            for place, batch in enumerate(batch_sizes)
        ),
        figure=figure,
        metrics={f"auc_smallest_{name.replace(' ', '_')}": auc_B[0] for name, auc_B in means.items()}
        | {f"auc_largest_{name.replace(' ', '_')}": auc_B[-1] for name, auc_B in means.items()}
        | {"deviation_off_by": furthest},
    )


def held_out_auc(data: Clicks, name: str, *, batch_size: int, rate: float, passes: int, seed: int) -> float:
    """After Adam over the rows."""
    normalisation, dropout = KINDS[name]
    net = small_net(data.features_RD.shape[1], normalisation=normalisation, dropout=dropout, seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, fused=True)
    steps = passes * (len(data.learned) // batch_size)
    descend(net, data, batch_size=batch_size, steps=steps, optimizer=optimizer, seed=[seed])
    return loss_and_auc(net, data, data.held_out)[1]


def deviation_of_means(data: Clicks, batch_size: int, *, batches: int = 400, seed: int = 0) -> float:
    """Root mean square over features and random batches of how far a batch's mean is from that of all rows, in standard
    deviations of a row."""
    rng = np.random.default_rng([seed, batch_size])
    features_RD = data.features_RD[: len(data.learned)].double().numpy()
    features_RD = features_RD[:, features_RD.std(axis=0) > 0]
    scaled_RD = (features_RD - features_RD.mean(axis=0)) / features_RD.std(axis=0)
    means = [scaled_RD[rng.choice(len(scaled_RD), batch_size, replace=False)].mean(axis=0) for _ in range(batches)]
    return float(np.sqrt(np.square(means).mean()))


def expected_deviation(batch_size: int, num_rows: int) -> float:
    """Of the mean of a batch drawn without replacement (Cochran 1977, eq. 2.9).

    >>> expected_deviation(4, 1_000_000_000)
    0.49999999925
    """
    return math.sqrt((num_rows - batch_size) / (num_rows - 1) / batch_size)


def sentence(batch_sizes: Sequence[int], found: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """The answer.

    Args:
        found: `[S]` AUC of each layer and batch size.
    """
    parts = []
    for place in (0, -1):
        changes = []
        for name in list(found)[1:]:
            difference = paired_difference(found[name][place], found["plain"][place])
            certain = not difference.estimate.low <= 0 <= difference.estimate.high
            changes.append(f"{name} {difference.estimate.mean:+.3f}{'' if certain else ' (within its interval)'}")
        parts.append(f"with batches of {batch_sizes[place]}, against the plain network's AUC: {', '.join(changes)}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    main_of(run)
