"""The state of a model in the open: its last updates as a terminal table and as one HTML page that needs nothing else.

Enters: the reports in the model's folder and the version that serves. Leaves: text. Neither MLflow nor Prefect is asked, so
the page can be made while both are down.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeline.evaluation.gate import GateVerdict
from pipeline.evaluation.metrics import Interval, Metrics
from pipeline.outcome import UpdateReport

SHOWN_UPDATES = 168
"""A week of hours."""
HEADINGS = (
    "window (UTC)",
    "outcome",
    "version",
    "seconds of budget",
    "rows",
    "learned",
    "pending",
    "AUC before [95 %]",
    "AUC after [95 %]",
    "gain by the gate [95 %]",
    "alarms",
    "notes",
)

_TEMPLATE = Path(__file__).with_name("status.html.jinja")
_ABSENT = "-"


@dataclass(frozen=True, kw_only=True)
class StatusRow:
    """One update, as words."""

    window: str
    outcome: str
    version: str
    serves: bool
    """True for the version that CURRENT names."""
    seconds: str
    over_budget: bool
    rows: str
    learned: str
    pending: str
    before: str
    after: str
    gain: str
    """Of AUC on held-out rows, over the model that served."""
    alarms: str
    notes: tuple[str, ...]

    def cells(self) -> tuple[str, ...]:
        """In the order of `HEADINGS`; the notes counted."""
        return (
            self.window,
            self.outcome,
            f"{self.version} *" if self.serves else self.version,
            self.seconds,
            self.rows,
            self.learned,
            self.pending,
            self.before,
            self.after,
            self.gain,
            self.alarms,
            str(len(self.notes)) if self.notes else _ABSENT,
        )


def status_rows(reports: Sequence[UpdateReport], serving: int | None) -> list[StatusRow]:
    """The last `SHOWN_UPDATES` of `reports`, newest first.

    Args:
        reports: of one model, oldest first.
        serving: the version that serves; None where none does.
    """
    return [_row(report, serving) for report in reports[: -SHOWN_UPDATES - 1 : -1]]


def headline(model: str, reports: Sequence[UpdateReport], serving: int | None) -> str:
    """The state in one sentence."""
    if not reports or serving is None:
        return f"{model}: no update has published a model yet"
    last = next((report for report in reversed(reports) if report.outcome == "published"), reports[-1])
    late = sum(report.total_seconds > report.budget_seconds for report in reports[-SHOWN_UPDATES:])
    inside = "all inside the budget" if late == 0 else f"{late:,} over the budget"
    return (
        f"{model}: version {serving} serves; {min(len(reports), SHOWN_UPDATES):,} of {len(reports):,} updates shown, {inside}; "
        f"learned up to {_time(last.window_end)} UTC, {last.rows_pending:,} rows pending"
    )


def status_table(rows: Sequence[StatusRow], *, most: int) -> Table:
    """The newest `most` rows for a terminal; a star marks the version that serves."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in HEADINGS:
        table.add_column(
            heading.replace(" of ", "\nof ").replace(" [", "\n["), justify="right", no_wrap=True, vertical="bottom"
        )
    for row in rows[:most]:
        table.add_row(*row.cells())
    return table


def status_page(title: str, rows: Sequence[StatusRow], *, plot: bytes | None, now: datetime) -> str:
    """One HTML page with everything in it; whatever a log or a note says is shown as text, never as markup.

    Args:
        title: what `headline` gives.
        rows: what `status_rows` gives.
        plot: PNG of AUC by hour, where there is one.
        now: when the page was made, aware.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    image = base64.b64encode(plot).decode() if plot else ""
    return template.render(title=title, rows=rows, headings=HEADINGS, image=image, made=_time(now))


def _row(report: UpdateReport, serving: int | None) -> StatusRow:
    return StatusRow(
        window=f"{_time(report.window_start)} to {report.window_end.astimezone(UTC):%H:%M}",
        outcome=report.outcome,
        version=str(report.version),
        serves=report.version == serving,
        seconds=f"{report.total_seconds:.1f} of {report.budget_seconds:g}",
        over_budget=report.total_seconds > report.budget_seconds,
        rows=f"{report.rows:,}",
        learned=f"{report.rows_learned:,}",
        pending=f"{report.rows_pending:,}",
        before=_auc(report.before),
        after=_auc(report.after),
        gain=_gain(report.gate),
        alarms=str(len(report.alarms)) if report.alarms else _ABSENT,
        notes=report.notes,
    )


def _auc(metrics: Metrics | None) -> str:
    if metrics is None or metrics.auc is None:
        return _ABSENT
    interval: Interval | None = metrics.auc_interval
    return f"{metrics.auc:.4f}" + (f" [{interval.low:.3f}, {interval.high:.3f}]" if interval else "")


def _gain(verdict: GateVerdict | None) -> str:
    if verdict is None or verdict.auc_difference is None:
        return _ABSENT
    interval = verdict.auc_interval
    return f"{verdict.auc_difference:+.4f}" + (f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval else "")


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"
