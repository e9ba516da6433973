"""Processes that work together on this machine, started from Python; `torchrun` starts them the same way on many machines.

Enters: a function by its name, and how many processes call it at once. Leaves: what each returned; or a `GroupFailed` that
names the process that failed first, and why.

The environment of a process is that of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR ...), so that a process cannot
tell who started it.
"""

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not say that it exports it

from data_schemas.errors import ConfigError, GroupFailed, TidemarkError
from pipeline.config import ProcessesConfig
from pipeline.leaving import run_and_leave
from pipeline.training.processes import Patience, Store, is_lost, joined

log = logging.getLogger(__name__)

PATIENCE = Patience.of(ProcessesConfig(), lock_wait_seconds=0.0)
POLL_SECONDS = 0.05
"""Between two looks at the processes."""
ENDING_SECONDS = 5.0
"""That a process which is asked to end may still take."""
AFTER_FIRST_SECONDS = 2.0
"""After one process has failed: others, which lost it, may know a better reason, or fail themselves."""
TAIL_CHARACTERS = 2000
"""Of what a process wrote, in a message."""


def run_together(
    work: str, count: int, arguments: Mapping[str, Any] | None = None, *, patience: Patience = PATIENCE
) -> list[Any]:
    """Calls a function in `count` fresh processes, which are one torch.distributed group as long as it runs.

    Args:
        work: `module:function`; importable in a fresh interpreter, with this one's `sys.path`.
        count: at least 1.
        arguments: by name, the same for each; what JSON can carry.
        patience: of each with the others.

    Returns:
        What each returned, in the order of their ranks; what JSON can carry.

    Raises:
        ConfigError: `count` is below 1.
        GroupFailed: a process was killed, or raised; the others are ended.
    """
    if count < 1:
        raise ConfigError(f"processes.count must be at least 1, got {count}")
    with started(work, range(count), count, meeting_place(), arguments or {}, patience) as processes:
        return processes.results()


def meeting_place() -> Store:
    """A place on this machine where processes find each other, as long as it is kept; its port was free."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def started(
    work: str, ranks: range, count: int, place: Store, arguments: Mapping[str, Any], patience: Patience
) -> Iterator["StartedProcesses"]:
    """Processes of these ranks among `count`, which call `work`; at the end of the block those that still run are ended."""
    with TemporaryDirectory(prefix="tidemark-") as temporary:
        folder = Path(temporary)
        words = [work, temporary, json.dumps(arguments), json.dumps(asdict(patience))]
        running: list[_Process] = []
        processes = StartedProcesses(running, count)
        try:
            for rank in ranks:
                running.append(_Process(rank, _start(words, _environment(rank, count, place), folder), folder))
            yield processes
        finally:
            processes.end()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a process ended."""

    rank: int
    pid: int
    signal: str = ""
    """Name of the signal that ended it."""
    error: str = ""
    """What it raised, in one line."""
    lost_another: bool = False
    """It failed because another did."""

    def __str__(self) -> str:
        how = f"was killed by {self.signal}" if self.signal else f"failed: {self.error}"
        return f"process {self.rank} (pid {self.pid}) {how}"


class StartedProcesses:
    """Processes that this one has started."""

    def __init__(self, processes: list["_Process"], count: int) -> None:
        self._processes = processes
        self._count = count

    def results(self) -> list[Any]:
        """What each returned, once all have.

        Raises:
            GroupFailed: one failed.
        """
        while any(process.runs for process in self._processes):
            self.require_whole()
            time.sleep(POLL_SECONDS)
        self.require_whole()
        return [process.result() for process in self._processes]

    def require_whole(self) -> None:
        """Raises `GroupFailed` where a process has failed, once it is clear which was the first."""
        if any(process.failure() for process in self._processes):
            self._wait(AFTER_FIRST_SECONDS)
            raise GroupFailed(self.reason() or "")

    def reason(self, wait_seconds: float = 0.0) -> str | None:
        """Which process failed first and why, and the way out; None where none did in so many seconds."""
        deadline = time.monotonic() + wait_seconds
        while not (failures := [failure for process in self._processes if (failure := process.failure())]):
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_SECONDS)
        first = min(failures, key=lambda failure: (failure.lost_another, not failure.signal, failure.rank))
        memory = "; the system kills the largest process when memory runs out" if first.signal == "SIGKILL" else ""
        return f"of {self._count} processes that worked together, {first}{memory}"

    def end(self) -> None:
        """Ends those that still run."""
        for process in self._processes:
            process.ask_to_end(signal.SIGTERM)
        self._wait(ENDING_SECONDS)
        for process in self._processes:
            process.ask_to_end(signal.SIGKILL)
        self._wait(ENDING_SECONDS)

    def wait(self) -> None:
        """Until all have ended by themselves, for a while."""
        self._wait(ENDING_SECONDS)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(process.runs for process in self._processes) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


class _Process:
    """One of them, and what it leaves in `folder`."""

    def __init__(self, rank: int, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        self.rank = rank
        self._process = process
        self._folder = folder

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def failure(self) -> Failure | None:
        code = self._process.poll()
        if code is None or code == 0:
            return None
        made = {"rank": self.rank, "pid": self._process.pid}
        if code < 0:
            return Failure(**made, signal=signal.Signals(-code).name)  # type: ignore[arg-type]
        told = _outcome(self._folder, self.rank)
        if told is None:
            written = (self._folder / f"written-{self.rank}").read_text(errors="replace").strip()
            last = written[-TAIL_CHARACTERS:] or "it wrote nothing"
            return Failure(**made, error=f"exit code {code}: {last}")  # type: ignore[arg-type]
        return Failure(**made, error=told["error"], lost_another=told["lost_another"])  # type: ignore[arg-type]

    def result(self) -> Any:
        told = _outcome(self._folder, self.rank)
        assert told is not None, "a process that ends well has told its result"
        return told["result"]

    def ask_to_end(self, how: signal.Signals) -> None:
        if self.runs:
            self._process.send_signal(how)


def threads_of_each(count: int) -> int:
    """Of `count` processes that share this machine's processor cores, as torch is told."""
    return int(os.environ.get("OMP_NUM_THREADS", max((os.cpu_count() or 1) // count, 1)))


def _environment(rank: int, count: int, place: Store) -> dict[str, str]:
    own = {
        "RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": place.host,
        "MASTER_PORT": place.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": threads_of_each(count),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return os.environ | {name: str(value) for name, value in own.items()}


def _start(words: Sequence[str], environment: Mapping[str, str], folder: Path) -> "subprocess.Popen[bytes]":
    with (folder / f"written-{environment['RANK']}").open("wb") as written:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.launch", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
        )


def _outcome(folder: Path, rank: int) -> dict[str, Any] | None:
    """What a process told before it ended."""
    path = folder / f"outcome-{rank}.json"
    return json.loads(path.read_bytes()) if path.is_file() else None


def _called(work: str) -> Callable[..., Any]:
    module, _, name = work.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _main(work: str, folder: Path, arguments: Mapping[str, Any], patience: Patience) -> int:
    """One of the processes: does its part, tells how it ended, and returns the exit code."""
    rank, outcome, code = int(os.environ["RANK"]), dict[str, Any](), 0
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        with joined(patience):
            outcome = {"result": _called(work)(**arguments)}
    except Exception as error:
        log.exception("process %d failed", rank)
        name = "" if isinstance(error, TidemarkError) else f"{type(error).__name__}: "
        outcome = {"error": f"{name}{error}".strip(), "lost_another": isinstance(error, GroupFailed) or is_lost(error)}
        code = 1
    staged = folder / f"outcome-{rank}.tmp"
    staged.write_text(json.dumps(outcome))
    staged.replace(folder / f"outcome-{rank}.json")
    return code


if __name__ == "__main__":
    run_and_leave(lambda: _main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), Patience(**json.loads(sys.argv[4]))))
