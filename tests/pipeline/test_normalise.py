"""Running normalisation against numpy's mean and standard deviation."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_schemas.dataset import Numeric
from pipeline.data.normalise import CLIP, RunningMoments, normalise, transform

FLOATS = st.floats(-1e6, 1e6, width=32) | st.just(float("nan"))


@given(hnp.arrays(np.float32, (2, 30), elements=FLOATS), st.lists(st.integers(0, 30), max_size=4))
def test_moments_do_not_depend_on_how_rows_are_cut_into_windows(values_NR: np.ndarray, cuts: list[int]) -> None:
    pieces = np.split(values_NR, sorted(cuts), axis=1)
    moments = RunningMoments.nothing_seen(2)
    for piece in pieces:
        moments = moments.after(piece)
    for row in range(2):
        present = values_NR[row][~np.isnan(values_NR[row])].astype(np.float64)
        assert moments.count_N[row] == len(present)
        if len(present):
            np.testing.assert_allclose(moments.mean_N[row], present.mean(), rtol=1e-9, atol=1e-6)
            np.testing.assert_allclose(moments.deviations_N[row] / len(present), present.var(), rtol=1e-6, atol=1e-3)


def test_values_become_standard_and_missing_ones_are_flagged() -> None:
    values_NR = np.array([[1, 2, 3, np.nan], [1e9, 0, 0, 0]], np.float32)
    dense_RN = normalise(values_NR, RunningMoments.nothing_seen(2).after(values_NR), num_flags=2)
    assert dense_RN.shape == (4, 4)
    np.testing.assert_allclose(dense_RN[:, 0], [-1.2247449, 0, 1.2247449, 0], rtol=1e-5)
    np.testing.assert_array_equal(dense_RN[:, 2], [0, 0, 0, 1])
    np.testing.assert_array_equal(dense_RN[:, 3], [0, 0, 0, 0])


def test_an_absurd_number_is_cut() -> None:
    usual = RunningMoments.nothing_seen(1).after(np.random.default_rng(0).normal(size=(1, 1000)).astype(np.float32))
    assert normalise(np.array([[1e30]], np.float32), usual, num_flags=1)[0, 0] == CLIP


def test_log_transform_keeps_the_sign() -> None:
    counts = transform([Numeric(name="n", transform="log1p")], np.array([[0, 1, -1, np.nan]], np.float32))
    np.testing.assert_allclose(counts, [[0, np.log(2), -np.log(2), np.nan]], rtol=1e-6)


def test_a_constant_feature_does_not_divide_by_zero() -> None:
    values_NR = np.full((1, 5), 3.0, np.float32)
    np.testing.assert_array_equal(normalise(values_NR, RunningMoments.nothing_seen(1).after(values_NR), num_flags=1)[:, 0], 0)
