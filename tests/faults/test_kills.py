"""kill -9 at any moment of a day's work: the day that is lived to its end is the same, bit for bit, as one without a kill."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DAY = Path(__file__).with_name("mortal_day.py")
KILLS_A_DAY = 4
"""One in each quarter of the work, so that what was taken up again is killed again."""
RECOVERY_SECONDS = 15.0
"""What a kill may cost on top of the work that it lost, which is a day's at most."""


class Machine:
    """Lives days, in processes that can be killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._errors = (root / "stderr").open("w")
        self._server = subprocess.Popen(
            [sys.executable, str(DAY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"do": do, "folder": str(self.root / "day"), **more}) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        assert answer["ended"] != "failed", (self.root / "stderr").read_text()[-3000:]
        return answer

    def new_day(self) -> None:
        """At the same path as every day before: artifacts in MLflow know where they are."""
        shutil.rmtree(self.root / "day", ignore_errors=True)
        shutil.copytree(self.root / "morning", self.root / "day")

    def close(self) -> None:
        self._server.communicate()
        self._errors.close()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    yield machine
    machine.close()


def _a_day_without_a_kill(machine: Machine, *, tracked: bool, rows_per_hour: int) -> tuple[dict[str, Any], float]:
    """What it comes to, and how long it takes."""
    for name in ("morning", "day"):
        shutil.rmtree(machine.root / name, ignore_errors=True)
    machine.ask("lay out", rows_per_hour=rows_per_hour)
    if tracked:
        machine.ask("open mlflow")
    (machine.root / "day").rename(machine.root / "morning")
    machine.new_day()
    seconds = float(machine.ask("live", tracked=tracked)["seconds"])
    return machine.ask("inspect", tracked=tracked)["result"], seconds


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
    machine: Machine, expected: dict[str, Any], whole: float, *, tracked: bool, kills: int, seed: int
) -> Killed:
    rng, killed, days = np.random.default_rng(seed), Killed(), max(kills // KILLS_A_DAY, 1)
    while killed.kills < kills:
        machine.new_day()
        lived = spent = 0.0
        before = killed.kills
        for quarter in range(KILLS_A_DAY):
            place = (killed.days % days + rng.random()) / days
            until = whole * (quarter + place) / KILLS_A_DAY
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


def _check(machine: Machine, tell: Callable[[str], None], *, tracked: bool, rows_per_hour: int, kills: int, seed: int) -> None:
    expected, whole = _a_day_without_a_kill(machine, tracked=tracked, rows_per_hour=rows_per_hour)
    assert expected["left behind"] == []
    assert expected["log"]["keys"] == expected["log"]["rows"] > 3 * rows_per_hour
    killed = _live_with_kills(machine, expected, whole, tracked=tracked, kills=kills, seed=seed)
    tell(killed.line(whole))
    assert [json.loads(found) for found in killed.differences] == []
    assert max(killed.recoveries) < whole + RECOVERY_SECONDS


def test_days_with_a_few_kills_end_as_one_without(machine: Machine, tell: Callable[[str], None]) -> None:
    _check(machine, tell, tracked=False, rows_per_hour=600, kills=6, seed=0)


@pytest.mark.slow
def test_days_with_many_kills_end_as_one_without(machine: Machine, tell: Callable[[str], None]) -> None:
    """Without MLflow, so that most of a day is ingest, learning, checkpoints and compaction."""
    _check(machine, tell, tracked=False, rows_per_hour=3000, kills=120, seed=1)


@pytest.mark.slow
def test_days_with_kills_and_mlflow_end_as_one_without(machine: Machine, tell: Callable[[str], None]) -> None:
    """With MLflow most of a day is its run, its plots and its registry."""
    _check(machine, tell, tracked=True, rows_per_hour=600, kills=80, seed=2)
