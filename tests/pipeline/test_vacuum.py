"""Vacuuming takes what nothing needs, and nothing else."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_schemas.click_log import RejectedRow, click_log_schema
from data_schemas.dataset import Categorical, DatasetSpec, TimeColumn
from pipeline.config import UpdateConfig, WindowConfig, load_config
from pipeline.data.compaction import compact
from pipeline.data.lake import ClickLog, LogFile, Quarantine
from pipeline.data.windows import Cursor, Window, next_window, read_window
from pipeline.publishing.checkpoint import Manifest, PendingRows, point_to
from pipeline.vacuum import VacuumReport, vacuum

SPEC = DatasetSpec(name="shop", time=TimeColumn(column="at"), event_key=("at",), categorical=(Categorical(name="item"),))
NOW = datetime.now(UTC)
HOUR = int(NOW.timestamp()) // 3600 - 100 * 24
DAY = timedelta(days=1)


@pytest.fixture
def config(tmp_path: Path) -> UpdateConfig:
    eager = ["maintenance.compact_files=2", "maintenance.compact_after_hours=0", "tracking.enabled=false"]
    return load_config(overrides=[f"state_dir={tmp_path}", *eager])


@pytest.fixture
def log(config: UpdateConfig) -> ClickLog:
    return ClickLog.open_or_create(config.log_path, SPEC)


def written(log: ClickLog, hour: int, first: int, num_rows: int = 2) -> list[LogFile]:
    """Files of rows numbered from `first` on, in no commit yet."""
    number = np.arange(first, first + num_rows)
    columns = {
        "event_time": pa.array(number + hour * 3_600_000_000).cast(pa.timestamp("us", tz="UTC")),
        "event_key": pa.array(number),
        "item": [f"item-{n}" for n in number],
    }
    writer = log.write()
    writer.add(hour, pa.table(columns, schema=click_log_schema(SPEC)))
    return writer.close()


def append(log: ClickLog, hour: int, first: int, num_rows: int = 2) -> list[LogFile]:
    files = written(log, hour, first, num_rows)
    log.append(files, f"file-{first}")
    return files


def make_older(folder: Path, age: timedelta) -> None:
    """As if everything that is there had been written so long ago."""
    for path in folder.rglob("*"):
        at = path.stat().st_mtime - age.total_seconds()
        os.utime(path, (at, at))


def checkpoint(config: UpdateConfig, version: int, log: ClickLog, consumed: int, pending: list[LogFile] | None = None) -> None:
    """A version of the model that serves from now on; it has learned up to a version of the log, but for some files."""
    waiting = [PendingRows(path=f.path, hour=f.hour, num_rows=f.num_rows, bitmap=None) for f in pending or []]
    manifest = Manifest(
        version=version,
        created="",
        dataset="shop",
        spec_fingerprint="",
        model_fingerprint="",
        precision="fp32",
        steps=1,
        log_id=log.table_id,
        log_version=consumed,
        window_start=HOUR,
        window_end=HOUR + 1,
        window_seed=(0,),
        permutation_position=0,
        plan=(),
        pending=tuple(waiting),
        moments=None,
    )
    folder = config.model_dir / "checkpoints" / f"v{version:06d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    point_to(config.model_dir, version)


def swept(config: UpdateConfig, *overrides: str, dry_run: bool = False) -> VacuumReport:
    kept = config.maintenance.model_copy(update=dict(_setting(text) for text in overrides))
    return vacuum(config.model_copy(update={"maintenance": kept}), SPEC, now=NOW, dry_run=dry_run)


def _setting(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


def on_disk(log: ClickLog) -> set[str]:
    return {str(path.relative_to(log.root)) for path in log.root.rglob("part-*.parquet")}


def test_files_that_were_compacted_away_go_once_no_update_can_be_at_them(config: UpdateConfig, log: ClickLog) -> None:
    old = {file.path for first in (0, 2) for file in append(log, HOUR, first)}
    make_older(log.root, 30 * DAY)
    compact(log, config.maintenance)
    (active,) = (file.path for file in log.files())
    report = swept(config)
    assert (report.files, report.files_waiting) == (0, 2)
    assert on_disk(log) == old | {active}
    make_older(log.root, 8 * DAY)
    size = sum((log.root / path).stat().st_size for path in old)
    would = swept(config, dry_run=True)
    assert (would.dry_run, would.files, would.bytes) == (True, 2, size)
    assert on_disk(log) == old | {active}
    assert (swept(config).files, swept(config).files) == (2, 0)
    assert on_disk(log) == {active}
    log.refresh()
    assert sorted(log.keys_of(log.files()).tolist()) == [0, 1, 2, 3]


def test_files_that_no_commit_names_go_once_no_writer_can_be_at_them(config: UpdateConfig, log: ClickLog) -> None:
    append(log, HOUR, 0)
    (killed,) = written(log, HOUR, 2)
    make_older(log.root, 2 * DAY)
    (at_work,) = written(log, HOUR, 4)
    assert swept(config).files == 1
    assert killed.path not in on_disk(log)
    log.append([at_work], "file-4")
    assert sorted(log.keys_of(log.files()).tolist()) == [0, 1, 4, 5]


def test_a_file_that_a_kept_checkpoint_waits_for_stays(config: UpdateConfig, log: ClickLog) -> None:
    waiting = append(log, HOUR, 0)
    append(log, HOUR, 2)
    checkpoint(config, 1, log, log.version, waiting)
    compact(log, config.maintenance)
    make_older(log.root, 30 * DAY)
    assert swept(config).files == 1
    assert waiting[0].path in on_disk(log)


def test_old_hours_leave_once_every_model_has_learned_them(config: UpdateConfig, log: ClickLog) -> None:
    append(log, HOUR, 0)
    late = append(log, HOUR + 1, 2, 3)
    new = append(log, HOUR + 95 * 24, 5, 4)
    checkpoint(config, 1, log, log.version, late)
    assert swept(config).log_rows == 0, "nothing is said of the log: all of it is kept"
    report = swept(config, "log_days=90")
    assert report.log_rows == 2
    assert "1 files of old hours stay" in report.notes[0]
    log.refresh()
    assert log.files() == sorted(late + new)
    checkpoint(config, 2, log, log.version)
    assert swept(config, "log_days=90").log_rows == 3
    log.refresh()
    assert log.files() == new


def test_a_model_that_comes_back_later_counts_what_it_missed(config: UpdateConfig, log: ClickLog) -> None:
    append(log, HOUR, 0, 5)
    learned = window_of(log, Cursor())
    cursor = learned.cursor_after(np.array([False, True, True, False, True]))
    append(log, HOUR + 95 * 24, 5, 4)
    swept(config, "log_days=90")
    log.refresh()
    window = window_of(log, cursor)
    assert read_window(log, window, ["event_key"]).column("event_key").to_pylist() == [5, 6, 7, 8]
    assert window.removed_rows == 3


def window_of(log: ClickLog, cursor: Cursor) -> Window:
    window = next_window(log, cursor, WindowConfig(), NOW)
    assert window is not None
    return window


def test_no_hour_leaves_while_the_serving_checkpoint_cannot_be_read(config: UpdateConfig, log: ClickLog) -> None:
    append(log, HOUR, 0)
    append(log, HOUR + 95 * 24, 2)
    checkpoint(config, 1, log, log.version)
    (config.model_dir / "checkpoints" / "v000001" / "manifest.json").write_text("{")
    report = swept(config, "log_days=90")
    assert report.log_rows == 0
    assert "no hour leaves the click log" in report.notes[-1]


def test_old_rejected_rows_leave_and_their_files_stay_known(config: UpdateConfig) -> None:
    quarantine = Quarantine.open_or_create(config.quarantine_path)
    for name, age in (("old", 100 * DAY), ("new", DAY)):
        rows = quarantine.write(name, NOW - age)
        rows.add([RejectedRow(row=1, kind="bad", reason="bad", raw="")])
        quarantine.append(rows.close(), name, name)
    came = NOW + 89 * DAY
    kept = config.model_copy(update={"maintenance": config.maintenance.model_copy(update={"quarantine_days": 90})})
    assert vacuum(kept, SPEC, now=came).quarantine_files == 0
    assert vacuum(kept, SPEC, now=came + 2 * DAY, dry_run=True).quarantine_files == 2
    quarantine.refresh()
    assert quarantine.rows().num_rows == 2
    assert vacuum(kept, SPEC, now=came + 2 * DAY).quarantine_files == 2
    quarantine.refresh()
    assert quarantine.rows().num_rows == 0
    assert quarantine.has_ingested("old")
