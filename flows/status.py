"""What a model has been through lately: printed, and written as an HTML page, from its folder alone.

python flows/status.py --state-dir demo/state --page status.html
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from data_schemas.errors import ConfigError, TidemarkError
from flows.history import reports_of
from flows.settings import settings_for
from flows.terminal import run_command
from pipeline.alerts import undelivered_alerts
from pipeline.config import UpdateConfig
from pipeline.pending import pending_of
from pipeline.publishing.checkpoint import current_version, head_version
from pipeline.publishing.plots import auc_by_hour
from pipeline.publishing.report import read_history
from pipeline.publishing.status import (
    SHOWN_UPDATES,
    HeldRow,
    headline,
    held_rows,
    pending_line,
    status_page,
    status_rows,
    status_table,
    undelivered_line,
)


def status(
    *,
    config: str | None = None,
    state_dir: str | None = None,
    model_name: str | None = None,
    page: str | None = None,
    last: int = 24,
    overrides: list[str] | None = None,
) -> None:
    """Print the last updates of a model, and write them as an HTML page.

    Args:
        config: Settings file (TOML), as the hourly update takes it.
        state_dir: Folder of everything that is kept.
        model_name: Which model in it.
        page: File of the page; by default status.html in the model's folder.
        last: Updates to print; the page shows 168.
        overrides: Any other setting, such as model_name=nightly; may be given several times.
    """
    if last < 1:
        raise ConfigError(f"last must be at least 1, got {last}; it is how many updates are printed")
    settings = settings_for(config, overrides, state_dir=state_dir, model_name=model_name)
    if not settings.model_dir.is_dir():
        raise ConfigError(f"there is no model in {settings.model_dir}; name another state_dir or model_name")
    reports, serving = reports_of(settings.model_dir), current_version(settings.model_dir)
    rows = status_rows(reports, serving)
    title = headline(settings.model_name, reports, serving, head_version(settings.model_dir))
    target = Path(page) if page else settings.model_dir / "status.html"
    plot = auc_by_hour(read_history(settings.model_dir)[-SHOWN_UPDATES:])
    lines, held = waiting(settings)
    page_text = status_page(title, rows, plot=plot, now=datetime.now(UTC), held=held, lines=lines)
    target.write_text(page_text, encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 240, soft_wrap=True, highlight=False)
    for line in (title, *lines):
        console.print(line, markup=False)
    for window in held:
        console.print(
            f"held aside: {window.window} UTC, {window.rows} rows, by the {window.kind}: {window.reason}", markup=False
        )
        console.print(f"  {window.release}\n  {window.discard}", markup=False)
    if rows:
        console.print(status_table(rows, most=last))
    console.print(f"page: {target}", markup=False)


def waiting(settings: UpdateConfig) -> tuple[list[str], list[HeldRow]]:
    """Sentences about what waits, and the windows that a person has to decide on; what cannot be told is said."""
    lines, held = list[str](), list[HeldRow]()
    try:
        pending = pending_of(settings)
        lines.append(pending_line(pending))
        held = held_rows(pending.held, state_dir=str(settings.state_dir), model_name=settings.model_name)
    except TidemarkError as error:
        lines.append(f"what waits cannot be told: {error}")
    undelivered = undelivered_alerts(settings.model_dir)
    if undelivered:
        lines.append(undelivered_line(undelivered))
    return lines, held


if __name__ == "__main__":
    sys.exit(run_command(status, status, name="status"))
