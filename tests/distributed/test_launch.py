"""Processes that are started together give their results, or one error that names the first that failed."""

import time

import pytest

from data_schemas.errors import ConfigError, GroupFailed
from pipeline.launch import run_together
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
    started = time.monotonic()
    with pytest.raises(GroupFailed, match=rf"of 3 processes that worked together, process {rank} \(pid \d+\) {what}"):
        run_together("parts:lose", 3, {"rank": rank, "how": how})
    assert time.monotonic() - started < 60, "the others do not wait for it"


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
        run_together("parts:exchange", 2, {"first": 0}, patience=Patience(join_seconds=3.0))


def test_none_is_too_few() -> None:
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        run_together("parts:exchange", 0, {"first": 0})
