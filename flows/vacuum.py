"""The state folder kept small: old hours, rejected rows and runs leave, and files that nothing needs are deleted.

python flows/vacuum.py --dataset brunch --state-dir state --dry-run
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import sys
from datetime import UTC, datetime

from prefect import flow

from data_schemas.dataset import load_spec
from flows.settings import settings_for
from flows.terminal import run_flow, tell
from pipeline.vacuum import vacuum as vacuum_state


@flow(name="vacuum", persist_result=False)
def vacuum(
    *,
    config: str | None = None,
    dataset: str | None = None,
    state_dir: str | None = None,
    dry_run: bool = False,
    overrides: list[str] | None = None,
) -> None:
    """Apply the retention settings, then delete the files that no version in use needs; updates may run meanwhile.

    Args:
        config: Settings file (TOML), as the hourly update takes it.
        dataset: Name of a shipped data set, or the path of a TOML file that declares one.
        state_dir: Folder of everything that is kept.
        dry_run: Say what would be removed, and remove nothing.
        overrides: Any other setting, such as maintenance.log_days=400; may be given several times.
    """
    settings = settings_for(config, overrides, dataset=dataset, state_dir=state_dir)
    report = vacuum_state(settings, load_spec(settings.dataset), now=datetime.now(UTC), dry_run=dry_run)
    for line in report.lines():
        tell(line)


if __name__ == "__main__":
    sys.exit(run_flow(vacuum))
