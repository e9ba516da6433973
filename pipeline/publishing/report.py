"""An update in words: Markdown for people, a row for the terminal, a line of JSON for what comes after.

Enters: an `UpdateReport`. Leaves: text; or a line in `<model_dir>/history.jsonl`, which the plots of many hours are
made from.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from models.id_table import IdFigures
from pipeline.evaluation.gate import GateVerdict
from pipeline.evaluation.metrics import Interval, Metrics
from pipeline.outcome import PlanRecord, UpdateReport
from sampling.plan import SamplingPlan

logger = logging.getLogger(__name__)

TABLE_HEADER = (
    "hour (UTC)",
    "rows",
    "batch",
    "seconds\nof budget",
    "AUC\nbefore\nlearning",
    "AUC\nfrozen",
    "log\nloss",
    "COPC",
)
"""Names of what `as_row` gives. COPC is clicks over predicted clicks: 1 is calibrated."""

_ABSENT = "-"
_SHOWN_DECISIONS = 8
_SHOWN_STRATA = 20
_IN_MLFLOW = ("plan", "loss_curve", "sampling")  # too long for a line of the history


def verdict(report: UpdateReport) -> str:
    """What happened, in one sentence."""
    window = _window(report)
    if report.outcome == "empty":
        return f"There was nothing to learn in {window}; version {report.version} goes on serving."
    if report.outcome == "suspicious":
        return (
            f"{window} does not look like the windows before it and was held aside: {report.alarms[0].sentence}; "
            f"version {report.version} goes on serving."
        )
    if report.outcome == "rejected" and report.gate:
        return (
            f"What was learned from {window} was rejected, and the window held aside: {report.gate.reason}; "
            f"version {report.version} goes on serving."
        )
    used = f"{report.total_seconds:.1f} s of its {report.budget_seconds:g} s"
    learned = f"Version {report.version} learned {report.rows_learned:,} of {report.rows:,} rows of {window} in {used}"
    if report.outcome == "held" and report.gate:
        return f"{learned}, and does not serve yet: {report.gate.reason}; version {report.serving} goes on serving."
    if report.before is None or report.before.auc is None:
        return f"{learned}."
    score = f"{learned}; before it learned them, the model ranked them with AUC {report.before.auc:.3f}"
    if report.frozen is None or report.frozen.auc is None:
        return f"{score}."
    gain = report.before.auc - report.frozen.auc
    return f"{score}, {abs(gain):.3f} {'above' if gain >= 0 else 'below'} the model that stopped learning."


def reason_of(report: UpdateReport) -> str:
    """Why the window of the update was held aside."""
    return report.gate.reason if report.gate else "; ".join(alarm.sentence for alarm in report.alarms)


def as_markdown(report: UpdateReport, plots: Mapping[str, str] | None = None) -> str:
    """The report as Markdown.

    Args:
        report: the update.
        plots: title to address of an image, a `data:` URI or a URL.
    """
    parts = [
        f"# {report.model_name}, {report.window_start.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        verdict(report),
        _figures(report),
        *(f"![{title}]({address})" for title, address in (plots or {}).items()),
        _gate(report.gate),
        _stability(report),
        _rows(report),
        _sampling(report.sampling),
        _ids(report.ids),
        _budget(report),
        _plan(report.plan),
        _notes(report.notes),
        _origin(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_row(report: UpdateReport) -> tuple[str, ...]:
    """One row of the terminal table, as `TABLE_HEADER` names it."""
    before, frozen = report.before, report.frozen
    return (
        f"{report.window_start.astimezone(UTC):%Y-%m-%dT%H}",
        f"{report.rows:,}",
        f"{report.batch_size:,}" if report.batch_size else _ABSENT,
        f"{report.total_seconds:.1f} of {report.budget_seconds:g}",
        _figure(before.auc if before else None, 4),
        _figure(frozen.auc if frozen else None, 4),
        _figure(before.log_loss if before else None, 4),
        _figure(before.copc if before else None, 3),
    )


def as_table(reports: Iterable[UpdateReport], title: str = "") -> Table:
    """The terminal table, one row an update."""
    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in TABLE_HEADER:
        table.add_column(name, justify="left" if name == TABLE_HEADER[0] else "right", no_wrap=True, vertical="bottom")
    for report in reports:
        table.add_row(*as_row(report))
    return table


def append_history(model_dir: Path, report: UpdateReport) -> None:
    """Adds the report as one line; it is on disk when this returns.

    The plans and the loss curve are left out: the checkpoint's manifest and MLflow have them.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    path = model_dir / "history.jsonl"
    line = json.dumps(as_plain(report, left_out=_IN_MLFLOW), allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" * torn + line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_history(model_dir: Path) -> list[dict[str, Any]]:
    """The reports of a model, oldest first; an update that was reported twice counts once, as it was reported last.

    Times are ISO strings, metrics nested objects. A line that a crash tore is skipped with a warning.
    """
    path = model_dir / "history.jsonl"
    if not path.exists():
        return []
    updates: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entry = json.loads(line)
            key = (entry["window_start"], entry["version"], entry["log_version"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: line %d is torn and was skipped", path, number)
            continue
        updates.pop(key, None)
        updates[key] = entry
    return list(updates.values())


def as_plain(value: Any, *, left_out: Sequence[str] = ()) -> Any:
    """Dataclasses, mappings and sequences as JSON has them, times as ISO strings; without the fields `left_out` of a report."""
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat()
        case Mapping():
            return {str(name): as_plain(part) for name, part in value.items()}
        case tuple() | list():
            return [as_plain(part) for part in value]
        case _ if is_dataclass(value):
            return {f.name: as_plain(getattr(value, f.name)) for f in fields(value) if f.name not in left_out}
        case _:
            return value


def _window(report: UpdateReport) -> str:
    start, end = report.window_start.astimezone(UTC), report.window_end.astimezone(UTC)
    last = f"{end:%H:%M}" if start.date() == end.date() else f"{end:%Y-%m-%d %H:%M}"
    return f"{start:%Y-%m-%d %H:%M} to {last} UTC"


def _figures(report: UpdateReport) -> str:
    columns = {"before learning": report.before, "after learning": report.after, "frozen model": report.frozen}
    shown = {name: metrics for name, metrics in columns.items() if metrics is not None}
    if not shown:
        return ""
    lines = [_line("", *shown), _line("---", *("---:" for _ in shown))]
    for label, name, digits in (
        ("AUC", "auc", 4),
        ("AUC within a user (GAUC)", "gauc", 4),
        ("log loss", "log_loss", 4),
        ("normalised entropy", "normalised_entropy", 4),
        ("clicks / predicted clicks (COPC)", "copc", 3),
        ("calibration error (ECE)", "ece", 4),
        ("mean probability", "mean_probability", 4),
        ("clicks", "clicks", 0),
    ):
        lines.append(_line(label, *(_with_interval(metrics, name, digits) for metrics in shown.values())))
    meaning = "In brackets: 95 % intervals that take rows as independent."
    if report.after is not None:
        meaning += " *After learning* tells how well these very rows were fitted, not how well the model generalises."
    if report.evaluated_rows < report.rows:
        meaning += f" Measured on a uniform sample of {report.evaluated_rows:,} of {report.rows:,} rows."
    return "## Figures\n\n" + "\n".join(lines) + f"\n\n{meaning}"


def _with_interval(metrics: Metrics, name: str, digits: int) -> str:
    interval: Interval | None = getattr(metrics, f"{name}_interval", None)
    text = _figure(getattr(metrics, name), digits)
    return text if interval is None else f"{text} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _gate(verdict: GateVerdict | None) -> str:
    if verdict is None:
        return ""
    lines = [_line("figure", "value", "from", "to", "passed"), _line("---", "---:", "---:", "---:", "---")]
    for figure in verdict.figures:
        cells = (_figure(figure.value, 4), _figure(figure.low, 4), _figure(figure.high, 4))
        lines.append(_line(figure.name, *cells, "yes" if figure.passed else f"**no**: {figure.sentence}"))
    meaning = (
        f"On {verdict.rows:,} held-out rows of {verdict.users:,} users, {verdict.clicks:,} of them clicked. AUC and log loss: "
        "what the model gained on the one that serves, with a 95 % interval over users; of the other figures, what is allowed."
    )
    if delong := verdict.delong_interval:
        meaning += f" DeLong's interval, which takes rows as independent: [{delong.low:+.4f}, {delong.high:+.4f}]."
    return f"## Gate\n\nDecision: **{verdict.decision}**: {verdict.reason}.\n\n" + "\n".join(lines) + f"\n\n{meaning}"


def _stability(report: UpdateReport) -> str:
    figures, diagnosis = report.stability, report.diagnosis
    if figures is None or diagnosis is None:
        return ""
    found = f"**{diagnosis.verdict.replace('_', ' ')}**" if diagnosis.verdict else "not judged"
    lines = [_line("measure", ""), _line("---", "---:")]
    for label, value, digits in (
        ("log loss of fixed rows over steps: standard deviation", figures.probe_deviation, 5),
        ("spikes of it", figures.probe_spikes, 0),
        ("gradient norms: standard deviation / mean", figures.gradient_variation, 2),
        ("published probabilities: mean change", figures.churn, 4),
        ("published probabilities: change that 1 % exceed", figures.churn_p99, 4),
    ):
        lines.append(_line(label, _figure(value, digits)))
    for label, change in (("AUC", figures.auc_change), ("log loss", figures.log_loss_change)):
        if change is not None:
            interval = f"[{change.interval.low:+.4f}, {change.interval.high:+.4f}]"
            lines.append(_line(f"{label}: change from the window before", f"{change.value:+.4f} {interval}"))
    return f"## Stability\n\nDiagnosis: {_sentence(found, diagnosis.reason)}\n\n" + "\n".join(lines)


def _sentence(found: str, reason: str) -> str:
    return f"{found}: {reason}." if reason else f"{found}."


def _rows(report: UpdateReport) -> str:
    counts = {
        "of the window": report.rows,
        "of them late": report.late_rows,
        "learned": report.rows_learned,
        "pending for the next update": report.rows_pending,
    }
    if report.rows_held_out:
        counts["of them held out to judge the model by"] = report.rows_held_out
    if report.rows_thinned:
        counts["left out for want of time"] = report.rows_thinned
    if report.skipped_steps:
        counts["steps skipped, their loss was not finite"] = report.skipped_steps
    lines = [_line("rows", "count"), _line("---", "---:"), *(_line(name, f"{n:,}") for name, n in counts.items())]
    return "## Rows\n\n" + "\n".join(lines)


def _sampling(plan: SamplingPlan | None) -> str:
    if plan is None:
        return ""
    columns = ("stratum", "rows", "over a cap", "probability", "to learn", "effective rows")
    lines = [_line(*columns), _line("---", *("---:" for _ in columns[1:]))]
    largest = sorted(plan.strata, key=lambda stratum: -stratum.rows)[:_SHOWN_STRATA]
    for s in [stratum for stratum in plan.strata if stratum in largest]:
        cells = (f"{s.rows:,}", f"{s.capped:,}", f"{s.keep_rate:.4g}", f"{s.kept:,}", f"{s.effective_rows:,.0f}")
        lines.append(_line(s.name, *cells))
    total = (f"{plan.rows:,}", f"{plan.capped:,}", "", f"{plan.kept:,}", f"{plan.effective_rows:,.0f}")
    lines.append(_line("**all**", *total))
    hidden = len(plan.strata) - len(largest)
    more = f"\n\n… and {hidden:,} smaller strata in the checkpoint's manifest." if hidden > 0 else ""
    made_up = "a weight of one over it" if plan.correction == "weights" else "a shift of the logits in training"
    meaning = f"*Probability*: of a row to be learned, made up for by {made_up}. Seed {list(plan.seed)}."
    return "## Sampling\n\n" + "\n".join(lines) + f"{more}\n\n{meaning}"


def _ids(ids: Mapping[str, IdFigures]) -> str:
    if not ids:
        return ""
    columns = ("feature", "with a row", "admitted", "evicted", "waiting", "forgotten", "new ids", "on the shared row")
    lines = [_line(*columns), _line("---", *("---:" for _ in columns[1:]))]
    for feature, figures in ids.items():
        counts = (figures.stored, figures.admitted, figures.evicted, figures.waiting, figures.forgotten)
        shares = (f"{figures.new_share:.1%}", f"{figures.shared_share:.1%}")
        lines.append(_line(feature, *(f"{count:,}" for count in counts), *shares))
    meaning = (
        "*New ids*: the share of the window's ids that were predicted by the row that all unknown ids share; "
        "*on the shared row*: the share that was learned there, not seen often enough for a row of their own."
    )
    return "## Ids\n\n" + "\n".join(lines) + f"\n\n{meaning}"


def _budget(report: UpdateReport) -> str:
    stages = dict(report.seconds) | {"**all**": report.total_seconds}
    lines = [_line("stage", "seconds", f"share of {report.budget_seconds:g} s"), _line("---", "---:", "---:")]
    for stage, seconds in stages.items():
        lines.append(_line(stage, f"{seconds:.2f}", f"{seconds / report.budget_seconds:.1%}"))
    return "\n\n".join(part for part in ("## Budget", "\n".join(lines), _step(report)) if part)


def _step(report: UpdateReport) -> str:
    """What was measured of the steps, in words."""
    said = []
    if report.fixed_seconds is not None and report.row_seconds is not None:
        said.append(
            f"An undisturbed step takes {1e3 * report.fixed_seconds:.2f} ms and {1e6 * report.row_seconds:.2f} µs a row."
        )
    if report.noise_scale is not None:
        said.append(f"Gradient noise scale of the dense network: {report.noise_scale:,.0f} rows.")
    if report.waiting_share is not None:
        said.append(f"The learner waited for its batches for {report.waiting_share:.1%} of the pass.")
    return " ".join(said)


def _plan(plan: tuple[PlanRecord, ...]) -> str:
    if not plan:
        return ""
    lines = [_line("from row", "batch", "rows kept", "learning rate", "why"), _line("---:", "---:", "---:", "---:", "---")]
    for record in plan[:_SHOWN_DECISIONS]:
        rate = f"{record.learning_rate:.3g}"
        lines.append(_line(f"{record.position:,}", f"{record.batch_size:,}", f"{record.keep_rate:.1%}", rate, record.reason))
    hidden = len(plan) - _SHOWN_DECISIONS
    more = f"\n\n… and {hidden:,} more in the checkpoint's manifest." if hidden > 0 else ""
    return "## Plan\n\n" + "\n".join(lines) + more


def _notes(notes: tuple[str, ...]) -> str:
    return "## Notes\n\n" + "\n".join(f"- {_one_line(note)}" for note in notes) if notes else ""


def _origin(report: UpdateReport) -> str:
    return (
        f"Data set `{report.dataset}` at click-log version {report.log_version}, checkpoint {report.version}, "
        f"{report.precision}, code `{report.git_commit[:12] or 'unknown'}`."
    )


def _line(*cells: str) -> str:
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _figure(value: float | None, digits: int) -> str:
    return _ABSENT if value is None else f"{value:,.{digits}f}"
