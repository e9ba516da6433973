"""One process at a time in a model's folder.

    <model_dir>/lock            locked by the operating system, which lets go when the process ends, however it ends
    <model_dir>/lock-holder.json    who holds it, for people; the lock itself never depends on it

Enters: the folder. Leaves: the folder held, until the block or the process ends; or an error that says who holds it.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from data_schemas.errors import ConfigError, UpdateInProgress

POLL_SECONDS = 0.1
"""Between two tries while waiting."""
INTRODUCTION_SECONDS = 1.0
"""A process that has just got the lock may need so long to say who it is."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a model's lock."""

    pid: int
    host: str
    since: datetime
    """Aware."""
    purpose: str
    """What for, such as `update`."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC ({self.purpose})"

    @property
    def may_live(self) -> bool:
        """False where the process is known to have ended: of another host that cannot be told."""
        return self.host != socket.gethostname() or lives(self.pid)


def lives(pid: int) -> bool:
    """Whether a process of this machine has not ended; one that has, and whose parent has not asked how, does not live."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it is another user's
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True  # no such folder here, or it ends at this moment
    return state not in ("Z", "X")


@contextmanager
def alone(model_dir: Path, purpose: str, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Holds the model's lock; the kernel lets go of it when the process ends, however it ends.

    Args:
        model_dir: folder of the model; made if it is missing.
        purpose: what for, in a word or two; others are told.
        wait_seconds: for another process to let go, at most.

    Raises:
        UpdateInProgress: another process holds it; the message says which, since when and what for.
        ConfigError: the folder cannot be written, or is on a file system without locks.
    """
    lock = FileLock(model_dir / "lock", fallback_to_soft=False)  # the fallback would outlive a killed process
    _acquire(lock, model_dir, wait_seconds)
    try:
        _introduce(model_dir, purpose)
        yield
    finally:
        with suppress(OSError):
            _holder_path(model_dir).unlink(missing_ok=True)
        lock.release()


def holder_of(model_dir: Path, *, patience_seconds: float = INTRODUCTION_SECONDS) -> Holder | None:
    """Who says to hold the lock; None where nobody has said so, or the one who has is gone.

    Only worth asking where the lock is known to be held: the text of a killed process stays until the next one comes.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        holder = _read(_holder_path(model_dir))
        if holder and holder.may_live:
            return holder
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_SECONDS)


_HOLDER = TypeAdapter(Holder)


def _acquire(lock: FileLock, model_dir: Path, wait_seconds: float) -> None:
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait_seconds:
                raise
            log.warning("waiting up to %g s for the model in %s, held by %s", wait_seconds, model_dir, _who(model_dir))
            lock.acquire(timeout=wait_seconds, poll_interval=POLL_SECONDS)
    except Timeout as error:
        waited = f" after {wait_seconds:g} s of waiting" if wait_seconds else ""
        raise UpdateInProgress(
            f"the model in {model_dir} is held{waited} by {_who(model_dir)}; try again later, wait for it with --wait SECONDS, "
            "or use another model_name"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"the model's folder {model_dir} cannot be locked ({error.strerror or error}); choose a state_dir that can be "
            "written, on a file system that has locks"
        ) from error


def _who(model_dir: Path) -> str:
    return str(holder_of(model_dir) or "a process that has not said who it is")


def _introduce(model_dir: Path, purpose: str) -> None:
    """Says who holds the lock; where that cannot be written, the lock holds all the same."""
    holder = Holder(pid=os.getpid(), host=socket.gethostname(), since=datetime.now(UTC), purpose=purpose)
    path = _holder_path(model_dir)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(_HOLDER.dump_python(holder, mode="json")) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        log.warning("%s does not say who holds the lock: %s", path, error.strerror)


def _holder_path(model_dir: Path) -> Path:
    return model_dir / "lock-holder.json"


def _read(path: Path) -> Holder | None:
    try:
        return _HOLDER.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
