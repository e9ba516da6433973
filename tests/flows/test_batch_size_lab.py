"""The laboratory end to end: experiments, their MLflow runs, the HTML page; and what it refuses."""

from pathlib import Path

import pytest

from flows.batch_size_lab import batch_size_lab
from flows.terminal import run_flow
from pipeline.publishing.lab import HEADING

pytestmark = pytest.mark.usefixtures("temporary_server")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, temporary_server: None) -> Path:
    """Where two experiments were run."""
    folder = tmp_path_factory.mktemp("lab")
    names = ["--experiments", "epochs", "--experiments", "noise_scale"]
    assert run_flow(batch_size_lab, ["--state-dir", str(folder / "state"), *names]) == 0
    return folder


def test_each_experiment_is_a_run_with_figure_table_and_sentence(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'state' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tidemark-batch-size-lab")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"epochs", "noise_scale"}
    for name, run in runs.items():
        assert run.info.status == "FINISHED"
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"table.csv", f"lab_{name}.png"}
        assert run.data.tags["sentence"] in run.data.tags["mlflow.note.content"]
        assert run.data.params["seed"] == "0"
        assert "seconds" in run.data.metrics
    assert runs["epochs"].data.metrics["cases"] == runs["epochs"].data.metrics["cases_as_counted"]


def test_the_page_holds_both(folder: Path) -> None:
    page = (folder / "state" / "batch_size_lab.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert 'id="epochs"' in page
    assert 'id="noise_scale"' in page


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--experiments", "epoch"], "unknown experiment 'epoch'; known are"),
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--docs", "docs", "--experiments", "epochs"], "leave out either docs or experiments"),
        (["--docs", "nowhere"], f"is not there, or has no line {HEADING!r}"),
    ],
)
def test_what_cannot_be_run_fails_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert run_flow(batch_size_lab, ["--state-dir", str(tmp_path / "state"), *words]) == 1
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
