"""Updates as MLflow runs.

Enters: an `UpdateReport` with its texts and plots. Leaves: one run an update, and one point an hour in the model's
timeline run, so that AUC by hour is one line in the MLflow UI. Steps of hourly figures are hours since 1970; steps of
learning curves are rows of the window.

Tracking never fails an update. What could not be written waits in `<model_dir>/spool` and is written after the next
update that gets through. MLflow is imported when it is first needed, with its telemetry off.
"""

import base64
import hashlib
import json
import logging
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from filelock import FileLock

from data_schemas.errors import TrackingUnavailable
from pipeline.config import UpdateConfig
from pipeline.evaluation.diagnosis import Verdict
from pipeline.evaluation.gate import GateVerdict
from pipeline.evaluation.metrics import Metrics
from pipeline.outcome import UpdateReport
from pipeline.publishing.report import verdict
from sampling.plan import as_table

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

SHOWN_METRICS = ("auc", "gauc", "log_loss", "normalised_entropy", "copc", "ece")
UPDATE_TAG = "tidemark.update_id"
TIMELINE_TAG = "tidemark.timeline"
SAMPLING_TABLE = "sampling_plan.json"
"""The strata of a window: rows, probability, rows to learn."""
PROBE_SECONDS = 3.0
"""A tracking server that does not answer for this long is taken to be down."""

_BATCH = 1000  # metrics that MLflow takes in one request
_MLFLOW_SETTINGS = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}


@dataclass(frozen=True, kw_only=True)
class MetricPoint:
    """One value on a chart."""

    key: str
    value: float
    step: int
    timestamp_ms: int
    """Since 1970, UTC."""


@dataclass(kw_only=True)
class RunRecord:
    """Everything that one run will hold; JSON, so that it can wait for a server."""

    update_id: str
    name: str
    timeline: str
    """Model whose timeline run gets `hourly`."""
    start_ms: int
    end_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    hourly: list[MetricPoint] = field(default_factory=list)
    """One point a key; at `step` hours since 1970, at the time of the window."""
    curves: list[MetricPoint] = field(default_factory=list)
    """Many points a key, over the rows of the window."""
    texts: dict[str, str] = field(default_factory=dict)
    """File name to content."""
    images: dict[str, str] = field(default_factory=dict)
    """File name to base64 of a PNG."""

    def to_json(self) -> str:
        """The inverse of `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """The inverse of `to_json`.

        Raises:
            ValueError: not the JSON of a record.
        """
        try:
            values = json.loads(text)
            for name in ("hourly", "curves"):
                values[name] = [MetricPoint(**point) for point in values[name]]
            return cls(**values)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a spooled run: {error}") from error


class Tracker:
    """Writes the runs of one model."""

    def __init__(self, config: UpdateConfig) -> None:
        self._config = config
        self._extra: list[MetricPoint] = []
        self.notes: list[str] = []
        """What went wrong with tracking so far, in words, for the report."""

    def log_metric(self, key: str, value: float, step: int) -> None:
        """Adds a point to the run that the next `log_update` writes; nothing is sent before."""
        self._extra.append(MetricPoint(key=key, value=value, step=step, timestamp_ms=now_ms()))

    def log_update(
        self, report: UpdateReport, *, texts: Mapping[str, str] | None = None, images: Mapping[str, bytes] | None = None
    ) -> str | None:
        """Writes the run of one update, and then those that wait in the spool.

        The same update twice makes one run. It never raises for a server, a database or a disk that fails: the run is
        spooled then, and `notes` says so.

        Args:
            report: the update.
            texts: file name to content, such as `report.md`.
            images: file name to PNG.

        Returns:
            The run's id, or None if it was spooled or tracking is off.
        """
        if not self._config.tracking.enabled:
            return None
        record = record_of(report, self._config, texts=texts or {}, images=images or {})
        record.curves += self._extra
        self._extra = []
        try:
            with quiet_mlflow():
                client, experiment = open_experiment(self._config)
                run_id = _write_once(client, experiment, record)
        except Exception as error:
            logger.warning("tracking failed; the run is spooled", exc_info=True)
            self._spool(record, error)
            return None
        with quiet_mlflow():
            self._replay(client, experiment)
        return run_id

    @property
    def spool_dir(self) -> Path:
        """Folder of the runs that could not be written yet."""
        return self._config.model_dir / "spool"

    def _spool(self, record: RunRecord, error: Exception) -> None:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        name = hashlib.sha256(record.update_id.encode()).hexdigest()[:12]
        path = self.spool_dir / f"{record.name.replace(' ', '_')}_{name}.json"
        try:
            self.spool_dir.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(record.to_json(), encoding="utf-8")
            unfinished.replace(path)
        except OSError as disk_error:
            self.notes.append(f"the run of this update is lost: tracking failed ({reason}), and so did {path}: {disk_error}")
            return
        self.notes.append(f"tracking failed ({reason}); the run waits in {path} for the next update")

    def _replay(self, client: "MlflowClient", experiment: str) -> None:
        for path in sorted(self.spool_dir.glob("*.json")):
            try:
                record = RunRecord.from_json(path.read_text(encoding="utf-8"))
            except ValueError as error:
                path.rename(path.with_suffix(".broken"))
                self.notes.append(f"the spooled run {path.name} cannot be read ({error}); it is kept as {path.stem}.broken")
                continue
            try:
                _write_once(client, experiment, record)
            except Exception as error:
                logger.warning("the spooled run %s could not be written", path.name, exc_info=True)
                self.notes.append(f"the spooled run {path.name} still waits: {error}")
                return
            path.unlink()
            self.notes.append(f"the run of {record.name}, spooled earlier, is in MLflow now")


def update_id(report: UpdateReport) -> str:
    """Names one update for ever: the same update tracked twice has the same id."""
    return (
        f"{report.dataset}/{report.model_name}/{report.window_start.astimezone(UTC):%Y-%m-%dT%H:%M}"
        f"/v{report.version}/log{report.log_version}"
    )


def tables_of(report: UpdateReport) -> dict[str, str]:
    """File name to content of what MLflow shows as tables: the plan of a sampled window."""
    return {SAMPLING_TABLE: json.dumps(as_table(report.sampling))} if report.sampling else {}


def record_of(
    report: UpdateReport, config: UpdateConfig, *, texts: Mapping[str, str], images: Mapping[str, bytes]
) -> RunRecord:
    """The run of a report; pure."""
    now = now_ms()
    return RunRecord(
        update_id=update_id(report),
        name=f"{report.window_start.astimezone(UTC):%Y-%m-%dT%H} {report.model_name}",
        timeline=report.model_name,
        start_ms=now - round(1000 * report.total_seconds),
        end_ms=now,
        params=_params(report, config),
        tags=_tags(report),
        hourly=_hourly(report),
        curves=_curves(report, now),
        texts=dict(texts),
        images={name: base64.b64encode(png).decode() for name, png in images.items()},
    )


def open_experiment(config: UpdateConfig) -> tuple["MlflowClient", str]:
    """A client of the tracking URI, and the id of the experiment, which is made if it is not there.

    A fresh sqlite database is made by one process at a time: several at once break it. It is made beside, and then renamed: a
    kill in one of the steps that MLflow makes it in leaves a database that MLflow can neither use nor mend.

    Raises:
        TrackingUnavailable: the server does not answer.
    """
    prepare_mlflow()
    _probe(config.tracking_uri)
    from mlflow import MlflowClient

    database = _sqlite_file(config.tracking_uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock", timeout=120) if database else nullcontext():
        if database and not database.exists():
            _make_database(database)
        client = MlflowClient(tracking_uri=config.tracking_uri, registry_uri=config.tracking_uri)
        found = client.get_experiment_by_name(config.experiment)
        if found is not None:
            return client, str(found.experiment_id)
        return client, _create_experiment(client, config, database)


def _make_database(database: Path) -> None:
    from mlflow import MlflowClient

    staged = database.with_name(f"{database.name}.tmp")
    for unfinished in (staged, staged.with_name(f"{staged.name}-journal")):
        unfinished.unlink(missing_ok=True)
    uri = f"sqlite:///{staged}"
    MlflowClient(tracking_uri=uri, registry_uri=uri).search_registered_models(max_results=1)
    staged.replace(database)


def _create_experiment(client: "MlflowClient", config: UpdateConfig, database: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    artifacts = (database.parent / "mlartifacts").resolve().as_uri() if database else None
    tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens its pages for training, not for GenAI
    try:
        return str(client.create_experiment(config.experiment, artifact_location=artifacts, tags=tags))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        found = client.get_experiment_by_name(config.experiment)  # another process was faster
        if found is None or found.lifecycle_stage != "active":
            raise
        return str(found.experiment_id)


def prepare_mlflow() -> None:
    """Sets MLflow's switches, where the environment does not: no telemetry, and a dead server costs seconds only.

    Call it before the first `import mlflow`.
    """
    for name, value in _MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Silences Python warnings of MLflow's: they are about its own imports and advice, nothing that an update can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def find_run(client: "MlflowClient", experiment: str, tag: str, value: str) -> Any | None:
    """The newest run of the experiment that has `tag` at `value`, or None."""
    runs = client.search_runs([experiment], filter_string=f"tags.`{tag}` = '{value}'", max_results=1)
    return runs[0] if runs else None


def _params(report: UpdateReport, config: UpdateConfig) -> dict[str, str]:
    parts = config.model_dump(
        mode="json", include={"window", "model", "training", "sampling", "budget", "evaluation", "alarms", "gate"}
    )
    flat = {f"{part}.{name}": str(value) for part, values in parts.items() for name, value in values.items()}
    return flat | {"precision": report.precision, "batch_size": str(report.batch_size)}


def _tags(report: UpdateReport) -> dict[str, str]:
    shown = json.dumps([{"path": name, "type": "table"} for name in tables_of(report)])
    tables = {"mlflow.loggedArtifacts": shown} if report.sampling else {}
    return tables | {
        "dataset": report.dataset,
        "model_name": report.model_name,
        "outcome": report.outcome,
        "git_commit": report.git_commit,
        "window_start": report.window_start.astimezone(UTC).isoformat(),
        "window_end": report.window_end.astimezone(UTC).isoformat(),
        "log_version": str(report.log_version),
        "checkpoint_version": str(report.version),
        "mlflow.note.content": verdict(report),
        "mlflow.source.name": "tidemark",
        "mlflow.source.git.commit": report.git_commit,
    }


def _hourly(report: UpdateReport) -> list[MetricPoint]:
    values: dict[str, float] = {}
    for when, metrics in (("before", report.before), ("after", report.after), ("frozen", report.frozen)):
        values |= _shown(metrics, when)
    if report.before and report.before.auc_interval:
        values["before/auc_low"] = report.before.auc_interval.low
        values["before/auc_high"] = report.before.auc_interval.high
    counts = (
        "late_rows",
        "rows_learned",
        "rows_pending",
        "rows_held_out",
        "rows_thinned",
        "evaluated_rows",
        "skipped_steps",
        "clicks_corrected",
        "clicks_known_share",
    )
    for name in counts:
        values[f"rows/{name.replace('rows_', '').replace('_rows', '')}"] = float(getattr(report, name))
    values["alarms"] = float(len(report.alarms))
    values |= {"rows/window": float(report.rows), "batch_size": float(report.batch_size)}
    values |= {f"seconds/{stage}": seconds for stage, seconds in report.seconds.items()}
    values |= {"seconds/total": report.total_seconds, "budget/share": report.total_seconds / report.budget_seconds}
    values |= stability_values(report) | _step_values(report) | _gate_values(report.gate)
    for feature, figures in report.ids.items():
        values |= {f"ids/{feature}/{name}": float(value) for name, value in asdict(figures).items()}
    if report.sampling:
        values |= {"rows/sampled": float(report.sampling.kept), "rows/effective": report.sampling.effective_rows}
    start = report.window_start.timestamp()
    return [
        MetricPoint(key=key, value=value, step=int(start // 3600), timestamp_ms=int(start * 1000))
        for key, value in values.items()
    ]


def stability_values(report: UpdateReport) -> dict[str, float]:
    """`stability/<figure>`, and `diagnosis/<verdict>`: 1 for the verdict of this update, 0 for the other three; none of them
    where there was too little to judge by."""
    figures = report.stability.as_dict() if report.stability else {}
    values = {f"stability/{name}": value for name, value in figures.items()}
    if report.diagnosis and report.diagnosis.verdict:
        values |= {f"diagnosis/{verdict}": float(verdict == report.diagnosis.verdict) for verdict in get_args(Verdict)}
    return values


def _gate_values(verdict: GateVerdict | None) -> dict[str, float]:
    """`gate/<figure>`, and `gate/published`: 1 where the gate lets the model serve."""
    if verdict is None:
        return {}
    values = {"gate/rows": float(verdict.rows), "gate/users": float(verdict.users), "gate/windows": float(verdict.windows)}
    values["gate/published"] = float(verdict.decision == "publish")
    for figure in verdict.figures:
        if figure.value is not None:
            values[f"gate/{figure.name.lower().replace(' ', '_')}"] = figure.value
    for name, interval in (("auc", verdict.auc_interval), ("log_loss", verdict.log_loss_interval)):
        if interval is not None:
            values |= {f"gate/{name}_low": interval.low, f"gate/{name}_high": interval.high}
    return values


def _step_values(report: UpdateReport) -> dict[str, float]:
    """What was measured of the steps; of their time and the noise scale only where a setting needs it."""
    measured = {"step/fixed_seconds": report.fixed_seconds, "step/row_seconds": report.row_seconds}
    measured |= {"noise_scale": report.noise_scale, "step/waiting_share": report.waiting_share}
    return {name: value for name, value in measured.items() if value is not None}


def _shown(metrics: Metrics | None, when: str) -> dict[str, float]:
    flat = metrics.as_dict() if metrics else {}
    return {f"{when}/{name}": flat[name] for name in SHOWN_METRICS if name in flat}


def _curves(report: UpdateReport, now_ms: int) -> list[MetricPoint]:
    start = now_ms - round(1000 * (report.loss_curve[-1].seconds if report.loss_curve else 0))
    points = [
        MetricPoint(key="learning/log_loss", value=p.log_loss, step=p.rows, timestamp_ms=start + round(1000 * p.seconds))
        for p in report.loss_curve
    ]
    for plan in report.plan:
        for key, value in (
            ("batch_size", float(plan.batch_size)),
            ("learning_rate", plan.learning_rate),
            ("keep_rate", plan.keep_rate),
        ):
            points.append(MetricPoint(key=f"learning/{key}", value=value, step=plan.position, timestamp_ms=start))
    return points


def _write_once(client: "MlflowClient", experiment: str, record: RunRecord) -> str:
    """Writes the run unless it is there; what an earlier attempt left unfinished is written anew."""
    found = find_run(client, experiment, UPDATE_TAG, record.update_id)
    if found is not None and found.info.status == "FINISHED":
        return str(found.info.run_id)
    if found is not None:
        client.delete_run(found.info.run_id)
    timeline = _timeline(client, experiment, record)
    tags = record.tags | {UPDATE_TAG: record.update_id, "mlflow.parentRunId": timeline}
    run = client.create_run(experiment, run_name=record.name, tags=tags, start_time=record.start_ms)
    run_id = str(run.info.run_id)
    log_batches(client, run_id, [*record.hourly, *record.curves], record.params)
    for name, text in record.texts.items():
        client.log_text(run_id, text, name)
    for name, encoded in record.images.items():
        log_image(client, run_id, base64.b64decode(encoded), name)
    log_batches(client, timeline, record.hourly, {})
    client.set_terminated(timeline, "FINISHED", record.end_ms)
    client.set_terminated(run_id, "FINISHED", record.end_ms)
    return run_id


def _timeline(client: "MlflowClient", experiment: str, record: RunRecord) -> str:
    """The run that holds the hourly figures of all updates of a model."""
    found = find_run(client, experiment, TIMELINE_TAG, record.timeline)
    if found is None:
        note = f"Every update of {record.timeline}, one point an hour; the runs of the updates are nested below."
        tags = {TIMELINE_TAG: record.timeline, "model_name": record.timeline, "mlflow.note.content": note}
        tags |= {name: record.tags[name] for name in ("dataset", "mlflow.source.name")}
        name = f"{record.timeline} timeline"
        found = client.create_run(experiment, run_name=name, tags=tags, start_time=record.start_ms)
        log_batches(client, found.info.run_id, [], record.params)
    return str(found.info.run_id)


def log_batches(client: "MlflowClient", run_id: str, points: list[MetricPoint], params: Mapping[str, str]) -> None:
    """Writes points and params to a run in as few requests as MLflow allows."""
    from mlflow.entities import Metric, Param

    metrics = [Metric(p.key, p.value, p.timestamp_ms, p.step) for p in points]
    if params:
        client.log_batch(run_id, params=[Param(name, value) for name, value in params.items()])
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH])


def log_image(client: "MlflowClient", run_id: str, png: bytes, name: str) -> None:
    """Writes a PNG to a run under `name`, which may have folders."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        path.write_bytes(png)
        client.log_artifact(run_id, str(path), str(Path(name).parent) if "/" in name else None)


def _probe(uri: str) -> None:
    """Asks a server whether it is there: MLflow's own client would take minutes to find out."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in, the client will tell
    except OSError as error:
        raise TrackingUnavailable(
            f"no MLflow server answers at {uri} ({error}); start it, or leave tracking.uri empty for a local file"
        ) from error


def _sqlite_file(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)) if uri.startswith(prefix) and ":memory:" not in uri else None


def now_ms() -> int:
    """Milliseconds since 1970, UTC, by the wall clock."""
    return round(datetime.now(UTC).timestamp() * 1000)
