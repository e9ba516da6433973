"""Stable hashes of ids."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.hashing import MISSING, combine_hashes, hash_ids, mix64, rows_of

MASK = 2**64 - 1


def splitmix64(value: int) -> int:
    """The reference, in Python's own integers."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
@settings(max_examples=50, deadline=None)
def test_integers_are_hashed_by_splitmix64(values: list[int]) -> None:
    expected = [splitmix64(value & MASK) for value in values]
    assert hash_ids(pa.array(values, pa.int64())).tolist() == expected


@given(st.lists(st.none() | st.text(max_size=12), max_size=30))
@settings(max_examples=50, deadline=None)
def test_strings_hash_the_same_in_every_encoding_and_missing_is_zero(values: list[str | None]) -> None:
    plain = pa.array(values, pa.string())
    hashes = hash_ids(plain)
    assert (hash_ids(plain.dictionary_encode()) == hashes).all()
    halves = pa.chunked_array([plain[: len(values) // 2], plain[len(values) // 2 :].dictionary_encode().dictionary_decode()])
    assert (hash_ids(halves) == hashes).all()
    assert [hash_ == MISSING for hash_ in hashes] == [value is None for value in values]
    assert len(set(hashes.tolist())) == len(set(values))


def test_hashes_are_the_same_in_another_process() -> None:
    values = pa.array(["a", "김", "", None])
    script = "import pyarrow as pa; from data_schemas.hashing import hash_ids; print(hash_ids(pa.array(['a','김','',None])))"
    other = subprocess.run([sys.executable, "-X", "utf8", "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(hash_ids(values))


def test_an_empty_column_has_no_hashes() -> None:
    assert len(hash_ids(pa.array([], pa.string()))) == 0
    assert len(hash_ids(pa.chunked_array([], pa.int64()))) == 0


def test_combining_is_not_symmetric_and_heeds_both() -> None:
    first, second = mix64(np.arange(1000, dtype=np.uint64)), mix64(np.arange(1000, 2000, dtype=np.uint64))
    assert (combine_hashes(first, second) != combine_hashes(second, first)).all()
    assert len(np.unique(combine_hashes(first, second[:1].repeat(1000)))) == 1000


def test_rows_fill_a_table_evenly() -> None:
    hashes = mix64(np.arange(100_000, dtype=np.uint64))
    for capacity in (2, 24, 1000):
        rows = rows_of(hashes, capacity)
        counts = np.bincount(rows, minlength=capacity)
        assert len(counts) == capacity
        expected = 100_000 / capacity
        assert np.square(counts - expected).sum() / expected < capacity + 6 * np.sqrt(2 * capacity)


def test_rows_of_a_huge_table_stay_inside_it() -> None:
    rows = rows_of(mix64(np.arange(1000, dtype=np.uint64)), 2**40)
    assert rows.min() >= 0
    assert rows.max() < 2**40


def test_chunks_with_dictionaries_of_their_own_hash_like_plain_strings() -> None:
    words = [["x", None, "y"], ["y", "z", "x"], [None], []]
    encoded = pa.chunked_array([pa.array(part, pa.string()).dictionary_encode() for part in words])
    assert hash_ids(encoded).tolist() == hash_ids(pa.array([word for part in words for word in part], pa.string())).tolist()
    sliced = encoded.slice(2, 3)
    assert hash_ids(sliced).tolist() == hash_ids(pa.array(["y", "y", "z"])).tolist()
    numbers = pa.chunked_array([[1, None], [], [3]], pa.int64())
    assert hash_ids(numbers).tolist() == hash_ids(pa.array([1, None, 3], pa.int64())).tolist()
