"""Processes that are started together give their results, or one error that names the first that failed."""

from dataclasses import replace
from typing import Any

import pytest

from data_schemas.errors import ConfigError, GroupFailed
from pipeline.config import ProcessesConfig
from pipeline.launch import PATIENCE, run_together
from pipeline.training.processes import Patience

slow = pytest.mark.slow


def test_each_gets_the_same_from_every_exchange() -> None:
    total, ranks, first, rows, matrix = zip(*run_together("parts:exchange", 2, {"first": 2**63}), strict=True)
    assert total == (3.0, 3.0)
    assert ranks == ([0, 1], [0, 1])
    assert first == ([0, "first"], [0, "first"])
    assert rows == ([2**63, 2**63 + 1],) * 2
    assert matrix == ([[1.0, 1.0]],) * 2


@slow
@pytest.mark.parametrize(("rank", "how"), [(0, "killed"), (2, "killed"), (1, "raises")])
def test_one_that_is_lost_ends_all_and_is_named(rank: int, how: str) -> None:
    what = {"killed": "was killed by SIGKILL", "raises": "failed: ValueError: this one cannot go on"}[how]
    with pytest.raises(GroupFailed, match=rf"of 3 processes that worked together, process {rank} \(pid \d+\) {what}"):
        run_together("parts:lose", 3, {"rank": rank, "how": how})


@slow
def test_what_the_first_fails_in_is_told_once() -> None:
    with pytest.raises(GroupFailed, match=r"process 0 \(pid \d+\) failed: KeyError: 'no such thing'"):
        run_together("parts:first_fails", 2)


@slow
def test_a_place_that_nobody_answers_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 of this machine: the others are started, and told a wrong place."""
    import pipeline.launch as launch

    class Wrong:
        host, port = "127.0.0.1", 9

    monkeypatch.setattr(launch, "meeting_place", Wrong)
    with pytest.raises(GroupFailed, match=r"cannot reach the others at 127\.0\.0\.1:9 .* within 3 s"):
        run_together("parts:exchange", 2, {"first": 0}, patience=replace(PATIENCE, join_seconds=3.0))


def test_those_that_were_started_are_ended_where_another_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.launch as launch

    start, begun = launch._start, list[Any]()

    def only_one(*words: Any) -> Any:
        if begun:
            raise BlockingIOError("Resource temporarily unavailable")
        begun.append(start(*words))
        return begun[0]

    monkeypatch.setattr(launch, "_start", only_one)
    with pytest.raises(BlockingIOError):
        run_together("parts:exchange", 2, {"first": 0})
    assert begun[0].poll() is not None


def test_in_an_exchange_there_is_time_to_wait_for_the_lock() -> None:
    assert Patience.of(ProcessesConfig(stall_seconds=5), lock_wait_seconds=7).stall_seconds == 12


def test_none_is_too_few() -> None:
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        run_together("parts:exchange", 0, {"first": 0})
