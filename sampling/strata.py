"""Strata of rows, how many rows of each are taken, and which: every draw comes with its inclusion probability.

Enters: columns of a window's rows. Leaves: a stratum for each row; rows, and the probability that each had to be among them.

A sum over drawn rows, each divided by its probability, is an unbiased estimate of the sum over all rows (Horvitz and Thompson
1952, JASA 47:663, eq. 4; with replacement Hansen and Hurwitz 1943, Ann. Math. Statist. 14:333).

Letters: R rows, S strata, D drawn rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, assert_never

import numpy as np
import numpy.typing as npt

from data_schemas.errors import ConfigError
from data_schemas.examples import I64
from sampling.counting import grouped

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
Numbers = npt.NDArray[Any]

StratifyBy = Literal["label", "item_popularity", "item_age", "user_activity", "hour"]
Shape = Literal["proportional", "sqrt", "equal"]
Allocation = Literal["proportional", "sqrt", "equal", "given"]

AGE_EDGES_HOURS = (1, 6, 24, 72, 168)
"""Ages of items at which a stratum begins; an unknown age, NaN or below 0, is a stratum of its own."""
ACTIVITY_EDGES = (2, 5, 20, 100)
"""Rows of a user at which a stratum begins."""
MAX_STRATA = 65_536
"""More are refused: a stratum of a handful of rows helps nobody."""
_QUANTILE_ROWS = 65_536


@dataclass(frozen=True)
class Strata:
    """A partition of rows.

    >>> Strata(("label=0", "label=1"), np.array([0, 1, 0], np.int32)).counts_S
    array([2, 1])
    """

    names: tuple[str, ...]
    """`[S]` such as `label=1, item_popularity=decile 10`."""
    stratum_R: I32
    """`[R]` position in `names`."""

    @property
    def counts_S(self) -> I64:
        """Rows of each stratum."""
        return np.bincount(self.stratum_R, minlength=len(self.names)).astype(np.int64, copy=False)


def strata_of(
    by: Sequence[StratifyBy],
    *,
    labels_R: Numbers,
    popularity_R: Numbers | None = None,
    age_hours_R: Numbers | None = None,
    activity_R: Numbers | None = None,
    hour_R: I64 | None = None,
) -> Strata:
    """The strata of a window: all combinations of `by` that have a row; one stratum where `by` is empty.

    Args:
        by: any of `StratifyBy`, each once.
        labels_R: 0 or 1.
        popularity_R: of the row's item, in any unit that grows; cut at the deciles of the rows.
        age_hours_R: of the row's item; NaN or below 0 where it is not known.
        activity_R: of the row's user, in rows; cut at `ACTIVITY_EDGES`.
        hour_R: hours since 1970.

    Raises:
        ConfigError: something twice or unknown in `by`, a column that is not there, or more than `MAX_STRATA` combinations.
    """
    if len(set(by)) != len(by):
        raise ConfigError(f"sampling.strata names something twice: {list(by)}; name each once")
    columns = {
        "label": labels_R,
        "item_popularity": popularity_R,
        "item_age": age_hours_R,
        "user_activity": activity_R,
        "hour": hour_R,
    }
    code_R = np.zeros(len(labels_R), np.int64)
    parts: list[list[str]] = []
    for name in by:
        column = columns.get(name)
        if column is None:
            known = ", ".join(name for name, column in columns.items() if column is not None)
            raise ConfigError(f"sampling.strata: these rows have no column for {name!r}; known here are {known}")
        bins_R, labels = _bins(name, column)
        code_R = bins_R if not parts else code_R * len(labels) + bins_R
        parts.append([f"{name}={label}" for label in labels])
    return _without_empty(code_R, parts)


def keep_rates(counts_S: I64, keep_rate: float, how: Shape = "proportional") -> F64:
    """`[S]` in (0, 1]: the rate at which each stratum is kept, so that `keep_rate` of all rows are expected to be.

    `proportional` keeps every stratum at the same rate; `sqrt` keeps rows in proportion to the root of a stratum's count,
    `equal` the same number of each. A stratum that has too few is kept whole, and the others make up for it. A stratum without
    rows has rate 1.

    >>> keep_rates(np.array([900, 100]), 0.2, "equal")
    array([0.11111111, 1.        ])

    Raises:
        ConfigError: `keep_rate` is outside (0, 1].
    """
    if not 0 < keep_rate <= 1:
        raise ConfigError(f"keep_rate must be in (0, 1], got {keep_rate}; use 1.0 to keep every row")
    counts = np.asarray(counts_S, np.float64)
    there = counts > 0
    rates_S = np.ones(len(counts))
    if keep_rate < 1 and there.any():
        counts = counts[there]
        kept = _scaled(_shape(counts, how), np.zeros_like(counts), counts, keep_rate * counts.sum())
        rates_S[there] = np.clip(kept / counts, np.finfo(np.float64).tiny, 1.0)
    return rates_S


def allocate(
    counts_S: I64,
    total: int,
    how: Allocation,
    given: Sequence[int] | I64 | None = None,
    *,
    replacement: bool = False,
) -> I64:
    """`[S]` rows to take of each stratum, `total` in all and at least 1 of each, as a sum cannot be estimated without it.

    Without replacement a stratum gives no more than it has, and the others make up for it; `given` is taken as it is.

    >>> allocate(np.array([900, 90, 10]), 100, "sqrt"), allocate(np.array([900, 90, 10]), 100, "equal")
    (array([70, 22,  8]), array([45, 45, 10]))

    Raises:
        ConfigError: a stratum has no rows; more is asked for than there is, without replacement; `total` is less than one row
            a stratum; or `given` does not fit.
    """
    counts = np.asarray(counts_S, np.int64)
    empty = np.flatnonzero(counts <= 0)
    if len(empty):
        raise ConfigError(f"sampling.strata: stratum {empty[0]} has no rows, so that none can be drawn; leave it out")
    if how == "given":
        return _as_given(counts, total, given, replacement=replacement)
    if total < len(counts):
        raise ConfigError(
            f"sampling.allocation = {how!r} asks for {total:,} rows of {len(counts):,} strata: less than one of each; "
            "take more rows or fewer sampling.strata"
        )
    if not replacement and total > counts.sum():
        raise ConfigError(
            f"sampling.allocation = {how!r} asks for {total:,} of {counts.sum():,} rows; ask for fewer, or set "
            "sampling.replacement = true"
        )
    high = np.full(len(counts), float(total)) if replacement else counts.astype(np.float64)
    return _rounded(_scaled(_shape(counts.astype(np.float64), how), np.ones(len(counts)), high, float(total)), total)


def draw(stratum_R: I32, taken_S: I64, rng: np.random.Generator, replacement: bool = False) -> tuple[I64, F64]:
    """A simple random sample of `taken_S` rows of each stratum.

    Returns:
        `[D]` rows in ascending order (with replacement the same row several times), and `[D]` the inclusion probability of
        each (with replacement the expected count): `taken / count` of the stratum.

    Raises:
        ConfigError: more is asked of a stratum than it has, without replacement; or none of one that has rows.
    """
    taken = np.asarray(taken_S, np.int64)
    counts = np.bincount(stratum_R, minlength=len(taken))
    _check_taken(counts, taken, replacement=replacement)
    grouped_R = grouped(stratum_R, len(taken))
    ends = np.cumsum(counts)
    chosen = [
        end - count + _chosen(count, size, rng, replacement=replacement)
        for end, count, size in zip(ends.tolist(), counts.tolist(), taken.tolist(), strict=True)
        if size
    ]
    rows = np.sort(grouped_R[np.concatenate(chosen)]) if chosen else np.empty(0, np.int64)
    return rows, (taken / np.maximum(counts, 1))[stratum_R[rows]]


def _bins(name: StratifyBy, column_R: Numbers) -> tuple[I64, list[str]]:
    """`[R]` the bin of each row, and what bins are called."""
    match name:
        case "label":
            return (column_R > 0).astype(np.int64), ["0", "1"]
        case "item_popularity":
            step = max(len(column_R) // _QUANTILE_ROWS, 1)
            edges = np.quantile(column_R[::step], np.arange(1, 10) / 10) if len(column_R) else np.zeros(9)
            return _cut(edges, column_R), [f"decile {number}" for number in range(1, 11)]
        case "item_age":
            known_R = column_R >= 0
            bins_R = np.where(known_R, np.searchsorted(AGE_EDGES_HOURS, column_R, side="right") + 1, 0)
            return bins_R, ["unknown", *_ranges(AGE_EDGES_HOURS, " h")]
        case "user_activity":
            return _cut(np.asarray(ACTIVITY_EDGES), column_R), _ranges(ACTIVITY_EDGES, "")
        case "hour":
            hours, bins_R = np.unique(column_R, return_inverse=True)
            return bins_R.astype(np.int64, copy=False), [str(hour) for hour in np.datetime_as_string(hours.astype("M8[h]"))]
        case _:
            assert_never(name)


def _cut(edges: Numbers, column_R: Numbers) -> I64:
    """`[R]` how many of the ascending edges are at most each value; counts of rows are cut once a value, not once a row."""
    if column_R.dtype.kind in "iu" and len(column_R) and column_R.min() >= 0 and column_R.max() <= len(column_R):
        return np.searchsorted(edges, np.arange(column_R.max() + 1), side="right")[column_R]
    return np.searchsorted(edges, column_R, side="right")


def _ranges(edges: Sequence[int], unit: str) -> list[str]:
    inner = [f"{low} to {high}{unit}" for low, high in pairwise(edges)]
    return [f"below {edges[0]}{unit}", *inner, f"{edges[-1]}{unit} and more"]


def _without_empty(code_R: I64, parts: Sequence[Sequence[str]]) -> Strata:
    """Strata numbered in the order of their codes, those without rows left out."""
    sizes = [len(labels) for labels in parts]
    combinations = int(np.prod(sizes, dtype=np.float64)) if sizes else 1
    if combinations > MAX_STRATA:
        raise ConfigError(f"sampling.strata make {combinations:,} strata; at most {MAX_STRATA:,} are allowed, name fewer")
    there = np.flatnonzero(np.bincount(code_R, minlength=combinations))
    number = np.zeros(combinations, np.int32)
    number[there] = np.arange(len(there), dtype=np.int32)
    positions = np.unravel_index(there, sizes) if sizes else ()
    names = [", ".join(parts[part][position[s]] for part, position in enumerate(positions)) for s in range(len(there))]
    return Strata(tuple(names) if sizes else ("all",) * len(there), number[code_R])


def _shape(counts: F64, how: Shape) -> F64:
    match how:
        case "proportional":
            return counts
        case "sqrt":
            return np.sqrt(counts)
        case "equal":
            return np.ones_like(counts)
        case _:
            assert_never(how)


def _scaled(shape: F64, low: F64, high: F64, total: float) -> F64:
    """`clip(c * shape, low, high)` for the `c` that makes it sum to `total`, which lies between the sums of the bounds.

    The sum is piecewise linear in `c` with breaks where an entry leaves a bound: the piece is found by bisection.
    """
    breaks = np.unique(np.concatenate([[0.0], low / shape, high / shape]))
    least, most = 0, len(breaks) - 1
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if np.clip(breaks[middle] * shape, low, high).sum() <= total else (least, middle)
    below, above = (np.clip(breaks[edge] * shape, low, high) for edge in (least, most))
    rise = above.sum() - below.sum()
    scaled: F64 = below + (above - below) * (np.clip((total - below.sum()) / rise, 0, 1) if rise > 0 else 0.0)
    return scaled


def _rounded(wanted: F64, total: int) -> I64:
    """Whole numbers that sum to `total`: the largest remainders are rounded up, the first of equal ones first."""
    down = np.floor(wanted + 1e-9).astype(np.int64)
    missing = total - int(down.sum())
    down[np.argsort(down - wanted, kind="stable")[:missing]] += 1
    return down


def _chosen(count: int, size: int, rng: np.random.Generator, *, replacement: bool) -> I64:
    if replacement:
        return rng.integers(count, size=size)
    return np.arange(count) if size == count else rng.choice(count, size, replace=False, shuffle=False)


def _as_given(counts: I64, total: int, given: Sequence[int] | I64 | None, *, replacement: bool) -> I64:
    if given is None or len(given) != len(counts):
        number = "none" if given is None else f"{len(given)}"
        raise ConfigError(
            f"sampling.allocation = 'given' needs a number of rows for each of {len(counts)} strata, got {number}"
        )
    taken = np.asarray(given, np.int64)
    if taken.sum() != total:
        raise ConfigError(f"the given allocation sums to {taken.sum():,}, not to {total:,} rows; make them agree")
    _check_taken(counts, taken, replacement=replacement)
    return taken


def _check_taken(counts: I64, taken: I64, *, replacement: bool) -> None:
    if len(counts) != len(taken):
        raise ConfigError(f"sampling.allocation has {len(taken)} strata, the rows have {len(counts)}; allocate for these rows")
    short = np.flatnonzero(taken > (np.where(counts > 0, np.inf, 0) if replacement else counts))
    if len(short):
        stratum = short[0]
        raise ConfigError(
            f"sampling.allocation asks for {taken[stratum]:,} rows of stratum {stratum}, which has {counts[stratum]:,}; "
            "ask for fewer, or set sampling.replacement = true where it has any"
        )
    never = np.flatnonzero((taken < 1) & (counts > 0))
    if len(never):
        raise ConfigError(
            f"sampling.allocation takes {taken[never[0]]:,} of the {counts[never[0]]:,} rows of stratum {never[0]}: "
            "no weight makes up for rows that are never drawn; take at least 1"
        )
