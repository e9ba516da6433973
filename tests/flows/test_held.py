"""The command that lists windows held aside, and decides on them."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from filelock import FileLock

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CheckpointError, ConfigError
from flows.held import held
from flows.terminal import run_command
from pipeline.config import WindowConfig
from pipeline.data.held import held_windows, hold_aside
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.windows import Cursor, next_window

SPEC = DatasetSpec.model_validate(
    {
        "name": "shop",
        "time": {"column": "at"},
        "label": {"column": "clicked"},
        "event_key": ("id",),
        "categorical": ({"name": "id", "type": "integer"},),
    }
)
NOW = datetime(2026, 1, 9, tzinfo=UTC)


@pytest.fixture
def log(tmp_path: Path) -> ClickLog:
    """Two hours of three rows."""
    (tmp_path / "landing").mkdir()
    for hour in (5, 6):
        rows = [f"{hour}{number},2026-01-01T0{hour}:10:00Z,{number % 2}" for number in range(3)]
        (tmp_path / "landing" / f"{hour}.csv").write_text("\n".join(["id,at,clicked", *rows]) + "\n")
    log = ClickLog.open_or_create(tmp_path / "state/click_log", SPEC)
    quarantine = Quarantine.open_or_create(tmp_path / "state/quarantine")
    ingest_landing(str(tmp_path / "landing"), log, quarantine, SPEC, now=NOW)
    return log


@pytest.fixture
def state(tmp_path: Path, log: ClickLog) -> Path:
    """The first of the two hours is held aside."""
    window = next_window(log, Cursor(), WindowConfig(), NOW)
    assert window
    hold_aside(
        tmp_path / "state/models/hourly",
        start=window.start,
        end=window.end,
        log_version=window.log_version,
        pieces=window.pieces,
        kind="alarm",
        reason="rows: 3, where the last 7 days make 90 to 110 likely",
        now=NOW,
    )
    return tmp_path / "state"


def next_start(log: ClickLog, state: Path) -> str | None:
    window = next_window(log, Cursor(), WindowConfig(), NOW, held_windows(state / "models/hourly"))
    return f"{window.start % 24}, {window.num_rows} rows" if window else None


def test_the_list_names_window_rows_and_reason(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held(state_dir=str(state))
    assert capsys.readouterr().out == (
        "2026-01-01T05  held  2026-01-01 05:00 to 06:00 UTC, 3 rows, by the alarm: "
        "rows: 3, where the last 7 days make 90 to 110 likely\n"
    )


def test_a_released_window_is_the_next_one(state: Path, log: ClickLog, capsys: pytest.CaptureFixture[str]) -> None:
    assert next_start(log, state) == "6, 3 rows"
    assert run_command(held, held, ["--state-dir", str(state), "--release", "2026-01-01T05"], name="held") == 0
    assert "2026-01-01T05 was held and is released: 3 rows, the next update learns it" in capsys.readouterr().out
    assert next_start(log, state) == "5, 3 rows"


def test_a_discarded_window_stays_out(state: Path, log: ClickLog, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(held, held, ["--state-dir", str(state), "--discard", "2026-01-01T05"], name="held") == 0
    assert "2026-01-01T05 was held and is discarded: 3 rows, it is never learned" in capsys.readouterr().out
    assert next_start(log, state) == "6, 3 rows"
    with pytest.raises(CheckpointError, match="was discarded before"):
        held(state_dir=str(state), release="2026-01-01T05")


def test_an_update_at_work_is_not_disturbed(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(state / "models/hourly/lock"):
        words = ["--state-dir", str(state), "--release", "2026-01-01T05", "--wait", "0.1"]
        assert run_command(held, held, words, name="held") == 75
    assert "is held after 0.1 s of waiting by" in capsys.readouterr().err
    assert [window.status for window in held_windows(state / "models/hourly")] == ["held"]


def test_wrong_parameters_name_the_way_out(state: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no window '2026-01-01T09' is held aside in .*; held are: 2026-01-01T05"):
        held(state_dir=str(state), release="2026-01-01T09")
    with pytest.raises(CheckpointError, match=r"no window '\.\./\.\./x' is held aside"):
        held(state_dir=str(state), discard="../../x")
    with pytest.raises(ConfigError, match="two decisions"):
        held(state_dir=str(state), release="a", discard="b")
    with pytest.raises(ConfigError, match="there is no model in"):
        held(state_dir=str(state), model_name="absent")


def test_a_model_without_held_windows_says_so(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (state / "models/nightly").mkdir()
    held(state_dir=str(state), model_name="nightly")
    assert capsys.readouterr().out == "nightly: no window was ever held aside\n"
