"""What half precision costs and gains: fp32, bf16 and fp16, with and without a scaled loss, against the batch size.

Enters: generated clicks and the model of the pipeline. Leaves: CPU time of a row, memory held for the backward pass and
held-out AUC in each arithmetic; and the share of a batch's gradients that fp16 rounds to zero.

The loss is a mean over b rows, so the gradient of a row's activations goes with 1 / b: the larger the batch, the more of it
falls below 2^-25, where fp16 becomes zero. A scaled loss lifts it (Micikevicius et al. 2018, *Mixed Precision Training*); bf16
has the exponents of fp32 and needs none.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, legend, look, name_axes, tick_sizes
from pipeline.lab.problems import Clicks, clicks, held_out_auc, log_loss, new_learner, small_net
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.learner import Arithmetic, Learner
from pipeline.training.room import kept_bytes

DTYPES: Mapping[Arithmetic, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 65536.0
"""That torch starts with."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to calculate."""

    name: str
    precision: Arithmetic
    scales_loss: bool = False


ARMS = (
    Arm(name="fp32", precision="fp32"),
    Arm(name="bf16", precision="bf16"),
    Arm(name="fp16, loss scaled", precision="fp16", scales_loss=True),
    Arm(name="fp16, loss not scaled", precision="fp16"),
)


def run(
    *,
    batch_sizes: tuple[int, ...] = (64, 512, 4096, 32768),
    training_batch: int = 512,
    num_rows: int = 16_384,
    rounds: int = 3,
    seeds: int = 2,
) -> Finding:
    """Half precision is faster, needs half the memory and costs no accuracy; fp16 needs a scaled loss.

    Args:
        batch_sizes: for the share of gradients that fp16 loses.
        training_batch: rows of a batch of the pipeline's model.
        num_rows: that it learns.
        rounds: of timings.
        seeds: of its first weights and of the order of rows.
    """
    data = clicks(num_rows)
    lost = {
        scale: [lost_share(row_gradients(data, batch_size=batch), DTYPES["fp16"], scale) for batch in batch_sizes]
        for scale in (1.0, LOSS_SCALE)
    }
    lost_bf16 = [lost_share(row_gradients(data, batch_size=batch), DTYPES["bf16"], 1.0) for batch in batch_sizes]
    aucs = {arm.name: [trained_auc(data, arm, batch=training_batch, seed=seed) for seed in range(seeds)] for arm in ARMS}
    learners = {arm.name: learner_of(arm, batch=training_batch) for arm in ARMS}
    memory = {name: saved_bytes(own, data, rows=training_batch) / training_batch for name, own in learners.items()}
    seconds = row_seconds(learners, data, batch=training_batch, rounds=rounds)
    figure, (upper, lower) = canvas(2)
    for number, (name, share) in enumerate(
        {"fp16": lost[1.0], f"fp16, loss x {LOSS_SCALE:g}": lost[LOSS_SCALE], "bf16": lost_bf16}.items()
    ):
        upper.plot(batch_sizes, [100 * value for value in share], **look(number), label=name)
    tick_sizes(upper, batch_sizes)
    name_axes(upper, "Gradients that round to zero", "batch size (rows)", "% of those that are not zero")
    legend(upper)
    names = [arm.name for arm in ARMS]
    micros = [1e6 * seconds[name] for name in names]
    lower.barh(range(len(names)), micros, color="#56B4E9", edgecolor="#0072B2")
    for place, name in enumerate(names):
        lower.annotate(f"AUC {np.mean(aucs[name]):.4f}", (0, place), xytext=(6, 0), textcoords="offset points", va="center")
    lower.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    lower.invert_yaxis()
    lower.grid(axis="y", visible=False)
    name_axes(lower, "The pipeline's model", "CPU microseconds a row", "")
    return Finding(
        name="mixed_precision",
        question="What does half precision gain, and what does it cost?",
        sentence=sentence(seconds, memory, aucs, batch_sizes, lost[1.0], lost[LOSS_SCALE]),
        columns=(
            "arithmetic",
            "CPU microseconds a row",
            "bytes a row kept",
            "held-out AUC",
            *_lost_columns(batch_sizes),
        ),
        rows=tuple(
            (arm.name, 1e6 * seconds[arm.name], memory[arm.name], float(np.mean(aucs[arm.name])), *_lost(arm, lost, lost_bf16))
            for arm in ARMS
        ),
        figure=figure,
        metrics={
            "speed_bf16": seconds["fp32"] / seconds["bf16"],
            "memory_bf16": memory["bf16"] / memory["fp32"],
            "lost_unscaled_largest": lost[1.0][-1],
            "lost_scaled_largest": lost[LOSS_SCALE][-1],
            "auc_bf16_less_fp32": float(np.mean(aucs["bf16"]) - np.mean(aucs["fp32"])),
        },
    )


def row_gradients(data: Clicks, *, batch_size: int, hidden: int = 64, seed: int = 0) -> torch.Tensor:
    """The gradients of the activations of a small network's hidden layer, for the mean loss of one batch, in fp32; those that
    are zero are upper out. Batches beyond the rows of `data` take rows several times."""
    net = small_net(data.features_RD.shape[1], hidden=(hidden, hidden), seed=seed)
    rows = torch.arange(batch_size) % len(data.learned)
    hidden_BH = net[:2](data.features_RD[rows]).detach().requires_grad_()
    log_loss(net[2:], hidden_BH, data.labels_R[rows]).backward()
    assert hidden_BH.grad is not None
    gradients: torch.Tensor = hidden_BH.grad[hidden_BH.grad != 0]
    return gradients


def lost_share(gradients: torch.Tensor, dtype: torch.dtype, scale: float) -> float:
    """Share of gradients, none of them zero, that are zero in `dtype` after `scale`.

    >>> lost_share(torch.tensor([1.0, 1e-9]), torch.float16, 1.0), lost_share(torch.tensor([1.0, 1e-9]), torch.float16, 1000.0)
    (0.5, 0.0)
    """
    return float(((gradients * scale).to(dtype) == 0).float().mean())


def trained_auc(data: Clicks, arm: Arm, *, batch: int, seed: int) -> float:
    """Of the pipeline's model after one pass."""
    learner = learner_of(arm, batch=batch, seed=seed)
    _learn(learner, data, rows=len(data.learned), batch=batch, seed=seed)
    return held_out_auc(learner, data)


def learner_of(arm: Arm, *, batch: int, seed: int = 0) -> Learner:
    """The pipeline's model in this arithmetic; its micro-batch is the batch."""
    fixed = [f"training.batch_size={batch}", f"training.micro_batch_size={batch}", "training.max_skipped_steps=1000"]
    learner = new_learner([*fixed, f"training.precision={arm.precision}"], seed=seed)
    if not arm.scales_loss:
        learner.scaler = torch.amp.GradScaler(learner.device.type, enabled=False)
    return learner


def row_seconds(learners: Mapping[str, Learner], data: Clicks, *, batch: int, rounds: int) -> dict[str, float]:
    """CPU seconds of a row in each arithmetic: medians over interleaved rounds, after one that warms up."""
    rows = min(len(data.learned), 4 * batch)
    taken: dict[str, list[float]] = {name: [] for name in learners}
    for number in range(rounds + 1):
        for name, learner in learners.items():
            seconds = _timed(lambda learner=learner: _learn(learner, data, rows=rows, batch=batch, seed=0))  # type: ignore[misc]
            if number:
                taken[name].append(seconds / rows)
    return {name: statistics.median(found) for name, found in taken.items()}


def saved_bytes(learner: Learner, data: Clicks, *, rows: int) -> int:
    """Of the activations that one forward pass of the dense network keeps for its backward pass; weights are not counted."""
    chunk = learner.look_up(data.window.minibatch(data.learned[:rows]))
    deep_BS, wide_BW = chunk.pooled.deep_BS.detach().requires_grad_(), chunk.pooled.wide_BW.detach().requires_grad_()
    weights = {parameter.untyped_storage().data_ptr() for parameter in learner.model.net.parameters()}
    with learner.autocast():
        return kept_bytes(lambda: learner.model.net(deep_BS, wide_BW, chunk.batch.dense_BN), without=weights)


def sentence(
    seconds: Mapping[str, float],
    memory: Mapping[str, float],
    aucs: Mapping[str, Sequence[float]],
    batch_sizes: Sequence[int],
    lost: Sequence[float],
    lost_scaled: Sequence[float],
) -> str:
    """The answer.

    Args:
        lost: share of the gradients that fp16 rounds to zero, at each of `batch_sizes`.
        lost_scaled: the same with a scaled loss.
    """
    speed = seconds["fp32"] / seconds["bf16"]
    change = float(np.mean(aucs["bf16"]) - np.mean(aucs["fp32"]))
    unscaled = float(np.mean(aucs["fp16, loss not scaled"]) - np.mean(aucs["fp32"]))
    faster = f"{speed:.2f} times as fast as fp32" if speed >= 1 else f"slower than fp32 here ({speed:.2f} times its speed)"
    return (
        f"bf16 is {faster}, keeps {memory['bf16'] / memory['fp32']:.0%} of the bytes for the backward pass and changes AUC by "
        f"{change:+.5f}. fp16 is {seconds['fp32'] / seconds['fp16, loss scaled']:.2f} times as fast as fp32 and rounds "
        f"{lost[0]:.2%} of the gradients to zero at batch {batch_sizes[0]} and {lost[-1]:.1%} at "
        f"{batch_sizes[-1]}, with a scaled loss {lost_scaled[-1]:.1%}; without it AUC changes by {unscaled:+.5f} here."
    )


def _learn(learner: Learner, data: Clicks, *, rows: int, batch: int, seed: int) -> None:
    kept_R = np.arange(data.window.num_rows) < rows
    policy = FixedBatch(batch_size=batch, learning_rate=learner.config.dense_learning_rate)
    learn(learner, data.window, seed=[seed], policy=policy, kept_R=kept_R)


def _timed(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _lost_columns(batch_sizes: Sequence[int]) -> list[str]:
    return [f"gradients lost at {size}" for size in batch_sizes]


def _lost(arm: Arm, lost: Mapping[float, Sequence[float]], lost_bf16: Sequence[float]) -> Sequence[float | None]:
    match arm.precision:
        case "fp32":
            return [0.0] * len(lost_bf16)
        case "bf16":
            return lost_bf16
        case "fp16":
            return lost[LOSS_SCALE if arm.scales_loss else 1.0]


if __name__ == "__main__":
    main_of(run)
