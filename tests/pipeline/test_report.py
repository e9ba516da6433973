"""The report says what happened, and the history keeps it through crashes."""

import dataclasses
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from models.id_table import IdFigures
from pipeline.evaluation.diagnosis import Diagnosis
from pipeline.evaluation.metrics import Interval, measure
from pipeline.evaluation.stability import Change, Stability
from pipeline.outcome import LossPoint, PlanRecord, UpdateReport
from pipeline.publishing.report import TABLE_HEADER, append_history, as_markdown, as_row, as_table, read_history, verdict

BEFORE = measure([1, 0, 1, 0, 0, 1], [0.9, 0.2, 0.3, 0.4, 0.1, 0.6], [1, 1, 2, 2, 3, 3])
FROZEN = measure([1, 0, 1, 0, 0, 1], [0.3, 0.2, 0.3, 0.4, 0.5, 0.6], [1, 1, 2, 2, 3, 3])
STEADINESS = Stability(
    probe_points=24,
    probe_deviation=0.00123,
    probe_spikes=2,
    gradient_variation=0.5,
    auc_change=Change(value=-0.02, interval=Interval(low=-0.03, high=-0.01)),
    churn=0.01,
)
ONE_CLASS = measure([0, 0], [0.2, 0.3], [1, 2])


def report(**changes: Any) -> UpdateReport:
    start = datetime(2026, 1, 1, 5, tzinfo=UTC)
    made = UpdateReport(
        dataset="synthetic",
        model_name="hourly",
        outcome="published",
        version=12,
        log_version=40,
        window_start=start,
        window_end=start + timedelta(hours=1),
        rows=41230,
        late_rows=7,
        rows_learned=41000,
        rows_pending=230,
        batch_size=1024,
        precision="bf16",
        before=BEFORE,
        after=BEFORE,
        frozen=FROZEN,
        evaluated_rows=1000,
        seconds={"load": 0.5, "learn": 2.5},
        budget_seconds=60.0,
        plan=(PlanRecord(step=0, position=0, batch_size=1024, learning_rate=0.002, reason="a | b\nc"),) * 10,
        loss_curve=(LossPoint(rows=64, seconds=0.1, log_loss=0.5),),
        skipped_steps=1,
        git_commit="0123456789abcdef",
        notes=("2 lists were capped",),
    )
    return dataclasses.replace(made, **changes)


def test_admitted_ids_have_a_table_of_their_own() -> None:
    figures = IdFigures(stored=12345, admitted=67, evicted=8, waiting=910, forgotten=0, new_share=0.0512, shared_share=0.0307)
    text = as_markdown(report(ids={"item_id": figures}))
    assert "| item_id | 12,345 | 67 | 8 | 910 | 0 | 5.1% | 3.1% |" in text
    assert "## Ids" not in as_markdown(report())


def test_the_verdict_is_the_first_sentence_and_names_the_figures() -> None:
    assert verdict(report()) == (
        "Version 12 learned 41,000 of 41,230 rows of 2026-01-01 05:00 to 06:00 UTC in 3.0 s of its 60 s; before it learned "
        "them, the model ranked them with AUC 0.889, 0.333 above the model that stopped learning."
    )
    assert as_markdown(report()).split("\n\n")[1] == verdict(report())


def test_the_verdict_leaves_out_what_does_not_exist() -> None:
    assert "AUC" not in verdict(report(before=ONE_CLASS))
    assert "AUC" not in verdict(report(before=None, after=None, frozen=None))
    assert "stopped" not in verdict(report(frozen=None))
    empty = verdict(report(outcome="empty", before=None, rows=0))
    assert empty == "There was nothing to learn in 2026-01-01 05:00 to 06:00 UTC; version 12 goes on serving."


def test_the_markdown_has_figures_rows_budget_plan_notes_and_plots() -> None:
    text = as_markdown(report(), {"AUC by hour": "data:image/png;base64,AA"})
    assert "| AUC | 0.8889 [0.5809, 1.0000] | 0.8889 [0.5809, 1.0000] | 0.5556 [0.0000, 1.0000] |" in text
    assert "| pending for the next update | 230 |" in text
    assert "| learn | 2.50 | 4.2% |" in text
    assert "uniform sample of 1,000 of 41,230" in text
    assert "and 2 more in the checkpoint's manifest" in text
    assert "- 2 lists were capped" in text
    assert "![AUC by hour](data:image/png;base64,AA)" in text
    assert "steps skipped" in text


def test_the_budget_tells_what_was_measured_of_a_step() -> None:
    text = as_markdown(report(fixed_seconds=0.0021, row_seconds=1.234e-5, noise_scale=5678.4))
    assert "An undisturbed step takes 2.10 ms and 12.34 µs a row." in text
    assert "Gradient noise scale of the dense network: 5,678 rows." in text
    plain = as_markdown(report())
    assert "undisturbed step" not in plain
    assert "noise scale" not in plain


def test_rows_that_the_plan_left_out_are_counted_where_there_are_any() -> None:
    planned = PlanRecord(step=0, position=0, batch_size=512, learning_rate=0.004, reason="short of time", keep_rate=0.255)
    text = as_markdown(report(rows_thinned=12_345, plan=(planned,)))
    assert "| left out for want of time | 12,345 |" in text
    assert "| 0 | 512 | 25.5% | 0.004 | short of time |" in text
    assert "want of time" not in as_markdown(report())


def test_the_stability_has_the_verdict_its_reason_and_every_measure() -> None:
    found = Diagnosis(verdict="learning_rate_too_high", reason="a dense step changed the log loss by +0.1")
    text = as_markdown(report(stability=STEADINESS, diagnosis=found))
    assert "Diagnosis: **learning rate too high**: a dense step changed the log loss by +0.1." in text
    for row in (
        "| log loss of fixed rows over steps: standard deviation | 0.00123 |",
        "| spikes of it | 2 |",
        "| gradient norms: standard deviation / mean | 0.50 |",
        "| published probabilities: mean change | 0.0100 |",
        "| published probabilities: change that 1 % exceed | - |",
        "| AUC: change from the window before | -0.0200 [-0.0300, -0.0100] |",
    ):
        assert row in text
    assert "log loss: change" not in text


def test_a_verdict_that_was_not_given_says_why_not() -> None:
    unjudged = Diagnosis(verdict=None, reason="fewer than 6 steps were probed")
    text = as_markdown(report(stability=STEADINESS, diagnosis=unjudged))
    assert "Diagnosis: not judged: fewer than 6 steps were probed." in text
    assert "Diagnosis: **healthy**." in as_markdown(
        report(stability=STEADINESS, diagnosis=Diagnosis(verdict="healthy", reason=""))
    )
    assert "## Stability" not in as_markdown(report())


def test_the_history_keeps_what_the_next_update_plans_and_judges_by(tmp_path: Path) -> None:
    measured = {"fixed_seconds": 0.002, "row_seconds": 1.5e-5, "noise_scale": 1234.0, "rows_thinned": 9}
    found = Diagnosis(verdict="drift", reason="log loss rose")
    append_history(tmp_path, report(stability=STEADINESS, diagnosis=found, **measured))
    (entry,) = read_history(tmp_path)
    assert {name: entry[name] for name in measured} == measured
    assert entry["diagnosis"] == {"verdict": "drift", "reason": "log loss rose"}
    assert entry["stability"]["auc_change"] == {"value": -0.02, "interval": {"low": -0.03, "high": -0.01}}


def test_words_from_outside_cannot_break_a_table() -> None:
    row = next(line for line in as_markdown(report()).splitlines() if "0.002" in line)
    assert row == "| 0 | 1,024 | 100.0% | 0.002 | a \\| b c |"


def test_every_table_row_has_as_many_cells_as_its_header() -> None:
    for made in (report(), report(before=ONE_CLASS, after=None, frozen=None, plan=(), notes=())):
        for table in as_markdown(made).split("\n\n"):
            if table.startswith("|"):
                cells = {line.replace("\\|", "").count("|") for line in table.splitlines()}
                assert len(cells) == 1


def test_the_terminal_table_fits_80_columns() -> None:
    assert as_row(report()) == ("2026-01-01T05", "41,230", "1,024", "3.0 of 60", "0.8889", "0.5556", "0.4432", "1.200")
    assert len(as_row(report())) == len(TABLE_HEADER)
    wide = report(rows=1_234_567, seconds={"learn": 593.1}, budget_seconds=600)
    lines = render(wide)
    assert "2026-01-01T05  1,234,567  1,024  593.1 of 600    0.8889  0.5556  0.4432  1.200" in lines
    assert "…" not in lines


def render(made: UpdateReport) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(as_table([made]))
    return capture.get()


def test_a_figure_that_does_not_exist_is_a_dash() -> None:
    assert as_row(report(before=ONE_CLASS, frozen=None))[4:] == ("-", "-", "0.2899", "-")
    assert as_row(report(before=None, frozen=None, batch_size=0))[2:] == ("-", "3.0 of 60", "-", "-", "-", "-")


def test_the_history_round_trips(tmp_path: Path) -> None:
    local = timezone(timedelta(hours=9))
    append_history(tmp_path / "m", report(window_start=datetime(2026, 1, 1, 14, tzinfo=local)))
    append_history(tmp_path / "m", report(version=13, before=ONE_CLASS, frozen=None))
    first, second = read_history(tmp_path / "m")
    assert first["window_start"] == "2026-01-01T05:00:00+00:00"
    assert first["before"]["auc"] == BEFORE.auc
    assert BEFORE.auc_interval is not None
    assert first["before"]["auc_interval"] == {"low": BEFORE.auc_interval.low, "high": BEFORE.auc_interval.high}
    assert first["seconds"] == {"load": 0.5, "learn": 2.5}
    assert first["notes"] == ["2 lists were capped"]
    assert (second["version"], second["before"]["auc"], second["frozen"]) == (13, None, None)
    left_out = {field.name for field in dataclasses.fields(UpdateReport)} - set(first)
    assert left_out == {"plan", "loss_curve", "sampling"}


def test_a_model_without_updates_has_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []


def test_an_update_that_is_reported_twice_counts_once(tmp_path: Path) -> None:
    append_history(tmp_path, report())
    append_history(tmp_path, report(rows=5))
    assert [entry["rows"] for entry in read_history(tmp_path)] == [5]


@given(cut=st.integers(min_value=1, max_value=10_000))
def test_a_torn_last_line_costs_only_itself(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("history")
    for version in (1, 2):
        append_history(folder, report(version=version))
    path = folder / "history.jsonl"
    whole = path.read_bytes()
    second = len(whole) // 2
    path.write_bytes(whole[: second + 1 + cut % (second - 2)])
    assert [entry["version"] for entry in read_history(folder)] == [1]
    append_history(folder, report(version=3))
    assert [entry["version"] for entry in read_history(folder)] == [1, 3]


@given(st.lists(st.binary(max_size=30)))
def test_any_bytes_in_the_history_are_skipped(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("history")
    (folder / "history.jsonl").write_bytes(b"\n".join(lines))
    append_history(folder, report())
    assert read_history(folder)[-1]["version"] == 12


def test_a_history_line_is_plain_json_without_nan(tmp_path: Path) -> None:
    append_history(tmp_path, report())
    json.loads((tmp_path / "history.jsonl").read_text(), parse_constant=pytest.fail)
    with pytest.raises(ValueError, match="JSON compliant"):
        append_history(tmp_path, report(seconds={"load": np.nan}))
