"""The status of a model, from its folder alone."""

from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_schemas.errors import ConfigError
from flows.status import status
from flows.terminal import run_command
from pipeline.outcome import UpdateReport
from pipeline.publishing.report import append_history
from pipeline.publishing.status import SHOWN_UPDATES, headline, status_page, status_rows

START = datetime(2026, 1, 1, tzinfo=UTC)

MakeReport = Callable[..., UpdateReport]


class Cells(HTMLParser):
    """Texts of the table's cells, and the names of all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


@pytest.fixture
def state(tmp_path: Path, report: MakeReport) -> Path:
    folder = tmp_path / "models/hourly"
    for hour in range(SHOWN_UPDATES + 2):
        append_history(folder, report(hour))
    (folder / "CURRENT").write_text(f"v{SHOWN_UPDATES + 2:06d}\n")
    return tmp_path


def test_the_page_has_the_last_week_newest_first(state: Path) -> None:
    status(state_dir=str(state))
    page = (state / "models/hourly/status.html").read_text()
    rows = [cell for cell in Cells(page).cells if cell.startswith("2026-")]
    assert len(rows) == SHOWN_UPDATES
    assert rows[0].startswith("2026-01-08 01:00")
    assert rows[-1].startswith("2026-01-01 02:00")
    assert 'src="data:image/png;base64,' in page


def test_the_terminal_shows_as_many_as_it_is_asked_for(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status(state_dir=str(state), last=3, page=str(state / "page.html"))
    said = capsys.readouterr().out
    assert "version 170 serves; 168 of 170 updates shown, all inside the budget" in said
    assert said.count("published") == 3
    assert "170 *" in said
    assert (state / "page.html").is_file()


def test_a_note_is_text_whatever_it_holds(report: MakeReport) -> None:
    hostile = report(0, notes=("<script>alert(1)</script>",))
    page = status_page("<b>", status_rows([hostile], 1), plot=None, now=START)
    assert "script" not in Cells(page).tags
    assert any("<script>alert(1)</script>" in cell for cell in Cells(page).cells)


def test_an_update_over_its_budget_is_marked_and_counted(report: MakeReport) -> None:
    reports = [report(0), report(1, seconds={"learn": 61.0})]
    late, _ = status_rows(reports, 2)
    assert late.over_budget
    assert late.serves
    assert "1 over the budget" in headline("hourly", reports, 2)


def test_a_model_that_never_published_says_so() -> None:
    assert headline("hourly", [], None) == "hourly: no update has published a model yet"


def test_wrong_parameters_name_the_way_out(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="last must be at least 1, got 0"):
        status(state_dir=str(state), last=0)
    assert run_command(status, status, ["--state-dir", str(state), "--model-name", "absent"], name="status") == 1
    assert "there is no model in" in capsys.readouterr().err


def test_after_a_rollback_the_headline_tells_of_the_version_that_serves(report: MakeReport) -> None:
    reports = [report(0), report(1), report(2, outcome="held", serving=2)]
    proven = "hourly: version 2 serves; 3 of 3 updates shown, all inside the budget; learned up to 2026-01-01 02:00 UTC"
    ahead = f"{proven}; version 3 has learned up to 2026-01-01 03:00 UTC and is not proven yet"
    assert headline("hourly", reports, 2, 3) == ahead
    assert headline("hourly", reports, 2) == proven
    assert "version 1 serves" in headline("hourly", reports, 1)
    assert "learned up to 2026-01-01 01:00 UTC" in headline("hourly", reports, 1)


def test_an_update_that_made_no_version_is_not_marked_as_the_one_that_serves(report: MakeReport) -> None:
    rejected, published = status_rows([report(0), report(1, outcome="rejected", version=1)], 1)
    assert (rejected.version, rejected.serves, rejected.attention) == ("-", False, True)
    assert (published.version, published.serves, published.attention) == ("1", True, False)
