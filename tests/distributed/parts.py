"""What the processes of these tests do; they import it by name."""

import os
import signal
from datetime import datetime
from typing import Any

import numpy as np
import torch

from pipeline.config import load_config
from pipeline.publishing.report import as_plain
from pipeline.training.learner import Learner
from pipeline.training.processes import Processes
from pipeline.update import run_update


def exchange(first: int) -> list[object]:
    """One of every exchange."""
    processes = Processes.started()
    rank = processes.rank
    rows = processes.concatenated_array(np.arange(rank * 2, dtype=np.uint64) + first)
    matrix = processes.concatenated_array(np.full((rank, 2), rank, np.float32))
    return [
        processes.total(rank + 1.0),
        processes.gather(rank),
        processes.from_first(lambda: [rank, "first"]),
        rows.tolist(),
        matrix.tolist(),
    ]


def lose(rank: int, how: str) -> None:
    """One process ends, while the others wait for it."""
    processes = Processes.started()
    processes.wait()
    if processes.rank == rank:
        match how:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raises":
                raise ValueError("this one cannot go on")
    for _ in range(10):
        processes.wait()


def first_fails() -> None:
    """The first process fails in what it does alone."""

    def fail() -> None:
        raise KeyError("no such thing")

    Processes.started().from_first(fail)


def update_all(overrides: list[str], now: str) -> list[dict[str, object]]:
    """Learns every window that waits; what the first process reports."""
    config, reports = load_config(overrides=overrides), []
    while found := Processes.started().gather(run_update(config, now=datetime.fromisoformat(now)))[0]:
        reports.append(as_plain(found))
    return reports


def update_with_little_memory(poor_rank: int, most_rows: int, overrides: list[str], now: str) -> list[dict[str, object]]:
    """`update_all`, where one process has memory for micro-batches of so many rows only."""
    backward = Learner._backward

    def poor(self: Learner, chunk: Any, piece: Any, divisor: float) -> torch.Tensor:
        if piece.rows.stop - piece.rows.start > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, chunk, piece, divisor)

    if Processes.started().rank == poor_rank:
        Learner._backward = poor  # type: ignore[method-assign]
    return update_all(overrides, now)
