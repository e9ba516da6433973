"""A program that a launcher starts: learns what waits, as the flows do but without Prefect; prints one line for each update.

python by_hand.py '{"overrides": [...], "now": "...", "die": {"rank": 1, "attempt": 0, "step": 5}, "differ": false}'
"""

import json
import os
import signal
import sys
from datetime import datetime
from typing import Any

from data_schemas.errors import StoppedByFirst, TidemarkError
from pipeline import ranks
from pipeline.config import load_config
from pipeline.ranks import Update, on_processes
from pipeline.training.learner import Learner


def main(asked: dict[str, Any]) -> int:
    """0, or 1 after one line that says what was wrong."""
    rank, attempt = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    die = asked.get("die")
    if die and (rank, attempt) == (die["rank"], die["attempt"]):
        _die_at(die["step"])
    overrides = [*asked["overrides"], *([f"training.seed={rank}"] if asked.get("differ") else [])]
    config, now = load_config(overrides=overrides), datetime.fromisoformat(asked["now"])
    begin = ranks._begin_attempt
    ranks._begin_attempt = lambda config: _told(begin(config))

    def work(update: Update) -> None:
        while report := update(config, now=now):
            _say(f"version {report.version} learned {report.rows_learned}")

    try:
        on_processes(config, work)
    except StoppedByFirst:
        return 1
    except TidemarkError as error:
        sys.stderr.write(f"error of process {rank}: {error}\n")
        return 1
    return 0


def _die_at(step: int) -> None:
    """This process is killed when it has learned so many steps."""
    original, steps = Learner.step, [0]

    def counted(*args: Any, **more: Any) -> Any:
        steps[0] += 1
        if steps[0] > step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **more)

    Learner.step = counted  # type: ignore[method-assign]


def _told(seconds: float) -> float:
    _say(f"spent {seconds:.1f} s before")
    return seconds


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
