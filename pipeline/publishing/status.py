"""The state of a model in the open: its last updates as a terminal table and as one HTML page that needs nothing else.

Enters: the reports in the model's folder, the version that serves, and what waits. Leaves: text. Neither MLflow nor Prefect
is asked, so the page can be made while both are down.
"""

import base64
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeline.alerts import Undelivered
from pipeline.data.held import HeldWindow
from pipeline.data.windows import as_time
from pipeline.evaluation.gate import GateVerdict
from pipeline.evaluation.metrics import Interval, Metrics
from pipeline.outcome import LEARNED, UpdateReport
from pipeline.pending import Pending

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
    attention: bool
    """True where the window was held aside."""
    notes: tuple[str, ...]
    """The reason of the gate first, where it did not publish."""

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


@dataclass(frozen=True, kw_only=True)
class HeldRow:
    """One window that is held aside, as words."""

    window: str
    rows: str
    kind: str
    reason: str
    held_at: str
    release: str
    """Command that has it learned."""
    discard: str
    """Command that leaves it out for good."""


def held_rows(windows: Sequence[HeldWindow], *, state_dir: str, model_name: str) -> list[HeldRow]:
    """The windows that a person has to decide on, oldest first."""
    return [_held_row(window, state_dir, model_name) for window in windows]


def pending_line(pending: Pending) -> str:
    """What waits, in one sentence."""
    rows = "no row waits to be learned"
    if pending.since and pending.until:
        rows = f"{pending.rows:,} rows wait to be learned, of {_time(pending.since)} to {_time(pending.until)} UTC"
    aside = sum(window.num_rows for window in pending.held)
    parts = [rows]
    if pending.released:
        released = sum(window.num_rows for window in pending.released)
        parts.append(f"{released:,} rows of {_count(len(pending.released), 'released window')} are learned next")
    if pending.held:
        parts.append(f"{aside:,} rows in {_count(len(pending.held), 'window')} that {_is_or_are(len(pending.held))} held aside")
    return "; ".join(parts)


def undelivered_line(undelivered: Undelivered) -> str:
    """How many alerts never left, in one sentence."""
    return (
        f"{_count(undelivered.number, 'alert')} could not be delivered, the last at {_time(undelivered.last_at)} UTC: "
        f"{undelivered.last_problem}"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _is_or_are(number: int) -> str:
    return "is" if number == 1 else "are"


def _held_row(window: HeldWindow, state_dir: str, model_name: str) -> HeldRow:
    command = ["python", "flows/held.py", "--state-dir", state_dir, "--model-name", model_name]
    start, end = as_time(window.start), as_time(window.end)
    return HeldRow(
        window=f"{_time(start)} to {end:%H:%M}",
        rows=f"{window.num_rows:,}",
        kind=window.kind,
        reason=window.reason,
        held_at=_time(datetime.fromisoformat(window.held_at)),
        release=shlex.join([*command, "--release", window.id]),
        discard=shlex.join([*command, "--discard", window.id]),
    )


def status_rows(reports: Sequence[UpdateReport], serving: int | None) -> list[StatusRow]:
    """The last `SHOWN_UPDATES` of `reports`, newest first.

    Args:
        reports: of one model, oldest first.
        serving: the version that serves; None where none does.
    """
    return [_row(report, serving) for report in reports[: -SHOWN_UPDATES - 1 : -1]]


def headline(model: str, reports: Sequence[UpdateReport], serving: int | None, head: int | None = None) -> str:
    """The state in one sentence.

    Args:
        model: its name.
        reports: oldest first.
        serving: the version that serves; None where none does.
        head: the version that has learned on and does not serve yet, where there is one.
    """
    if not reports or serving is None:
        return f"{model}: no update has published a model yet"
    late = sum(report.total_seconds > report.budget_seconds for report in reports[-SHOWN_UPDATES:])
    inside = "all inside the budget" if late == 0 else f"{late:,} over the budget"
    shown = f"{min(len(reports), SHOWN_UPDATES):,} of {len(reports):,} updates shown, {inside}"
    until = _learned_until(reports, serving)
    parts = [f"version {serving} serves; {shown}", *([f"learned up to {until} UTC"] if until else [])]
    if head is not None:
        ahead = _learned_until(reports, head)
        parts.append(f"version {head} has learned{f' up to {ahead} UTC' if ahead else ' on'} and is not proven yet")
    return f"{model}: {'; '.join(parts)}"


def _learned_until(reports: Sequence[UpdateReport], version: int) -> str | None:
    """None where its report is not among them."""
    made = (report for report in reversed(reports) if report.outcome in LEARNED and report.version == version)
    return next((_time(report.window_end) for report in made), None)


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


def status_page(
    title: str,
    rows: Sequence[StatusRow],
    *,
    plot: bytes | None,
    now: datetime,
    held: Sequence[HeldRow] = (),
    lines: Sequence[str] = (),
) -> str:
    """One HTML page with everything in it; whatever a log or a note says is shown as text, never as markup.

    Args:
        title: what `headline` gives.
        rows: what `status_rows` gives.
        plot: PNG of AUC by hour, where there is one.
        now: when the page was made, aware.
        held: what `held_rows` gives.
        lines: sentences below the title, such as what waits.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    image = base64.b64encode(plot).decode() if plot else ""
    return template.render(title=title, rows=rows, headings=HEADINGS[:-1], image=image, made=_time(now), held=held, lines=lines)


def _row(report: UpdateReport, serving: int | None) -> StatusRow:
    learned = report.outcome in LEARNED
    reason = (report.gate.reason,) if report.gate and report.outcome in ("held", "rejected") else ()
    return StatusRow(
        window=f"{_time(report.window_start)} to {report.window_end.astimezone(UTC):%H:%M}",
        outcome=report.outcome,
        version=str(report.version) if learned else _ABSENT,
        serves=learned and report.version == serving,
        seconds=f"{report.total_seconds:.1f} of {report.budget_seconds:g}",
        over_budget=report.total_seconds > report.budget_seconds,
        rows=f"{report.rows:,}",
        learned=f"{report.rows_learned:,}",
        pending=f"{report.rows_pending:,}",
        before=_auc(report.before),
        after=_auc(report.after),
        gain=_gain(report.gate),
        alarms=str(len(report.alarms)) if report.alarms else _ABSENT,
        attention=report.outcome in ("rejected", "suspicious"),
        notes=(*reason, *report.notes),
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
