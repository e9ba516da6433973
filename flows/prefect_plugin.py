"""Adds the command `prefect run` to Prefect's own command line.

Prefect calls `setup_environment` when a program imports it, where plugins are switched on: in this project's folder by
`[tool.prefect.plugins]` in pyproject.toml, elsewhere by PREFECT_PLUGINS_ENABLED=1.
"""

import sys
from pathlib import Path

import flows.environment  # noqa: F401 - before prefect

# isort: split
from prefect.plugins import HookContext, register_hook


@register_hook
def setup_environment(*, ctx: HookContext) -> None:
    """Register `run` where the program is `prefect`."""
    if Path(sys.argv[0]).stem == "prefect":
        # Private, and the only place where commands can be added: Prefect is pinned, and a test runs the command.
        from prefect.cli._app import _app

        _app.command("flows.prefect_run:app", name="run")
