"""The demo: 24 hours of synthetic clicks, learned hour by hour by the hourly job itself; one table.

What it makes is in `demo/` in the project's folder; `make demo` keeps Prefect's own files there too.
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import os
import shlex
import sys
from pathlib import Path

from rich.console import Console

from data_schemas.errors import TidemarkError
from flows.history import after_first, mean_figures, reports_of
from flows.hourly_update import hourly_update
from flows.settings import settings_for
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.publishing.report import as_table

DEMO = Path(__file__).parents[1] / "demo"

SETTINGS = (
    "dataset=synthetic",
    f"landing={DEMO / 'landing'}",
    f"state_dir={DEMO / 'state'}",
    "budget.seconds=60",
    "evaluation.frozen_after_updates=1",
)
"""The frozen model is the one after the first hour."""


def main() -> int:
    """Run the demo; 0, or 1 after one line that says what went wrong."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        _learn_a_day(console)
    except TidemarkError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        return 1
    _show(console)
    return 0


def _learn_a_day(console: Console) -> None:
    stream = SyntheticConfig()
    settings = settings_for(None, SETTINGS)
    learned = len(reports_of(settings.model_dir))
    written = write_landing(stream, DEMO / "landing")
    if learned >= stream.hours and not written:
        console.print("All 24 hours are learned already; remove the folder demo/ to start again.")
        return
    rows = stream.hours * stream.rows_per_hour
    console.print(f"Learning {stream.hours} hours of synthetic clicks, about {rows:,} rows: one to three minutes.")
    hourly_update(overrides=list(SETTINGS), quiet=True)


def _show(console: Console) -> None:
    settings = settings_for(None, SETTINGS)
    reports = reports_of(settings.model_dir)
    Console().print(as_table(reports, title="24 hourly updates of one model"))
    later = after_first(1, reports)
    fresh, frozen = (mean_figures(later, of) for of in (lambda r: r.before, lambda r: r.frozen))
    if fresh.auc is not None and frozen.auc is not None:
        console.print(
            f"Kept fresh, the model ranked clicks that it had not learned yet with a mean AUC of {fresh.auc:.3f}; "
            f"the one that stopped after the first hour, with {frozen.auc:.3f}."
        )
    database = Path(os.path.relpath(settings.state_dir / "mlflow.db"))
    command = [
        os.path.relpath(Path(sys.executable).with_name("mlflow")),
        "ui",
        "--backend-store-uri",
        f"sqlite:///{database}",
    ]
    console.print(f"Every figure and plot is in MLflow. Open it with\n  {shlex.join(command)}\nand go to http://127.0.0.1:5000")


if __name__ == "__main__":
    sys.exit(main())
