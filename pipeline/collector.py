"""Python's collector of cyclic garbage, kept away from what lasts as long as the process.

Imports of torch, MLflow and Prefect make half a million objects that last. The collector looks them through several times while
they are made, and again when the process ends; together that is seconds of an update of a few rows.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """For imports: the collector rests inside, and leaves alone for good whatever there is afterwards, garbage too."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def end_quickly() -> None:
    """Lets the process end without a last collection.

    Finalizers of what is part of a cycle then do not run: files that such an object holds have to be closed before.
    """
    atexit.register(gc.freeze)
