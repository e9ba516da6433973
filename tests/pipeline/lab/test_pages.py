"""What readers see of the findings: a Markdown section and an HTML page."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from data_schemas.errors import ConfigError
from pipeline.lab import epochs
from pipeline.lab.catalogue import EXPERIMENTS
from pipeline.lab.running import Result, chosen, name_of, result_of
from pipeline.publishing.lab import HEADING, as_csv, html_page, image_name, markdown_table, renewed, section

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def result() -> Result:
    return result_of(epochs.run)


def test_the_section_holds_sentence_figure_and_table(result: Result) -> None:
    text = section([result], machine="2 processor cores")
    assert text.startswith(HEADING)
    assert result.finding.sentence in text
    assert "(images/lab_epochs.png)" in text
    assert markdown_table(result.finding) in text
    assert "2 processor cores" in text


def test_what_stands_above_the_section_stays(result: Result) -> None:
    text = section([result], machine="here")
    assert renewed(f"# Title\n\nWords.\n\n{HEADING}\n\nold\n", text) == f"# Title\n\nWords.\n\n{text}"
    with pytest.raises(ValueError, match="the page has no line"):
        renewed("# Title\n", text)


def test_the_page_shows_a_finding_as_text_and_never_as_markup(result: Result) -> None:
    odd = replace(result, finding=replace(result.finding, sentence="a < b & <script>alert(1)</script>."))
    page = html_page([odd], machine="here", now=datetime(2026, 1, 1, tzinfo=UTC))
    assert "<script>" not in page
    assert "a &lt; b &amp; &lt;script&gt;" in page
    assert "data:image/png;base64," in page
    assert "2026-01-01 00:00" in page


def test_a_bar_in_a_cell_does_not_break_the_table(result: Result) -> None:
    odd = replace(result.finding, columns=("a", "b"), rows=(("|G|^2", 1.0),))
    assert markdown_table(odd).splitlines()[-1] == "| \\|G\\|^2 | 1 |"
    assert as_csv(odd) == "a,b\n|G|^2,1.0\n"


def test_parameters_are_written_with_the_result(result: Result) -> None:
    assert result.parameters["seed"] == "0"
    assert result.seconds > 0
    assert result.cpu_seconds > 0


def test_experiments_are_chosen_by_name_in_the_order_of_the_catalogue() -> None:
    assert chosen(None) == list(EXPERIMENTS)
    assert chosen(["noise_scale", "epochs"]) == [run for run in EXPERIMENTS if name_of(run) in {"noise_scale", "epochs"}]
    with pytest.raises(ConfigError, match=r"unknown experiment 'epoch'; known are .*epochs"):
        chosen(["epoch"])


def test_the_page_in_the_docs_has_every_experiment_in_order_with_its_figure() -> None:
    text = (DOCS / "batch_size.md").read_text(encoding="utf-8").partition(HEADING)[2]
    names = [name_of(run) for run in EXPERIMENTS]
    places = [text.find(f"(images/lab_{name}.png)") for name in names]
    assert -1 not in places, (
        f"run `make lab`: no {[n for n, p in zip(names, places, strict=True) if p < 0]} in docs/batch_size.md"
    )
    assert places == sorted(places)
    sizes = {name: (DOCS / "images" / f"lab_{name}.png").stat().st_size for name in names}
    assert max(sizes.values()) < 60_000


def test_an_image_is_named_after_the_experiment(result: Result) -> None:
    assert image_name(result.finding) == "lab_epochs.png"
