"""Prefect's temporary server, started while a flow's own modules are imported: two waits of seconds each become one.

Where no Prefect server is named, Prefect starts one for the time of a run, in a process of its own, and waits for it at the
first call of a flow. It is one object a process; started early, it is what that call finds.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context

log = logging.getLogger(__name__)


@contextmanager
def server_starting() -> Iterator[None]:
    """Inside, Prefect's temporary server starts, and at the end of the block it answers; nothing happens where the run has a
    server already. One that does not start is for Prefect to try again, and to complain of."""
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED

    if PREFECT_API_URL.value() or not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        yield
        return
    from prefect.server.api.server import SubprocessASGIServer

    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(copy_context().run, SubprocessASGIServer().start)
        yield
    if error := started.exception():
        log.warning("Prefect's temporary server did not start, and is started once more: %s", error)
