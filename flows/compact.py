"""Few large files instead of many small ones: each crowded hour of the click log is rewritten into one file, while updates run.

python flows/compact.py --dataset brunch --state-dir state
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import sys

from prefect import flow

from data_schemas.dataset import load_spec
from flows.settings import settings_for
from flows.terminal import run_flow, tell
from pipeline.data.compaction import compact as compact_log
from pipeline.data.lake import ClickLog


@flow(name="compact", persist_result=False)
def compact(
    *,
    config: str | None = None,
    dataset: str | None = None,
    state_dir: str | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Rewrite each hour of the click log that lies in many files into one file; no row is learned again for it.

    Args:
        config: Settings file (TOML), as the hourly update takes it.
        dataset: Name of a shipped data set, or the path of a TOML file that declares one.
        state_dir: Folder of everything that is kept.
        overrides: Any other setting, such as maintenance.compact_files=8; may be given several times.
    """
    settings = settings_for(config, overrides, dataset=dataset, state_dir=state_dir)
    log = ClickLog.open_or_create(settings.log_path, load_spec(settings.dataset))
    tell(compact_log(log, settings.maintenance).line())


if __name__ == "__main__":
    sys.exit(run_flow(compact))
