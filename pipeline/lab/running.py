"""All experiments, one after the other or several at a time.

Enters: experiments of the catalogue. Leaves: what each found, in their order, as soon as it and those before it are done.
"""

import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from data_schemas.errors import ConfigError
from pipeline.lab.catalogue import EXPERIMENTS
from pipeline.lab.experiment import Finding, Run, parameters_of
from pipeline.lab.figures import small_png


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finding with what it took."""

    finding: Finding
    png: bytes
    """The figure as a file."""
    parameters: dict[str, str]
    seconds: float
    """Wall time."""
    cpu_seconds: float
    """Of the process, while it ran."""


def name_of(run: Run) -> str:
    """The module of an experiment, as its finding is named."""
    return run.__module__.rpartition(".")[2]


def chosen(names: Sequence[str] | None) -> list[Run]:
    """The experiments of these names in the order of the catalogue; all of them by default.

    Raises:
        ConfigError: an unknown name; the known ones are listed.
    """
    known = {name_of(run): run for run in EXPERIMENTS}
    if unknown := sorted(set(names or ()) - set(known)):
        raise ConfigError(f"unknown experiment {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    return [run for name, run in known.items() if not names or name in names]


def run_all(runs: Sequence[Run], *, workers: int) -> Iterator[Result]:
    """Runs each with its default parameters.

    Args:
        workers: processes at a time; with 1 all is done in this one.
    """
    if workers == 1:
        yield from map(result_of, runs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quieten) as pool:
        waiting = [pool.submit(result_of, run) for run in runs]
        try:
            for done in waiting:
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def result_of(run: Run) -> Result:
    """Runs one with its default parameters."""
    started, cpu_started = time.monotonic(), time.process_time()
    finding = run()
    return Result(
        finding=finding,
        png=small_png(finding.figure),
        parameters={name: str(value) for name, value in parameters_of(run).items()},
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )


def _quieten() -> None:
    # Warns of a change inside torch whenever torchrec makes a table: nothing that a user can act on.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
