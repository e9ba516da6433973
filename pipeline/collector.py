"""Python's collector of cyclic garbage, kept away from what lasts as long as the process.

Imports of torch, MLflow and Prefect make half a million objects that last. The collector looks them through several times while
they are made, and again when the process ends; together that is seconds of an update of a few rows.
"""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


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


def leave_at_once(code: int) -> NoReturn:
    """Ends the process with what was registered for its end, but without taking the interpreter apart.

    A thread of torch.distributed that lets go of a tensor while Python is being taken apart is unwound by Python, for which C++
    aborts the process, whatever it has done ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
