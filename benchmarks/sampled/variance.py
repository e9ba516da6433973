"""Gradient variance of stratified batches against simple random ones of equal size, at the weights of a trained model.

The variance of a batch's mean gradient is the trace of its covariance, T / (T - 1) (mean |g|^2 - |mean g|^2) over T batches: of
the dense network, of the embeddings and of the wide weights, each row of a table a coordinate of its own. The batches come from
the order that updates learn in: simple random ones from a permutation, stratified ones from a stratified order.

Within a stratum of n rows the variance S of a single row's gradient comes from simple random batches of that stratum alone. A
stratified batch with proportional allocation has the variance sum(W S) / b; what strata save is the rest of the simple random
one, the spread between the means of the strata (Cochran 1977, Sampling Techniques, 5.6).

Letters: R rows, B rows of a batch, P dense parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_schemas.examples import I64
from models.loss import weighted_log_loss_sum
from models.row_gradients import lookups_of, row_gradients
from pipeline.config import SamplingConfig
from pipeline.data.encode import EncodedWindow
from pipeline.training.learner import Learner
from pipeline.training.sampling import columns_of
from sampled.streams import Hour, Model, hours_of, synthetic_spec
from sampling.minibatches import BatchCursor
from sampling.plan import Columns
from sampling.strata import I32, StratifyBy

PARTS = ("dense", "embeddings", "wide weights")
SINGLE: tuple[StratifyBy, ...] = ("label", "item_popularity", "user_activity")
BATCHES_BY: tuple[tuple[StratifyBy, ...], ...] = (
    *((name,) for name in SINGLE),
    ("label", "item_popularity"),
    ("label", "user_activity"),
    SINGLE,
)
LEAST_BATCHES_A_PASS = 8
"""A smaller stratum is measured in smaller batches, so that they are not all of its rows."""
STRATUM_BATCHES_SHARE = 5
"""Batches of each stratum: one over this of the others'."""


def run(batches: int, batch_size: int, hours: int, rows: int, ctr: float) -> None:
    """The model has learned all hours but the last, which the gradients are of."""
    model, hour = _trained(hours, rows, ctr)
    columns = columns_of(hour.examples, hour.window, model.spec, SINGLE)
    all_R = np.arange(hour.window.num_rows)
    simple = _variance(model.learner, hour.window, _batches(all_R, None, batches, batch_size))
    _print_batches(model.learner, hour.window, columns, simple, batches, batch_size)
    _print_strata(model.learner, hour.window, columns, simple * batch_size, batches // STRATUM_BATCHES_SHARE, batch_size)


@dataclass(kw_only=True)
class _Spread:
    """Sums over batches, from which the variance of their gradient comes."""

    count: int = 0
    squares: float = 0.0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, rows: torch.Tensor | None, gradient: torch.Tensor, like: torch.Tensor) -> None:
        """One tensor of a batch's gradient; `rows` of it where it is not whole."""
        total = self.sums.setdefault(name, torch.zeros_like(like, dtype=torch.float64))
        if rows is None:
            total += gradient
        else:
            total.index_add_(0, rows, gradient.double())
        self.squares += float(gradient.double().square().sum())

    @property
    def variance(self) -> float:
        """Trace of the covariance of a batch's gradient, unbiased."""
        of_mean = sum(float((total / self.count).square().sum()) for total in self.sums.values())
        return self.count / (self.count - 1) * (self.squares / self.count - of_mean)


def _trained(hours: int, rows: int, ctr: float) -> tuple[Model, Hour]:
    spec = synthetic_spec()
    model = Model(spec, SamplingConfig(), 0)
    for number, hour in enumerate(hours_of(spec, ctr=ctr, hours=hours, rows=rows, seed=0)):
        if number == hours - 1:
            return model, hour
        model.learn(hour)
    raise ValueError(f"hours must be at least 1, got {hours}")


def _batches(rows: I64, stratum_R: I32 | None, count: int, size: int) -> Iterator[I64]:
    """`count` batches from passes over `rows`, each in an order of its own."""
    done = 0
    while done < count:
        cursor = BatchCursor.of(len(rows), seed=[1, done], stratum_R=stratum_R)
        while cursor.remaining and done < count:
            yield rows[cursor.next_rows(size)]
            done += 1


def _variance(learner: Learner, window: EncodedWindow, batches: Iterator[I64]) -> np.ndarray:
    """`[3]` of `PARTS`."""
    spreads = {part: _Spread() for part in PARTS}
    weights = {of.name: of.tensor for of in learner.model.tables.slices(with_optimizer=False)}
    for rows_B in batches:
        for spread in spreads.values():
            spread.count += 1
        for part, name, rows, gradient in _gradients(learner, window, rows_B):
            spreads[part].add(name, rows, gradient, learner.parameters[name] if rows is None else weights[name])
    return np.array([spread.variance for spread in spreads.values()])


def _gradients(
    learner: Learner, window: EncodedWindow, rows_B: I64
) -> Iterator[tuple[str, str, torch.Tensor | None, torch.Tensor]]:
    """Part, name, table rows and gradient of each tensor, of the batch's mean loss."""
    model, chunk = learner.model, learner.look_up(window.minibatch(rows_B))
    batch = chunk.batch
    deep_BS = chunk.pooled.deep_BS.detach().requires_grad_()
    wide_BW = chunk.pooled.wide_BW.detach().requires_grad_()
    logits_B = model.net(deep_BS, wide_BW, batch.dense_BN)
    loss = weighted_log_loss_sum(logits_B, batch.labels_B, batch.weights_B) / len(rows_B)
    names, parameters = zip(*learner.parameters.items(), strict=True)
    deep_gradient, wide_gradient, *dense = torch.autograd.grad(loss, [deep_BS, wide_BW, *parameters])
    yield from (("dense", name, None, gradient) for name, gradient in zip(names, dense, strict=True))
    looked_up = lookups_of(model.layout, batch.deep, batch.wide, deep_gradient, wide_gradient, batch.weights_B, None)
    for part, lookups in zip(PARTS[1:], looked_up, strict=True):
        yield from ((part, of.name, of.rows_U, of.gradient_UD) for of in row_gradients(lookups))


def _print_batches(
    learner: Learner, window: EncodedWindow, columns: Columns, simple: np.ndarray, batches: int, batch_size: int
) -> None:
    table = Table(title=f"gradient variance over that of simple random batches; {batches:,} batches of {batch_size} rows")
    for head in ("batches mirror", "strata", *PARTS):
        table.add_column(head, justify="left" if head == "batches mirror" else "right")
    table.add_row("nothing (variance itself)", "1", *(f"{value:.3g}" for value in simple))
    all_R = np.arange(window.num_rows)
    for by in BATCHES_BY:
        strata = columns.strata(by)
        variance = _variance(learner, window, _batches(all_R, strata.stratum_R, batches, batch_size))
        table.add_row(", ".join(by), str(len(strata.names)), *(f"{value:.3f}" for value in variance / simple))
    Console(width=120).print(table)


def _print_strata(
    learner: Learner, window: EncodedWindow, columns: Columns, of_a_row: np.ndarray, batches: int, batch_size: int
) -> None:
    """Of the variance of a single row's gradient: what lies inside each stratum, and what lies between them."""
    table = Table(title=f"where the variance of a row's gradient lies; {batches:,} batches of each stratum")
    for head in ("stratum", "rows", "clicks", *PARTS):
        table.add_column(head, justify="left" if head == "stratum" else "right")
    for by in SINGLE:
        strata, inside = columns.strata((by,)), np.zeros(len(PARTS))
        for number, name in enumerate(strata.names):
            rows = np.flatnonzero(strata.stratum_R == number)
            share = len(rows) / window.num_rows * _of_a_row(learner, window, rows, batches, batch_size) / of_a_row
            inside += share
            table.add_row(name, *_shares(rows, window), *(f"{value:.1%}" for value in share))
        table.add_row(f"between strata of {by}", "", "", *(f"{value:.1%}" for value in 1 - inside), end_section=True)
    Console(width=120).print(table)


def _of_a_row(learner: Learner, window: EncodedWindow, rows: I64, batches: int, batch_size: int) -> np.ndarray:
    """The variance of a single row's gradient within these rows; batches of b of n have (n - b) / (n - 1) / b of it."""
    size = max(min(batch_size, len(rows) // LEAST_BATCHES_A_PASS), 1)
    variance = _variance(learner, window, _batches(rows, None, batches, size))
    return variance * size * (len(rows) - 1) / max(len(rows) - size, 1)


def _shares(rows: I64, window: EncodedWindow) -> Sequence[str]:
    return f"{len(rows) / window.num_rows:.1%}", f"{window.labels_R[rows].mean():.1%}"
