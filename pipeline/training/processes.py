"""The processes that train one model together, as torchrun starts them; one process is the common case.

Enters: the environment that a launcher sets. Leaves: `Processes`, with the few exchanges that an update needs: each is called
by all of them in the same order, and what it returns is the same in all.
"""

import hashlib
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # torch does not say that it exports it
from torch.distributed.rendezvous import rendezvous

from data_schemas.errors import ConfigError, GroupFailed, StoppedByFirst
from data_schemas.examples import I64
from pipeline.config import ProcessesConfig

T = TypeVar("T")
Scalar = TypeVar("Scalar", bound=np.generic)

Store = Any
"""A store of torch.distributed, which exports no type for it."""

MEETING_POLL_SECONDS = 0.02
"""Between two looks at who has come."""
TOLD = "the other processes were told, and stopped"
LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
"""In what torch says where another process is gone."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long processes wait for each other."""

    join_seconds: float
    """In which all must have come together."""
    stall_seconds: float
    """Inside an exchange, before the others are given up."""

    @classmethod
    def of(cls, config: ProcessesConfig, *, lock_wait_seconds: float) -> "Patience":
        """As the settings have it; in an exchange the others also wait while the first waits for the model's lock."""
        return cls(join_seconds=config.join_seconds, stall_seconds=config.stall_seconds + lock_wait_seconds)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among all."""

    rank: int = 0
    count: int = 1
    """World size."""

    @classmethod
    def started(cls) -> "Processes":
        """As torch.distributed was initialised; one process if it was not."""
        if not dist.is_initialized():
            return cls()
        return cls(rank=dist.get_rank(), count=dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the one that holds the lock, writes and publishes."""
        return self.rank == 0

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, in all; the others do not do it.

        Raises:
            StoppedByFirst: in the others, where it raised in the first, which raises that itself.
        """
        if self.count == 1:
            return work()
        if not self.is_first:
            told: list[Any] = [None, None]
            dist.broadcast_object_list(told, src=0)
            if told[1] is not None:
                raise StoppedByFirst(told[1])
            value: T = told[0]
            return value
        try:
            value = work()
        except Exception as error:
            dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=0)
            error.add_note(TOLD)
            raise
        dist.broadcast_object_list([value, None], src=0)
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def concatenated(self, own: torch.Tensor) -> torch.Tensor:
        """The contiguous tensors of all processes behind each other along their first axis; only their lengths may differ."""
        if self.count == 1:
            return own
        lengths = self.gather(len(own))
        whole = own.new_empty((sum(lengths), *own.shape[1:]))
        pieces = whole.split(lengths)
        pieces[self.rank].copy_(own)
        for rank, piece in enumerate(pieces):
            if piece.numel():
                dist.broadcast(piece, src=rank)
        return whole

    def concatenated_array(self, own: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """The same for arrays."""
        if self.count == 1:
            return own
        own = np.ascontiguousarray(own)
        signed = own.view(np.int64) if own.dtype == np.uint64 else own
        whole: npt.NDArray[Scalar] = self.concatenated(torch.from_numpy(signed)).numpy().view(own.dtype)
        return whole

    def require_equal(self, what: str, fingerprint: str) -> None:
        """Raises `GroupFailed` where the processes have come to differ in what each keeps a copy of."""
        found = self.gather(fingerprint)
        different = [rank for rank, other in enumerate(found) if other != found[0]]
        if different:
            raise GroupFailed(
                f"{what} of process {different[0]} differ from those of the first, and should be copies; nothing is saved, and "
                "the rows stay waiting. Train in one process, and report this as a defect"
            )

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds the gradients of all processes, in one exchange."""
        if self.count > 1:
            _add_up([parameter.grad for parameter in parameters if parameter.grad is not None])

    @torch.no_grad()
    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Puts the mean of all processes' tensors, of one type, in the place of each, in one exchange."""
        if self.count > 1:
            _add_up(tensors, divisor=self.count)

    def add_up(self, tensor: torch.Tensor) -> None:
        """Puts the sum of all processes' tensors in the place of this one."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def union(self, numbers: I64) -> I64:
        """The numbers that any process has, each once, rising; costs what they all have together."""
        return numbers if self.count == 1 else np.unique(self.concatenated_array(numbers))

    def wait(self) -> None:
        """Until all processes have come here."""
        self.total(0.0)

    def total(self, value: float) -> float:
        """The sum of `value` over all processes, the same on each."""
        if self.count == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(summed)
        return float(summed)


def _add_up(tensors: Sequence[torch.Tensor], divisor: int = 1) -> None:
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    pieces = (flat / divisor if divisor > 1 else flat).split([tensor.numel() for tensor in tensors])
    for tensor, total in zip(tensors, pieces, strict=True):
        tensor.copy_(total.view_as(tensor))


@contextmanager
def joined(patience: Patience, *, store: Store | None = None, rank: int = 0, count: int = 0) -> Iterator[Processes]:
    """This process among those of its group, until the end of the block.

    Args:
        patience: with the others.
        store: where they meet; None: where the environment says, and with the rank and the count that it says.
        rank: with a store.
        count: with a store.

    Raises:
        GroupFailed: the meeting place cannot be reached, or not all came there in time.
        ConfigError: there are more processes than GPUs on this machine.
    """
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # torchrec calls them
    if store is None:
        store, rank, count = _met(patience)
    store = _gathered(store, rank, count, patience)
    dist.init_process_group(
        _backend(), store=store, rank=rank, world_size=count, timeout=timedelta(seconds=patience.stall_seconds)
    )
    try:
        yield Processes.started()
        dist.barrier()  # without it, destroying the group aborts others that still read
    finally:
        dist.destroy_process_group()


def were_told(error: BaseException) -> bool:
    """Whether the first process raised it in what it did for all, so that the others have stopped as well."""
    return TOLD in getattr(error, "__notes__", ())


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone, or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)


def _met(patience: Patience) -> tuple[Store, int, int]:
    """Where the environment says: the store, this process's rank, and their number."""
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=timedelta(seconds=patience.join_seconds))))
        return store, rank, count
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise GroupFailed(
            f"process {os.environ.get('RANK', '?')} cannot reach the others at {where} (MASTER_ADDR and MASTER_PORT) within "
            f"{patience.join_seconds:g} s: {_first_line(error)}. Start the first process, let that port through, or start all "
            "with torchrun"
        ) from error


def _gathered(store: Store, rank: int, count: int, patience: Patience) -> Store:
    """Waits until all have come, and says who has not; the part of the store that is theirs alone.

    torchrun keeps its store when it starts processes anew, with the addresses of those that are gone. So each process leaves a
    word that nobody had before, the first one says which words it has read, and whose own is among them has come.
    """
    own, deadline, met = uuid.uuid4().hex, time.monotonic() + patience.join_seconds, ""
    store.set(f"tidemark/here/{rank}", own)
    while time.monotonic() < deadline:
        words = [_word(store, f"tidemark/here/{other}") for other in range(count)] if rank == 0 else []
        if words and all(words):
            store.set("tidemark/met", "/".join(words))
        met = _word(store, "tidemark/met")
        if own in met.split("/"):
            place = _place(met, store)
            place.set(f"come/{rank}", own)
            if place.check([f"come/{other}" for other in range(count)]):
                return place
        time.sleep(MEETING_POLL_SECONDS)
    absent = [other for other in range(count) if not store.check([f"tidemark/here/{other}"])]
    absent = absent or [other for other in range(count) if not _place(met, store).check([f"come/{other}"])]
    raise GroupFailed(
        f"of {count} processes {count - len(absent)} came together within {patience.join_seconds:g} s; missing: "
        f"{', '.join(map(str, absent))}. See what those wrote, or give them longer with processes.join_seconds"
    )


def _place(met: str, store: Store) -> Store:
    return PrefixStore(f"tidemark/{hashlib.sha256(met.encode()).hexdigest()}", store)


def _word(store: Store, key: str) -> str:
    """Empty where nobody has left one."""
    return str(store.get(key).decode()) if store.check([key]) else ""


def _backend() -> str:
    """Gloo for what is in main memory; NCCL as well, where there is a GPU for each process of this machine."""
    if not torch.cuda.is_available():
        return "gloo"
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if here > gpus:
        raise ConfigError(
            f"{here} processes on this machine, and {gpus} GPUs: each needs one of its own; use at most {gpus} a machine, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES=''"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return "cpu:gloo,cuda:nccl"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
