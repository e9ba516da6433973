"""Memory that is kept between steps, in a process of its own: it cannot be taken back."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from pipeline.training.room import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    for _ in range(4):
        np.ones(1 << 19)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    held = [np.ones(1 << 19) for _ in range(4)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc gives memory back at a threshold")
def test_what_a_step_frees_is_there_for_the_next() -> None:
    """Four blocks of 4 MB, 50 times: a thousand pages a block, if each of them is faulted in anew."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "give back")
    }
    assert faults["keep"] < 5_000 < faults["give back"]
