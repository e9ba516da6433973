"""How near does a step come to what this machine's memory and arithmetic allow?

In:  nothing; the click log of `throughput.py` is generated in a temporary folder.
Out: the machine's limits as measured, then a line a part: operations, bytes, time, and the share of the limit that it reaches.

    python benchmarks/roofline.py [--model deepfm] [--batch 4096] [--precision bf16] [--repetitions 9] [--threads 0]

A part cannot be faster than its operations at the rate of a large matrix multiplication in its arithmetic, nor than its bytes
at the rate of copying a large array: its limit is the larger of the two. Operations are those of matrix multiplications, as
torch counts them; everything else that a network does counts as none. Bytes are the least that have to move, were nothing
kept in a cache from one part to the next: columns of the Parquet file and as decoded; ids in and out; looked-up rows and what
is pooled of them; each distinct row and its accumulator read and written once in the sparse step; weights, gradients and two
moments in Adam's. The whole is a pass of `learn` with reading and encoding, all overhead counted; its limit is the sum of the
parts' limits.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from throughput import FEATURES, FILE_ROWS, HIDDEN, Ours, wait_for, write_click_log
from torch.utils.flop_counter import FlopCounterMode

from data_schemas.examples import Examples
from models.memory import Memory
from pipeline.data.encode import EncodedWindow, encode
from pipeline.data.lake import RowRange
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.model_state import default_device
from pipeline.training.learner import Chunk, Learner, _MicroBatch

T = TypeVar("T")

WANTED = 0.6
"""Share of the limit, of the whole."""
COPIED_BYTES = 256 * 2**20
MATRIX = 2048
FILES = 4
F32_BYTES, ID_BYTES = 4, 8
WIDE_ROW_BYTES = {"cpu": 8, "cuda": 20}
"""A wide weight and its sum of squares; in fused tables three columns of zeros stand beside the weight."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of the machine."""

    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """Of the way of one batch."""

    name: str
    operations: float
    bytes: float
    seconds: float

    def limit(self, of: Limits) -> float:
        """Seconds that it cannot be faster than."""
        return max(self.operations / of.operations_per_second, self.bytes / of.bytes_per_second)


def main() -> None:
    options = _command_line()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = default_device()
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    bandwidth = _bytes_per_second(device, options.repetitions)
    rates = {kind: _operations_per_second(kind, device, options.repetitions) for kind in (torch.float32, torch.bfloat16)}
    print(
        f"{torch.get_num_threads()} threads for tensors, device {device}: memory {bandwidth / 1e9:.1f} GB/s, matrices", end=" "
    )
    print(", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {str(kind).removeprefix('torch.')}" for kind, rate in rates.items()))
    limits = Limits(bytes_per_second=bandwidth, operations_per_second=rates[dtype])
    with tempfile.TemporaryDirectory() as folder:
        log, spec, files = write_click_log(Path(folder), 16)
        settings = [f"training.precision={options.precision}"]
        ours = Ours(log, spec, options.model, options.batch, hidden=HIDDEN, settings=settings)
        ranges = [RowRange.whole(file) for file in log.files()[:FILES]]
        rows, scale = FILES * FILE_ROWS, options.batch / (FILES * FILE_ROWS)
        read_seconds, table = _median(lambda: log.read(ranges, columns_to_read(spec)), options.repetitions, device)
        encode_seconds, (_, window) = _median(lambda: _encoded(table, ours), options.repetitions, device)
        file_bytes = sum((log.root / each.file.path).stat().st_size for each in ranges)
        parts = [
            Part(name="read and verify", operations=0, bytes=(file_bytes + table.nbytes) * scale, seconds=read_seconds * scale),
            Part(
                name="hash, table rows",
                operations=0,
                bytes=(3 * ID_BYTES + window.single_RK.itemsize) * FEATURES * options.batch,
                seconds=encode_seconds * scale,
            ),
            *_of_step(ours.learner, window, options, device),
        ]
        whole, _ = _median(lambda: ours.learn(files[:FILES]), options.repetitions, device)
    _show(parts, whole * scale, limits, f"{options.model}, {options.precision}, a batch of {options.batch:,}: {ours.title}")
    print(f"rows/s of the whole way: {rows / whole:,.0f}", file=sys.stderr)


def _command_line() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", default="deepfm", choices=("deepfm", "dcnv2", "dlrm"))
    cli.add_argument("--batch", type=int, default=4096)
    cli.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    cli.add_argument("--repetitions", type=int, default=9)
    cli.add_argument("--threads", type=int, default=0, help="for tensors; 0 for torch's own choice")
    return cli.parse_args()


def _encoded(table: pa.Table, ours: Ours) -> tuple[Examples, EncodedWindow]:
    examples = to_examples(table, ours.spec)
    return examples, encode(examples, ours.spec, Memory(ours.spec), None, hour=0)


def _of_step(learner: Learner, window: EncodedWindow, options: argparse.Namespace, device: torch.device) -> Sequence[Part]:
    """The parts of steps that learn the same batch again and again."""
    batch, names = window.minibatch(np.arange(options.batch)), ("lookup", "forward", "backward", "sparse", "optimizer")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.repetitions + 1):
        for name, taken in zip(names, _timed_step(learner, window, options.batch, device), strict=True):
            seconds[name].append(taken)
    took = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    forward, backward = _operations(learner, learner.look_up(batch))
    dims = learner.model.layout.deep_dims
    pooled = options.batch * (sum(dims) + FEATURES) * F32_BYTES
    distinct = sum(len(np.unique(window.single_RK[: options.batch, column])) for column in range(FEATURES))
    row_bytes = dims[0] * F32_BYTES + F32_BYTES + WIDE_ROW_BYTES[device.type]
    weights = sum(parameter.numel() for parameter in learner.parameters.values()) * F32_BYTES
    ids = 2 * options.batch * FEATURES * ID_BYTES
    seen = options.batch * (sum(dims) + FEATURES) * F32_BYTES
    return (
        Part(name="lookup", operations=0, bytes=ids + 2 * pooled, seconds=took["lookup"]),
        Part(name="dense forward", operations=forward, bytes=seen + weights, seconds=took["forward"]),
        Part(name="dense backward", operations=backward, bytes=2 * seen + 2 * weights, seconds=took["backward"]),
        Part(name="sparse backward", operations=0, bytes=ids + pooled + 2 * distinct * row_bytes, seconds=took["sparse"]),
        Part(name="optimizer", operations=0, bytes=7 * weights, seconds=took["optimizer"]),
    )


def _timed_step(learner: Learner, window: EncodedWindow, batch: int, device: torch.device) -> tuple[float, ...]:
    """Seconds of looking up, forward, backward, the sparse step and the dense one."""
    minibatch, clock = window.minibatch(np.arange(batch)), _Clock(device)
    chunk = learner.look_up(minibatch)
    lookup, forward, backward, pieces = clock.lap(), 0.0, 0.0, []
    learner.optimizer.zero_grad()
    for piece in learner._micro_batches(chunk, slice(0, batch)):
        loss = learner._loss(chunk, piece, float(batch))
        forward += clock.lap()
        loss.backward()  # type: ignore[no-untyped-call]
        backward += clock.lap()
        pieces.append(piece)
    chunk.keep_gradients(pieces, divisor=float(batch))
    clock.lap()
    learner.finish(chunk)
    sparse = clock.lap()
    learner._dense_step(1e-4)
    return lookup, forward, backward, sparse, clock.lap()


def _operations(learner: Learner, chunk: Chunk) -> tuple[float, float]:
    """Of matrix multiplications, forward and backward."""
    whole = slice(0, chunk.batch.num_rows)
    piece = _MicroBatch(chunk, whole, learner.model.layout)
    with FlopCounterMode(display=False) as forward:
        loss = learner._loss(chunk, piece, 1.0)
    with FlopCounterMode(display=False) as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    learner.optimizer.zero_grad()
    return float(forward.get_total_flops()), float(backward.get_total_flops())


class _Clock:
    """Waits for the device before it is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.lap_from = 0.0
        self.lap()

    def lap(self) -> float:
        """Seconds since the last one."""
        wait_for(self._device)
        before, self.lap_from = self.lap_from, time.perf_counter()
        return self.lap_from - before


def _median(work: Callable[[], T], repetitions: int, device: torch.device) -> tuple[float, T]:
    """Seconds, and what it gave last; the first time warms up."""
    clock, seconds, result = _Clock(device), list[float](), work()
    for _ in range(repetitions):
        clock.lap()
        result = work()
        seconds.append(clock.lap())
    return statistics.median(seconds), result


def _bytes_per_second(device: torch.device, repetitions: int) -> float:
    """Read and written by a copy that no cache holds."""
    source, target = (torch.zeros(COPIED_BYTES // F32_BYTES, device=device) for _ in range(2))
    seconds, _ = _median(lambda: target.copy_(source), repetitions, device)
    return 2 * COPIED_BYTES / seconds


def _operations_per_second(dtype: torch.dtype, device: torch.device, repetitions: int) -> float:
    """Of a large square matrix multiplication; a multiplication and an addition are two."""
    size = MATRIX if device.type == "cpu" else 4 * MATRIX
    matrix = torch.randn(size, size, device=device).to(dtype)
    seconds, _ = _median(lambda: matrix @ matrix, repetitions, device)
    return 2.0 * size**3 / seconds


def _show(parts: Sequence[Part], whole: float, limits: Limits, title: str) -> None:
    table = Table(title=title)
    for name in ("", "GFLOP", "MB", "ms", "limit, ms", "bound by", "share of the limit"):
        table.add_column(name, justify="right" if name else "left")
    for part in parts:
        limit = part.limit(limits)
        by = "arithmetic" if part.operations / limits.operations_per_second == limit else "memory"
        figures = (f"{part.operations / 1e9:.2f}", f"{part.bytes / 1e6:.1f}", f"{1e3 * part.seconds:.2f}", f"{1e3 * limit:.2f}")
        table.add_row(part.name, *figures, by, f"{limit / part.seconds:.0%}")
    limit = sum(part.limit(limits) for part in parts)
    rest = whole - sum(part.seconds for part in parts)
    table.add_row("cut batches, all else", "", "", f"{1e3 * rest:.2f}", "", "", "")
    table.add_row("whole", "", "", f"{1e3 * whole:.2f}", f"{1e3 * limit:.2f}", "", f"{limit / whole:.0%}")
    Console(width=120).print(table)
    print(f"the whole reaches {limit / whole:.0%}, wanted {WANTED:.0%}: {'reached' if limit / whole >= WANTED else 'missed'}")


if __name__ == "__main__":
    main()
