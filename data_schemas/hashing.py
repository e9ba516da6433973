"""Raw ids to stable 64-bit hashes, and hashes to table rows.

Enters: Arrow columns of strings or integers. Leaves: numpy `uint64`, the same on every machine and in every process.
Strings are hashed once per distinct value. A missing id is an id of its own, `MISSING`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

U64 = npt.NDArray[np.uint64]

MISSING = np.uint64(0)
"""The hash of an id that is not there."""

BLOCK_ROWS = 16_384
"""Values that are mixed at a time, so that intermediate results stay in the processor's cache."""


def hash_ids(column: pa.Array | pa.ChunkedArray) -> U64:
    """One 64-bit hash a row.

    >>> hash_ids(pa.array([7, None], pa.int64()))[1]
    np.uint64(0)

    Args:
        column: integers, strings, or dictionary-encoded strings; nulls are `MISSING`.

    Returns:
        `[R] uint64`. Integers are mixed by splitmix64 (Steele et al. 2014), strings by SipHash with pandas' fixed key.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    hashes = np.empty(len(column), np.uint64)
    if pa.types.is_integer(column.type):
        _hash_integers(chunks, hashes)
    else:
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        _hash_dictionaries(encoded, hashes)
    return hashes


def mix64(values: U64) -> U64:
    """splitmix64's finaliser: a bijection of 64-bit words in which every input bit flips half of the output bits."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def combine_hashes(first: U64, second: U64) -> U64:
    """The hash of a pair; not symmetric."""
    return mix64(first * np.uint64(3) + mix64(second))


def rows_of(hashes: U64, capacity: int) -> npt.NDArray[np.int64]:
    """Table rows in `[0, capacity)`, spread evenly, by multiply and shift (Lemire 2019) instead of a division."""
    if capacity > 2**32:
        return (hashes % np.uint64(capacity)).view(np.int64)
    rows = hashes >> np.uint64(32)
    rows *= np.uint64(capacity)
    rows >>= np.uint64(32)
    return rows.view(np.int64)


def _hash_integers(chunks: Sequence[pa.Array], hashes: U64) -> None:
    start = 0
    for chunk in chunks:
        values = chunk.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64, copy=False).view(np.uint64)
        for block in range(0, len(values), BLOCK_ROWS):
            part = values[block : block + BLOCK_ROWS]
            hashes[start + block : start + block + len(part)] = mix64(part)
        if chunk.null_count:
            hashes[start : start + len(chunk)][chunk.is_null().to_numpy(zero_copy_only=False)] = MISSING
        start += len(chunk)


def _hash_dictionaries(column: pa.Array | pa.ChunkedArray, hashes: U64) -> None:
    """Each distinct string once, though it be in the dictionaries of many chunks."""
    chunks = column.unify_dictionaries().chunks if isinstance(column, pa.ChunkedArray) else [column]
    distinct = np.append(_hash_strings(chunks[0].dictionary), MISSING) if chunks else np.empty(0, np.uint64)
    start = 0
    for chunk in chunks:
        indices = chunk.indices.fill_null(len(distinct) - 1) if chunk.null_count else chunk.indices
        hashes[start : start + len(chunk)] = distinct.take(indices.to_numpy(zero_copy_only=False))
        start += len(chunk)


def _hash_strings(distinct: pa.Array) -> U64:
    if len(distinct) == 0:
        return np.empty(0, np.uint64)
    hashed: U64 = pd.util.hash_array(distinct.to_numpy(zero_copy_only=False).astype(object), categorize=False)
    return hashed
