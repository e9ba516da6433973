"""Settings of Prefect and MLflow that must stand in the environment before either is imported.

Import this module first. Whatever the user has set is left alone, PREFECT_HOME with it; but a run by hand does without a
Prefect server that does not answer, since an update must not wait for who only watches it.
"""

import logging
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

DEFAULTS = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""No telemetry (MLflow wants the word `true`), and no pickle. For a busy machine: patience with Prefect's server, which is
given up after 20 s otherwise, and no threads that spin while they wait."""

BY_HAND = {
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "DASK_LOGGING__DISTRIBUTED": "error",
}
"""A run by hand prints lines of its own, and an error goes to the caller, so Prefect need not log it as well."""


PROBE_SECONDS = 3.0
"""A Prefect server that does not answer for this long is taken to be down: Prefect itself would wait for minutes."""


def runs_by_hand() -> bool:
    """False for Prefect's server and worker, and in the process that a worker starts for a scheduled run."""
    is_prefect = Path(sys.argv[0]).stem == "prefect" and sys.argv[1:2] != ["run"]
    return not is_prefect and "PREFECT__FLOW_RUN_ID" not in os.environ


def set_defaults() -> None:
    """Set what the user has not set."""
    for name, value in (DEFAULTS | (BY_HAND if runs_by_hand() else {})).items():
        os.environ.setdefault(name, value)
    if runs_by_hand():
        _leave_out_a_dead_server()
    # Warns of a change inside torch whenever torchrec makes a table: nothing that a user can act on.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def _leave_out_a_dead_server() -> None:
    """Without an address Prefect starts a server of its own for the time of the run."""
    address = os.environ.get("PREFECT_API_URL", "")
    if not address.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in, Prefect will tell
    except OSError as error:
        del os.environ["PREFECT_API_URL"]
        where = address.rpartition("@")[2]  # without the password that may stand before it
        logging.getLogger(__name__).warning("no Prefect server answers at %s (%s); this run is not shown there", where, error)


set_defaults()
