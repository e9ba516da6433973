"""What the processes of these tests do; they import it by name."""

import os
import signal

import numpy as np

from pipeline.training.processes import Processes


def exchange(first: int) -> list[object]:
    """One of every exchange."""
    processes = Processes.started()
    rank = processes.rank
    rows = processes.concatenated(np.arange(rank * 2, dtype=np.uint64) + first)
    matrix = processes.concatenated(np.full((rank, 2), rank, np.float32))
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
