"""A strategy whose model is trained by several processes, each with its share of every step's rows.

Enters: a strategy's settings, and where the stream was recorded. Leaves: the `StrategyRun` of the first process, which has the
figures of all. Each process encodes the stream anew from the click log, before its clock starts.
"""

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from pipeline.comparison.run import Probing, StrategyRun, run_strategy
from pipeline.comparison.stream import recorded_stream
from pipeline.config import UpdateConfig, spec_of
from pipeline.launch import run_together
from pipeline.training.processes import Patience

_RUN = TypeAdapter(StrategyRun)


def run_on_processes(
    strategy: str, config: UpdateConfig, *, seed: int, probing: Probing, recorded_by: UpdateConfig, hours: int
) -> StrategyRun:
    """As `run_strategy`, by `config.processes.count` processes of this machine.

    Args:
        recorded_by: settings by which the stream was recorded.
        hours: length of the stream.

    Raises:
        GroupFailed: a process failed.
    """
    arguments = {
        "strategy": strategy,
        "settings": _plain(config),
        "seed": seed,
        "probing": asdict(probing),
        "recorded_by": _plain(recorded_by),
        "hours": hours,
    }
    patience = Patience.of(config.processes, lock_wait_seconds=config.lock_wait_seconds)
    work = f"{__name__}:{take_part.__name__}"
    return _RUN.validate_python(run_together(work, config.processes.count, arguments, patience=patience)[0])


def take_part(
    strategy: str,
    settings: dict[str, Any],
    seed: int,
    probing: dict[str, int],
    recorded_by: dict[str, Any],
    hours: int,
) -> Any:
    """One of the processes; returns what JSON can carry."""
    config, recording = UpdateConfig(**settings), UpdateConfig(**recorded_by)
    spec = spec_of(recording)
    stream = recorded_stream(recording, spec, hours=hours)
    run = run_strategy(strategy, config, spec, stream, seed=seed, probing=Probing(**probing))
    return _RUN.dump_python(run, mode="json")


def _plain(config: UpdateConfig) -> dict[str, Any]:
    """Without alerts, which may hold a secret and which no run sends."""
    return config.model_dump(mode="json", exclude={"alerts"})
