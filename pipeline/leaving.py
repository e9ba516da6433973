"""How a process of a group ends: at once, with its exit code.

Enters: what it has to do. Leaves: nothing.
"""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


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
