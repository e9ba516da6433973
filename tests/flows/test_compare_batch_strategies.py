"""The comparison end to end: a stream, two strategies, two seeds, a sqlite store; and what it refuses."""

from pathlib import Path

import pytest

from data_schemas.errors import NothingToLearn
from flows.compare_batch_strategies import compare_batch_strategies
from flows.terminal import run_flow

pytestmark = pytest.mark.usefixtures("temporary_server")

STRATEGIES = ("small: training.batch_size=64", "large: training.batch_size=4096")


def words_of(folder: Path, *more: str) -> list[str]:
    strategies = [word for strategy in STRATEGIES for word in ("--strategies", strategy)]
    places = ["--landing", str(folder / "landing"), "--state-dir", str(folder / "state")]
    given = {"--reference": "small", "--seeds": "2", "--hours": "3"}
    asked = [word for name, value in given.items() if name not in more for word in (name, value)]
    return [*strategies, *asked, "--generate", *places, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, temporary_server: None) -> Path:
    """Where a comparison was made."""
    folder = tmp_path_factory.mktemp("compare")
    assert run_flow(compare_batch_strategies, words_of(folder)) == 0
    return folder


def test_the_parent_holds_the_table_and_the_plots_and_its_runs_have_the_same_keys(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'state' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tidemark-synthetic-comparison")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {(run.data.params["strategy"], run.data.params["seed"]) for run in children} == {
        (name, seed) for name in ("small", "large") for seed in ("0", "1")
    }
    assert len(children) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({frozenset(run.data.metrics) for run in children}) == 1
    assert len({frozenset(run.data.params) for run in children}) == 1
    assert {"auc", "log_loss", "by_rows/auc", "mean/auc", "mean/seconds"} <= set(children[0].data.metrics)
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"comparison.md", "comparison.csv", "auc_by_rows.png", "auc_by_seconds.png", "probe_loss.png"}
    note = parent.data.tags["mlflow.note.content"]
    assert "| small |" in note
    assert "| large |" in note
    assert client.search_registered_models() == []


def test_steps_are_hours_since_the_epoch_or_rows_seen(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'state' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tidemark-synthetic-comparison")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], filter_string="params.seed = '0'")
    assert len(runs) == 2
    for run in runs:
        hours = [point.step for point in client.get_metric_history(run.info.run_id, "auc")]
        assert hours == [490_897, 490_898]  # 2026-01-01T01 and T02, in hours since 1970
        rows = [point.value for point in client.get_metric_history(run.info.run_id, "rows_learned")]
        assert [point.step for point in client.get_metric_history(run.info.run_id, "by_rows/auc")] == rows[:2]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--seeds", "1"], "seeds must be at least 2, got 1"),
        (["--strategies", "fixed 3"], "unknown strategy 'fixed 3'; known are"),
        (["--reference", "fixed 512"], "the reference 'fixed 512' is not among the strategies 'small', 'large'"),
        (["--gradient-ema", "0.9"], "strategy 'small, gradient EMA': training: gradient_ema = 0.9 with"),
        (["--overrides", "sampling.replay_share=0.2"], "strategy 'small': sampling.replay_share = 0.2 is not heeded"),
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--hours", "1"], "hours must be at least 2, got 1"),
        (["--dataset", "brunch"], "generate writes the synthetic stream, and dataset is 'brunch'"),
    ],
)
def test_what_cannot_be_compared_fails_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], complaint: str
) -> None:
    assert run_flow(compare_batch_strategies, words_of(tmp_path, *more)) == 1
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_landing_folder_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "landing").mkdir()
    with pytest.raises(NothingToLearn, match="put click logs into"):
        compare_batch_strategies(landing=str(tmp_path / "landing"), state_dir=str(tmp_path / "state"))
