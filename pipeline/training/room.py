"""Room in memory: how much there is, and what is said where it does not suffice.

Enters: a device, a forward pass, or an error. Leaves: bytes that are free, or kept; whether it tells of memory; an
`OutOfMemory` with the way out. And one setting of a process that learns: it keeps what a step frees for the next one.
"""

from __future__ import annotations  # torch, which takes seconds to import, is named in a signature alone

import ctypes
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from data_schemas.errors import OutOfMemory

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

KEPT_BLOCK_BYTES = 1 << 25
"""The most that glibc allows: larger blocks go back to the system when they are freed."""
KEPT_BYTES = 1 << 30
"""Free at the end of malloc's heap, above which it gives some back."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
LACKING = ("out of memory", "DefaultCPUAllocator", "allocate memory")
"""In what torch says: of a GPU in an error of its own, of the CPU in a plain RuntimeError."""


def free_bytes(device: torch.device) -> int:
    """That can still be taken: of the GPU; or of main memory and swap, within what this container may use."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if glibc := _glibc():
        glibc.malloc_trim(0)  # what this process keeps free is free
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    free = 1024 * (kilobytes["MemAvailable"] + kilobytes["SwapFree"])
    left = _left_in_container()
    return free if left is None else min(free, left)


def keep_freed_memory() -> None:
    """Lets this process keep what a step frees for the next one, from here on: glibc would give it back to the system, and to
    have its pages zeroed anew takes up to a tenth of a step. Where there is no glibc, nothing changes."""
    glibc = _glibc()
    if glibc is None:
        return
    kept = glibc.mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES) and glibc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    log.debug("malloc %s what a step frees", "keeps" if kept else "would not keep")


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def tells_of_memory(error: BaseException) -> bool:
    """Whether it was raised because memory did not suffice, of a GPU or of the machine."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in LACKING))


def kept_bytes(forward: Callable[[], object], *, without: set[int]) -> int:
    """Bytes of the different storages that autograd keeps of `forward` for a backward pass.

    Args:
        without: addresses of storages that are not counted.
    """
    import torch

    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in without:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in kept.values())


@contextmanager
def memory_explained(what: str, num_rows: int) -> Iterator[None]:
    """Says what to do where memory does not suffice.

    Raises:
        OutOfMemory: in the place of what tells of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not tells_of_memory(error):
            raise
        raise OutOfMemory(advice(f"{what} {num_rows:,} rows", str(error) or type(error).__name__)) from error


def advice(what: str, reason: str) -> str:
    """What did not fit, why, and the way out."""
    return (
        f"{what} does not fit into memory ({reason.splitlines()[0]}); nothing is published and the rows stay waiting. Lower "
        "training.batch_size, max_batch_size or sparse_step_rows, or capacity or embedding_dim of the data set's features, or "
        "stop what else uses the memory"
    )


def _left_in_container() -> int | None:
    """By the limit of version 2 control groups; None where there is none."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        given_back = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(given_back.get("inactive_file", 0))
