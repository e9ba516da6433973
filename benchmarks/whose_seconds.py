"""Runs a command of ours and tells whose code its seconds went to, by looking at the main thread every few milliseconds.

In:  a file for the answer, then the command: a Python file and its arguments. Out: JSON, a list of [whose, part, seconds, CPU
     seconds of the main thread]; the seconds add up to the time from the start of the process (in the environment variable
     STARTED, by time.time) to the command's end.

Imports nothing but the standard library, so that every import of the command's is seen. A second belongs to what is being
imported, if an import is under way; else to the innermost of our own code, Prefect and MLflow: what torch, pyarrow or sqlite
do belongs to who called them. Waiting for Prefect's server is Prefect's.
"""

import json
import os
import runpy
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

INTERVAL_SECONDS = 0.005
ROOT = Path(__file__).resolve().parents[1]
OURS = ("data_schemas", "sampling", "models", "pipeline", "flows")
HOSTS = ("prefect", "mlflow")
"""Libraries that run code, their own and ours, and are not merely called for an answer."""

Owner = tuple[str, str]
"""Whose, and which part."""


def main() -> None:
    target, *command = sys.argv[1:]
    watch = _Watch(threading.main_thread())
    watch.charge(("python", "start"), time.time() - float(os.environ["STARTED"]), time.thread_time())
    over = threading.Event()
    watcher = threading.Thread(target=watch.until, args=(over,))
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    watcher.start()
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        over.set()
        watcher.join()
        Path(target).write_text(json.dumps([[*owner, watch.wall[owner], watch.cpu[owner]] for owner in watch.wall]))


class _Watch:
    """Charges the seconds of a thread to owners."""

    def __init__(self, thread: threading.Thread) -> None:
        assert thread.ident is not None
        self._thread, self._cpu_clock = thread.ident, time.pthread_getcpuclockid(thread.ident)
        self.wall: Counter[Owner] = Counter()
        self.cpu: Counter[Owner] = Counter()

    def charge(self, owner: Owner, wall: float, cpu: float) -> None:
        self.wall[owner] += wall
        self.cpu[owner] += cpu

    def until(self, over: threading.Event) -> None:
        """What has passed since the last look belongs to whom this look finds at work."""
        wall, cpu = time.perf_counter(), time.clock_gettime(self._cpu_clock)
        while not over.wait(INTERVAL_SECONDS):
            owner = _owner(sys._current_frames().get(self._thread))
            now_wall, now_cpu = time.perf_counter(), time.clock_gettime(self._cpu_clock)
            self.charge(owner, now_wall - wall, now_cpu - cpu)
            wall, cpu = now_wall, now_cpu


def _owner(frame: FrameType | None) -> Owner:
    whose, stage = "", ""
    while frame is not None:
        name, package = frame.f_code.co_name, _package(frame.f_code.co_filename)
        if name == "_find_and_load" and whose != "ours":
            imported = str(frame.f_locals["name"]).partition(".")[0]
            return ("ours", "import") if imported in OURS else (imported, "import")
        if package in HOSTS and not whose:
            whose = package
        if package == "ours" and name != "<module>":
            whose = whose or "ours"
            if name in ("run", "run_as_task") and "work" in frame.f_locals:
                stage = str(frame.f_locals["name"])
        frame = frame.f_back
    return (whose or "ours", stage or "other")


def _package(filename: str) -> str:
    path = Path(filename)
    if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
        return "ours" if path.relative_to(ROOT).parts[0] in OURS else ""
    parts = path.parts
    return parts[parts.index("site-packages") + 1].removesuffix(".py") if "site-packages" in parts else ""


if __name__ == "__main__":
    main()
