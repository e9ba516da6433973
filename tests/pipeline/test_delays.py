"""The share of clicks that is known by age, beside the distribution that the delays were drawn from."""

import numpy as np
import pytest

from pipeline.data.delays import KEPT_HOURS, LEAST_LOG, Delays

TRUE = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
"""Of clicks that become known at the ages 1 to 5."""


def seen(first: int, hours: int, clicks_an_hour: int, seed: int = 0) -> Delays:
    """Hour by hour, what an update of each hour counts; traffic doubles on the way."""
    rng = np.random.default_rng(seed)
    shown = np.repeat(np.arange(hours), np.linspace(clicks_an_hour, 2 * clicks_an_hour, hours).astype(int))
    ages = rng.choice(5, len(shown), p=TRUE) + 1
    delays = Delays.nothing_seen(5)
    for hour in range(hours):
        now = shown + ages == hour + 1
        delays = delays.after(first + shown[now], ages[now], first + hour + 1)
    return delays


def test_shares_are_those_of_the_delays_though_the_youngest_have_seen_only_quick_clicks() -> None:
    shares = seen(500_000, 8, 20_000).known_shares()
    np.testing.assert_allclose(shares, np.append(0, TRUE.cumsum()), atol=0.01)
    naive = seen(500_000, 8, 20_000).clicks_CA.sum(axis=0)
    assert naive[0] / naive.sum() > 0.42, "counted without regard to age, quick clicks are too many"


def test_shares_rise_from_nothing_to_all_whatever_was_seen() -> None:
    for delays in (Delays.nothing_seen(5), seen(10, 1, 100), seen(10, 3, 1), Delays.nothing_seen(1)):
        shares = delays.known_shares()
        assert (shares[0], shares[-1]) == (0, 1)
        assert (np.diff(shares) > 0).all()


def test_where_clicks_come_at_once_nearly_all_are_known() -> None:
    delays = Delays.nothing_seen(7)
    for hour in range(24):
        delays = delays.after(np.full(1000, hour), np.ones(1000, np.int64), hour + 1)
    assert delays.known_shares()[1] > 0.999


def test_logs_of_what_is_not_known_are_zero_before_the_hour_and_nothing_in_the_end() -> None:
    delays = seen(100, 8, 1000)
    logs = delays.log_unseen(np.array([100, 100, 100, 100]), np.array([99, 100, 101, 105]))
    assert logs[[0, 1, 3]].tolist() == [0, 0, LEAST_LOG]
    assert np.exp(logs[2]) == pytest.approx(0.6, abs=0.05)


def test_old_hours_are_given_up_and_nothing_else() -> None:
    delays = seen(100, 8, 10)
    later = delays.after(np.array([103 + KEPT_HOURS]), np.array([1]), 104 + KEPT_HOURS)
    assert later.hour_C.tolist() == [104, 105, 106, 107, 103 + KEPT_HOURS]
    assert (later.clicks_CA[:-1] == delays.clicks_CA[4:]).all()


def test_they_are_the_same_after_a_checkpoint() -> None:
    delays = seen(100, 8, 10)
    again = Delays.load(delays.arrays(), 5)
    assert again.known_until == 108
    assert (again.hour_C == delays.hour_C).all()
    assert (again.clicks_CA == delays.clicks_CA).all()
    assert Delays.load(delays.arrays(), 6).known_shares().tolist() == Delays.nothing_seen(6).known_shares().tolist()
