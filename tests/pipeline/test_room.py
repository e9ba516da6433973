"""Memory that is kept between steps, in a process of its own: it cannot be taken back."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from pipeline.training.room import keep_freed_memory

def step():
    return [np.ones(3 << 17) for _ in range(4)]

if sys.argv[1] == "keep":
    keep_freed_memory()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has the setting")
def test_what_a_step_frees_is_there_for_the_next() -> None:
    """Four blocks of 3 MB, 50 times: 768 pages a block, if each of them is faulted in anew, or 1 or 2 huge ones."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "give back")
    }
    assert faults["keep"] < 100
    assert faults["give back"] > 150
