"""Does a drawn negative give itself away? What one bit about an item and its time tells of the label.

Enters: rows with labels and weights, and the clicks that were known before. Leaves: for each derived bit the AUC of ranking by
that bit alone. In a log of impressions some bits tell a little, because people prefer some items; drawn negatives must not make
any of them tell more. A sampler that does teaches the model its own rule instead of what people like.

Letters: R rows, P clicks, B bits.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from data_schemas.examples import F32, I64, U64

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

SILENT_HOURS = (1, 3, 24)
"""An item may not have been clicked for so long."""
YOUNG_HOURS = (1, 6, 24)
"""An item may have been first clicked so recently."""
DECILES = 10
MAX_HOURS = 2**23
"""Hours since 1970 that fit into a code, until the year 2926."""


def bit_auc(bit_R: Bools, labels_R: F32, weights_R: F64 | F32) -> float:
    """AUC of ranking by one bit: half of one plus the difference of its weighted shares among clicks and among others.

    >>> bit_auc(np.array([True, True, False, False]), np.array([1, 0, 0, 0], np.float32), np.ones(4))
    0.8333333333333334
    """
    shares = [np.average(bit_R[labels_R == label], weights=weights_R[labels_R == label]) for label in (1, 0)]
    return float(0.5 + (shares[0] - shares[1]) / 2)


def strength(auc: float) -> float:
    """How far from telling nothing, in [0, 0.5], whichever way round."""
    return abs(auc - 0.5)


def time_bits(item_R: U64, hour_R: I64, clicked_P: U64, hour_P: I64) -> dict[str, Bools]:
    """Bits about when a row's item was clicked before the row's hour: never, not lately, for the first time lately.

    Args:
        item_R, hour_R: the rows.
        clicked_P, hour_P: items and hours of all clicks known, of earlier and later hours alike.
    """
    last_R, first_R = _last_and_first(item_R, hour_R, clicked_P, hour_P)
    never_R = last_R < 0
    bits = {"never clicked before": never_R}
    bits |= {f"not clicked in the last {span} h": never_R | (hour_R - last_R > span) for span in SILENT_HOURS}
    bits |= {f"first clicked within {span} h": ~never_R & (hour_R - first_R <= span) for span in YOUNG_HOURS}
    return bits


def decile_edges(count_R: I64) -> list[float]:
    """The deciles of a count; those that are equal once."""
    return list(np.unique(np.quantile(count_R, np.arange(1, DECILES) / DECILES)))


def popularity_bits(count_R: I64, edges: Sequence[float]) -> dict[str, Bools]:
    """For each edge: whether a count known before the row's hour is at or above it."""
    return {f"clicked {edge:g} times or more": count_R >= edge for edge in edges}


def counts_before(item_R: U64, hour_R: I64, clicked_P: U64, hour_P: I64, *, span_hours: int) -> I64:
    """Clicks of each row's item in the `span_hours` before the row's hour."""
    clicks_P, row_R = _codes(item_R, hour_R, clicked_P, hour_P)
    return np.searchsorted(clicks_P, row_R).astype(np.int64) - np.searchsorted(clicks_P, row_R - span_hours)


def probe(bits: Mapping[str, Bools], labels_R: F32, weights_R: F64 | F32) -> dict[str, float]:
    """AUC of each bit alone."""
    return {name: bit_auc(bit_R, labels_R, weights_R) for name, bit_R in bits.items()}


def _last_and_first(item_R: U64, hour_R: I64, clicked_P: U64, hour_P: I64) -> tuple[I64, I64]:
    """Hours of the last and the first click of each row's item before the row's hour; -1 for none."""
    clicks_P, row_R = _codes(item_R, hour_R, clicked_P, hour_P)
    first_R, end_R = np.searchsorted(clicks_P, row_R - hour_R), np.searchsorted(clicks_P, row_R)
    known_R, hours_P = end_R > first_R, np.append(clicks_P % MAX_HOURS, 0)
    return np.where(known_R, hours_P[end_R - 1], -1), np.where(known_R, hours_P[first_R], -1)


def _codes(item_R: U64, hour_R: I64, clicked_P: U64, hour_P: I64) -> tuple[I64, I64]:
    """Sorted codes of item and hour of the clicks; the codes of the rows. Hours of one item lie together."""
    items = np.unique(np.concatenate([clicked_P, item_R]))
    clicks_P, row_R = (
        np.searchsorted(items, ids) * MAX_HOURS + hours for ids, hours in ((clicked_P, hour_P), (item_R, hour_R))
    )
    return np.sort(clicks_P), row_R
