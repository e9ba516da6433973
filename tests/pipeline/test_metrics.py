"""The figures against scikit-learn, brute force, closed forms, and properties that hold for every input."""

import ast
import inspect
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chi2
from sklearn.metrics import log_loss, roc_auc_score

from data_schemas.hashing import MISSING
from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import Interval, Metrics, calibration_bins, measure
from sampling import thinning

F64 = npt.NDArray[np.float64]


def clicks_of(seed: int, num_rows: int, decimals: int = 12) -> tuple[F64, F64, npt.NDArray[np.uint64], F64]:
    rng = np.random.default_rng(seed)
    probabilities = np.round(1 / (1 + np.exp(-rng.normal(-1.0, 1.0, num_rows))), decimals)
    labels = (rng.random(num_rows) < probabilities).astype(np.float64)
    users = rng.integers(1, max(num_rows // 8, 2), num_rows).astype(np.uint64)
    return labels, probabilities, users, rng.choice([0.5, 1.0, 4.0], num_rows)


@pytest.mark.parametrize("decimals", [1, 2, 12])
@pytest.mark.parametrize("weighted", [False, True])
def test_auc_and_log_loss_equal_scikit_learn(decimals: int, weighted: bool) -> None:
    labels, probabilities, users, weights = clicks_of(1, 2000, decimals)
    metrics = measure(labels, probabilities, users, weights if weighted else None)
    sample_weight = weights if weighted else None
    assert metrics.auc == pytest.approx(roc_auc_score(labels, probabilities, sample_weight=sample_weight), abs=1e-12)
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    assert metrics.log_loss == pytest.approx(log_loss(labels, clipped, sample_weight=sample_weight), abs=1e-12)


def test_delong_interval_equals_the_quadratic_definition() -> None:
    labels, probabilities, users, _ = clicks_of(2, 300, decimals=2)
    clicked, other = probabilities[labels == 1], probabilities[labels == 0]
    wins = (clicked[:, None] > other) + 0.5 * (clicked[:, None] == other)
    error = np.sqrt(np.var(wins.mean(1), ddof=1) / len(clicked) + np.var(wins.mean(0), ddof=1) / len(other))
    metrics = measure(labels, probabilities, users)
    assert metrics.auc_interval is not None
    assert metrics.auc_interval.low == pytest.approx(wins.mean() - 1.959964 * error, abs=1e-6)
    assert metrics.auc_interval.high == pytest.approx(wins.mean() + 1.959964 * error, abs=1e-6)


def test_intervals_cover_the_truth_about_95_times_in_100_on_independent_rows() -> None:
    truth = measure(*clicks_of(3, 400_000)[:3])
    covered = {"auc": 0, "log_loss": 0, "copc": 0}
    for seed in range(300):
        labels, probabilities, users, _ = clicks_of(50_000 + seed, 500)
        metrics = measure(labels, probabilities, users)
        for name in covered:
            interval = getattr(metrics, f"{name}_interval")
            value = 1.0 if name == "copc" else getattr(truth, name)
            covered[name] += interval.low <= value <= interval.high
    assert 276 <= covered["auc"] <= 294
    assert 276 <= covered["log_loss"] <= 294
    assert 282 <= covered["copc"] <= 300, "Poisson is wider than binomial"


@pytest.mark.parametrize("weighted", [False, True])
def test_gauc_equals_a_loop_over_users(weighted: bool) -> None:
    labels, probabilities, users, weights = clicks_of(4, 1500, decimals=1)
    weights = weights if weighted else np.ones(1500)
    aucs, impressions = [], []
    for user in np.unique(users):
        mine = users == user
        if 0 < labels[mine].sum() < mine.sum():
            aucs.append(roc_auc_score(labels[mine], probabilities[mine], sample_weight=weights[mine]))
            impressions.append(weights[mine].sum())
    metrics = measure(labels, probabilities, users, weights)
    assert metrics.gauc == pytest.approx(np.average(aucs, weights=impressions), abs=1e-12)
    assert metrics.gauc_users == len(aucs)


def test_rows_without_a_user_are_left_out_of_gauc_only() -> None:
    labels, probabilities, users, _ = clicks_of(5, 400)
    known = np.arange(400) < 300
    metrics = measure(labels, probabilities, np.where(known, users, MISSING))
    assert metrics.gauc == measure(labels[known], probabilities[known], users[known]).gauc
    assert metrics.auc == measure(labels, probabilities, users).auc
    nobody = measure(labels, probabilities, np.full(400, MISSING))
    assert (nobody.gauc, nobody.gauc_users) == (None, 0)


def test_users_may_be_words() -> None:
    labels, probabilities, users, _ = clicks_of(6, 300)
    words = np.array([f"user {user}" for user in users], dtype=object)
    assert measure(labels, probabilities, words) == measure(labels, probabilities, users)


def test_an_integer_weight_equals_repeated_rows() -> None:
    labels, probabilities, users, _ = clicks_of(7, 300, decimals=2)
    weights = np.random.default_rng(7).integers(0, 4, 300)
    weighted = measure(labels, probabilities, users, weights)
    repeated = measure(*(np.repeat(column, weights) for column in (labels, probabilities, users)))
    for name in ("auc", "gauc", "log_loss", "normalised_entropy", "copc", "ece", "mean_probability"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), abs=1e-12), name


def test_normalised_entropy_of_the_click_rate_itself_is_one() -> None:
    labels = np.array([1, 0, 0, 0, 1])
    assert measure(labels, np.full(5, 0.4), np.ones(5)).normalised_entropy == pytest.approx(1.0)


def test_copc_is_clicks_over_predicted_clicks_with_the_exact_poisson_interval() -> None:
    labels = np.repeat([1, 0], [9, 91])
    metrics = measure(labels, np.full(100, 0.06), np.ones(100))
    assert metrics.copc == pytest.approx(9 / 6)
    assert metrics.copc_interval is not None
    assert metrics.copc_interval.low == pytest.approx(chi2.ppf(0.025, 18) / 2 / 6)
    assert metrics.copc_interval.high == pytest.approx(chi2.ppf(0.975, 20) / 2 / 6)


def test_ece_of_two_known_bins() -> None:
    labels = np.repeat([1, 0, 1, 0], [1, 9, 6, 4])
    probabilities = np.repeat([0.2, 0.5], 10)
    assert measure(labels, probabilities, np.ones(20)).ece == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)


def test_calibration_bins_hold_equal_mass_and_rise() -> None:
    labels, probabilities, _, _ = clicks_of(8, 3000)
    bins = calibration_bins(labels, probabilities, num_bins=15)
    assert [bin.rows for bin in bins] == [200] * 15
    assert sorted(bin.mean_probability for bin in bins) == [bin.mean_probability for bin in bins]
    assert sum(bin.rows * bin.click_rate for bin in bins) == pytest.approx(labels.sum())


def test_equal_probabilities_share_a_bin_whatever_the_order_of_rows() -> None:
    labels = np.arange(100) % 2
    bins = calibration_bins(np.sort(labels), np.full(100, 0.3))
    assert [(bin.rows, bin.click_rate) for bin in bins] == [(100, 0.5)]


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_ranking_figures(label: int) -> None:
    metrics = measure(np.full(4, label), np.array([0.1, 0.2, 0.3, 0.4]), np.ones(4))
    assert (metrics.auc, metrics.auc_interval, metrics.gauc, metrics.normalised_entropy) == (None,) * 4
    assert (metrics.copc is None) == (label == 0)
    assert "auc" not in metrics.as_dict()


def test_a_certain_wrong_answer_costs_something_finite() -> None:
    for dtype in (np.float32, np.float64, np.int64):
        metrics = measure(np.array([1, 0]), np.array([0, 1], dtype=dtype), np.ones(2))
        assert metrics.log_loss == pytest.approx(-np.log(1e-7))


def test_predictions_of_zero_have_no_copc() -> None:
    assert measure(np.array([1, 0]), np.zeros(2), np.ones(2)).copc is None


def test_as_dict_is_flat_and_prefixed() -> None:
    flat = measure(*clicks_of(9, 200)[:3]).as_dict("before/")
    assert {"before/auc", "before/auc_low", "before/auc_high", "before/copc", "before/rows"} <= set(flat)
    assert all(isinstance(value, float) for value in flat.values())


@pytest.mark.parametrize(
    ("labels", "probabilities", "weights", "words"),
    [
        ([], [], None, "nothing to measure: 0 rows"),
        ([0, 1], [0.5, 0.5], [0, 0], "nothing to measure: 2 rows"),
        ([0, 2], [0.5, 0.5], None, "labels must be 0 or 1, got 2 in row 1"),
        ([0, 1], [0.5, 1.5], None, r"probabilities must be in \[0, 1\], got 1.5 in row 1"),
        ([0, 1], [np.nan, 0.5], None, "got nan in row 0; 1 of 2 rows"),
        ([0, 1], [0.5, 0.5], [1, -1], "weights must be 0 or in"),
        ([0, 1], [0.5, 0.5], [1, np.inf], "weights must be 0 or in"),
        ([0, 1], [0.5], None, "one length"),
        ([[0, 1]], [[0.5, 0.5]], None, "one length"),
    ],
)
def test_wrong_input_is_refused_with_the_value(labels: list, probabilities: list, weights: list | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure(np.array(labels), np.array(probabilities), np.ones(np.shape(labels)), weights)


def test_an_interval_is_in_order() -> None:
    with pytest.raises(ValueError, match="low <= high"):
        Interval(low=1.0, high=0.5)
    with pytest.raises(ValueError, match="at least 1"):
        calibration_bins([1], [0.5], num_bins=0)


@st.composite
def any_rows(draw: st.DrawFn) -> tuple[npt.NDArray[np.int64], F64, npt.NDArray[np.int64], F64]:
    num_rows = draw(st.integers(1, 40))
    return (
        draw(arrays(np.int64, num_rows, elements=st.integers(0, 1))),
        draw(arrays(np.float64, num_rows, elements=st.sampled_from([0.0, 1e-9, 0.1, 0.25, 0.5, 0.9, 1.0]))),
        draw(arrays(np.int64, num_rows, elements=st.integers(0, 5))),
        draw(arrays(np.float64, num_rows, elements=st.sampled_from([1e-12, 1.0, 3.5, 1e12]))),
    )


def contains(interval: Interval | None, value: float | None) -> bool:
    return interval is None or (value is not None and interval.low - 1e-9 <= value <= interval.high + 1e-9)


@settings(max_examples=150, deadline=None)
@given(any_rows())
def test_figures_stay_in_their_ranges_and_inside_their_intervals(rows: tuple) -> None:
    metrics: Metrics = measure(*rows)
    for name in ("auc", "gauc", "ece", "mean_probability"):
        value = getattr(metrics, name)
        assert value is None or -1e-9 <= value <= 1 + 1e-9, name
    assert 0 <= metrics.log_loss <= 16.2
    assert contains(metrics.auc_interval, metrics.auc)
    assert contains(metrics.log_loss_interval, metrics.log_loss)
    assert metrics.copc_interval is None or metrics.copc_interval.low <= metrics.copc <= metrics.copc_interval.high
    assert all(np.isfinite(value) for value in metrics.as_dict().values())


@settings(max_examples=100, deadline=None)
@given(any_rows(), st.sampled_from([lambda p: p / 2, lambda p: p**3 / 4 + p / 2, lambda p: 0.2 + p / 2]))
def test_ranking_does_not_change_under_a_rising_map(rows: tuple, rising) -> None:
    labels, probabilities, users, weights = rows
    before, after = measure(*rows), measure(labels, rising(probabilities), users, weights)
    assert before.auc == after.auc
    assert before.gauc == after.gauc


@settings(max_examples=100, deadline=None)
@given(any_rows(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows: tuple, random) -> None:
    order = list(range(len(rows[0])))
    random.shuffle(order)
    rows = (*rows[:3], np.clip(rows[3], 0.25, 4.0))  # sums of these are exact in any order
    shuffled = measure(*(column[order] for column in rows)).as_dict()
    assert shuffled == pytest.approx(measure(*rows).as_dict(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("module", [metrics, thinning])
def test_figures_over_rows_wake_no_threads_of_blas(module: ModuleType) -> None:
    """These spin for a tenth of a second after a product of 10,000 numbers, on cores that a window is learned with next."""
    code = list(ast.walk(ast.parse(inspect.getsource(module))))
    products = [node for node in code if isinstance(node, ast.MatMult)]
    called = {node.attr for node in code if isinstance(node, ast.Attribute)}
    assert not products
    assert not called & {"dot", "vdot", "matmul", "inner", "einsum", "tensordot"}
