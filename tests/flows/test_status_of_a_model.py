"""The status of a model that has learned: what waits, what is held aside, and the commands that decide on it."""

import json
import re
import shlex
from html import unescape
from pathlib import Path

import pytest

from data_schemas.dataset import load_spec
from data_schemas.errors import CheckpointError
from flows.held import held
from flows.settings import settings_for
from flows.status import status
from flows.terminal import run_command
from pipeline.config import UpdateConfig, overridden
from pipeline.data.held import decide, held_windows, hold_aside
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.data.windows import next_window
from pipeline.model_state import restore_or_create
from pipeline.pending import pending_of
from pipeline.update import run_update

STREAM = SyntheticConfig(hours=3, rows_per_hour=200, num_users=50, num_items=40, num_authors=8, late_share=0.0)
REASON = "rows: 3, where <b>90</b> to 110 are likely"


@pytest.fixture
def config(tmp_path: Path) -> UpdateConfig:
    """A model that has learned the first of three hours; the second is held aside, the third waits."""
    write_landing(STREAM, tmp_path / "landing")
    overrides = ["tracking.enabled=false", "model.hidden=[8]", "training.precision=fp32"]
    places = {"landing": str(tmp_path / "landing"), "state_dir": str(tmp_path / "a state")}
    config = settings_for(None, overrides, dataset="synthetic", **places)
    spec = load_spec("synthetic")
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=STREAM.hour_start(9))
    assert run_update(config, now=STREAM.hour_start(1))
    window = next_window(log, restore_or_create(config, spec).cursor, config.window, STREAM.hour_start(9))
    assert window
    hold_aside(
        config.model_dir,
        start=window.start,
        end=window.end,
        log_version=window.log_version,
        pieces=window.pieces,
        kind="alarm",
        reason=REASON,
        now=STREAM.hour_start(2),
    )
    return config


def rows_of_hour(config: UpdateConfig, hour: int) -> int:
    log = ClickLog.open_or_create(config.log_path, load_spec("synthetic"))
    start = int(STREAM.hour_start(hour).timestamp()) // 3600
    return sum(file.num_rows for file in log.files() if file.hour == start)


def test_what_waits_is_counted_apart_from_what_is_held(config: UpdateConfig) -> None:
    pending = pending_of(config)
    assert (pending.rows, pending.since, pending.until) == (rows_of_hour(config, 2), STREAM.hour_start(2), STREAM.hour_start(3))
    assert [window.num_rows for window in pending.held] == [rows_of_hour(config, 1)]
    assert pending.released == ()


def test_a_released_window_is_told_until_it_is_learned(config: UpdateConfig) -> None:
    decide(config.model_dir, "2026-01-01T01", "released")
    pending = pending_of(config)
    assert ([window.id for window in pending.released], pending.held) == (["2026-01-01T01"], ())
    assert run_update(config, now=STREAM.hour_start(3))
    assert pending_of(config).released == ()
    decided = [window.status for window in held_windows(config.model_dir)]
    assert decided == ["released"]


def test_what_waits_behind_a_released_window_is_not_blamed_on_its_size(config: UpdateConfig) -> None:
    small = overridden(config, ["window.max_rows=20"])
    capped = run_update(small, now=STREAM.hour_start(3))
    assert capped
    assert any("rows over window.max_rows wait" in note for note in capped.notes)
    decide(config.model_dir, "2026-01-01T01", "released")
    released = run_update(small, now=STREAM.hour_start(3))
    assert released
    assert any("a window that was released is learned by itself" in note for note in released.notes)
    assert not any("max_rows" in note for note in released.notes)


def test_a_discarded_window_waits_no_more(config: UpdateConfig) -> None:
    decide(config.model_dir, "2026-01-01T01", "discarded")
    pending = pending_of(config)
    assert (pending.rows, pending.held, pending.released) == (rows_of_hour(config, 2), (), ())


def test_the_page_shows_reason_and_commands_and_the_commands_work(
    config: UpdateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    status(state_dir=str(config.state_dir))
    said = capsys.readouterr().out
    assert f"{rows_of_hour(config, 2)} rows wait to be learned, of 2026-01-01 02:00 to 2026-01-01 03:00 UTC; " in said
    assert f"{rows_of_hour(config, 1)} rows in 1 window that is held aside" in said
    assert f"held aside: 2026-01-01 01:00 to 02:00 UTC, {rows_of_hour(config, 1)} rows, by the alarm: {REASON}" in said
    page = (config.model_dir / "status.html").read_text()
    assert "where &lt;b&gt;90&lt;/b&gt; to 110" in page
    release, discard = (shlex.split(unescape(text)) for text in re.findall(r"<code>(.*?)</code>", page))
    assert (release[:2], discard[-2:]) == (["python", "flows/held.py"], ["--discard", "2026-01-01T01"])
    assert run_command(held, held, release[2:], name="held") == 0
    assert [window.status for window in held_windows(config.model_dir)] == ["released"]


def test_alerts_that_never_left_are_counted(config: UpdateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"at": "2026-01-01T01:02:03+00:00", "problem": "the webhook answered 404", "alert": {}}
    (config.model_dir / "undelivered_alerts.jsonl").write_text(2 * (json.dumps(line) + "\n"))
    status(state_dir=str(config.state_dir))
    said = capsys.readouterr().out
    assert "2 alerts could not be delivered, the last at 2026-01-01 01:02 UTC: the webhook answered 404" in said


def test_what_cannot_be_told_is_said_and_nothing_is_made(config: UpdateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config.log_path.rename(config.log_path.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match="there is no click log in"):
        pending_of(config)
    status(state_dir=str(config.state_dir))
    assert "what waits cannot be told: there is no click log in" in capsys.readouterr().out
    assert not config.log_path.exists()
