"""A disk that is full at any write, and one that cannot be written: an error that says so, and the day goes on once it can."""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROWS_PER_HOUR = 600


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system of `size` bytes at `folder`; yields what changes its options.

    Skips where this user may not mount one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(
            f"a small file system cannot be mounted here ({mounted.stderr.strip()}); run as root, or in a user namespace"
        )
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True) and None
    finally:
        subprocess.run(["umount", folder], check=True)


def _used(folder: Path) -> int:
    usage = os.statvfs(folder)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize


def _fill(machine: Any, tell: Callable[[str], None], sizes: int) -> None:
    expected, _ = machine.first_day(tracked=False, rows_per_hour=ROWS_PER_HOUR)
    state, stages, otherwise = machine.root / "day" / "state", Counter[str](), 0
    machine.new_day()
    with _disk(state, 1 << 30):
        machine.ask("live", tracked=False)
        needed = _used(state)
    for size in np.linspace(16 << 10, needed, sizes).astype(int).tolist():
        machine.new_day()
        with _disk(state, size) as remount:
            answer = machine.ask("live", tracked=False, may_fail=True)
            if answer["ended"] == "failed":
                stages[answer["stage"]] += 1
                assert answer["result"]["named"], answer["result"]["error"]
            remount(f"size={1 << 30}")
            machine.ask("live", tracked=False)
            otherwise += machine.ask("inspect", tracked=False)["result"] != expected
    found = ", ".join(f"{name} {count}" for name, count in stages.most_common())
    tell(f"{stages.total()} of {sizes} disks of up to {needed >> 10} KiB full, in {found}; {otherwise} days ended otherwise")
    assert otherwise == 0
    assert stages.total() > sizes / 2


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write(machine: Any, tell: Callable[[str], None]) -> None:
    _fill(machine, tell, 12)


def test_a_state_folder_that_cannot_be_written_is_named_and_nothing_is_lost(machine: Any) -> None:
    expected, _ = machine.first_day(tracked=False, rows_per_hour=ROWS_PER_HOUR)
    machine.new_day()
    with _disk(machine.root / "day" / "state", 1 << 30) as remount:
        for seconds in (0.15, 0.5):
            machine.ask("live", tracked=False, kill_after=seconds)
            remount("ro")
            answer = machine.ask("live", tracked=False, may_fail=True)
            assert answer["ended"] == "failed"
            assert answer["result"]["named"]
            assert re.search("Read-only file system|cannot write to", answer["result"]["error"])
            remount("rw")
        machine.ask("live", tracked=False)
        assert machine.ask("inspect", tracked=False)["result"] == expected
