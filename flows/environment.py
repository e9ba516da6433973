"""Settings of Prefect and MLflow that must stand in the environment before either is imported.

Import this module first. Whatever the user has set is left alone, PREFECT_HOME with it.
"""

import logging
import os
import sys
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
}
"""A run by hand prints lines of its own, and an error goes to the caller, so Prefect need not log it as well."""


def runs_by_hand() -> bool:
    """False for Prefect's server and worker, and in the process that a worker starts for a scheduled run."""
    is_prefect = Path(sys.argv[0]).stem == "prefect" and sys.argv[1:2] != ["run"]
    return not is_prefect and "PREFECT__FLOW_RUN_ID" not in os.environ


def set_defaults() -> None:
    """Set what the user has not set."""
    for name, value in (DEFAULTS | (BY_HAND if runs_by_hand() else {})).items():
        os.environ.setdefault(name, value)
    # Warns of a change inside torch whenever torchrec makes a table: nothing that a user can act on.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


set_defaults()
