"""A process that leaves at once keeps its exit code, and what it has said."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("work", "code", "told"), [("lambda: 7", 7, ""), ("lambda: {}['lost']", 1, "KeyError: 'lost'")])
def test_a_process_that_leaves_does_what_was_registered_and_keeps_its_exit_code(work: str, code: int, told: str) -> None:
    """Whatever a thread does meanwhile."""
    text = f"""
import atexit, threading, time
from pipeline.leaving import run_and_leave

class Held:
    def __del__(self):
        print("taken apart")

held = Held()
atexit.register(print, "registered")
threading.Thread(target=time.sleep, args=(60,)).start()
print("said", end=" ")
run_and_leave({work})
"""
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (code, "said registered\n")
    assert ended.stderr.strip().endswith(told)
