"""The step: dense weights step once a batch, sparse rows once a chunk of one or more batches.

    look a chunk's ids up once -> for each batch: dense network over micro-batches, dense step -> one sparse backward

fbgemm's tables apply their optimizer inside backward, so a backward through them for each micro-batch would step sparse
rows several times and dense weights once. Here the tables see one backward a chunk: accumulation is exact for both.

With a chunk of many batches the dense network learns from embeddings as they were before the chunk: as it will meet them
when it predicts the next window, and not adapted to other rows of the same users and items a moment ago.

Letters: C rows of the chunk in this process, B of a batch, m of a micro-batch, S the sum of embedding lengths, W wide weights;
of S, P belong to the row itself and H to its user's history.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from data_schemas.errors import LearningDiverged, OutOfMemory
from data_schemas.minibatch import MiniBatch
from models.ctr import CtrModel
from models.embeddings import Pooled
from models.loss import weighted_log_loss_sum
from models.row_gradients import Lookups, lookups_of
from models.tables import TableLayout
from pipeline.config import TrainingConfig
from pipeline.training.batch_size import whole
from pipeline.training.compilation import Compiled, compiled
from pipeline.training.local_updates import Sharing
from pipeline.training.noise_scale import MEASURE_EVERY, NoiseScale, spread_of
from pipeline.training.optimizers import dense_optimizer, warmed_up
from pipeline.training.processes import Processes
from pipeline.training.room import advice, memory_explained, tells_of_memory
from pipeline.training.smoothing import MovingAverage, smooth_gradients
from pipeline.training.sparse_step import SparseStep

log = logging.getLogger(__name__)

Arithmetic = Literal["fp32", "bf16", "fp16"]

SMALLEST_MICRO_BATCH = 16
"""Rows down to which a micro-batch is halved where memory does not suffice."""
MAX_OVERFLOWS = 30
"""Steps in a row in which fp16 may overflow: a loss scale of 2^16 is 2^-14 after them, which no sound gradient needs."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did."""

    log_loss: float
    """Weighted mean over the rows of all processes, before the step; NaN or infinite where the step was skipped."""
    learned: bool
    """False: the loss or a gradient was not finite, and no weight was touched."""
    learning_rate: float
    """Of the dense optimizer, warm-up included."""


class Learner:
    """A model with everything that its next step depends on."""

    def __init__(
        self,
        model: CtrModel,
        config: TrainingConfig,
        *,
        precision: Arithmetic,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.precision = precision
        self.device = device
        self.processes = processes or Processes()
        self.sharing = Sharing(config.share_gradients_every, self.processes)
        self.steps = 0
        """Steps since the model was new."""
        self.micro_batch_size = config.micro_batch
        """Rows that go through the dense network at once, as memory has allowed so far."""
        self.fastest_threads: int | None = None
        """With which a pass was found to be fastest, alone on a CPU; None: not measured."""
        self.halvings: list[tuple[int, int]] = []
        """Where memory did not suffice: steps before, and rows of a micro-batch from there on."""
        self.skipped_in_a_row = 0
        self.overflows_in_a_row = 0
        self.gradient_norm = 0.0
        """Of the last step, over dense weights and embeddings."""
        self.parameters = dict(model.net.named_parameters())
        self.optimizer = dense_optimizer(self.parameters.values(), config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.gradient_average = MovingAverage(self.parameters, config.gradient_ema) if config.gradient_ema else None
        self.weight_average = MovingAverage(self.parameters, config.weight_ema) if config.weight_ema else None
        self.sparse_step = SparseStep(model.tables, config, self.processes)
        self.noise_scale = NoiseScale(measurable=precision != "fp16" and not config.compile_dense_network)
        """Of the dense gradients, measured every few steps where a setting needs it. fp16 scales its gradients, and a compiled
        network takes whole micro-batches, of which a small batch has but one."""
        self._sparse_factor = 1.0
        self.net: Compiled = compiled(model.net, asked=config.compile_dense_network)

    @property
    def threads(self) -> int | None:
        """That one operation is spread over while rows are learned; None: as many as torch is given."""
        if self.config.threads != "auto":
            return self.config.threads
        if self.fastest_threads is None or self.processes.count > 1 or self.device.type != "cpu":
            return None
        return min(self.fastest_threads, torch.get_num_threads())

    def look_up(self, batch: MiniBatch) -> "Chunk":
        """Looks the ids of a chunk up, for the steps that follow; `finish` learns them.

        Raises:
            OutOfMemory: it does not fit.
        """
        with memory_explained("looking up", batch.num_rows):
            batch = batch.to(self.device)
            return Chunk(batch, self.model.tables(batch.deep, batch.wide))

    def step(
        self, chunk: "Chunk", rows: slice, *, divisor: float, learning_rate: float, batch_scale: float = 1.0
    ) -> StepResult:
        """Learns one batch with the dense weights, and keeps what it means for the sparse rows.

        Args:
            chunk: looked up before.
            rows: the batch, as rows of the chunk; padded rows have weight 0.
            divisor: rows of the whole batch, over all processes, times the window's mean weight.
            learning_rate: of the dense optimizer, before warm-up.
            batch_scale: the batch over the reference batch: factor on the gradients of the embeddings (those of the wide part
                are sums over rows anyway), and the steps that it counts as in the moving average of dense weights.

        Raises:
            LearningDiverged: more than `training.max_skipped_steps` steps in a row were not finite.
            OutOfMemory: it does not fit, in however small micro-batches.
        """
        with memory_explained("a step of", rows.stop - rows.start):
            return self._step(chunk, rows, divisor=divisor, learning_rate=learning_rate, batch_scale=batch_scale)

    def _step(self, chunk: "Chunk", rows: slice, *, divisor: float, learning_rate: float, batch_scale: float) -> StepResult:
        measures = self.config.measures_noise and self.steps % MEASURE_EVERY == 0 and self.precision != "fp16"
        pieces, loss_sum, squared_norms = self._gathered(chunk, rows, divisor, measures=measures)
        self._unscale(pieces)
        self.sharing.share_gradients(list(self.parameters.values()))
        if measures:
            self._measure_noise(chunk, pieces, squared_norms)
        log_loss = self.processes.total(float(loss_sum))
        finite = self.processes.total(float(not (math.isfinite(log_loss) and self._gradients_are_finite(pieces)))) == 0
        rate = warmed_up(learning_rate, self.steps, self.config.warmup_steps)
        if finite:
            chunk.keep_gradients(pieces, divisor=divisor, scale=batch_scale)
            self._dense_step(rate, batch_scale)
        if self.precision == "fp16":
            self.scaler.update()
        self._count(finite, log_loss)
        return StepResult(log_loss=log_loss, learned=finite, learning_rate=rate)

    @torch.no_grad()
    def start_at(self, click_rate: float) -> None:
        """Lets a model that has not learned anything predict this rate, where it is neither 0 nor 1.

        Otherwise a rare click costs hundreds of steps before the bias is where a count would have put it.
        """
        if self.steps == 0 and 0 < click_rate < 1:
            self.model.net.bias.fill_(math.log(click_rate / (1 - click_rate)))

    def padded(self, rows: int) -> int:
        """Rows of the static shape that `rows` of one process are filled up to, for a network that is compiled for it."""
        return whole(rows, self.micro_batch_size) if self.config.compile_dense_network else rows

    def set_sparse_factor(self, factor: float) -> None:
        """Of the rates of the embeddings and of the wide part, from the next `finish` on."""
        if factor != self._sparse_factor:
            sparse, wide = self.config.sparse_learning_rate, self.config.wide_learning_rate
            self.model.tables.set_learning_rates(sparse=sparse * factor, wide=wide * factor)
            self._sparse_factor = factor

    def finish(self, chunk: "Chunk") -> None:
        """One step of the sparse rows, with the gradients of all batches of the chunk that were learned."""
        with memory_explained("a step of the embeddings over", chunk.batch.num_rows):
            if self.sparse_step.needed:
                self.sparse_step.learn(*chunk.lookups(self.model.layout))
                return
            torch.autograd.backward([chunk.pooled.deep_BS, chunk.pooled.wide_BW], chunk.gradients(self.model.layout))

    def notes(self) -> tuple[str, ...]:
        """What memory did not suffice for, in words."""
        return tuple(
            f"memory did not suffice for a step after {step:,} steps: from there on micro-batches had {size:,} rows; set "
            f"training.micro_batch_size = {size} to have them from the start"
            for step, size in self.halvings
        )

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of the dense network."""
        return autocast(self.precision, self.device)

    def dense_weights(self, *, averaged: bool) -> dict[str, torch.Tensor]:
        """The dense weights; their moving average where there is one and it is asked for."""
        if averaged and self.weight_average is not None and self.weight_average.steps:
            return self.sharing.mean(self.weight_average.averages())
        return self.sharing.mean({name: parameter.detach() for name, parameter in self.parameters.items()})

    def end_pass(self) -> None:
        """All processes have one model again, where each has stepped by itself."""
        if self.sharing.apart:
            self.sharing.share(self._dense_state())

    @contextmanager
    def averaged(self) -> Iterator[dict[str, torch.Tensor]]:
        """The dense weights that are evaluated and published; inside, the tables hold the rows that are."""
        with self.sparse_step.averaged():
            yield self.dense_weights(averaged=True)

    def _gathered(
        self, chunk: "Chunk", rows: slice, divisor: float, *, measures: bool
    ) -> tuple[list["_MicroBatch"], torch.Tensor, list[torch.Tensor]]:
        """The micro-batches of a batch with their gradients, the loss, and if asked for the norm of each one's gradient.

        Where memory does not suffice in one process, all of them start anew from no gradients, with micro-batches of half as
        many rows: gradients of all processes are exchanged afterwards, so that none has been so far.
        """
        while True:
            self.optimizer.zero_grad()
            lacking = ""
            try:
                gathered = self._gather(chunk, rows, divisor, measures=measures)
            except (RuntimeError, MemoryError) as error:
                if not tells_of_memory(error):
                    raise
                lacking = str(error) or type(error).__name__
            if not self.processes.total(float(bool(lacking))):
                return gathered
            self._halve_micro_batch(rows.stop - rows.start, lacking or "another process has told of it")

    def _gather(
        self, chunk: "Chunk", rows: slice, divisor: float, *, measures: bool
    ) -> tuple[list["_MicroBatch"], torch.Tensor, list[torch.Tensor]]:
        pieces = list(self._micro_batches(chunk, rows, at_least_two=measures and not self.net.compiles))
        loss_sum, squared_norms = torch.zeros((), device=self.device), list[torch.Tensor]()
        for piece in pieces:
            if measures:
                loss, squared_norm = self._measured_backward(chunk, piece, divisor)
                squared_norms.append(squared_norm)
            else:
                loss = self._backward(chunk, piece, divisor)
            loss_sum = loss_sum + loss
        return pieces, loss_sum, squared_norms

    def _halve_micro_batch(self, num_rows: int, reason: str) -> None:
        """The same in all processes, whose batches have as many rows."""
        size = self.micro_batch_size // 2
        while size >= num_rows:
            size //= 2
        if size < SMALLEST_MICRO_BATCH:
            raise OutOfMemory(advice(f"a step of {num_rows:,} rows", reason))
        log.warning("out of memory after %d steps: micro-batches of %d rows from here on (%s)", self.steps, size, reason)
        self.micro_batch_size = size
        self.halvings.append((self.steps, size))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _micro_batches(self, chunk: "Chunk", rows: slice, *, at_least_two: bool = False) -> Iterator["_MicroBatch"]:
        size, count = self.micro_batch_size, rows.stop - rows.start
        if at_least_two and 2 <= count <= size:
            size = -(-count // 2)
        for start in range(rows.start, rows.stop, size):
            yield _MicroBatch(chunk, slice(start, min(start + size, rows.stop)), self.model.layout)

    def _measured_backward(self, chunk: "Chunk", piece: "_MicroBatch", divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_backward`, with the same sums in the same order; and the squared norm of this micro-batch's gradient alone."""
        before = [parameter.grad for parameter in self.parameters.values()]
        for parameter in self.parameters.values():
            parameter.grad = None
        loss = self._backward(chunk, piece, divisor)
        own = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        squared_norm = torch.nn.utils.get_total_norm(own) ** 2
        for parameter, gradient in zip(self.parameters.values(), before, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad = gradient.add_(parameter.grad)
            elif gradient is not None:
                parameter.grad = gradient
        return loss, squared_norm

    def _measure_noise(self, chunk: "Chunk", pieces: Sequence["_MicroBatch"], squared_norms: Sequence[torch.Tensor]) -> None:
        """From the norms of the micro-batches' shares of the gradient; every process ends with the same figures."""
        rows = [int((chunk.batch.weights_B[piece.rows] != 0).sum()) for piece in pieces]
        count = self.processes.total(sum(rows))
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        whole = float(torch.nn.utils.get_total_norm(gradients)) ** 2
        own = [float(norm) for norm in squared_norms]
        if self.processes.count == 1:
            norms = [norm * (count / n) ** 2 if n else 0.0 for norm, n in zip(own, rows, strict=True)]
            self.noise_scale.add(spread_of(norms, rows, whole))
            return
        micro_batches = self.processes.total(sum(n > 0 for n in rows))
        total = self.processes.total(sum(norm * count / n for norm, n in zip(own, rows, strict=True) if n))
        even = count / max(micro_batches, 1.0)
        pairs = round(micro_batches)
        self.noise_scale.add(spread_of([total] * pairs, [max(round(even), 1)] * pairs, whole))

    def _backward(self, chunk: "Chunk", piece: "_MicroBatch", divisor: float) -> torch.Tensor:
        """Forward and backward of the dense network over a micro-batch; its share of the batch's loss."""
        loss = self._loss(chunk, piece, divisor)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _loss(self, chunk: "Chunk", piece: "_MicroBatch", divisor: float) -> torch.Tensor:
        part = piece.rows
        with self.autocast():
            logits_m = self.net(piece.deep_mS, piece.wide_mW, chunk.batch.dense_BN[part])
        if chunk.batch.logit_shifts_B is not None:
            logits_m = logits_m.float() + chunk.batch.logit_shifts_B[part]
        batch = chunk.batch
        looks_m3 = None if batch.looks_B3 is None else batch.looks_B3[part]
        return weighted_log_loss_sum(logits_m, batch.labels_B[part], batch.weights_B[part], looks_m3) / divisor

    def _unscale(self, pieces: Sequence["_MicroBatch"]) -> None:
        """Divides the loss scale out of all gradients: the fused tables apply theirs at once, unscaled or not."""
        if self.precision != "fp16":
            return
        self._share_overflow(pieces)
        self.scaler.unscale_(self.optimizer)
        leaves = [leaf for piece in pieces for leaf in (piece.deep_mS, piece.wide_mW)]
        self.scaler.unscale_(torch.optim.SGD(leaves, lr=0.0))

    def _share_overflow(self, pieces: Sequence["_MicroBatch"]) -> None:
        """Lets gradients overflow in all processes where they did in any, so that the loss scale of all stays the same."""
        if self.processes.count == 1:
            return
        if self.processes.total(float(not self._gradients_are_finite(pieces))):
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.inf)

    def _gradients_are_finite(self, pieces: Sequence["_MicroBatch"]) -> bool:
        gradients = [leaf.grad for piece in pieces for leaf in (piece.deep_mS, piece.wide_mW) if leaf.grad is not None]
        gradients += [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        self.gradient_norm = float(torch.nn.utils.get_total_norm(gradients))
        return math.isfinite(self.gradient_norm)

    def _dense_step(self, rate: float, batch_scale: float = 1.0) -> None:
        if self.gradient_average is not None:
            smooth_gradients(self.parameters.items(), self.gradient_average)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        if self.weight_average is not None:
            self.weight_average.add(self.parameters, steps=batch_scale)
        self.sharing.stepped(self.steps, self._dense_state() if self.sharing.local else ())

    def _dense_state(self) -> list[torch.Tensor]:
        """Everything that the next dense step depends on, but for counts of steps, which are the same in all processes."""
        of_optimizer = [self.optimizer.state[parameter] for parameter in self.parameters.values()]
        moments = [held[name] for held in of_optimizer for name in sorted(held) if name != "step"]
        averages = [average.sums for average in (self.gradient_average, self.weight_average) if average is not None]
        state = [*self.parameters.values(), *moments, *(total for sums in averages for total in sums.values())]
        return [tensor for tensor in state if isinstance(tensor, torch.Tensor)]

    def _count(self, finite: bool, log_loss: float) -> None:
        overflow_only = not finite and self.precision == "fp16" and math.isfinite(log_loss)
        self.overflows_in_a_row = self.overflows_in_a_row + 1 if overflow_only else 0
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + (not overflow_only)
        if self.overflows_in_a_row > MAX_OVERFLOWS:
            raise LearningDiverged(
                f"gradients overflowed fp16 in {self.overflows_in_a_row} steps in a row, whatever the loss scale; nothing is "
                "published and the rows stay waiting. Use training.precision = 'bf16' or 'fp32'"
            )
        if self.skipped_in_a_row > self.config.max_skipped_steps:
            raise LearningDiverged(
                f"the loss was not finite in {self.skipped_in_a_row} steps in a row; nothing is published and the rows "
                "stay waiting. Lower training.dense_learning_rate or training.sparse_learning_rate, or bound the numeric "
                "features in the data set's TOML"
            )


def autocast(precision: Arithmetic, device: torch.device) -> AbstractContextManager[object]:
    """Inside, a network computes in this arithmetic."""
    match precision:
        case "fp32":
            return nullcontext()
        case "bf16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        case "fp16":
            return torch.autocast(device.type, dtype=torch.float16)


class Chunk:
    """Rows whose ids were looked up together, and the gradients that gather for them."""

    def __init__(self, batch: MiniBatch, pooled: Pooled) -> None:
        self.batch = batch
        self.pooled = pooled
        self._kept: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
        """Rows that were learned, in their order, with the gradients of their embeddings and wide weights."""
        self.learned_C = torch.zeros_like(batch.weights_B)
        """Weights of the examples that were learned; 0 for all others."""

    def keep_gradients(self, pieces: Sequence["_MicroBatch"], *, divisor: float, scale: float = 1.0) -> None:
        """Keeps those of one batch, whose rows come after those of the batches before.

        Those of wide weights are sums over rows, not means over the batch: what a weight has seen is then counted in rows,
        whatever the batches that they came in.
        """
        for piece in pieces:
            deep_mS, wide_mW = piece.deep_mS.grad, piece.wide_mW.grad
            assert deep_mS is not None
            assert wide_mW is not None
            if scale != 1.0:
                deep_mS = deep_mS * scale
            self.learned_C[piece.rows] = self.batch.weights_B[piece.rows]
            self._kept.append((piece.rows, deep_mS, wide_mW * divisor))

    def gradients(self, layout: TableLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """`[C, S]` and `[C, W]`: of what was looked up, 0 where nothing was learned.

        Those of histories go to the rows that carry them.
        """
        wide_CW = _filled([(rows, wide_mW) for rows, _, wide_mW in self._kept], self.pooled.wide_BW)
        carrier_C, plain = self.batch.history_row_B, layout.plain_width
        if carrier_C is None:
            return _filled([(rows, deep_mS) for rows, deep_mS, _ in self._kept], self.pooled.deep_BS), wide_CW
        plain_CP = _filled(
            [(rows, deep_mS[:, :plain]) for rows, deep_mS, _ in self._kept], self.pooled.deep_BS.detach()[:, :plain]
        )
        of_history_CH = self.pooled.deep_BS.new_zeros(len(carrier_C), self.pooled.deep_BS.shape[1] - plain)
        for rows, deep_mS, _ in self._kept:
            of_history_CH.index_add_(0, carrier_C[rows], deep_mS[:, plain:])
        return torch.cat([plain_CP, of_history_CH], dim=1), wide_CW

    def lookups(self, layout: TableLayout) -> tuple[Lookups, Lookups]:
        """What was looked up, with the gradients gathered for it."""
        batch = self.batch
        return lookups_of(layout, batch.deep, batch.wide, *self.gradients(layout), self.learned_C, batch.history_row_B)


def _filled(pieces: Sequence[tuple[slice, torch.Tensor]], like: torch.Tensor) -> torch.Tensor:
    """As many rows as `like`: those of the pieces, and zeros for the others; nothing is copied where one piece is all."""
    parts, end = list[torch.Tensor](), 0
    for rows, piece in pieces:
        parts += [like.new_zeros(rows.start - end, like.shape[1]), piece]
        end = rows.stop
    parts = [part for part in (*parts, like.new_zeros(len(like) - end, like.shape[1])) if len(part)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _MicroBatch:
    """The looked-up embeddings of some rows, cut off from the tables, so that gradients end here."""

    def __init__(self, chunk: Chunk, rows: slice, layout: TableLayout) -> None:
        self.rows = rows
        deep_mS = layout.with_history(chunk.pooled.deep_BS.detach(), chunk.batch.history_row_B, rows)
        self.deep_mS = deep_mS.detach().requires_grad_()
        self.wide_mW = chunk.pooled.wide_BW.detach()[rows].requires_grad_()
