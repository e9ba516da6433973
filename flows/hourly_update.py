"""The hourly job: ingest what is new in the landing folder, then learn every closed hour that waits, in order.

prefect run flows/hourly_update.py dataset=brunch landing=../clicks
python flows/hourly_update.py --help
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import sys

from prefect import flow

from flows.terminal import run_flow, tell

IMPORTED_LATER = "flows.catching_up"
"""Imports torch, which takes seconds: while Prefect's server starts, and not for `--help`."""


@flow(name="hourly-update", persist_result=False)
def hourly_update(
    *,
    config: str | None = None,
    dataset: str | None = None,
    landing: str | None = None,
    state_dir: str | None = None,
    budget_seconds: float | None = None,
    wait: float | None = None,
    processes: int | None = None,
    overrides: list[str] | None = None,
    quiet: bool = False,
) -> None:
    """Ingest what is new in the landing folder, then learn every closed hour that waits, each within its own budget.

    Args:
        config: Settings file (TOML). Without it, and for what it leaves out, the defaults hold.
        dataset: Name of a shipped data set, or the path of a TOML file that declares one.
        landing: Folder or fsspec address in which click logs arrive.
        state_dir: Folder of everything that is kept: click log, quarantine, checkpoints, MLflow database.
        budget_seconds: Time for one update, from start to published model.
        wait: Seconds to wait where another process has the model; without it, the command ends with exit code 75 at once.
        processes: Processes that train the model together on this machine; the settings say it where this does not.
        overrides: Any other setting, such as training.batch_size=1024; may be given several times.
        quiet: Print nothing but errors.
    """
    from flows.catching_up import catch_up
    from flows.settings import settings_for

    settings = settings_for(
        config,
        overrides,
        dataset=dataset,
        landing=landing,
        state_dir=state_dir,
        budget__seconds=budget_seconds,
        lock_wait_seconds=wait,
        processes__count=processes,
    )
    catch_up(settings, tell=(lambda line: None) if quiet else tell)


if __name__ == "__main__":
    sys.exit(run_flow(hourly_update))
