"""A cluster of two workers makes the click log that one process makes."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import ConfigError, DataError
from flows import cluster as cluster_module
from flows.cluster import run_spread
from pipeline.config import load_config
from pipeline.data.ingest import IngestReport, Spread, Stage, ingest_landing
from pipeline.data.lake import ClickLog, Quarantine, RowRange
from pipeline.data.landing import LandingFile
from pipeline.data.staging import StagedFile, UnstagedFile

START = datetime(2024, 5, 1, tzinfo=UTC)
NOW = datetime(2024, 6, 1, tzinfo=UTC)
SPEC = DatasetSpec.model_validate(
    {
        "name": "shop",
        "time": {"column": "at"},
        "label": {"column": "clicked"},
        "event_key": ("event_id",),
        "categorical": ({"name": "item"},),
    }
)


class Place:
    """The same landing folder, with a click log and a quarantine of its own."""

    def __init__(self, root: Path, landing: Path) -> None:
        self.landing = landing
        self.log = ClickLog.open_or_create(root / "log", SPEC)
        self.quarantine = Quarantine.open_or_create(root / "quarantine")

    def ingest(self, spread: Spread = map) -> IngestReport:
        return ingest_landing(str(self.landing), self.log, self.quarantine, SPEC, now=NOW, spread=spread)

    def ingest_at(self, cluster: str, wrap: Callable[[Stage], Stage] = lambda stage: stage) -> IngestReport:
        """Through Prefect, as a flow does it."""
        reports: list[IngestReport] = []

        @flow(persist_result=False)
        def around() -> None:
            ingest = lambda spread: self.ingest(lambda stage, files: spread(wrap(stage), files))  # noqa: E731
            reports.append(run_spread("ingest", cluster, ingest))

        around()
        return reports[0]

    def rows(self) -> dict[int, list[dict[str, Any]]]:
        """By hour, in the order in which a window has them."""
        found: dict[int, list[dict[str, Any]]] = {}
        for file in self.log.files():
            part = self.log.read([RowRange.whole(file)], self.log.schema.names)
            found.setdefault(file.hour, []).extend(part.to_pylist())
        return found

    def rejected(self) -> list[dict[str, Any]]:
        rows = self.quarantine.rows().drop_columns(["ingested_at"]).to_pylist()
        return sorted(rows, key=lambda row: json.dumps(row))

    def orphans(self) -> set[str]:
        found = {str(path.relative_to(self.log.root)) for path in self.log.root.rglob("part-*.parquet")}
        return found - {file.path for file in self.log.files()}


@pytest.fixture
def landing(tmp_path: Path) -> Path:
    """Twelve files that share hours and events, a broken one, one of unknown format, and rows that break the declaration."""
    folder = tmp_path / "landing"
    folder.mkdir()
    for number in range(12):
        events = [*range(40 * number, 40 * number + 50), 40 * number]
        lines = [f"e{event},{(START + timedelta(minutes=5 * event)).isoformat()},{event % 2},i{event % 7}" for event in events]
        lines += ["late,no time at all,1,i1"] if number % 3 == 0 else []
        (folder / f"{number:02d}.csv").write_text("\n".join(["event_id,at,clicked,item", *lines]) + "\n")
    (folder / "05-broken.csv").write_text("event_id,at\n1,2\n")
    (folder / "06.unknown").write_text("?")
    return folder


@pytest.mark.usefixtures("temporary_server")
class TestWithAServer:
    def test_two_workers_make_the_log_that_one_process_makes_though_one_dies(
        self, tmp_path: Path, landing: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cluster_module, "GROUP_FILES", 3)
        alone, spread = Place(tmp_path / "alone", landing), Place(tmp_path / "spread", landing)
        expected, died = alone.ingest(), tmp_path / "died"

        def die_once(stage: Stage) -> Stage:
            def mortal(file: LandingFile) -> StagedFile | UnstagedFile:
                if file.path.endswith("04.csv") and not died.exists():
                    died.touch()
                    os._exit(9)
                return stage(file)

            return mortal

        report = spread.ingest_at("local:2", die_once)
        assert died.exists()
        assert report == expected
        assert (report.rows_rejected, report.files_broken, report.files_unknown) == (4, 1, 1)
        assert report.rows_accepted == 490
        assert report.rows_duplicate == 12 * 51 - 490
        assert spread.rows() == alone.rows()
        assert spread.rejected() == alone.rejected()
        assert alone.orphans() == set()
        # of the worker that died, a task at work and one done: vacuum takes them
        assert len(spread.orphans()) <= 3 * 6 * 2
        assert replace(spread.ingest(), log_version=0) == replace(alone.ingest(), log_version=0)

    @pytest.mark.slow
    def test_a_file_that_takes_every_worker_down_waits_and_keeps_no_other_out(self, tmp_path: Path, landing: Path) -> None:
        place = Place(tmp_path / "spread", landing)

        def always_die(stage: Stage) -> Stage:
            def mortal(file: LandingFile) -> StagedFile | UnstagedFile:
                if file.path.endswith("04.csv"):
                    os._exit(9)
                return stage(file)

            return mortal

        report = place.ingest_at("local:2", always_die)
        assert (report.files_read, report.files_unreadable, report.files_broken) == (11, 1, 1)
        assert any("04.csv: the workers that read it died" in line for line in report.lines())
        again = place.ingest()
        assert (again.files_read, again.files_skipped) == (1, 12)

    def test_a_scheduler_that_does_not_answer_is_named(
        self, tmp_path: Path, landing: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 1)
        with pytest.raises(DataError, match=r"no Dask scheduler .* 'tcp://127.0.0.1:9'"):
            Place(tmp_path / "spread", landing).ingest_at("tcp://127.0.0.1:9")


def test_without_the_packages_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(ConfigError, match=r"requirements/cluster\.txt"):
        run_spread("ingest", "local:2", lambda spread: None)


@pytest.mark.parametrize("wrong", ["local", "local:0", "two", "host:8786"])
def test_a_cluster_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="cluster"):
        load_config(overrides=[f"cluster={wrong}"])
