"""Runs reach MLflow once, in one piece, and never at the cost of an update."""

import base64
import dataclasses
import json
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.id_table import IdFigures
from pipeline.config import UpdateConfig, load_config
from pipeline.evaluation.diagnosis import Diagnosis, Verdict
from pipeline.evaluation.metrics import Interval, measure
from pipeline.evaluation.stability import Change, Stability
from pipeline.outcome import LossPoint, PlanRecord, UpdateReport
from pipeline.publishing import tracking
from pipeline.publishing.retention import delete_runs
from pipeline.publishing.tracking import MetricPoint, RunRecord, Tracker, now_ms, open_experiment, record_of, update_id

PLAN_CURVES = ("batch_size", "learning_rate", "keep_rate")
HOUR = datetime(2026, 1, 1, 5, tzinfo=UTC)


def report_at(hour: int = 0, **changes: Any) -> UpdateReport:
    rng = np.random.default_rng(hour)
    metrics = measure(rng.random(200) < 0.3, rng.random(200), rng.integers(1, 20, 200))
    start = HOUR + timedelta(hours=hour)
    report = UpdateReport(
        dataset="synthetic",
        model_name="hourly",
        outcome="published",
        version=hour + 1,
        log_version=hour + 3,
        window_start=start,
        window_end=start + timedelta(hours=1),
        rows=200,
        late_rows=2,
        rows_learned=200,
        rows_pending=0,
        batch_size=64,
        precision="fp32",
        before=metrics,
        after=metrics,
        frozen=None,
        evaluated_rows=200,
        seconds={"load": 0.5, "learn": 1.5},
        budget_seconds=60.0,
        plan=(PlanRecord(step=0, position=0, batch_size=64, learning_rate=0.002, reason="fixed"),),
        loss_curve=tuple(LossPoint(rows=64 * k, seconds=0.1 * k, log_loss=0.5 - 0.01 * k) for k in range(1, 4)),
        skipped_steps=0,
        git_commit="abc123",
        notes=(),
    )
    return dataclasses.replace(report, **changes)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def config(tmp_path: Path, database: str) -> UpdateConfig:
    return config_with(tmp_path, database)


def config_with(state_dir: Path, uri: str) -> UpdateConfig:
    return load_config(overrides=[f"state_dir={state_dir}", f"tracking.uri={uri}", f"tracking.experiment={state_dir.name}"])


def runs_of(config: UpdateConfig) -> dict[str, Any]:
    client, experiment = open_experiment(config)
    runs = client.search_runs([experiment], max_results=100)
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {run.info.run_name: run for run in runs}


@pytest.fixture
def dead_uri() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_an_update_is_one_finished_run_with_everything_on_it(config: UpdateConfig) -> None:
    tracker = Tracker(config)
    tracker.log_metric("probe/loss", 0.25, step=7)
    run_id = tracker.log_update(report_at(), texts={"report.md": "# hello"}, images={"plots/auc.png": b"\x89PNG"})
    run = runs_of(config)["2026-01-01T05 hourly"]
    assert (run.info.run_id, run.info.status, tracker.notes) == (run_id, "FINISHED", [])
    assert run.data.params["training.batch_size"] == str(config.training.batch_size)
    assert run.data.params["precision"] == "fp32"
    assert run.data.tags["git_commit"] == "abc123"
    assert run.data.tags["log_version"] == "3"
    expected = {f"before/{name}" for name in tracking.SHOWN_METRICS} | {"after/auc", "seconds/learn", "budget/share"}
    assert expected | {"learning/log_loss", "learning/batch_size", "learning/learning_rate", "learning/keep_rate"} <= set(
        run.data.metrics
    )
    assert run.data.metrics["probe/loss"] == 0.25
    client, _ = open_experiment(config)
    assert [m.step for m in client.get_metric_history(run_id, "before/auc")] == [int(HOUR.timestamp() // 3600)]
    assert [m.step for m in client.get_metric_history(run_id, "learning/log_loss")] == [64, 128, 192]
    assert sorted(f.path for f in client.list_artifacts(run_id)) == ["plots", "report.md"]
    assert [f.path for f in client.list_artifacts(run_id, "plots")] == ["plots/auc.png"]


def test_the_timeline_holds_one_point_an_hour_and_the_updates_are_nested_in_it(config: UpdateConfig) -> None:
    for hour in range(3):
        Tracker(config).log_update(report_at(hour))
    runs = runs_of(config)
    timeline = runs["hourly timeline"].info.run_id
    client, _ = open_experiment(config)
    first = int(HOUR.timestamp() // 3600)
    points = client.get_metric_history(timeline, "before/auc")
    assert [(p.step, p.timestamp) for p in points] == [(first + h, (first + h) * 3_600_000) for h in range(3)]
    assert {runs[f"2026-01-01T0{5 + h} hourly"].data.tags["mlflow.parentRunId"] for h in range(3)} == {timeline}


def test_the_same_update_twice_is_one_run(config: UpdateConfig) -> None:
    first = Tracker(config).log_update(report_at())
    assert Tracker(config).log_update(report_at()) == first
    assert len(runs_of(config)) == 2


def test_a_run_that_an_earlier_attempt_left_unfinished_is_written_anew(config: UpdateConfig) -> None:
    client, experiment = open_experiment(config)
    torn = client.create_run(experiment, run_name="torn", tags={tracking.UPDATE_TAG: update_id(report_at())})
    run_id = Tracker(config).log_update(report_at())
    assert run_id != torn.info.run_id
    assert set(runs_of(config)) == {"2026-01-01T05 hourly", "hourly timeline"}


def test_more_metrics_than_one_request_takes_all_arrive(config: UpdateConfig) -> None:
    curve = tuple(LossPoint(rows=k, seconds=0.0, log_loss=0.5) for k in range(1, 2502))
    run_id = Tracker(config).log_update(report_at(loss_curve=curve))
    client, _ = open_experiment(config)
    assert len(client.get_metric_history(run_id, "learning/log_loss")) == 2501


def test_what_a_dead_server_missed_is_replayed_once_on_the_next_update(tmp_path: Path, database: str, dead_uri: str) -> None:
    dead, alive = config_with(tmp_path, dead_uri), config_with(tmp_path, database)
    tracker = Tracker(dead)
    assert tracker.log_update(report_at(0), images={"a.png": b"\x89PNG"}) is None
    assert "no MLflow server answers" in tracker.notes[0]
    assert Tracker(dead).log_update(report_at(0)) is None
    assert Tracker(dead).log_update(report_at(1)) is None
    assert len(list((tmp_path / "models/hourly/spool").iterdir())) == 2
    tracker = Tracker(alive)
    assert tracker.log_update(report_at(2)) is not None
    assert [note.split(",")[0] for note in tracker.notes] == [
        "the run of 2026-01-01T05 hourly",
        "the run of 2026-01-01T06 hourly",
    ]
    assert not list((tmp_path / "models/hourly/spool").iterdir())
    assert len(runs_of(alive)) == 4
    assert Tracker(alive).log_update(report_at(0)) == runs_of(alive)["2026-01-01T05 hourly"].info.run_id


def test_a_server_that_accepts_and_says_nothing_is_given_up_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PROBE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = Tracker(config_with(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}"))
        assert tracker.log_update(report_at()) is None
    assert "timed out" in tracker.notes[0]


def test_a_spooled_file_that_cannot_be_read_is_kept_aside(config: UpdateConfig) -> None:
    tracker = Tracker(config)
    tracker.spool_dir.mkdir(parents=True)
    (tracker.spool_dir / "torn.json").write_text('{"name": "x"')
    (tracker.spool_dir / "other.json").write_text('{"name": "x"}')
    assert tracker.log_update(report_at()) is not None
    assert sorted(path.name for path in tracker.spool_dir.iterdir()) == ["other.broken", "torn.broken"]
    assert len(tracker.notes) == 2


def test_a_spool_that_cannot_be_written_is_said_and_does_not_raise(tmp_path: Path, dead_uri: str) -> None:
    config = config_with(tmp_path, dead_uri)
    config.model_dir.parent.mkdir(parents=True)
    config.model_dir.write_text("a file where the folder should be")
    tracker = Tracker(config)
    assert tracker.log_update(report_at()) is None
    assert "is lost" in tracker.notes[0]


def test_tracking_that_is_off_writes_nothing(tmp_path: Path) -> None:
    config = load_config(overrides=[f"state_dir={tmp_path}", "tracking.enabled=false"])
    assert Tracker(config).log_update(report_at()) is None
    assert not list(tmp_path.iterdir())


def test_an_empty_or_one_class_update_has_no_figure_that_does_not_exist(config: UpdateConfig) -> None:
    one_class = measure(np.zeros(5), np.full(5, 0.1), np.ones(5))
    run_id = Tracker(config).log_update(report_at(before=one_class, after=None, loss_curve=(), plan=()))
    metrics = open_experiment(config)[0].get_run(run_id).data.metrics
    assert "before/log_loss" in metrics
    assert not {"before/auc", "before/copc", "after/auc", "frozen/auc", "learning/log_loss"} & set(metrics)


def test_a_default_store_keeps_its_files_in_the_state_folder(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_with(tmp_path, database)
    client, experiment = open_experiment(config)
    folder = Path(database.removeprefix("sqlite:///")).parent
    assert client.get_experiment(experiment).artifact_location == (folder / "mlartifacts").as_uri()
    Tracker(config).log_update(report_at(), texts={"report.md": "# hello"})
    assert not (tmp_path / "mlruns").exists()


def test_importing_tracking_does_not_import_mlflow() -> None:
    code = "import sys, pipeline.publishing.tracking, pipeline.publishing.registry; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_three_processes_may_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.config import load_config; from pipeline.publishing.tracking import open_experiment;"
        "print(open_experiment(load_config(overrides=['state_dir=' + sys.argv[1]]))[1])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(answers)) == 1


numbers = st.floats(allow_nan=False, allow_infinity=False)
points = st.builds(MetricPoint, key=st.text(), value=numbers, step=st.integers(), timestamp_ms=st.integers())
words = st.dictionaries(st.text(), st.text(), max_size=3)
records = st.builds(
    RunRecord,
    update_id=st.text(),
    name=st.text(),
    timeline=st.text(),
    start_ms=st.integers(),
    end_ms=st.integers(),
    params=words,
    tags=words,
    hourly=st.lists(points, max_size=3),
    curves=st.lists(points, max_size=3),
    texts=words,
    images=words,
)


@settings(max_examples=50, deadline=None)
@given(records)
def test_a_record_survives_the_spool(record: RunRecord) -> None:
    assert RunRecord.from_json(record.to_json()) == record


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v))
)
def test_any_other_json_in_the_spool_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        RunRecord.from_json(json.dumps(value))


def test_the_record_of_a_report_is_pure_of_mlflow(config: UpdateConfig) -> None:
    record = record_of(report_at(), config, texts={}, images={"a.png": b"png"})
    assert base64.b64decode(record.images["a.png"]) == b"png"
    assert len({point.key for point in record.hourly}) == len(record.hourly)


def test_figures_of_admitted_ids_are_hourly_metrics(tmp_path: Path) -> None:
    figures = IdFigures(stored=5, admitted=4, evicted=3, waiting=2, forgotten=1, new_share=0.5, shared_share=0.25)
    config = load_config(overrides=[f"state_dir={tmp_path}"])
    record = record_of(report_at(ids={"item": figures}), config, texts={}, images={})
    values = {point.key: point.value for point in record.hourly if point.key.startswith("ids/")}
    assert values["ids/item/evicted"] == 3.0
    assert values["ids/item/new_share"] == 0.5
    assert len(values) == 7


def values_of(report: UpdateReport, folder: Path) -> dict[str, float]:
    record = record_of(report, load_config(overrides=[f"state_dir={folder}"]), texts={}, images={})
    return {point.key: point.value for point in record.hourly}


def test_what_was_measured_of_the_steps_is_hourly_and_absent_where_nothing_was(tmp_path: Path) -> None:
    measured = {"fixed_seconds": 0.002, "row_seconds": 1.5e-5, "noise_scale": 1234.0}
    values = values_of(report_at(rows_thinned=77, batch_size=512, **measured), tmp_path)
    assert values["rows/thinned"] == 77.0
    assert values["batch_size"] == 512.0
    assert values["step/fixed_seconds"] == 0.002
    assert values["step/row_seconds"] == 1.5e-5
    assert values["noise_scale"] == 1234.0
    plain = values_of(report_at(), tmp_path)
    assert plain["rows/thinned"] == 0.0
    assert not {"step/fixed_seconds", "step/row_seconds", "noise_scale"} & set(plain)


def test_the_plan_of_a_pass_is_three_curves_over_its_rows(tmp_path: Path) -> None:
    plan = (
        PlanRecord(step=0, position=0, batch_size=64, learning_rate=0.002, reason="time for all"),
        PlanRecord(step=2, position=128, batch_size=256, learning_rate=0.004, reason="short of time", keep_rate=0.25),
    )
    record = record_of(report_at(plan=plan), load_config(overrides=[f"state_dir={tmp_path}"]), texts={}, images={})
    curves = {name: [(p.step, p.value) for p in record.curves if p.key == f"learning/{name}"] for name in PLAN_CURVES}
    assert curves == {
        "batch_size": [(0, 64.0), (128, 256.0)],
        "learning_rate": [(0, 0.002), (128, 0.004)],
        "keep_rate": [(0, 1.0), (128, 0.25)],
    }


@pytest.mark.parametrize("verdict", get_args(Verdict))
def test_the_verdict_is_one_of_four_lines_that_are_0_or_1(tmp_path: Path, verdict: Verdict) -> None:
    values = values_of(report_at(diagnosis=Diagnosis(verdict=verdict, reason="figures")), tmp_path)
    drawn = {key.removeprefix("diagnosis/"): value for key, value in values.items() if key.startswith("diagnosis/")}
    assert drawn == {name: float(name == verdict) for name in get_args(Verdict)}


def test_what_was_not_judged_has_no_verdict_and_what_was_not_measured_no_figure(tmp_path: Path) -> None:
    unjudged = Diagnosis(verdict=None, reason="fewer than 6 steps were probed")
    values = values_of(report_at(diagnosis=unjudged, stability=Stability(probe_points=2, churn=0.01)), tmp_path)
    steadiness = {key: value for key, value in values.items() if key.startswith(("stability/", "diagnosis/"))}
    assert steadiness == {"stability/probe_points": 2.0, "stability/churn": 0.01}


def test_the_measures_of_steadiness_are_hourly_with_their_intervals(tmp_path: Path) -> None:
    change = Change(value=-0.01, interval=Interval(low=-0.03, high=0.01))
    probed = {"probe_deviation": 0.002, "probe_spikes": 1, "gradient_variation": 0.3, "churn_p99": 0.08}
    figures = Stability(probe_points=24, auc_change=change, log_loss_change=change, churn=0.01, **probed)
    values = values_of(report_at(stability=figures), tmp_path)
    assert {f"stability/{name}" for name in (*probed, "probe_points", "churn")} <= set(values)
    for name in ("auc_change", "log_loss_change"):
        assert [values[f"stability/{name}{end}"] for end in ("", "_low", "_high")] == [-0.01, -0.03, 0.01]


def test_old_runs_are_deleted_but_for_the_timeline_and_that_of_a_model_with_an_alias(config: UpdateConfig) -> None:
    runs = {hour: Tracker(config).log_update(report_at(hour), texts={"report.md": "x"}) for hour in range(3)}
    client, _ = open_experiment(config)
    for hour, age_days in ((0, 40), (1, 40), (2, 10)):
        client.set_terminated(runs[hour], "FINISHED", now_ms() - age_days * 86_400_000)
    client.create_registered_model("retained")
    client.create_model_version("retained", source="file:///nowhere", run_id=runs[1])
    client.set_registered_model_alias("retained", "champion", "1")
    before = datetime.now(UTC) - timedelta(days=30)
    assert (delete_runs(config, before, dry_run=True), len(runs_of(config))) == (1, 4)
    assert delete_runs(config, before) == 1
    assert sorted(runs_of(config)) == ["2026-01-01T06 hourly", "2026-01-01T07 hourly", "hourly timeline"]
    assert not client.list_artifacts(runs[0])
    assert delete_runs(config, before) == 0
