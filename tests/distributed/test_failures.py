"""A process that is killed in mid-learn ends the update on all, with the reason; what it was to learn, the next one does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_schemas.errors import GroupFailed
from pipeline.config import load_config
from pipeline.publishing.checkpoint import current_version
from pipeline.ranks import Update, on_processes

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("by_hand.py")


def _peers() -> list[int]:
    """Processes that this one has started and that take part in updates."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent, command = int(status.read_text().rpartition(")")[2].split()[1]), status.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if parent == os.getpid() and b"pipeline.ranks:take_part" in command:
            found.append(int(status.parent.name))
    return found


def test_one_that_is_killed_is_named_and_the_next_update_goes_through(day: Any) -> None:
    alone = day.updated("one", 1)
    day.updated("many", 1, hours=1)
    config = load_config(overrides=day.overrides("many", "processes.count=3"))
    killed: list[int] = []

    def progress(done: int, rows: int) -> None:
        if done > rows / 3 and not killed:
            killed.append(max(_peers()))
            os.kill(killed[0], signal.SIGKILL)

    def work(update: Update) -> None:
        update(config, now=day.end, progress=progress)

    with pytest.raises(GroupFailed, match="was killed by SIGKILL") as failed:
        on_processes(config, work)
    (pid,), told = killed, str(failed.value)
    assert re.search(rf"of 3 processes that worked together, process [12] \(pid {pid}\)", told), told
    assert "rows that were not published wait" in told
    assert _peers() == []
    assert current_version(config.model_dir) == 1
    reports = day.updated("many", 2)
    day.assert_same(reports, alone[1:])
    day.assert_same_numbers("many", "one")


def test_one_that_is_killed_between_two_updates_is_named(day: Any) -> None:
    config = load_config(overrides=day.overrides("many", "processes.count=2"))

    def work(update: Update) -> None:
        update(config, now=day.end)
        os.kill(_peers()[0], signal.SIGKILL)
        time.sleep(0.5)
        update(config, now=day.end)

    with pytest.raises(GroupFailed, match=r"of 2 processes that worked together, process 1 .* was killed by SIGKILL"):
        on_processes(config, work)
    assert current_version(config.model_dir) == 1
    assert len(day.updated("many", 1)) == day.hours - 1


def test_one_process_may_begin_a_group_after_another(day: Any) -> None:
    """torchrec keeps, for as long as a process lives, what it agreed on with a group that is gone."""
    config = load_config(overrides=day.overrides("many", "processes.count=2"))
    for _ in range(day.hours):
        on_processes(config, lambda update: update(config, now=day.end))
    day.updated("one", 1)
    day.assert_same_numbers("many", "one")


def test_the_first_may_be_killed_too(day: Any, tmp_path: Path) -> None:
    asked = {"overrides": day.overrides("many", "processes.count=2"), "now": day.end.isoformat()}
    asked["die"] = {"rank": 0, "attempt": 0, "step": 3}
    done = subprocess.run([sys.executable, str(PROGRAM), json.dumps(asked)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    _wait(lambda: not _running("pipeline.ranks:take_part", str(day.folder)), 30)
    assert len(day.updated("many", 1)) == day.hours


def test_torchrun_starts_anew_inside_the_same_budget(day: Any) -> None:
    asked = {"overrides": day.overrides("many"), "now": day.end.isoformat()}
    asked["die"] = {"rank": 1, "attempt": 0, "step": 3}
    done = _torchrun(asked, "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-3000:]
    spent = [float(seconds) for seconds in re.findall(r"spent ([\d.]+) s before", done.stdout)]
    assert spent[0] == 0.0
    assert spent[1] > 0, "the attempt before counts"
    assert spent[2:] == [0.0] * day.hours, "the updates after it, and the look for one more, do not pay for it"
    assert len(re.findall("version", done.stdout)) == day.hours
    day.updated("one", 1)
    day.assert_same_numbers("many", "one")


def test_under_torchrun_the_one_that_was_killed_is_told(day: Any) -> None:
    asked = {"overrides": day.overrides("many"), "now": day.end.isoformat()}
    asked["die"] = {"rank": 1, "attempt": 0, "step": 3}
    done = _torchrun(asked)
    assert done.returncode != 0
    assert re.search(r"error of process 0: .*(process 1|the launcher ended the job)", done.stderr), done.stderr[-3000:]
    assert re.search(r"Signal 9 \(SIGKILL\)|exitcode +: -9", done.stderr)


def test_processes_with_other_settings_are_refused(day: Any) -> None:
    done = _torchrun({"overrides": day.overrides("many"), "now": day.end.isoformat(), "differ": True})
    assert done.returncode != 0
    assert "has training.seed = 1, and the first 0; start all with the same command line" in done.stderr, done.stderr[-3000:]
    assert done.stderr.count("error of process") == 1


def test_one_that_does_not_come_is_named(day: Any) -> None:
    """Two are announced, and one comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    asked = {"overrides": day.overrides("many", "processes.join_seconds=3"), "now": day.end.isoformat()}
    command = [sys.executable, str(PROGRAM), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | place | _path())
    assert done.returncode == 1
    told = rf"process 0 cannot reach the others at 127\.0\.0\.1:{port} .* within 3 s: .* 1/2 clients joined"
    assert re.search(told, done.stderr), done.stderr


def _torchrun(asked: dict[str, Any], *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    command += [str(PROGRAM), json.dumps(asked)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | _path())


def _path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _running(*words: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            return True
    return False


def _wait(until: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.2)
