"""A comparison in words: one sentence, a table for the terminal, Markdown for MLflow and the docs, CSV for what comes after.

Enters: a `Comparison`. Leaves: text; every figure in it is computed from the runs.
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeline.comparison.statistics import Estimate, PairedDifference
from pipeline.comparison.summary import Comparison, StrategyFigures

SIGNIFICANT = 0.05
"""Holm-corrected p-value below which a difference is called one."""
ENOUGH_SEEDS = 5
"""With fewer, the sentence says so."""

_ABSENT = "-"
_HEADER = ("strategy", "AUC", "AUC less\nreference", "Holm\np", "log\nloss", "rows\nlearned", "CPU s", "probe\nspread")
_IN_TERMINAL = 7  # columns that fit into 80 characters


def in_words(comparison: Comparison) -> str:
    """The result in one sentence, and what limits it in a second where something does."""
    reference = comparison.line(comparison.reference)
    assert reference.auc is not None, "a comparison has a reference that did not diverge"
    compared = [line for line in comparison.lines if line.auc_difference is not None]
    best = max((line for line in comparison.lines if line.auc is not None), key=_auc)
    better, worse = (_significant(compared, sign) for sign in (1, -1))
    if best.strategy == comparison.reference:
        start = f"{best.strategy} has the highest mean AUC, {_auc(best):.4f}"
    else:
        gain = _auc(best) - _auc(reference)
        start = f"{best.strategy} has the highest mean AUC, {_auc(best):.4f}, {gain:.4f} above {comparison.reference}"
        start += " (significant)" if best in better else " (not significant)"
    sentence = (
        f"{start}; of {len(compared)} strategies {len(better)} rank better than {comparison.reference} and {len(worse)} worse "
        f"at a Holm-corrected p below {SIGNIFICANT}{_furthest(worse)}."
    )
    return " ".join([sentence, *_limits(comparison)])


def as_terminal_table(comparison: Comparison) -> Table:
    """The lines as a table for the terminal, 95 % intervals as ±."""
    table = Table(title=_title(comparison), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in _HEADER[:_IN_TERMINAL]:
        table.add_column(name, justify="left" if name == _HEADER[0] else "right", no_wrap=True, vertical="bottom")
    for line in comparison.lines:
        table.add_row(*_cells(line)[:_IN_TERMINAL])
    return table


def as_markdown_table(comparison: Comparison) -> str:
    """The same as Markdown, with what its columns mean."""
    header = [name.replace("\n", " ") for name in _HEADER]
    rows = [header, ["---", *("---:" for _ in header[1:])], *(_cells(line) for line in comparison.lines)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"**{_title(comparison)}**\n\n{table}\n\n{_meaning(comparison)}\n"


def as_markdown(comparison: Comparison) -> str:
    """The page of a comparison: the sentence, the table, and what each strategy left out."""
    return f"# Strategies side by side\n\n{in_words(comparison)}\n\n{as_markdown_table(comparison)}"


def as_csv(comparison: Comparison) -> str:
    """One row a strategy, unrounded; an interval as `<name>_low` and `<name>_high`, what does not exist empty."""
    rows = [dict(_flat(line)) for line in comparison.lines]
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _flat(line: StrategyFigures) -> Iterator[tuple[str, object]]:
    for field in fields(line):
        match getattr(line, field.name):
            case Estimate(mean=mean, low=low, high=high):
                yield from {field.name: mean, f"{field.name}_low": low, f"{field.name}_high": high}.items()
            case PairedDifference(estimate=estimate, p_value=p_value):
                yield from {
                    field.name: estimate.mean,
                    f"{field.name}_low": estimate.low,
                    f"{field.name}_high": estimate.high,
                    f"{field.name}_p": p_value,
                }.items()
            case None:
                continue
            case value:
                yield field.name, value


def _cells(line: StrategyFigures) -> list[str]:
    if line.auc is None:
        return [line.strategy, f"diverged, {line.diverged} of {line.seeds + line.diverged}", *[_ABSENT] * (len(_HEADER) - 2)]
    difference = line.auc_difference
    return [
        line.strategy,
        _with_interval(line.auc, 4),
        "reference" if difference is None else _with_interval(difference.estimate, 4, signed=True),
        _ABSENT if line.adjusted_p is None else _p(line.adjusted_p),
        _ABSENT if line.log_loss is None else _short(f"{line.log_loss.mean:.4f}"),
        f"{line.rows_learned:,.0f}",
        f"{line.seconds:.1f}",
        _ABSENT if line.probe_spread is None else _short(f"{line.probe_spread.mean:.5f}"),
    ]


def _with_interval(estimate: Estimate | None, digits: int, *, signed: bool = False) -> str:
    if estimate is None:
        return _ABSENT
    mean = f"{estimate.mean:+.{digits}f}" if signed else f"{estimate.mean:.{digits}f}"
    return _short(f"{mean} ± {estimate.half_width:.{digits}f}")


def _short(text: str) -> str:
    """Without the zero before the point.

    >>> _short("-0.0125 ± 0.0030, 10.5")
    '-.0125 ± .0030, 10.5'
    """
    return re.sub(r"(?<!\d)0\.", ".", text)


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else _short(f"{value:.3f}")


def _title(comparison: Comparison) -> str:
    runs = comparison.runs_of(comparison.reference)
    judged = comparison.judged(runs[0])
    rows = sum(window.rows for window in judged)
    return f"{len(judged)} windows judged from {_hour(comparison.first_judged)} UTC, {rows:,} rows, {len(runs)} seeds"


def _meaning(comparison: Comparison) -> str:
    return (
        "Every window is predicted before it is learned; AUC and log loss are means of the windows' figures, weighted by rows. "
        f"±: 95 % interval over seeds (Student's t). *AUC less reference*: paired by seed, against {comparison.reference}; "
        "*Holm p*: of that difference, corrected for the number of strategies. *CPU s*: of learning the stream once, with one "
        "thread. *Probe spread*: standard deviation, within a window, of the log loss of the same rows, which nobody learns."
    )


def _limits(comparison: Comparison) -> Iterator[str]:
    seeds = len(comparison.runs_of(comparison.reference))
    if seeds < ENOUGH_SEEDS:
        yield f"With {seeds} seeds the intervals are wide; use {ENOUGH_SEEDS} or more."
    partial = [line for line in comparison.lines if line.auc is not None and line.rows_left > 0]
    if partial:
        shares = ", ".join(
            f"{line.strategy} {line.rows_learned / (line.rows_learned + line.rows_left):.1%}" for line in partial
        )
        yield f"Share of the rows that was learned, where it was not all: {shares}."
    diverged = [line.strategy for line in comparison.lines if line.diverged]
    if diverged:
        yield f"Diverged: {', '.join(diverged)}."


def _significant(lines: list[StrategyFigures], sign: int) -> list[StrategyFigures]:
    return [
        line
        for line in lines
        if line.auc_difference is not None
        and line.adjusted_p is not None
        and line.adjusted_p < SIGNIFICANT
        and sign * line.auc_difference.estimate.mean > 0
    ]


def _furthest(worse: list[StrategyFigures]) -> str:
    if not worse:
        return ""
    last = min(worse, key=_auc)
    assert last.auc_difference is not None
    return f", {last.strategy} by the most, {-last.auc_difference.estimate.mean:.4f}"


def _auc(line: StrategyFigures) -> float:
    assert line.auc is not None
    return line.auc.mean


def _hour(hours_since_epoch: int) -> str:
    return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(hours=hours_since_epoch):%Y-%m-%dT%H}"
