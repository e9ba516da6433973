"""Which arithmetic, and micro-batches of how many rows, the dense network is fastest in, on this machine and for this net.

Enters: a net and the settings. Leaves: `Chosen`, which the model keeps, so that a replay gives the same bits.

bf16 halves the memory traffic but is slower for small networks on some processors; small micro-batches stay in a processor's
cache and large ones keep a GPU busy. So both are measured, not assumed.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from models.ctr import DenseNet
from pipeline.config import MICRO_BATCH_SIZES, TrainingConfig
from pipeline.training.learner import Arithmetic, autocast
from pipeline.training.room import free_bytes, kept_bytes, tells_of_memory

ROUNDS = 5
WORTH_GROWING = 0.03
"""Share of the seconds a row by which a larger micro-batch has to be faster than the smallest that is as fast as any."""
MEMORY_SHARE = 0.25
"""Of the memory that is free, which what a micro-batch keeps for its backward pass may take."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """For the steps of a new model."""

    precision: Arithmetic
    micro_batch_size: int
    notes: tuple[str, ...] = ()
    """What was chosen from, where there was a choice of sizes."""


def choose_arithmetic(
    config: TrainingConfig,
    net: DenseNet,
    *,
    deep_width: int,
    wide_width: int,
    num_dense: int,
    device: torch.device,
    num_processes: int = 1,
    free: Callable[[torch.device], int] = free_bytes,
) -> Chosen:
    """What is asked for, or where that is `auto` the fastest by interleaved medians of forward and backward, a row.

    fp16 is never chosen by itself: it needs loss scaling, and gains nothing over bf16 where both are supported. Of sizes that
    are about as fast the smallest is taken.

    Args:
        config: settings.
        net: of the model.
        deep_width: of its embeddings.
        wide_width: of its wide weights.
        num_dense: columns.
        device: it is on.
        num_processes: that share a batch.
        free: bytes of memory.
    """
    probe = _Probe(net, deep_width=deep_width, wide_width=wide_width, num_dense=num_dense, device=device)
    precisions: Sequence[Arithmetic] = ("fp32", "bf16") if config.precision == "auto" else (config.precision,)
    sizes = _sizes(config, num_processes)
    if len(sizes) > 1:
        fits = MEMORY_SHARE * free(device) / probe.bytes_a_row(sizes[0])
        sizes = sizes[:1] + [size for size in sizes[1:] if size <= fits]
    every = [(precision, size) for precision in precisions for size in sizes]
    if len(every) == 1:
        return Chosen(precision=precisions[0], micro_batch_size=sizes[0])
    seconds = _medians([lambda choice=choice: probe.seconds_a_row(*choice) for choice in every])  # type: ignore[misc]
    fastest = every[seconds.index(min(seconds))][0]
    of_size = {size: took for (precision, size), took in zip(every, seconds, strict=True) if precision == fastest}
    size = min(size for size, took in of_size.items() if took <= (1 + WORTH_GROWING) * min(of_size.values()))
    return Chosen(precision=fastest, micro_batch_size=size, notes=_notes(of_size, fastest, size))


def _sizes(config: TrainingConfig, num_processes: int) -> list[int]:
    """Micro-batches to choose from, rising: none is larger than the smallest batch of a process, but for the first."""
    if config.micro_batch_size != "auto":
        return [config.micro_batch_size]
    batch = config.smallest_batch // num_processes
    larger = [size for size in MICRO_BATCH_SIZES[1:] if size <= batch]
    if config.batch_policy != "fixed" or config.compile_dense_network:
        larger = [size for size in larger if batch % size == 0]
    return [config.micro_batch, *larger]


def _medians(works: Sequence[Callable[[], float]]) -> list[float]:
    """Of what each gives, in turns; the first turn warms up."""
    rounds = [[work() for work in works] for _ in range(ROUNDS + 1)][1:]
    return [statistics.median(took) for took in zip(*rounds, strict=True)]


def _notes(of_size: dict[int, float], precision: Arithmetic, chosen: int) -> tuple[str, ...]:
    if len(of_size) == 1:
        return ()
    tried = ", ".join(f"{1e6 * took:.1f} us a row in {size:,}" for size, took in of_size.items())
    return (f"micro-batches of {chosen:,} rows in {precision} were chosen: {tried}",)


class _Probe:
    """Forward and backward passes of a net over zeros."""

    def __init__(self, net: DenseNet, *, deep_width: int, wide_width: int, num_dense: int, device: torch.device) -> None:
        self._net = net
        self._widths = (deep_width, wide_width, num_dense)
        self._device = device

    def seconds_a_row(self, precision: Arithmetic, rows: int) -> float:
        """Of one pass; infinite where it does not fit into memory."""
        started = time.perf_counter()
        try:
            self._pass(precision, rows)
        except (RuntimeError, MemoryError) as error:
            if not tells_of_memory(error):
                raise
            return float("inf")
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / rows

    def bytes_a_row(self, rows: int) -> float:
        """That a pass in fp32 keeps between forward and backward, beside the weights."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._net.parameters()}
        return max(kept_bytes(lambda: self._logits("fp32", rows), without=weights) / rows, 4.0 * sum(self._widths))

    def _pass(self, precision: Arithmetic, rows: int) -> None:
        self._logits(precision, rows).sum().backward()
        self._net.zero_grad()

    def _logits(self, precision: Arithmetic, rows: int) -> torch.Tensor:
        deep_BS, wide_BW, dense_BN = (torch.zeros(rows, width, device=self._device) for width in self._widths)
        with autocast(precision, self._device):
            logits_B: torch.Tensor = self._net(deep_BS.requires_grad_(), wide_BW, dense_BN)
        return logits_B
