"""Python's collector of cyclic garbage, kept away from what lasts as long as the process.

Imports of torch, MLflow and Prefect make half a million objects that last. The collector looks them through several times while
they are made, and again when the process ends; together that is seconds of an update of a few rows.
"""

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
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


def run_and_leave(work: Callable[[], int]) -> NoReturn:
    """Calls `work`, and ends the process with the exit code that it returns, or 1 and a traceback where it raised.

    Functions of `atexit` are called, but the interpreter is not taken apart, and threads are not waited for. A thread of
    torch.distributed that lets go of a tensor while Python is being taken apart is unwound by Python, for which C++ aborts the
    process, whatever it has done ("terminate called without an active exception").
    """
    code = 1
    try:
        code = work()
    except BaseException:  # noqa: BLE001 - told, and the process ends
        traceback.print_exc()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
