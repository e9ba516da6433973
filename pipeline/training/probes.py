"""Looks at single steps from outside: what they do to rows that they learn, and to rows that nothing was learned from yet.

Enters: the learner before and after a step. Leaves: `Probed`. No weight and no random number is touched: a pass with probes
gives the bits of one without.

The rows not yet learned are the last ones of the pass, the same all along; probing ends when the pass comes to them. A dense
step is probed with the embeddings that it saw, a sparse step with the dense weights after it.

Letters: P rows not yet learned, C rows of the chunk, m rows that are probed of a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from data_schemas.minibatch import MiniBatch
from models.embeddings import Pooled
from models.loss import weighted_log_loss_sum
from pipeline.evaluation.diagnosis import Part, StepProbe
from pipeline.training.learner import Chunk, Learner

DENSE_PROBES, SPARSE_PROBES = 24, 12
"""In a window at most, evenly spaced in rows."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Along one pass."""

    steps: tuple[StepProbe, ...]
    log_losses: tuple[float, ...]
    """Of the rows not yet learned, before each probed dense step; nats."""
    gradient_norms: tuple[float, ...]
    """Of the same steps, over dense weights and embeddings."""


class Probes:
    """Probes some steps of a pass."""

    def __init__(self, learner: Learner, other: MiniBatch, *, num_rows: int) -> None:
        """Watches a pass over `num_rows` rows, the last of which are `other`."""
        self._learner = learner
        self._other = other.to(learner.device)
        self._first_other = num_rows - other.num_rows
        self._every: dict[Part, float] = {"dense": num_rows / DENSE_PROBES, "sparse": num_rows / SPARSE_PROBES}
        self._next: dict[Part, float] = {"dense": 0.0, "sparse": 0.0}
        self._steps: list[StepProbe] = []
        self._log_losses: list[float] = []
        self._gradient_norms: list[float] = []
        self._other_pooled: Pooled | None = None

    def probed(self) -> Probed:
        """What was seen."""
        return Probed(steps=tuple(self._steps), log_losses=tuple(self._log_losses), gradient_norms=tuple(self._gradient_norms))

    @contextmanager
    def dense_step(self, chunk: Chunk, rows: slice, *, position: int) -> Iterator[None]:
        """Around a step of the dense network on `rows` of the chunk, after `position` rows of the pass."""
        if not self._due("dense", position, rows.stop - rows.start):
            yield
            return
        pooled = self._look_up_others()
        tail = self._tail(rows)
        before = (self._own(chunk, chunk.pooled, tail), self._others(pooled))
        yield
        after = (self._own(chunk, chunk.pooled, tail), self._others(pooled))
        self._add("dense", rows.stop - rows.start, before, after)
        self._log_losses.append(before[1])
        self._gradient_norms.append(self._learner.gradient_norm)

    @contextmanager
    def sparse_step(self, chunk: Chunk, rows: slice, num_rows: int, *, position: int) -> Iterator[None]:
        """Around the step of the table rows of a chunk.

        Args:
            chunk: of several batches.
            rows: of the chunk that were learned; the last of them is none that only fills a shape.
            num_rows: of the pass that they stand for.
            position: in the pass, after them.
        """
        if not num_rows or not self._due("sparse", position - num_rows, num_rows):
            self._other_pooled = None
            yield
            return
        tail = self._tail(rows)
        before = (self._own(chunk, chunk.pooled, tail), self._others(self._look_up_others()))
        yield
        self._other_pooled = None
        with torch.no_grad():
            pooled = self._learner.model.tables(chunk.batch.deep, chunk.batch.wide)
        after = (self._own(chunk, pooled, tail), self._others(self._look_up_others()))
        self._other_pooled = None
        self._add("sparse", num_rows, before, after)

    def _due(self, part: Part, position: int, rows: int) -> bool:
        """Whether a step that learns `rows` rows after `position` is probed; it must not come to the others."""
        if position < self._next[part] or position + rows > self._first_other:
            return False
        self._next[part] = position + self._every[part]
        return True

    def _tail(self, rows: slice) -> slice:
        """At most as many of a step's rows as there are others."""
        return slice(max(rows.start, rows.stop - self._other.num_rows), rows.stop)

    @torch.no_grad()
    def _look_up_others(self) -> Pooled:
        if self._other_pooled is None:
            self._other_pooled = self._learner.model.tables(self._other.deep, self._other.wide)
        return self._other_pooled

    def _others(self, pooled: Pooled) -> float:
        return self._log_loss(self._other, pooled, slice(0, self._other.num_rows))

    def _own(self, chunk: Chunk, pooled: Pooled, rows: slice) -> float:
        return self._log_loss(chunk.batch, pooled, rows)

    @torch.no_grad()
    def _log_loss(self, batch: MiniBatch, pooled: Pooled, rows: slice) -> float:
        """The weighted mean of the live weights, in fp32."""
        model = self._learner.model
        deep_mS = model.layout.with_history(pooled.deep_BS, batch.history_row_B, rows)
        logits_m = model.net(deep_mS, pooled.wide_BW[rows], batch.dense_BN[rows])
        if batch.logit_shifts_B is not None:
            logits_m = logits_m + batch.logit_shifts_B[rows]
        weights_m = batch.weights_B[rows]
        looks_m3 = None if batch.looks_B3 is None else batch.looks_B3[rows]
        return float(weighted_log_loss_sum(logits_m, batch.labels_B[rows], weights_m, looks_m3) / weights_m.sum())

    def _add(self, part: Part, rows: int, before: tuple[float, float], after: tuple[float, float]) -> None:
        self._steps.append(
            StepProbe(
                part=part,
                rows=rows,
                same_before=before[0],
                same_after=after[0],
                other_before=before[1],
                other_after=after[1],
            )
        )
