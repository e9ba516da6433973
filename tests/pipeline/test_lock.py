"""The lock of a model's folder, between real processes: who holds it is told, and a killed process holds nothing."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_schemas.errors import ConfigError, UpdateInProgress
from pipeline.lock import alone, holder_of

ROOT = Path(__file__).parents[2]
HOLD = """
import subprocess, sys, time
from pathlib import Path
from pipeline.lock import alone

with alone(Path(sys.argv[1]), "night shift"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(float(sys.argv[2]))
"""

Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts a process that holds the lock of `tmp_path`, and returns once it does."""
    started: list[subprocess.Popen[str]] = []
    children: list[int] = []

    def start(seconds: float = 60) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        started.append(process)
        assert process.stdout
        children.append(int(process.stdout.readline()))
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()
    for child in children:
        os.kill(child, signal.SIGKILL)


def test_the_second_says_who_holds_it(tmp_path: Path, hold: Hold) -> None:
    process = hold()
    with pytest.raises(UpdateInProgress) as caught, alone(tmp_path, "update"):
        pass
    assert f"is held by process {process.pid} on {socket.gethostname()}, since 20" in str(caught.value)
    assert "(night shift); try again later, wait for it with --wait SECONDS" in str(caught.value)
    assert caught.value.exit_code == 75


def test_a_killed_holder_holds_nothing_though_a_child_of_it_lives(tmp_path: Path, hold: Hold) -> None:
    process = hold()
    process.kill()
    process.wait()
    assert (tmp_path / "lock-holder.json").is_file(), "its text stays"
    with alone(tmp_path, "update"):
        holder = holder_of(tmp_path)
        assert holder
        assert (holder.pid, holder.purpose) == (os.getpid(), "update")
    assert not (tmp_path / "lock-holder.json").exists()


def test_the_text_of_a_killed_holder_does_not_name_it_for_the_next_one(
    tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = hold()
    process.kill()
    process.wait()
    monkeypatch.setattr("pipeline.lock._introduce", lambda *told: None)  # as though it had got no further
    with alone(tmp_path, "update"), pytest.raises(UpdateInProgress) as caught, alone(tmp_path, "rollback"):
        pass
    assert str(process.pid) not in str(caught.value)
    assert "a process that has not said who it is" in str(caught.value)


def test_a_holder_that_comes_to_say_who_it_is_a_moment_later_is_named(tmp_path: Path) -> None:
    text = f'{{"pid": {os.getpid()}, "host": "{socket.gethostname()}", "since": "2026-01-01T00:00:00Z", "purpose": "update"}}'
    later = threading.Timer(0.3, lambda: (tmp_path / "lock-holder.json").write_text(text))
    later.start()
    holder = holder_of(tmp_path, patience_seconds=30)
    later.join()
    assert str(holder) == f"process {os.getpid()} on {socket.gethostname()}, since 2026-01-01 00:00:00 UTC (update)"


def test_one_that_is_asked_to_wait_goes_on_when_the_first_is_done(tmp_path: Path, hold: Hold) -> None:
    process = hold(1.0)
    with alone(tmp_path, "update", wait_seconds=60):
        assert process.wait(timeout=60) == 0


def test_one_that_is_asked_to_wait_goes_on_when_the_first_is_killed(tmp_path: Path, hold: Hold) -> None:
    process = hold()
    killer = threading.Timer(0.5, process.kill)
    killer.start()
    started = time.monotonic()
    with alone(tmp_path, "update", wait_seconds=60):
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert time.monotonic() - started < 50
    killer.join()


def test_waiting_ends_too(tmp_path: Path, hold: Hold) -> None:
    hold()
    with (
        pytest.raises(UpdateInProgress, match=r"is held after 0\.2 s of waiting by process"),
        alone(tmp_path, "update", wait_seconds=0.2),
    ):
        pass


def test_what_goes_wrong_inside_lets_go_and_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone(tmp_path, "update"):
        _ = 1 / 0
    with alone(tmp_path, "update"):
        pass


@pytest.mark.parametrize("text", ["", "{", '{"pid": "x"}', "\0" * 100])
def test_nonsense_beside_the_lock_changes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock-holder.json").write_text(text)
    assert holder_of(tmp_path, patience_seconds=0) is None
    with alone(tmp_path, "update"):
        assert holder_of(tmp_path)


def test_a_folder_that_cannot_be_locked_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be locked .*choose a state_dir"), alone(tmp_path / "file", "update"):
        pass
