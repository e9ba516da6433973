"""Back to a kept version of a model: its weights, and what it has consumed of the click log, together.

python flows/rollback.py --state-dir state --version 41
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import sys

from rich.console import Console

from flows.settings import settings_for
from flows.terminal import run_command
from pipeline.rollback import roll_back


def rollback(
    *,
    config: str | None = None,
    state_dir: str | None = None,
    model_name: str | None = None,
    version: int | None = None,
    wait: float | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Make a kept version current again; the next update learns again what came after it.

    Args:
        config: Settings file (TOML), as the hourly update takes it.
        state_dir: Folder of everything that is kept.
        model_name: Which model in it.
        version: Version to go back to; by default the one before the current.
        wait: Seconds to wait where another process has the model; without it, the command ends with exit code 75 at once.
        overrides: Any other setting, such as tracking.enabled=false; may be given several times.
    """
    done = roll_back(
        settings_for(config, overrides, state_dir=state_dir, model_name=model_name, lock_wait_seconds=wait), version
    )
    console = Console(soft_wrap=True, highlight=False)
    until = f"{done.learned_until:%Y-%m-%d %H:%M} UTC"
    console.print(
        f"version {done.version} serves instead of {done.before}: it had learned until {until}, "
        f"click-log version {done.log_version}; what came since waits for the next update",
        markup=False,
    )
    for note in done.notes:
        console.print(f"  {note}", markup=False)


if __name__ == "__main__":
    sys.exit(run_command(rollback, rollback, name="rollback"))
