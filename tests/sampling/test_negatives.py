"""Drawn negatives: their law, what they never are, and that nothing gives them away."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.examples import F32, I64, U64
from data_schemas.hashing import MISSING
from sampling.leaks import bit_auc, counts_before, decile_edges, popularity_bits, probe, strength, time_bits
from sampling.negatives import Drawn, Law, choose_hard, draw_negatives

LAWS: tuple[Law, ...] = ("uniform", "popularity", "in_batch")


def _draw(user: Any, item: Any, hour: Any, **more: Any) -> Drawn:
    settings = {"law": "popularity", "draws_a_click": 4, "power": 0.75, "seed": [1]} | more
    return draw_negatives(np.array(user, np.uint64), np.array(item, np.uint64), np.array(hour, np.int64), **settings)


@pytest.mark.parametrize("law", LAWS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_drawn_row_is_live_in_its_hour_never_the_users_own_and_carries_its_probability(law: Law, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 2)), max_size=24))
    user, item, hour = np.array(rows, np.int64).reshape(-1, 3).T
    drawn = _draw(user, item, hour, law=law, in_batch_clicks=4)
    clicks, rows_of_items = drawn.click_D, drawn.item_D
    assert (hour[clicks] == hour[rows_of_items]).all()
    own = set(zip(user.tolist(), item.tolist(), strict=True))
    assert not own & set(zip(user[clicks].tolist(), item[rows_of_items].tolist(), strict=True))
    assert len(clicks) + drawn.undrawn + 4 * drawn.clicks_without == 4 * len(rows)
    for click, row, probability, exposure in zip(clicks, rows_of_items, drawn.probability_D, drawn.exposure_D, strict=True):
        for power, got in (({"uniform": 0.0, "popularity": 0.75, "in_batch": 1.0}[law], probability), (0.75, exposure)):
            assert got == pytest.approx(_brute_probability(user, item, hour, click, item[row], power))


def _brute_probability(user: I64, item: I64, hour: I64, click: int, candidate: int, power: float) -> float:
    now, own = hour == hour[click], set(item[user == user[click]].tolist())
    live, counts = np.unique(item[now], return_counts=True)
    masses = {i: float(count) ** power for i, count in zip(live.tolist(), counts.tolist(), strict=True) if i not in own}
    return masses[candidate] / sum(masses.values())


@pytest.mark.parametrize("law", LAWS)
def test_items_are_drawn_as_often_as_their_probabilities_say(law: Law) -> None:
    rng = np.random.default_rng(3)
    item = np.repeat(np.arange(1, 13), 2 ** np.arange(12) // 8 + 1)
    user = rng.integers(1, len(item) // 3, len(item))
    hour = np.zeros(len(item), np.int64)
    draws = [_draw(user, item, hour, law=law, draws_a_click=20, seed=[seed], in_batch_clicks=32) for seed in range(20)]
    for candidate in range(1, 13):
        drawn = sum(int((item[each.item_D] == candidate).sum()) for each in draws)
        expected = (
            20
            * 20
            * sum(
                _brute_probability(
                    user, item, hour, click, candidate, {"uniform": 0.0, "popularity": 0.75, "in_batch": 1.0}[law]
                )
                for click in range(len(item))
                if candidate not in item[user == user[click]]
            )
        )
        spread = 6 if law == "in_batch" else 1  # the draws of a batch share its items
        assert abs(drawn - expected) < 4 * spread * np.sqrt(expected) + 1, candidate


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    rng = np.random.default_rng(0)
    columns = (rng.integers(1, 50, 400), rng.integers(1, 40, 400), rng.integers(0, 3, 400))
    for law in LAWS:
        first, again, other = (_draw(*columns, law=law, seed=[seed]) for seed in (7, 7, 8))
        assert (first.item_D == again.item_D).all()
        assert len(first.item_D) != len(other.item_D) or (first.item_D != other.item_D).any()


def test_unknown_users_are_each_their_own_and_unknown_items_are_nobodys() -> None:
    missing = int(MISSING)
    drawn = _draw([missing, missing, 5], [1, 2, missing], [0, 0, 0])
    assert drawn.clicks_without == 1
    assert set(drawn.click_D.tolist()) == {0, 1}
    assert set(zip(drawn.click_D.tolist(), drawn.item_D.tolist(), strict=True)) == {(0, 1), (1, 0)}


def test_who_clicked_everything_that_is_live_gets_no_negatives_and_is_counted() -> None:
    drawn = _draw([1, 1, 2], [10, 11, 10], [0, 0, 0])
    assert drawn.clicks_without == 2
    assert (drawn.click_D == 2).all()
    assert (drawn.item_D == 1).all()
    assert drawn.probability_D == pytest.approx(np.ones(4))


def test_trailing_hours_make_items_live_that_were_clicked_before_the_window() -> None:
    drawn = _draw([1, 2, 3], [10, 11, 12], [5, 5, 3], num_clicks=2, draws_a_click=50)
    assert set(drawn.item_D.tolist()) == {0, 1}
    trailing = _draw([1, 2, 3], [10, 11, 12], [5, 5, 3], num_clicks=2, draws_a_click=50, trailing_hours=2)
    assert set(trailing.item_D.tolist()) == {0, 1, 2}
    assert set(trailing.click_D.tolist()) == {0, 1}


@pytest.mark.parametrize("law", LAWS)
def test_weighted_draws_of_any_law_estimate_the_same_sum_over_what_could_have_been_shown(law: Law) -> None:
    rng = np.random.default_rng(5)
    item = rng.zipf(1.5, 600) % 50 + 1
    user, hour = rng.integers(1, 200, 600), np.zeros(600, np.int64)
    figure = rng.random(51)
    drawn = [_draw(user, item, hour, law=law, seed=[seed]) for seed in range(60)]
    sums = [float((each.ratio_D * figure[item[each.item_D]]).sum()) / len(each.item_D) for each in drawn]
    expected = np.mean(
        [
            sum(_brute_probability(user, item, hour, click, i, 0.75) * figure[i] for i in np.unique(item) if i not in own)
            for click in range(0, 600, 6)
            for own in [set(item[user == user[click]].tolist())]
        ]
    )
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - expected) < 4 * error + 0.004  # every sixth click stands for all


@given(rows=st.integers(1, 5), candidates=st.integers(2, 9), data=st.data())
@settings(max_examples=50, deadline=None)
def test_hard_negatives_are_the_top_and_their_weights_sum_to_the_draws(rows: int, candidates: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(1, candidates))
    hard = data.draw(st.integers(0, chosen - 1))
    scores = np.random.default_rng(rows).random((rows, candidates)).astype(np.float32)
    positions, weights = choose_hard(scores, chosen=chosen, hard=hard, seed=[0])
    assert all(len(set(row)) == chosen for row in positions.tolist())
    assert (np.sort(positions[:, :hard], axis=1) == np.sort(np.argsort(-scores, axis=1)[:, :hard], axis=1)).all()
    assert weights.sum(axis=1) == pytest.approx(np.full(rows, chosen))


def test_sums_over_hard_negatives_are_unbiased_for_sums_over_their_candidates() -> None:
    rng = np.random.default_rng(2)
    scores, figure = rng.random((40, 10)).astype(np.float32), rng.random((40, 10))
    estimates = []
    for seed in range(400):
        positions, weights = choose_hard(scores, chosen=4, hard=2, seed=[seed])
        estimates.append((np.take_along_axis(figure, positions, axis=1) * weights).sum())
    assert np.mean(estimates) == pytest.approx(4 * figure.mean(axis=1).sum(), abs=4 * np.std(estimates) / 20)


def test_hard_negatives_with_no_share_left_to_chance_are_refused() -> None:
    with pytest.raises(ValueError, match="hard < chosen"):
        choose_hard(np.zeros((1, 4), np.float32), chosen=2, hard=2, seed=[0])


@dataclass(frozen=True)
class _Log:
    """A log of impressions whose law is known: items are born, fade, and are shown as their clicks of the hour ** 0.75."""

    user_R: U64
    item_R: U64
    hour_R: I64
    labels_R: F32

    def clicks(self) -> tuple[U64, U64, I64]:
        clicked = self.labels_R > 0
        return self.user_R[clicked], self.item_R[clicked], self.hour_R[clicked]


def _impressions(hours: int = 72, clicks_an_hour: int = 600, seed: int = 0) -> _Log:
    rng = np.random.default_rng(seed)
    born, size = rng.integers(-40, hours, 900), rng.pareto(1.2, 900) + 0.2
    columns = []
    for hour in range(hours):
        age = hour - born
        appeal = np.where(age >= 0, size * 0.5 ** (np.maximum(age, 0) / 8), 0) + 0.02 * size * (age >= 0)
        item = rng.choice(900, clicks_an_hour, p=appeal / appeal.sum())
        user = rng.integers(0, 5000, clicks_an_hour)
        live, count = np.unique(item, return_counts=True)
        shown = rng.choice(live, 4 * clicks_an_hour, p=count**0.75 / (count**0.75).sum())
        beside = np.repeat(user, 4)
        own = np.isin(beside * 1000 + shown, user * 1000 + item)
        for users, items, label in ((user, item, 1.0), (beside[~own], shown[~own], 0.0)):
            columns.append((users + 1, items + 1, np.full(len(users), 400_000 + hour), np.full(len(users), label)))
    user_R, item_R, hour_R, labels_R = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return _Log(user_R.astype(np.uint64), item_R.astype(np.uint64), hour_R, labels_R.astype(np.float32))


LOG = _impressions()
WARM = 400_024
"""Bits need a past: they are asked for after a day."""
CHANCE = 0.012
"""Four standard errors of the AUC of one bit, with the rows of two days."""


def _aucs(log: _Log, weights_R: Any) -> dict[str, float]:
    """Of every bit, judged after the first day; deciles are those of the impressions."""
    _, clicked_P, hour_P = LOG.clicks()
    late = log.hour_R >= WARM
    item_R, hour_R = log.item_R[late], log.hour_R[late]
    bits = time_bits(item_R, hour_R, clicked_P, hour_P)
    for span in (1, 24):
        edges = decile_edges(counts_before(LOG.item_R, LOG.hour_R, clicked_P, hour_P, span_hours=span)[LOG.hour_R >= WARM])
        counts_R = counts_before(item_R, hour_R, clicked_P, hour_P, span_hours=span)
        bits |= {f"{span} h: {name}": bit_R for name, bit_R in popularity_bits(counts_R, edges).items()}
    return probe(bits, log.labels_R[late], weights_R[late])


def _excess(log: _Log, weights_R: Any) -> dict[str, float]:
    """By how much each bit tells more than in the impressions."""
    logged = _aucs(LOG, np.ones(len(LOG.labels_R)))
    return {name: strength(auc) - strength(logged[name]) for name, auc in _aucs(log, weights_R).items()}


def _too_much(excess: dict[str, float]) -> dict[str, float]:
    assert len(excess) >= 15
    return {name: round(by, 4) for name, by in excess.items() if by > CHANCE}


def _hourly(law: Law, draws_a_click: int = 4, **more: Any) -> tuple[I64, I64, Any]:
    """Draws for window after window of one hour: clicks, rows of items, ratios."""
    user_R, item_R, hour_R = LOG.clicks()
    found = []
    for hour in np.unique(hour_R):
        rows = np.flatnonzero(hour_R == hour)
        drawn = _draw(user_R[rows], item_R[rows], hour_R[rows], law=law, draws_a_click=draws_a_click, seed=[hour], **more)
        found.append((rows[drawn.click_D], rows[drawn.item_D], drawn.ratio_D))
    click_D, item_D, ratio_D = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return click_D, item_D, ratio_D


def _with_drawn(click_D: I64, item_D: I64, weights_D: Any) -> tuple[_Log, Any]:
    user_R, item_R, hour_R = LOG.clicks()
    ones = np.ones(len(user_R))
    log = _Log(
        np.concatenate([user_R, user_R[click_D]]),
        np.concatenate([item_R, item_R[item_D]]),
        np.concatenate([hour_R, hour_R[click_D]]),
        np.concatenate([ones, np.zeros(len(click_D))]).astype(np.float32),
    )
    return log, np.concatenate([ones, weights_D])


@pytest.mark.parametrize("law", LAWS)
def test_no_bit_tells_more_of_a_drawn_label_than_of_a_logged_one(law: Law) -> None:
    assert _too_much(_excess(*_with_drawn(*_hourly(law)))) == {}


def test_hard_negatives_give_nothing_away_once_weighted() -> None:
    """Scores that know the very bits: the hardest candidates are those that were not clicked for some hours."""
    click_D, item_D, _ = _hourly("popularity", draws_a_click=12)
    _, clicked_P, hour_P = LOG.clicks()
    silent = time_bits(clicked_P[item_D], hour_P[click_D], clicked_P, hour_P)["not clicked in the last 3 h"]
    positions, weights = choose_hard(silent.astype(np.float32).reshape(-1, 12), chosen=4, hard=2, seed=[3])
    rows = np.take_along_axis(np.arange(len(click_D)).reshape(-1, 12), positions, axis=1).reshape(-1)
    unweighted = _excess(*_with_drawn(click_D[rows], item_D[rows], np.ones(len(rows))))
    assert unweighted["not clicked in the last 3 h"] > 5 * CHANCE, "without weights the score itself gives them away"
    assert _too_much(_excess(*_with_drawn(click_D[rows], item_D[rows], weights.reshape(-1)))) == {}


def test_the_probe_catches_negatives_of_the_trailing_day() -> None:
    """What was not clicked for a day is live now only where it is clicked now: the known leak."""
    user_R, item_R, hour_R = LOG.clicks()
    drawn = _draw(user_R, item_R, hour_R, trailing_hours=24)
    log, weights_R = _with_drawn(drawn.click_D, drawn.item_D, drawn.ratio_D)
    assert max(_excess(log, weights_R).values()) > 4 * CHANCE
    silent = time_bits(log.item_R, log.hour_R, item_R, hour_R)["not clicked in the last 24 h"]
    late, clicked = log.hour_R >= WARM, log.labels_R == 1
    assert silent[late & clicked].mean() > 0.01
    assert silent[late & ~clicked].mean() < 0.3 * silent[late & clicked].mean()


def test_the_probe_catches_uniform_draws_that_were_not_put_right() -> None:
    click_D, item_D, _ = _hourly("uniform")
    assert max(_excess(*_with_drawn(click_D, item_D, np.ones(len(click_D)))).values()) > 2 * CHANCE


def test_the_auc_of_a_bit_equals_scikit_learns() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    bit_R, labels_R, weights_R = rng.random(500) < 0.3, (rng.random(500) < 0.2).astype(np.float32), rng.random(500)
    assert bit_auc(bit_R, labels_R, weights_R) == pytest.approx(roc_auc_score(labels_R, bit_R, sample_weight=weights_R))


def test_bits_of_time_are_those_of_a_walk_through_the_log() -> None:
    rng = np.random.default_rng(1)
    item_R, hour_R = rng.integers(0, 9, 80).astype(np.uint64), rng.integers(100, 140, 80)
    clicked_P, hour_P = rng.integers(0, 9, 60).astype(np.uint64), rng.integers(90, 140, 60)
    bits = time_bits(item_R, hour_R, clicked_P, hour_P)
    counts_R = counts_before(item_R, hour_R, clicked_P, hour_P, span_hours=5)
    for row in range(80):
        earlier = hour_P[(clicked_P == item_R[row]) & (hour_P < hour_R[row])]
        assert bits["never clicked before"][row] == (len(earlier) == 0)
        assert bits["not clicked in the last 3 h"][row] == (not (earlier >= hour_R[row] - 3).any())
        assert bits["first clicked within 6 h"][row] == (len(earlier) > 0 and hour_R[row] - earlier.min() <= 6)
        assert counts_R[row] == (earlier >= hour_R[row] - 5).sum()
