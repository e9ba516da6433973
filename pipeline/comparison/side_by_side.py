"""All strategies with all seeds over one stream, one after the other or several at a time.

Enters: jobs. Leaves: `StrategyRun`s as they are done. Each process holds the stream once and runs with one thread.
"""

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import ConfigError
from pipeline.comparison.run import EVERY_EIGHTH, Probing, StrategyRun, run_strategy
from pipeline.comparison.strategies import Strategy, refuse_unheeded, require_same_inputs
from pipeline.comparison.stream import RecordedWindow
from pipeline.comparison.together import run_on_processes
from pipeline.config import UpdateConfig, overridden


@dataclass(frozen=True, kw_only=True)
class Job:
    """A strategy with a seed."""

    strategy: str
    config: UpdateConfig
    """The strategy's settings."""
    recorded_by: UpdateConfig
    """Those by which the stream was recorded."""
    seed: int
    probing: Probing = EVERY_EIGHTH
    """How closely the loss of fixed rows is followed along its passes."""


def jobs_of(config: UpdateConfig, strategies: Sequence[Strategy], seeds: int, *, probing: Probing = EVERY_EIGHTH) -> list[Job]:
    """Every strategy with seeds 0 to `seeds` - 1, seed by seed, so that what slows the machine meets all strategies alike.

    Args:
        probing: of all of them.

    Raises:
        ConfigError: a strategy's settings are wrong, contradict each other, or would not be heeded; its name is given.
    """
    configs = {strategy.name: _config_of(config, strategy) for strategy in strategies}
    return [
        Job(strategy=name, config=own, recorded_by=config, seed=seed, probing=probing)
        for seed in range(seeds)
        for name, own in configs.items()
    ]


def run_jobs(
    jobs: Sequence[Job], spec: DatasetSpec, stream: Sequence[RecordedWindow], *, workers: int
) -> Iterator[StrategyRun]:
    """Runs of all jobs, as they end.

    Args:
        workers: jobs at a time, each in a process; with 1 in this one. A job whose model several processes train starts these
            besides.
    """
    if workers == 1:
        for job in jobs:
            yield _run(job, spec, stream)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_hold, initargs=(spec, stream)) as pool:
        waiting = [pool.submit(_run_with_held, job) for job in jobs]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _config_of(config: UpdateConfig, strategy: Strategy) -> UpdateConfig:
    try:
        own = overridden(config, strategy.overrides)
        refuse_unheeded(own)
        require_same_inputs(own.model.kind, config.model.kind)
    except ConfigError as error:
        raise ConfigError(f"strategy {strategy.name!r}: {error}") from error
    return own


_held: list[tuple[DatasetSpec, Sequence[RecordedWindow]]] = []
"""In a process of the pool: what all of its jobs need, so that it is sent once."""


def _hold(spec: DatasetSpec, stream: Sequence[RecordedWindow]) -> None:
    # Warns of a change inside torch whenever torchrec makes a table: nothing that a user can act on.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    _held.append((spec, stream))


def _run_with_held(job: Job) -> StrategyRun:
    ((spec, stream),) = _held
    return _run(job, spec, stream)


def _run(job: Job, spec: DatasetSpec, stream: Sequence[RecordedWindow]) -> StrategyRun:
    if job.config.processes.count == 1:
        return run_strategy(job.strategy, job.config, spec, stream, seed=job.seed, probing=job.probing)
    hours = stream[-1].end - stream[0].start
    return run_on_processes(
        job.strategy, job.config, seed=job.seed, probing=job.probing, recorded_by=job.recorded_by, hours=hours
    )
