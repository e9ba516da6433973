"""Strategies side by side on one recorded stream: which batch size, rate and smoothing learn most from the same clicks.

Every window is predicted, then learned, by every strategy with every seed. Figures, table and plots are in MLflow.

    python flows/compare_batch_strategies.py --dataset brunch --landing ../shared/data/brunch/impressions --workers 2
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from rich.console import Console

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import ConfigError
from flows.artifacts import embed
from flows.catching_up import ingest_new
from flows.settings import settings_for
from flows.stages import run_as_task
from flows.terminal import progress, run_flow, tell
from pipeline.comparison.run import StrategyRun
from pipeline.comparison.side_by_side import Job, jobs_of, run_jobs
from pipeline.comparison.strategies import REFERENCE, chosen, with_gradient_ema
from pipeline.comparison.stream import RecordedWindow, recorded_stream
from pipeline.comparison.summary import Comparison, compare
from pipeline.config import UpdateConfig, spec_of
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.passwords import without_passwords
from pipeline.publishing.comparison import ComparisonRuns
from pipeline.publishing.comparison_plots import comparison_plots
from pipeline.publishing.comparison_report import as_markdown, as_terminal_table, in_words

DEFAULTS = ("budget.min_reserve_seconds=0", "training.precision=fp32")
"""The budget is learning alone; and no strategy is luckier than another in what precision suits the machine's mood."""


@flow(name="compare-batch-strategies", persist_result=False)
def compare_batch_strategies(
    *,
    strategies: list[str] | None = None,
    reference: str = REFERENCE,
    seeds: int = 5,
    gradient_ema: float | None = None,
    hours: int | None = None,
    warmup_hours: int | None = None,
    workers: int = 1,
    generate: bool = False,
    config: str | None = None,
    dataset: str | None = None,
    landing: str | None = None,
    state_dir: str | None = None,
    budget_seconds: float | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Ingest what is new in the landing folder, then run every strategy with every seed over the click log.

    Args:
        strategies: Names of strategies, or 'NAME: setting=value ...'; may be given several times. All by default.
        reference: The strategy that the others are measured against.
        seeds: Runs of each strategy, at least 2; 5 or more for intervals that mean something.
        gradient_ema: Run each strategy once more with a moving average of its gradients, of this decay.
        hours: Length of the stream; the whole click log by default.
        warmup_hours: Hours that are predicted and learned, but not judged: 24, or a sixth of a shorter stream.
        workers: Processes at a time; each holds the stream in memory.
        generate: Write the synthetic stream, of `hours` or 24 hours, into the landing folder first.
        config: Settings file (TOML). Without it, and for what it leaves out, the defaults hold.
        dataset: Name of a shipped data set, or the path of a TOML file that declares one.
        landing: Folder or fsspec address of the click logs.
        state_dir: Folder of everything that is kept: click log, quarantine, MLflow database.
        budget_seconds: CPU seconds in which a strategy may learn a window; what it does not come to is left out.
        overrides: Any other setting, for every strategy, such as model.kind=dcnv2; may be given several times.
    """
    settings = settings_for(
        config,
        overrides,
        defaults=DEFAULTS,
        dataset=dataset,
        landing=landing,
        state_dir=state_dir,
        budget__seconds=budget_seconds,
    )
    settings = _own_experiment(settings)
    _check(seeds=seeds, workers=workers, hours=hours, warmup_hours=warmup_hours)
    entered = with_gradient_ema(chosen(strategies, reference), gradient_ema)
    jobs = jobs_of(settings, entered, seeds)
    if generate:
        _generate(settings, hours)
    ingest_new(settings)
    spec = spec_of(settings)
    stream = run_as_task("encode", lambda: recorded_stream(settings, spec, hours=hours))
    warmup = _warmup(stream) if warmup_hours is None else warmup_hours
    tell(
        f"{len(jobs)} runs, {len(entered)} strategies with {seeds} seeds each, over {len(stream)} windows of "
        f"{sum(window.num_rows for window in stream):,} rows"
    )
    comparison = _compared(settings, spec, stream, jobs, reference=reference, warmup_hours=warmup, workers=workers)
    _show(settings, comparison)


def _own_experiment(settings: UpdateConfig) -> UpdateConfig:
    """Comparisons have an experiment of their own, beside that of the updates, unless one is named."""
    if settings.tracking.experiment:
        return settings
    tracking = settings.tracking.model_copy(update={"experiment": f"{settings.experiment}-comparison"})
    return settings.model_copy(update={"tracking": tracking})


def _check(*, seeds: int, workers: int, hours: int | None, warmup_hours: int | None) -> None:
    if seeds < 2:
        raise ConfigError(f"seeds must be at least 2, got {seeds}: one run has no interval; use 5 or more")
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    if hours is not None and hours < 2:
        raise ConfigError(f"hours must be at least 2, got {hours}: the first window is learned before one is predicted")
    if warmup_hours is not None and warmup_hours < 0:
        raise ConfigError(f"warmup_hours must be at least 0, got {warmup_hours}")


def _generate(settings: UpdateConfig, hours: int | None) -> None:
    if settings.dataset != "synthetic":
        raise ConfigError(f"generate writes the synthetic stream, and dataset is {settings.dataset!r}; leave one of them out")
    stream = SyntheticConfig() if hours is None else SyntheticConfig(hours=hours)
    run_as_task("generate", lambda: write_landing(stream, Path(settings.landing)))


def _warmup(stream: Sequence[RecordedWindow]) -> int:
    return min(24, (stream[-1].end - stream[0].start) // 6)


def _compared(
    settings: UpdateConfig,
    spec: DatasetSpec,
    stream: Sequence[RecordedWindow],
    jobs: Sequence[Job],
    *,
    reference: str,
    warmup_hours: int,
    workers: int,
) -> Comparison:
    names = list(dict.fromkeys(job.strategy for job in jobs))
    first_judged = stream[0].start + warmup_hours
    params = {
        "reference": reference,
        "dataset": spec.name,
        "seeds": str(len(jobs) // len(names)),
        "windows": str(len(stream)),
        "rows": str(sum(window.num_rows for window in stream)),
        "strategies": str(len(names)),
        "warmup_hours": str(warmup_hours),
    }
    tracked = (
        ComparisonRuns(settings, name=f"{len(names)} strategies on {spec.name}", params=params)
        if settings.tracking.enabled
        else None
    )
    by_key = {(job.strategy, job.seed): job for job in jobs}
    runs: list[StrategyRun] = []

    def run_all() -> None:
        with progress("comparing", total=len(jobs)) as advance:
            for run in run_jobs(jobs, spec, stream, workers=workers):
                runs.append(run)
                if tracked:
                    tracked.add(run, by_key[run.strategy, run.seed], first_judged=first_judged)
                advance(f"{run.strategy}, seed {run.seed}", len(runs))

    try:
        run_as_task("run strategies", run_all)
        comparison = compare(runs, strategies=names, reference=reference, warmup_hours=warmup_hours)
    except BaseException:
        if tracked:
            tracked.fail()
        raise
    if tracked:
        run_as_task("track", lambda: tracked.finish(comparison))
    return comparison


def _show(settings: UpdateConfig, comparison: Comparison) -> None:
    page = as_markdown(comparison)
    images = "\n\n".join(f"![{name}]({address})" for name, address in embed(comparison_plots(comparison)).items())
    create_markdown_artifact(f"{page}\n\n{images}", key="comparison", description=in_words(comparison))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(as_terminal_table(comparison))
    tell(in_words(comparison))
    if settings.tracking.enabled:
        tell(f"Every run, table and plot: experiment {settings.experiment!r} in {without_passwords(settings.tracking_uri)}")


if __name__ == "__main__":
    sys.exit(run_flow(compare_batch_strategies))
