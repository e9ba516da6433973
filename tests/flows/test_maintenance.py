"""The flows that keep the state folder small, as a user calls them."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from data_schemas.dataset import load_spec
from flows.compact import compact
from flows.replace_hour import replace_hour
from flows.terminal import run_command
from flows.vacuum import vacuum
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine

DECLARATION = """
name = "shop"
event_key = ["event_id"]
[time]
column = "at"
[label]
column = "clicked"
[[categorical]]
name = "item"
"""


def test_many_files_become_one_and_the_old_ones_stay_for_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declaration, landing, state = tmp_path / "shop.toml", tmp_path / "landing", tmp_path / "state"
    declaration.write_text(DECLARATION)
    landing.mkdir()
    for number in range(3):
        (landing / f"{number}.csv").write_text(f"event_id,at,clicked,item\n{number},2024-01-01T05:00:00Z,1,a\n")
    spec = load_spec(declaration)
    log, quarantine = ClickLog.open_or_create(state / "click_log", spec), Quarantine.open_or_create(state / "quarantine")
    ingest_landing(str(landing), log, quarantine, spec, now=datetime.now(UTC))
    eager = ["maintenance.compact_files=2", "maintenance.compact_after_hours=0", "tracking.enabled=false"]
    compact.fn(dataset=str(declaration), state_dir=str(state), overrides=eager)
    vacuum.fn(dataset=str(declaration), state_dir=str(state), dry_run=True, overrides=eager)
    printed = capsys.readouterr().out
    assert "3 files of 1 hours became 1, 3 rows" in printed
    assert "vacuum: 0 files would be deleted, 0 bytes; 3 that are no longer active stay for now" in printed
    log.refresh()
    assert [file.num_rows for file in log.files()] == [3]


def test_an_hour_is_replaced_and_the_counts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declaration, state = tmp_path / "shop.toml", tmp_path / "state"
    declaration.write_text(DECLARATION)
    for folder, keys in (("landing", (1, 2, 3)), ("corrected", (2, 3, 4))):
        (tmp_path / folder).mkdir()
        rows = [f"{key},2024-01-01T05:00:00Z,1,{'b' if key == 3 and folder == 'corrected' else 'a'}" for key in keys]
        (tmp_path / folder / "5.csv").write_text("\n".join(["event_id,at,clicked,item", *rows]) + "\n")
    spec = load_spec(declaration)
    log, quarantine = ClickLog.open_or_create(state / "click_log", spec), Quarantine.open_or_create(state / "quarantine")
    ingest_landing(str(tmp_path / "landing"), log, quarantine, spec, now=datetime.now(UTC))
    words = ["2024-01-01T05", str(tmp_path / "corrected"), "--dataset", str(declaration), "--state-dir", str(state)]
    assert run_command(replace_hour.fn, replace_hour.fn, words, name="replace-hour") == 0
    assert (
        "hour 2024-01-01 05:00 UTC: 2 rows stay, 1 of them with other values, 1 are new and are learned next, 1 have left"
        in capsys.readouterr().out
    )
    assert run_command(replace_hour.fn, replace_hour.fn, ["2024-01-01T05:30", *words[1:]], name="replace-hour") == 1
    assert "is not on the hour" in capsys.readouterr().err
    log.refresh()
    assert [file.num_rows for file in log.files()] == [3]
