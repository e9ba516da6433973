"""Updates on many processes: the first leads, with everything that a person sees; the others take part and are silent.

    one command: flows/hourly_update.py --processes 4        starts three more processes, which follow this one
    torchrun --nproc-per-node 4 flows/hourly_update.py       is started four times; the one with RANK 0 leads

Enters: settings, and what to do with the function that updates. Leaves: what came of it in the first process; or one error that
names the process that failed, in time.
"""

import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_schemas.errors import ConfigError, GroupFailed, StoppedByFirst, TidemarkError
from pipeline.config import UpdateConfig, spec_of
from pipeline.launch import StartedProcesses, meeting_place, started, threads_of_each
from pipeline.lock import lives
from pipeline.outcome import UpdateReport
from pipeline.training.processes import Patience, Processes, is_lost, joined, were_told
from pipeline.training.threads import torch_threads
from pipeline.update import run_update

T = TypeVar("T")
Update = Callable[..., UpdateReport | None]
"""`run_update`, on all processes."""

log = logging.getLogger(__name__)

IDLE = timedelta(days=30)
"""That others wait for the next update: while the first ingests, publishes, or tells."""
REASON_SECONDS = 10.0
"""That it may take to see which process was lost."""
WAY_OUT = (
    "the model that serves is whole, rows that were not published wait as before, and the next update learns them: run it again"
)
STARTED = "started.json"
"""In the model's folder: when an update under torchrun began, for an attempt that torchrun starts anew."""


def on_processes(config: UpdateConfig, work: Callable[[Update], T]) -> T | None:
    """Does `work` in the first process; None in the others, once it is done there.

    Args:
        config: of every update; `processes.count` is how many there are, unless torchrun has started this one among others.
        work: called with the function to call in place of `run_update`, as often as it likes.

    Raises:
        GroupFailed: a process was lost, or they did not come together; the message says which, why and the way out.
        ConfigError: not all of them have the same settings, code and data set.
    """
    assert not dist.is_initialized(), "inside a group, call the function that work was given, or run_update in every process"
    patience = Patience.of(config.processes, lock_wait_seconds=config.lock_wait_seconds)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with joined(patience) as processes:
            _require_same(config, processes)
            neighbours = _Neighbours(processes)
            group = _Group(processes, neighbours)
            if processes.is_first:
                with _told_to_end(neighbours):
                    return group.lead(work)
            group.follow(config)
            return None
    count = config.processes.count
    if count == 1:
        return work(run_update)
    place, settings = meeting_place(), config.model_dump(mode="json", exclude={"alerts"})
    with (
        started("pipeline.ranks:take_part", range(1, count), count, place, {"settings": settings}, patience) as peers,
        torch_threads(threads_of_each(count)),
        _ended_with(peers),
        joined(patience, store=place, rank=0, count=count) as processes,
    ):
        _require_same(config, processes)
        return _Group(processes, peers).lead(work)


def take_part(settings: Mapping[str, Any]) -> None:
    """What a process does that the first one has started."""
    config, processes = UpdateConfig(**settings), Processes.started()
    _require_same(config, processes)
    _Group(processes, None).follow(config)


class _Group:
    """The processes, and the words between the first and the others while no update runs."""

    def __init__(self, processes: Processes, others: "StartedProcesses | _Neighbours | None") -> None:
        self._processes = processes
        self._others = others
        self._idle = dist.new_group(backend="gloo", timeout=IDLE)
        self._listen = True
        """Whether the others wait for a word."""

    def lead(self, work: Callable[[Update], T]) -> T:
        """Does `work`, and lets the others go."""
        try:
            result = work(self._update)
            self._let_go()
        except Exception as error:
            if self._listen or were_told(error):
                self._let_go()
            elif not isinstance(error, TidemarkError):
                self._blame(error)
            raise
        return result

    def follow(self, config: UpdateConfig) -> None:
        """Takes part in each update, until the first process lets go, or fails in what it does alone."""
        logging.getLogger("pipeline").setLevel(logging.CRITICAL)  # the first one says the same
        try:
            while self._say("") == "update":
                try:
                    run_update(config)
                except StoppedByFirst:
                    self._say("")
                    break
            dist.barrier()
        except RuntimeError as error:
            self._blame(error)
            raise

    def _update(self, config: UpdateConfig, **more: Any) -> UpdateReport | None:
        self._listen = False
        self._say("update")
        report = run_update(config, spent_seconds=_begin_attempt(config), **more)
        self._listen = True
        _end_attempt(config)
        return report

    def _let_go(self) -> None:
        self._listen = False
        self._say("end")
        dist.barrier()

    def _say(self, word: str) -> str:
        said = [word]
        dist.broadcast_object_list(said, src=0, group=self._idle)
        return said[0]

    def _blame(self, error: Exception) -> None:
        """Raises the reason, where another process was the cause."""
        reason = self._others.reason(REASON_SECONDS if is_lost(error) else 1.0) if self._others else None
        if reason is None and not is_lost(error):
            return
        raise GroupFailed(f"{reason or f'another process is gone ({str(error).splitlines()[0]})'}; {WAY_OUT}") from error


class _Neighbours:
    """Processes that torchrun has started: of those on this machine it can be seen whether they live."""

    def __init__(self, processes: Processes) -> None:
        self._places = processes.gather((socket.gethostname(), os.getpid()))

    def reason(self, wait_seconds: float) -> str | None:
        """Which of them are gone; None where none is, as far as can be seen."""
        deadline, host = time.monotonic() + wait_seconds, socket.gethostname()
        while True:
            gone = [f"process {rank} (pid {p})" for rank, (on, p) in enumerate(self._places) if on == host and not lives(p)]
            if gone:
                return f"of {len(self._places)} processes {', '.join(gone)} ended; torchrun says how"
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)


@contextmanager
def _ended_with(peers: StartedProcesses) -> Iterator[None]:
    """Says what became of the others where they were lost before they came together, and lets them end in the end."""
    try:
        yield
    except GroupFailed as error:
        reason = peers.reason()
        if reason is None or reason in str(error):
            raise
        raise GroupFailed(f"{reason}; {WAY_OUT}") from error
    peers.wait()


@contextmanager
def _told_to_end(neighbours: _Neighbours) -> Iterator[None]:
    """Under torchrun: when another process fails, it ends this one; that becomes an error with a reason."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # there is time to tell: torchrun waits for 30 s
        reason = neighbours.reason(0.0) or "the launcher ended the job, as it does when a process fails or the time is up"
        raise GroupFailed(f"{reason}; {WAY_OUT}")

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def _begin_attempt(config: UpdateConfig) -> float:
    """Seconds that attempts before this one, of the same torchrun, have spent on the update."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job is None:
        return 0.0
    path = config.model_dir / STARTED
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and path.is_file():
        try:
            note = json.loads(path.read_bytes())
            if note["job"] == job:
                return max(time.time() - float(note["at"]), 0.0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s does not say when the update began, which starts with a whole budget: %s", path, error)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps({"job": job, "at": time.time()}))
    staged.replace(path)
    return 0.0


def _end_attempt(config: UpdateConfig) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        (config.model_dir / STARTED).unlink(missing_ok=True)


def _require_same(config: UpdateConfig, processes: Processes) -> None:
    """Raises `ConfigError` in all processes where one differs from the first."""
    own = dict(_flat(config.model_dump(mode="json", exclude={"alerts": True, "processes": {"count"}})))
    own |= {
        "the data set's declaration": spec_of(config).fingerprint(),
        "the code": _code(),
        "torch": torch.__version__,
    }
    places = processes.gather((socket.gethostname(), own))
    (_, first), others = places[0], places[1:]
    for rank, (host, other) in enumerate(others, start=1):
        for name in first.keys() | other.keys():
            if first.get(name) != other.get(name):
                kind = ConfigError if processes.is_first else StoppedByFirst
                raise kind(
                    f"process {rank} on {host} has {name} = {other.get(name)!r}, and the first {first.get(name)!r}; start all "
                    "with the same command line, settings file, environment and code"
                )
    _require_shared(config, processes)


def _require_shared(config: UpdateConfig, processes: Processes) -> None:
    """Raises `ConfigError` in all processes where one does not see the model's folder of the first."""
    token = config.model_dir / processes.from_first(lambda: _leave_token(config.model_dir))
    sees, deadline = token.is_file(), time.monotonic() + config.processes.join_seconds / 2
    while not sees and time.monotonic() < deadline:  # a network file system may take a while to show it
        time.sleep(0.2)
        sees = token.is_file()
    blind = [(rank, host) for rank, (host, sees) in enumerate(processes.gather((socket.gethostname(), sees))) if not sees]
    if processes.is_first:
        token.unlink()
    for rank, host in blind:
        kind = ConfigError if processes.is_first else StoppedByFirst
        raise kind(
            f"process {rank} on {host} does not see what the first writes into {config.model_dir}; give all of them one "
            "state_dir on a file system that they share"
        )


def _leave_token(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"shared-{os.getpid()}-{time.time_ns()}"
    (folder / name).touch()
    return name


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _code() -> str:
    """16 hex digits over the project's own source."""
    root, found = Path(__file__).parents[1], hashlib.sha256()
    packages = ("data_schemas", "sampling", "models", "pipeline")
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()[:16]
