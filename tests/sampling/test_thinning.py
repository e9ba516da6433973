"""Thinned rows stand for all: weights and logit shifts against the model of all rows, caps against counting by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from data_schemas.errors import ConfigError
from data_schemas.hashing import MISSING
from sampling.counting import CountedIds
from sampling.plan import Columns, Rules, as_table, sample_rows
from sampling.strata import Strata
from sampling.thinning import Method, effective_rows, logit_shift, thin, within_cap

TWO = Strata(("a", "b"), np.repeat(np.array([0, 1], np.int32), [4000, 500]))
DRAWS = [("poisson", False), ("fixed", False), ("fixed", True)]


def columns(labels_R: np.ndarray, **others: np.ndarray | CountedIds) -> Columns:
    ids = CountedIds(np.arange(1, len(labels_R) + 1, dtype=np.uint64))
    given = {"users": ids, "items": ids, "hour_R": np.zeros(len(labels_R), np.int64)} | others
    return Columns(labels_R=labels_R.astype(np.float32), **given)  # type: ignore[arg-type]


def clicks(num_rows: int, base: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two features and the labels that they make, from a logistic model."""
    rng = np.random.default_rng(seed)
    x_RN = rng.normal(size=(num_rows, 2))
    return x_RN, (rng.random(num_rows) < expit(logit(base) + x_RN @ [0.8, -0.5])).astype(np.float32)


@pytest.mark.parametrize(("method", "replacement"), DRAWS)
def test_factors_estimate_the_total_without_bias(method: Method, replacement: bool) -> None:
    rng = np.random.default_rng(0)
    value_R = rng.normal(2, 1, len(TWO.stratum_R)) * (1 + TWO.stratum_R)
    thinned = [thin(TWO, np.array([0.1, 0.5]), rng, method=method, replacement=replacement) for _ in range(400)]
    estimates = np.array([np.dot(t.factor_R, value_R) for t in thinned])
    assert estimates.mean() == pytest.approx(value_R.sum(), abs=4 * estimates.std() / 20)
    assert estimates.std() < 0.1 * value_R.sum()


@pytest.mark.parametrize(("method", "replacement"), DRAWS)
def test_a_rate_is_the_share_of_rows_drawn(method: Method, replacement: bool) -> None:
    drawn_S = np.zeros(2)
    for seed in range(100):
        thinned = thin(TWO, np.array([0.1, 0.5]), np.random.default_rng(seed), method=method, replacement=replacement)
        drawn_S += np.bincount(TWO.stratum_R, thinned.times_R) / 100
        assert thinned.rate_S == pytest.approx([0.1, 0.5])
        assert (thinned.times_R.max() > 1) == replacement
    assert drawn_S == pytest.approx([400, 250], abs=0 if method == "fixed" else 8)


def test_rows_that_a_cap_left_out_are_never_drawn_and_the_others_at_their_rate() -> None:
    among_R = np.arange(len(TWO.stratum_R)) % 2 == 0
    for method, replacement in DRAWS:
        rng = np.random.default_rng(0)
        thinned = thin(TWO, np.array([0.1, 1.0]), rng, method=method, replacement=replacement, among_R=among_R)  # type: ignore[arg-type]
        assert not thinned.times_R[~among_R].any()
        assert thinned.factor_R.sum() == pytest.approx(among_R.sum(), rel=0.15)


def test_thinning_at_one_keeps_every_row_once() -> None:
    for method in ("poisson", "fixed"):
        thinned = thin(TWO, np.ones(2), np.random.default_rng(0), method=method)  # type: ignore[arg-type]
        assert np.all(thinned.factor_R == 1)


@pytest.mark.parametrize("rate", [0.0, 1.5, float("nan"), -1.0])
def test_a_keep_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"keep_rate must be in \(0, 1\]"):
        thin(TWO, np.array([1.0, rate]), np.random.default_rng(0))


def test_poisson_with_replacement_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs sampling\.draw = 'fixed'"):
        thin(TWO, np.ones(2), np.random.default_rng(0), replacement=True)


@pytest.mark.parametrize("keep_rate", [0.1, 0.25])
@pytest.mark.parametrize("correction", ["weights", "logit_shift"])
def test_a_model_of_thinned_rows_has_the_coefficients_of_the_model_of_all_rows(correction: str, keep_rate: float) -> None:
    """scikit-learn's logistic regression. The shift is log(1 / keep_rate): its fit on kept rows is too high by just that."""
    x_RN, labels_R = clicks(200_000, 0.05, 0)
    sample = sample_rows(
        Rules(negative_keep_rate=keep_rate, correction=correction),  # type: ignore[arg-type]
        columns(labels_R),
        (1, 2),
    )
    kept_R = sample.kept_R
    assert kept_R is not None
    assert sample.factor_R is not None
    on_all = LogisticRegression(C=1e6).fit(x_RN, labels_R)
    on_kept = LogisticRegression(C=1e6).fit(x_RN[kept_R], labels_R[kept_R], sample.factor_R[kept_R])
    shift = 0.0
    if correction == "logit_shift":
        assert sample.shift_R == pytest.approx(np.log(1 / keep_rate))
        assert np.all(sample.factor_R[kept_R] == 1)
        assert on_kept.intercept_[0] - on_all.intercept_[0] == pytest.approx(np.log(1 / keep_rate), abs=0.03)
        shift = float(sample.shift_R[0])  # type: ignore[index]
    assert on_kept.coef_ == pytest.approx(on_all.coef_, abs=0.03)
    assert on_kept.intercept_[0] - shift == pytest.approx(on_all.intercept_[0], abs=0.03)
    predicted_R = expit(x_RN @ on_kept.coef_[0] + on_kept.intercept_[0] - shift)
    assert labels_R.sum() / predicted_R.sum() == pytest.approx(1, abs=0.02)


def test_the_shift_is_that_of_the_row_s_own_stratum() -> None:
    """Popular items' negatives are kept at a lower rate: only a shift of their own puts both click rates right."""
    rng = np.random.default_rng(0)
    popularity_R = rng.permutation(np.repeat([1.0, 50.0], [20_000, 180_000]))
    truth_R = np.where(popularity_R > 1, 0.05, 0.2)
    labels_R = (rng.random(200_000) < truth_R).astype(np.float32)
    rules = Rules(strata=("item_popularity",), negative_keep_rate=0.2, allocation="equal", correction="logit_shift")
    sample = sample_rows(rules, columns(labels_R, popularity_R=popularity_R), (0,))
    kept_R, shift_R = sample.kept_R, sample.shift_R
    assert kept_R is not None
    assert shift_R is not None
    assert len(np.unique(shift_R)) == len(np.unique(popularity_R))
    for popularity, truth in ((50.0, 0.05), (1.0, 0.2)):
        of_R = kept_R & (popularity_R == popularity)
        assert expit(logit(labels_R[of_R].mean()) - shift_R[of_R][0]) == pytest.approx(truth, rel=0.05)


def test_the_shift_is_the_log_of_the_ratio_of_rates() -> None:
    assert logit_shift(np.array([1.0, 0.5]), np.array([0.25, 1.0])) == pytest.approx([np.log(4), -np.log(2)])


@given(
    ids=st.lists(st.integers(0, 6), max_size=80).map(lambda ids: np.array(ids, np.uint64)),
    cap=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_a_cap_leaves_the_least_of_cap_and_count_of_each_id(ids: np.ndarray, cap: int, seed: int) -> None:
    within_R = within_cap(CountedIds(ids), cap, np.random.default_rng(seed))
    for value in np.unique(ids):
        count = np.count_nonzero(ids == value)
        expected = count if cap == 0 or value == MISSING else min(count, cap)
        assert np.count_nonzero(within_R[ids == value]) == expected


def test_the_rows_under_a_cap_are_a_uniform_draw() -> None:
    rng, counted = np.random.default_rng(0), CountedIds(np.array([5, 7, 5, 5, 7, 5], np.uint64))
    share_R = np.mean([within_cap(counted, 1, rng) for _ in range(4000)], axis=0)
    assert share_R == pytest.approx([1 / 4, 1 / 2, 1 / 4, 1 / 4, 1 / 2, 1 / 4], abs=0.03)


def test_a_plan_says_what_is_learned_and_what_is_left_out() -> None:
    labels_R = np.repeat([1, 0], [100, 900])
    user_R = np.repeat(np.array([3, 4], np.uint64), [950, 50])
    rules = Rules(negative_keep_rate=0.1, draw="fixed", max_rows_per_user=400)
    plan = sample_rows(rules, columns(labels_R, users=CountedIds(user_R)), (7, 8)).plan
    negative, positive = plan.strata
    assert (negative.name, negative.rows, positive.name, positive.rows) == ("label=0", 900, "label=1", 100)
    assert plan.capped == negative.capped + positive.capped == 550
    assert negative.kept == round((900 - negative.capped) / 10)
    assert negative.keep_rate == pytest.approx(0.1, rel=0.02)
    assert (positive.kept, positive.keep_rate, positive.effective_rows) == (100 - positive.capped, 1.0, positive.kept)
    assert plan.seed == (7, 8)
    weights = np.repeat([1, 1 / negative.keep_rate], [positive.kept, negative.kept])
    assert plan.effective_rows == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert list(plan.notes()) == [
        "550 rows were over sampling.max_rows_per_user or max_rows_per_item; no weight makes up for them",
        f"{450 - plan.kept:,} of 1,000 rows were left out by sampling; weights made up for them",
    ]
    table = as_table(plan)
    assert table["columns"] == ["name", "rows", "capped", "keep_rate", "kept", "effective_rows"]
    assert [line[:2] for line in table["data"]] == [["label=0", 900], ["label=1", 100]]


def test_nothing_is_left_out_by_default_and_the_plan_says_so() -> None:
    sample = sample_rows(Rules(strata=("label",)), columns(np.array([0, 1, 0])), (0,))
    assert (sample.kept_R, sample.factor_R, sample.shift_R) == (None, None, None)
    assert [(s.name, s.rows, s.kept, s.keep_rate) for s in sample.plan.strata] == [
        ("label=0", 2, 2, 1.0),
        ("label=1", 1, 1, 1.0),
    ]
    assert list(sample.plan.notes()) == []


def test_given_rates_are_kept_and_a_stratum_without_rows_is_noted() -> None:
    labels_R = np.repeat([0, 1], [5000, 500])
    rules = Rules(allocation="given", given_keep_rates={"label=0": 0.1, "label=2": 0.5})
    plan = sample_rows(rules, columns(labels_R), (0,)).plan
    assert [s.keep_rate for s in plan.strata] == [0.1, 1.0]
    assert plan.strata[0].kept == pytest.approx(500, abs=80)
    assert "names strata that have no rows in this window: label=2" in list(plan.notes())[-1]


def test_the_same_seed_gives_the_same_rows() -> None:
    labels_R = (np.arange(2000) % 10 == 0).astype(np.float32)
    first, again, other = (
        sample_rows(Rules(negative_keep_rate=0.3), columns(labels_R), seed).kept_R for seed in ((1, 5), (1, 5), (1, 6))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_effective_rows_of_equal_weights_are_the_rows() -> None:
    assert effective_rows(np.array([0, 3, 3, 0, 3], np.float32)) == pytest.approx(3)
    assert effective_rows(np.zeros(2, np.float32)) == 0


def test_thinning_negatives_where_there_are_none_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"sampling\.negative_keep_rate = 0\.5 asks to thin negatives, and the window's 3 rows"
    ):
        sample_rows(Rules(negative_keep_rate=0.5), columns(np.ones(3)), (0,))


def test_given_rates_of_other_strata_are_refused_by_name() -> None:
    rules = Rules(allocation="given", given_keep_rates={"hour=1970-01-01T00": 0.1})
    with pytest.raises(
        ConfigError, match=r"sampling\.given_keep_rates names 'hour=1970-01-01T00', but strata here are made of"
    ):
        sample_rows(rules, columns(np.array([0, 1])), (0,))
