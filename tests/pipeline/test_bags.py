"""Weights of bags of ids, against arithmetic by hand."""

from math import inf

import numpy as np
import pytest

from data_schemas.examples import IdLists
from pipeline.data.encode import Bags, UserBags, _decayed_weights


def _lists(*lengths: int) -> IdLists:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return IdLists(values_V=np.arange(offsets[-1]).astype(np.uint64), offsets=offsets)


def test_weights_halve_in_a_half_life_and_sum_to_1_in_each_list() -> None:
    ages_V = np.array([8, 4, 0, 30, 500_000, 500_004])
    weights_V = _decayed_weights(_lists(0, 3, 0, 1, 2, 0), ages_V, 4.0)
    np.testing.assert_allclose(weights_V, [1 / 7, 2 / 7, 4 / 7, 1, 2 / 3, 1 / 3], rtol=1e-6)


def test_without_a_half_life_all_of_a_list_weigh_the_same() -> None:
    np.testing.assert_allclose(_decayed_weights(_lists(2, 0, 3), np.arange(5), inf), [1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("half_life", [4.0, inf])
def test_no_lists_have_no_weights(half_life: float) -> None:
    for lists in (_lists(), _lists(0, 0)):
        assert _decayed_weights(lists, np.empty(0, np.int64), half_life).shape == (0,)


def test_a_users_bags_are_taken_together_and_must_be_of_one_length() -> None:
    def bags(*lengths: int) -> Bags:
        lists = _lists(*lengths)
        rows_V = lists.values_V.astype(np.int64)
        return Bags(rows_V=rows_V, weights_V=rows_V.astype(np.float32), offsets=lists.offsets)

    users = UserBags(user_R=np.zeros(1, np.int64), pools={"near": bags(2, 0, 1), "far": bags(2, 0, 1)})
    for taken in users.take(np.array([2, 1, 0])).values():
        np.testing.assert_array_equal(taken.rows_V, [2, 0, 1])
        np.testing.assert_array_equal(taken.offsets, [0, 1, 1, 3])
    with pytest.raises(AssertionError, match="differ in length"):
        UserBags(user_R=np.zeros(1, np.int64), pools={"near": bags(2, 0, 1), "far": bags(1, 1, 1)})
