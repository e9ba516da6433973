"""Stages of an update as Prefect tasks.

Enters: the name of a stage and the work to do. Leaves: what the work returns. Prefect never sees it: it would keep the
rows of a window alive.
"""

from collections.abc import Callable
from typing import TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

T = TypeVar("T")


def run_as_task(name: str, work: Callable[[], T]) -> T:
    """Do `work` as a Prefect task called `name`; whatever it raises is raised here."""
    # Prefect keeps the task, and with it all that its function refers to: work and result pass through lists that are
    # empty afterwards.
    waiting, done = [work], list[T]()

    @task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    def stage() -> None:
        done.append(waiting.pop()())

    stage()
    return done.pop()
