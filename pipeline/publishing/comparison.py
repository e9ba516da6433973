"""A comparison as MLflow runs: one parent, below it one run for each strategy and seed.

Enters: `StrategyRun`s as they end, then the `Comparison`. Leaves: runs with the same metric keys, so that the charts and the
compare page of the MLflow UI lay the strategies over each other as they are. `strategy` and `seed` are params. Steps of
`auc`, `log_loss` and the other hourly figures are hours since 1970; steps of what is under `by_rows/` are rows learned, at the
seconds of learning, so that the UI's relative time is learning time. `mean/` holds one figure a run, at
step 0.
"""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import accumulate

from pipeline.comparison.run import StrategyRun
from pipeline.comparison.side_by_side import Job
from pipeline.comparison.summary import Comparison, figures_of
from pipeline.config import UpdateConfig
from pipeline.publishing.comparison_plots import comparison_plots
from pipeline.publishing.comparison_report import as_csv, as_markdown
from pipeline.publishing.tracking import MetricPoint, log_batches, log_image, now_ms, open_experiment, quiet_mlflow

HOURLY = ("auc", "gauc", "log_loss", "normalised_entropy", "copc", "ece")
"""Figures before learning that a run shows by hour."""


class ComparisonRuns:
    """Writes the runs of one comparison, each as soon as it ends, so that a long one can be followed."""

    def __init__(self, config: UpdateConfig, *, name: str, params: dict[str, str]) -> None:
        """Makes the parent run.

        Raises:
            TrackingUnavailable: the server does not answer.
        """
        self._config = config
        with quiet_mlflow():
            self._client, self._experiment = open_experiment(config)
            tags = {"mlflow.source.name": "tidemark", "dataset": config.dataset}
            parent = self._client.create_run(self._experiment, run_name=name, tags=tags)
            self.run_id = str(parent.info.run_id)
            log_batches(self._client, self.run_id, [], params)

    def add(self, run: StrategyRun, job: Job, *, first_judged: int) -> None:
        """Writes the run of one strategy with one seed."""
        with quiet_mlflow():
            tags = {"mlflow.parentRunId": self.run_id, "mlflow.source.name": "tidemark", "dataset": self._config.dataset}
            if run.diverged:
                tags["mlflow.note.content"] = run.diverged
            ended = now_ms()
            started = ended - round(1000 * sum(window.seconds for window in run.windows))
            name = f"{run.strategy}, seed {run.seed}"
            made = self._client.create_run(self._experiment, run_name=name, tags=tags, start_time=started)
            points = [*_hourly(run), *_by_rows(run, started), *_means(run, first_judged, ended)]
            log_batches(self._client, made.info.run_id, points, params_of(job))
            self._client.set_terminated(made.info.run_id, "FAILED" if run.diverged else "FINISHED", ended)

    def finish(self, comparison: Comparison) -> None:
        """Gives the parent its table and plots."""
        page = as_markdown(comparison)
        with quiet_mlflow():
            self._client.set_tag(self.run_id, "mlflow.note.content", page)
            self._client.log_text(self.run_id, page, "comparison.md")
            self._client.log_text(self.run_id, as_csv(comparison), "comparison.csv")
            for name, png in comparison_plots(comparison).items():
                log_image(self._client, self.run_id, png, name)
            self._client.set_terminated(self.run_id, "FINISHED")

    def fail(self) -> None:
        """Marks the parent: no table will follow."""
        with quiet_mlflow():
            self._client.set_terminated(self.run_id, "FAILED")


def params_of(job: Job) -> dict[str, str]:
    """The strategy's name, the seed, and every setting that learning depends on; the same keys for every strategy."""
    parts = job.config.model_dump(mode="json", include={"window", "model", "training", "budget", "sampling"})
    flat = {f"{part}.{name}": str(value) for part, values in parts.items() for name, value in values.items()}
    return flat | {"strategy": job.strategy, "seed": str(job.seed), "training.seed": str(job.seed)}


def _hourly(run: StrategyRun) -> Iterator[MetricPoint]:
    rows = accumulate(window.rows_learned for window in run.windows)
    seconds = accumulate(window.seconds for window in run.windows)
    for window, rows_so_far, seconds_so_far in zip(run.windows, rows, seconds, strict=True):
        values = window.before.as_dict() if window.before else {}
        shown = {name: values[name] for name in HOURLY if name in values}
        shown |= {
            "batch_size": float(window.batch_size),
            "rows_learned": float(rows_so_far),
            "learning_seconds": seconds_so_far,
        }
        shown |= {"rows_left": float(window.rows_left), "skipped_steps": float(window.skipped_steps)}
        for key, value in shown.items():
            yield MetricPoint(key=key, value=value, step=window.start, timestamp_ms=window.start * 3_600_000)


def _by_rows(run: StrategyRun, started_ms: int) -> Iterator[MetricPoint]:
    rows, seconds = 0, 0.0
    for window in run.windows:
        if window.before is not None and window.before.auc is not None:
            at = started_ms + round(1000 * seconds)
            yield MetricPoint(key="by_rows/auc", value=window.before.auc, step=rows, timestamp_ms=at)
        rows, seconds = rows + window.rows_learned, seconds + window.seconds
    for point in run.probe:
        at = started_ms + round(1000 * point.seconds)
        yield MetricPoint(key="by_rows/probe_log_loss", value=point.log_loss, step=point.rows, timestamp_ms=at)


def _means(run: StrategyRun, first_judged: int, ended_ms: int) -> Iterator[MetricPoint]:
    figures = figures_of(run, first_judged)
    for name, value in asdict(figures).items() if figures else ():
        # One figure a run has no axis: with step 0 the MLflow UI draws it as a bar for each strategy.
        yield MetricPoint(key=f"mean/{name}", value=value, step=0, timestamp_ms=ended_ms)
