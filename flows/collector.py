"""Python's collector of cyclic garbage, kept away from what lasts as long as the process.

Imports of torch, MLflow and Prefect make half a million objects, none of which is garbage. The collector looks them through
several times while they are made, and again when the process ends; together that is several seconds of an update of a few rows.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """For imports: the collector rests inside, and leaves alone for good what there is afterwards."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def end_quickly() -> None:
    """Lets the process end without a last collection: what it holds then goes with it."""
    atexit.register(gc.freeze)
