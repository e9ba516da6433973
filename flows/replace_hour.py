"""An hour of the click log, replaced by files that were delivered anew; no row is learned twice for it.

python flows/replace_hour.py 2019-02-22T05 corrected/ --dataset brunch --state-dir state
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import sys
from datetime import UTC, datetime

from prefect import flow

from data_schemas.dataset import load_spec
from flows.backfill import parse_hour
from flows.settings import settings_for
from flows.terminal import run_flow, tell
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.replacement import replace_hour as replace_in_log


@flow(name="replace-hour", persist_result=False)
def replace_hour(
    hour: str,
    files: str,
    *,
    config: str | None = None,
    dataset: str | None = None,
    state_dir: str | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Give HOUR of the click log the rows of the files in FILES; updates may run meanwhile.

    Args:
        hour: Such as 2019-02-22T05; UTC unless it says otherwise.
        files: Folder or fsspec address with every file of that hour, as it should be.
        config: Settings file (TOML), as the hourly update takes it.
        dataset: Name of a shipped data set, or the path of a TOML file that declares one.
        state_dir: Folder of everything that is kept.
        overrides: Any other setting; may be given several times.
    """
    start = int(parse_hour(hour).timestamp()) // 3600
    settings = settings_for(config, overrides, dataset=dataset, state_dir=state_dir)
    spec = load_spec(settings.dataset)
    log, quarantine = ClickLog.open_or_create(settings.log_path, spec), Quarantine.open_or_create(settings.quarantine_path)
    for line in replace_in_log(files, start, log, quarantine, spec, now=datetime.now(UTC)).lines():
        tell(line)


if __name__ == "__main__":
    sys.exit(run_flow(replace_hour))
