"""kill -9 at any moment of a day's work: the day that is lived to its end is the same, bit for bit, as one without a kill."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

RECOVERY_SECONDS = 15.0
"""What a kill may cost on top of the work that it lost, which is a day's at most."""


@dataclass
class Killed:
    """What became of days with kills in them."""

    kills: int = 0
    days: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    """What the process was doing."""
    recoveries: list[float] = field(default_factory=list)
    """Seconds that a day took more than one without a kill, for each of its kills."""
    differences: list[str] = field(default_factory=list)

    def line(self, whole: float) -> str:
        """For the table of faults."""
        stages = ", ".join(f"{name} {count}" for name, count in self.stages.most_common())
        mean, most = np.mean(self.recoveries), max(self.recoveries)
        return (
            f"{self.kills} kills in {self.days} days of {whole:.1f} s, {len(self.differences)} days ended otherwise; lost work "
            f"and restart cost {mean:.1f} s a kill, {most:.1f} s at most; killed in {stages}"
        )


def _live_with_kills(
    machine: Any, expected: dict[str, Any], whole: float, *, tracked: bool, kills: int, a_day: int, seed: int
) -> Killed:
    rng, killed, days = np.random.default_rng(seed), Killed(), max(kills // a_day, 1)
    while killed.kills < kills:
        machine.new_day()
        lived = spent = 0.0
        before = killed.kills
        for part in range(a_day):
            place = (killed.days % days + rng.random()) / days
            until = whole * (part + place) / a_day
            answer = machine.ask("live", tracked=tracked, kill_after=max(until - lived, 0.01))
            spent, lived = spent + answer["seconds"], until
            if answer["ended"] == "done":
                break
            killed.stages[answer["stage"]] += 1
            killed.kills += 1
        spent += machine.ask("live", tracked=tracked)["seconds"]
        killed.days += 1
        found = machine.ask("inspect", tracked=tracked)["result"]
        killed.differences += [json.dumps(found)] if found != expected else []
        if killed.kills > before:
            killed.recoveries.append((spent - whole) / (killed.kills - before))
    return killed


def _check(machine: Any, tell: Callable[[str], None], *, tracked: bool, rows_per_hour: int, **kills: int) -> None:
    expected, whole = machine.first_day(tracked=tracked, rows_per_hour=rows_per_hour)
    assert expected["left behind"] == []
    assert expected["log"]["keys"] == expected["log"]["rows"] > 3 * rows_per_hour
    killed = _live_with_kills(machine, expected, whole, tracked=tracked, **kills)
    tell(killed.line(whole))
    assert [json.loads(found) for found in killed.differences] == []
    assert max(killed.recoveries) < whole + RECOVERY_SECONDS


def test_days_with_a_few_kills_end_as_one_without(machine: Any, tell: Callable[[str], None]) -> None:
    _check(machine, tell, tracked=False, rows_per_hour=600, kills=6, a_day=3, seed=0)


def _kill_at_steps(machine: Any, tell: Callable[[str], None], *, every: int) -> None:
    """A step counts twice, right before and right after it."""
    expected, _ = machine.first_day(tracked=False, rows_per_hour=300)
    bases = [json.loads(told)[0]["base"] for told in expected["checkpoints"]["versions"].values()]
    assert None in bases[1:]
    assert any(bases), "a day has whole versions and deltas"
    machine.new_day()
    steps = int(machine.ask("live", tracked=False, kill_at=-1)["stage"].split()[0])
    places, otherwise = Counter[str](), 0
    for step in range(1 + every // 2, steps + 1, every):
        machine.new_day()
        answer = machine.ask("live", tracked=False, kill_at=step)
        assert answer["ended"] == "killed"
        places[answer["stage"].split()[-1]] += 1
        machine.ask("live", tracked=False)
        otherwise += machine.ask("inspect", tracked=False)["result"] != expected
    found = ", ".join(f"{name} {count}" for name, count in places.most_common())
    tell(
        f"{places.total()} kills at {steps} steps of publishing whole versions and deltas, {otherwise} ended otherwise; {found}"
    )
    assert places.total() >= 2, "somewhere it was killed"
    assert otherwise == 0


def test_kills_at_some_steps_of_publishing_leave_the_version_before_or_the_new_one(
    machine: Any, tell: Callable[[str], None]
) -> None:
    _kill_at_steps(machine, tell, every=73)


@pytest.mark.slow
def test_kills_between_all_steps_of_publishing_leave_the_version_before_or_the_new_one(
    machine: Any, tell: Callable[[str], None]
) -> None:
    _kill_at_steps(machine, tell, every=2)


@pytest.mark.slow
def test_a_kill_while_mlflow_makes_its_database_leaves_none_or_a_whole_one(machine: Any, tell: Callable[[str], None]) -> None:
    machine.first_day(tracked=False, rows_per_hour=50)
    machine.new_day()
    whole, rng, killed = machine.ask("open mlflow")["seconds"], np.random.default_rng(3), 0
    for place in range(10):
        machine.new_day()
        killed += machine.ask("open mlflow", kill_after=whole * (place + rng.random()) / 10)["ended"] == "killed"
        machine.ask("open mlflow")
    tell(f"{killed} kills while it was made, which takes {whole:.1f} s; each time the next process could use it")
    assert killed >= 8


@pytest.mark.slow
def test_days_with_many_kills_end_as_one_without(machine: Any, tell: Callable[[str], None]) -> None:
    """Without MLflow, so that most of a day is ingest, learning, checkpoints and compaction."""
    _check(machine, tell, tracked=False, rows_per_hour=3000, kills=120, a_day=1, seed=1)


@pytest.mark.slow
def test_days_with_kills_and_mlflow_end_as_one_without(machine: Any, tell: Callable[[str], None]) -> None:
    """With MLflow most of a day is its run, its plots and its registry; what was taken up again is killed again."""
    _check(machine, tell, tracked=True, rows_per_hour=600, kills=80, a_day=4, seed=2)
