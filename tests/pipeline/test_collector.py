"""The collector rests while modules are imported, and does not look through all that lasts when the process ends."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from pipeline.collector import nothing_collected


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


class Ring:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.own = self


@pytest.mark.parametrize("enabled", [True, False])
def test_it_rests_inside_and_is_afterwards_as_before(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with nothing_collected():
        assert not gc.isenabled()
        kept = Ring()
    assert gc.isenabled() == enabled
    assert gc.get_freeze_count() > 0
    lasting, later = weakref.ref(kept), Ring()
    garbage = weakref.ref(later)
    del kept, later
    gc.collect()
    assert lasting() is not None, "what was there is left alone"
    assert garbage() is None, "what came later is not"


def test_it_works_again_after_an_import_that_failed() -> None:
    with pytest.raises(ImportError), nothing_collected():
        raise ImportError
    assert gc.isenabled()


def test_a_process_ends_without_a_last_collection_but_with_what_was_registered() -> None:
    code = """
import atexit, sys
from pipeline.collector import end_quickly

class Ring:
    def __init__(self):
        self.own = self
    def __del__(self):
        print("collected")

ring = Ring()
if sys.argv[1] == "quickly":
    end_quickly()
atexit.register(lambda: print("registered"))
sys.exit(3)
"""
    for how, printed in (("quickly", ["registered"]), ("as usual", ["registered", "collected"])):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=False)
        assert done.returncode == 3, done.stderr
        assert done.stdout.split() == printed
