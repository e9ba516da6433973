"""The step: one sparse update and one dense update a batch, whatever the number of micro-batches.

    look up once -> dense network over micro-batches, gradients of the embeddings collected -> sparse backward -> dense step

fbgemm's tables apply their optimizer inside backward, so a backward through them for each micro-batch would step sparse
rows several times and dense weights once. Here the tables see one backward a batch: accumulation is exact for both.

Letters: B rows of the batch in this process, m of a micro-batch, S the sum of embedding lengths, F features, N dense columns.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from data_schemas.errors import LearningDiverged
from data_schemas.minibatch import MiniBatch
from models.ctr import CtrModel
from models.embeddings import Pooled
from models.loss import weighted_log_loss_sum
from pipeline.config import TrainingConfig
from pipeline.training.optimizers import dense_optimizer, warmed_up
from pipeline.training.processes import Processes
from pipeline.training.smoothing import MovingAverage, smooth_gradients

Arithmetic = Literal["fp32", "bf16", "fp16"]


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
        self.steps = 0
        """Steps since the model was new."""
        self.skipped_in_a_row = 0
        self.parameters = dict(model.net.named_parameters())
        self.optimizer = dense_optimizer(self.parameters.values(), config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.gradient_average = MovingAverage(self.parameters, config.gradient_ema) if config.gradient_ema else None
        self.weight_average = MovingAverage(self.parameters, config.weight_ema) if config.weight_ema else None

    def step(self, batch: MiniBatch, *, divisor: float, learning_rate: float) -> StepResult:
        """Learns a batch.

        Args:
            batch: this process's rows; padded rows have weight 0.
            divisor: rows of the whole batch, over all processes, times the window's mean weight.
            learning_rate: of the dense optimizer, before warm-up.

        Raises:
            LearningDiverged: more than `training.max_skipped_steps` steps in a row were not finite.
        """
        batch = batch.to(self.device)
        pooled = self.model.tables(batch.sparse)
        leaves = _Leaves(pooled)
        self.optimizer.zero_grad()
        loss_sum = self._accumulate(leaves, batch, divisor)
        self._unscale(leaves)
        self.processes.sum_gradients(list(self.parameters.values()))
        log_loss = self.processes.total(float(loss_sum))
        finite = self.processes.total(float(not (math.isfinite(log_loss) and self._gradients_are_finite(leaves)))) == 0
        rate = warmed_up(learning_rate, self.steps, self.config.warmup_steps)
        if finite:
            torch.autograd.backward([pooled.deep_BS, pooled.wide_BF], [leaves.deep_gradient, leaves.wide_gradient])
            self._dense_step(rate)
        if self.precision == "fp16":
            self.scaler.update()
        self._count(finite, log_loss)
        return StepResult(log_loss=log_loss, learned=finite, learning_rate=rate)

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of the dense network."""
        match self.precision:
            case "fp32":
                return nullcontext()
            case "bf16":
                return torch.autocast(self.device.type, dtype=torch.bfloat16)
            case "fp16":
                return torch.autocast(self.device.type, dtype=torch.float16)

    def dense_weights(self, *, averaged: bool) -> dict[str, torch.Tensor]:
        """The dense weights; their moving average where there is one and it is asked for."""
        if averaged and self.weight_average is not None and self.weight_average.steps:
            return self.weight_average.averages()
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def _accumulate(self, leaves: "_Leaves", batch: MiniBatch, divisor: float) -> torch.Tensor:
        """Forward and backward of the dense network, micro-batch by micro-batch; the loss over this process's rows."""
        total = torch.zeros((), device=self.device)
        size = min(self.config.micro_batch_size, batch.num_rows)
        for start in range(0, batch.num_rows, size):
            part = slice(start, start + size)
            with self.autocast():
                logits_m = self.model.net(leaves.deep_BS[part], leaves.wide_BF[part], batch.dense_BN[part])
            loss = weighted_log_loss_sum(logits_m, batch.labels_B[part], batch.weights_B[part]) / divisor
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _unscale(self, leaves: "_Leaves") -> None:
        """Divides the loss scale out of all gradients: the fused tables apply theirs at once, unscaled or not."""
        if self.precision != "fp16":
            return
        self.scaler.unscale_(self.optimizer)
        self.scaler.unscale_(torch.optim.SGD([leaves.deep_BS, leaves.wide_BF], lr=0.0))

    def _gradients_are_finite(self, leaves: "_Leaves") -> bool:
        gradients = [leaves.deep_gradient, leaves.wide_gradient]
        gradients += [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def _dense_step(self, rate: float) -> None:
        if self.gradient_average is not None:
            smooth_gradients(self.parameters.items(), self.gradient_average)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        if self.weight_average is not None:
            self.weight_average.add(self.parameters)

    def _count(self, finite: bool, log_loss: float) -> None:
        overflow_only = self.precision == "fp16" and math.isfinite(log_loss)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + (not overflow_only)
        if self.skipped_in_a_row > self.config.max_skipped_steps:
            raise LearningDiverged(
                f"the loss was not finite in {self.skipped_in_a_row} steps in a row; nothing is published and the rows "
                "stay waiting. Lower training.dense_learning_rate or training.sparse_learning_rate, or bound the numeric "
                "features in the data set's TOML"
            )


class _Leaves:
    """The looked-up embeddings, cut off from the tables, where the gradients of all micro-batches gather."""

    def __init__(self, pooled: Pooled) -> None:
        self.deep_BS = pooled.deep_BS.detach().requires_grad_()
        self.wide_BF = pooled.wide_BF.detach().requires_grad_()

    @property
    def deep_gradient(self) -> torch.Tensor:
        assert self.deep_BS.grad is not None
        return self.deep_BS.grad

    @property
    def wide_gradient(self) -> torch.Tensor:
        assert self.wide_BF.grad is not None
        return self.wide_BF.grad
