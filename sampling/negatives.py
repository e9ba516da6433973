"""Negatives for a log of clicks only: drawn from what could have been shown, each with the probability it was drawn with.

Enters: the clicks of a window by user, item and hour, and a seed. Leaves: for each drawn row the click that it stands beside,
the row that its item is copied from, and two probabilities: the one that it was drawn with, and the one that it has under the
law of exposure, by which an item is shown as `count ** power` among the items that are live in the same hour.

An item is live in the hours in which somebody clicked it. Drawing from more than that leaks the time: among clicks "live in
this hour" is always true, so a negative from yesterday is told by its age alone.

The correction: a model learned on draws of probability q estimates the log odds up to -log q. With t the law of exposure,
either a weight of t / q on each drawn row, or log(t / q) added to the logits of clicks and drawn rows alike (Yi et al. 2019,
"Sampling-Bias-Corrected Neural Modeling", section 3; t is constant there), gives the model that draws from t would have given.

Letters: R rows of the log, D drawn rows, G live pairs of hour and item, H hours, U users by hour, n draws a click,
C candidates a click.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_schemas.examples import F32, I64, U64
from data_schemas.hashing import MISSING

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Law = Literal["uniform", "popularity", "in_batch"]

_Draw = Callable[[I64], tuple[I64, I64]]
"""From clicks to one pair and one row for each."""

MAX_ROUNDS = 64
"""Draws that hit an item of the user's own are drawn again, at most so often."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Rows that were drawn as negatives, click after click."""

    click_D: I64
    """Row of the click that it stands beside: its user, hour and context."""
    item_D: I64
    """Row that the item and what belongs to it are copied from."""
    probability_D: F64
    """Of this item at each draw for that click, in (0, 1]: the user's own items can never be drawn."""
    exposure_D: F64
    """Of the same item under the law of exposure, the user's own items left out as well."""
    click_ratio_R: F64
    """`[R]` exposure over probability of each click's own item, by the same two formulas; 1 where nothing was drawn."""
    draws_a_click: int
    """n: a row's expected number among the draws of its click is n times its probability."""
    live_pairs: int
    """G."""
    clicks_without: int
    """Clicks for which nothing could be drawn: no item, or the user clicked all that was live."""
    undrawn: int
    """Draws that met the user's own items `MAX_ROUNDS` times, and were given up."""

    @property
    def ratio_D(self) -> F64:
        """Exposure over probability: the weight that puts a drawn row right, or the exponential of its logit's shift."""
        return self.exposure_D / self.probability_D


def draw_negatives(
    user_R: U64,
    item_R: U64,
    hour_R: I64,
    *,
    law: Law,
    draws_a_click: int,
    power: float,
    seed: Sequence[int],
    num_clicks: int | None = None,
    trailing_hours: int = 0,
    in_batch_clicks: int = 256,
) -> Drawn:
    """Draws `draws_a_click` negatives for each click, with replacement, never an item that its user clicked.

    Args:
        user_R: hashed users; each row of `hashing.MISSING` is a user of its own.
        item_R: hashed items; a row of `hashing.MISSING` is no candidate and gets no negatives.
        hour_R: hours since 1970.
        law: `uniform` over the live items; `popularity`, as `count ** power`; `in_batch`, the items of other clicks of a random
            batch of the same hour, which comes to as `count`.
        power: of the law of exposure, at least 0.
        seed: the same gives the same draws.
        num_clicks: the first so many rows are the window; those after it were clicked before it, and only make items live.
        trailing_hours: an item stays live for so many hours after the hour in which it was clicked. Above 0 it leaks.
        in_batch_clicks: with `in_batch`, clicks of a batch at most; at least 2.
    """
    rng = np.random.default_rng(list(seed))
    clicks = np.flatnonzero(item_R[:num_clicks] != MISSING)
    live = _Live.of(item_R, hour_R, np.unique(hour_R[clicks]), trailing_hours)
    own = _Own.of(user_R, clicks, live)
    drawing, exposure = (
        _Mass.of(live, own, exponent) for exponent in ({"uniform": 0.0, "in_batch": 1.0}.get(law, power), power)
    )
    possible = own.num_open_U[own.user_hour_R[clicks]] > 0
    able = clicks[possible]
    click_D = np.repeat(able, draws_a_click)
    if law == "in_batch":
        batches = _Batches.of(able, hour_R, in_batch_clicks, rng)
        pair_D, item_D = _reject(click_D, own, lambda clicks: batches.draw(clicks, live, rng))
    else:
        pair_D, item_D = _reject(click_D, own, lambda clicks: drawing.draw(clicks, live, rng))
    drawn = np.flatnonzero(pair_D >= 0)
    click_D, pair_D, item_D = click_D[drawn], pair_D[drawn], item_D[drawn]
    click_ratio_R = np.ones(len(item_R))
    pairs = live.pair_R[able]
    click_ratio_R[able] = exposure.probability(able, pairs) / drawing.probability(able, pairs)
    return Drawn(
        click_D=click_D,
        item_D=item_D,
        probability_D=drawing.probability(click_D, pair_D),
        exposure_D=exposure.probability(click_D, pair_D),
        click_ratio_R=click_ratio_R,
        draws_a_click=draws_a_click,
        live_pairs=len(live.count_G),
        clicks_without=len(item_R[:num_clicks]) - len(able),
        undrawn=len(able) * draws_a_click - len(drawn),
    )


def choose_hard(scores_RC: F32, *, chosen: int, hard: int, seed: Sequence[int]) -> tuple[I64, F64]:
    """Of each row's candidates the `hard` with the highest scores, and the rest of `chosen` at random from the others.

    The candidates are a sample of the law of exposure; within them the inclusion probability is 1 for the top and
    `(chosen - hard) / (C - hard)` for the others. Two-phase sampling (Särndal, Swensson & Wretman 1992, chapter 9): with the
    weights returned, sums over the chosen are unbiased for sums over `chosen` draws of the law itself, whatever the scores.

    Args:
        scores_RC: a score for each candidate of each row; of equal ones the first counts as higher.
        chosen: of each row, at most C.
        hard: of them, in `[0, chosen)`: with no share left to chance, the easy candidates could never be accounted for.

    Returns:
        `[R, chosen]` positions among the candidates, the hard ones first, and their weights, which sum to `chosen` in each row.
    """
    num_rows, candidates = scores_RC.shape
    if not 0 <= hard < chosen <= candidates:
        raise ValueError(f"0 <= hard < chosen <= candidates must hold, got {hard}, {chosen} and {candidates}")
    order_RC = np.argsort(-scores_RC, axis=1, kind="stable")
    others_RC = np.random.default_rng(list(seed)).permuted(order_RC[:, hard:], axis=1)
    positions = np.concatenate([order_RC[:, :hard], others_RC[:, : chosen - hard]], axis=1)
    inclusion = np.repeat([1.0, (chosen - hard) / (candidates - hard)], [hard, chosen - hard])
    weights: F64 = np.broadcast_to(chosen / candidates / inclusion, (num_rows, chosen)).copy()
    return positions, weights


@dataclass(frozen=True, kw_only=True)
class _Live:
    """Which items are live in which hours, pairs in order of hour, then item."""

    hour_H: I64
    num_items: int
    key_G: I64
    """Number of the hour times `num_items` plus number of the item."""
    row_G: I64
    """A row with that item, the newest there is."""
    count_G: I64
    """Clicks of the item in the hour, or within the trailing hours of it."""
    first_H: I64
    """`[H + 1]` where the pairs of each hour begin."""
    item_code_R: I64
    hour_code_R: I64
    """-1 for an hour before the window."""
    pair_R: I64
    """The pair of each row's item in its own hour; -1 for none."""

    @classmethod
    def of(cls, item_R: U64, hour_R: I64, hour_H: I64, trailing_hours: int) -> "_Live":
        items, item_code_R = np.unique(item_R, return_inverse=True)
        named = np.flatnonzero(item_R != MISSING)
        rows = np.tile(named, trailing_hours + 1)
        at = hour_R[rows] + np.repeat(np.arange(trailing_hours + 1), len(named))
        rows, hour_code = rows[np.isin(at, hour_H)], _codes(at[np.isin(at, hour_H)], hour_H)
        key_G, first, count_G = np.unique(hour_code * len(items) + item_code_R[rows], return_index=True, return_counts=True)
        hour_code_R = np.where(np.isin(hour_R, hour_H), _codes(hour_R, hour_H), -1)
        return cls(
            hour_H=hour_H,
            num_items=len(items),
            key_G=key_G,
            row_G=rows[first],
            count_G=count_G,
            first_H=np.searchsorted(key_G, np.arange(len(hour_H) + 1) * len(items)),
            item_code_R=item_code_R,
            hour_code_R=hour_code_R,
            pair_R=_find(key_G, np.where(hour_code_R < 0, -1, hour_code_R * len(items) + item_code_R)),
        )


@dataclass(frozen=True, kw_only=True)
class _Own:
    """What each user clicked in the window, and what of it is live, hour by hour."""

    num_items: int
    user_code_R: I64
    item_code_R: I64
    clicked: I64
    """Sorted codes of user and item."""
    user_hour_R: I64
    """Number of each click's user and hour; -1 for other rows."""
    owner_P: I64
    """User and hour ..."""
    pair_P: I64
    """... and a live pair of that hour which the user clicked in the window."""
    num_open_U: I64
    """Live items that are left for a user in an hour."""
    hour_code_U: I64

    @classmethod
    def of(cls, user_R: U64, clicks: I64, live: _Live) -> "_Own":
        user_code_R = np.unique(user_R, return_inverse=True)[1].astype(np.int64)
        nobody = np.flatnonzero(user_R == MISSING)
        user_code_R[nobody] = len(user_R) + nobody
        items, hours = live.num_items, max(len(live.hour_H), 1)
        clicked = np.unique(user_code_R[clicks] * items + live.item_code_R[clicks])
        user_hour_U, place = np.unique(user_code_R[clicks] * hours + live.hour_code_R[clicks], return_inverse=True)
        user_U, hour_U = np.divmod(user_hour_U, hours)
        first_U, end_U = np.searchsorted(clicked // items, user_U), np.searchsorted(clicked // items, user_U, side="right")
        counts_U: I64 = np.asarray(end_U - first_U, np.int64)
        owner, nth = _places(counts_U)
        pair = _find(live.key_G, hour_U[owner] * items + clicked[np.asarray(first_U)[owner] + nth] % items)
        owner_P, pair_P = owner[pair >= 0], pair[pair >= 0]
        user_hour_R = np.full(len(user_R), -1)
        user_hour_R[clicks] = place
        return cls(
            num_items=items,
            user_code_R=user_code_R,
            item_code_R=live.item_code_R,
            clicked=clicked,
            user_hour_R=user_hour_R,
            owner_P=owner_P,
            pair_P=pair_P,
            num_open_U=np.diff(live.first_H)[hour_U] - np.bincount(owner_P, minlength=len(hour_U)),
            hour_code_U=hour_U,
        )

    def has(self, click_D: I64, item_row_D: I64) -> Bools:
        """Whether the click's user clicked the item of the row."""
        return _find(self.clicked, self.user_code_R[click_D] * self.num_items + self.item_code_R[item_row_D]) >= 0


@dataclass(frozen=True, kw_only=True)
class _Mass:
    """`count ** exponent` of each live pair, and what is left of an hour's sum for each user."""

    own: _Own
    mass_G: F64
    upto_G: F64
    """Running sum, of all hours."""
    open_U: F64

    @classmethod
    def of(cls, live: _Live, own: _Own, exponent: float) -> "_Mass":
        mass_G = live.count_G.astype(np.float64) ** exponent
        total_H = np.add.reduceat(np.append(mass_G, 0.0), live.first_H[:-1]) if len(live.hour_H) else np.empty(0)
        own_U = np.bincount(own.owner_P, weights=mass_G[own.pair_P], minlength=len(own.num_open_U))
        return cls(own=own, mass_G=mass_G, upto_G=np.cumsum(mass_G), open_U=total_H[own.hour_code_U] - own_U)

    def probability(self, click_D: I64, pair_D: I64) -> F64:
        """Of the pair, at each draw for the click; for a click's own item by the same formula, though it is never drawn."""
        return np.minimum(self.mass_G[pair_D] / self.open_U[self.own.user_hour_R[click_D]], 1.0)

    def draw(self, click_D: I64, live: _Live, rng: np.random.Generator) -> tuple[I64, I64]:
        """A live pair of each click's hour, and a row of its item."""
        hour_D = self.own.hour_code_U[self.own.user_hour_R[click_D]]
        first_D, end_D = live.first_H[hour_D], live.first_H[hour_D + 1]
        low_D = self.upto_G[first_D] - self.mass_G[first_D]
        aim_D = low_D + rng.random(len(click_D)) * (self.upto_G[end_D - 1] - low_D)
        pair_D = np.clip(np.searchsorted(self.upto_G, aim_D, side="right"), first_D, end_D - 1)
        return pair_D, live.row_G[pair_D]


@dataclass(frozen=True, kw_only=True)
class _Batches:
    """The clicks of each hour in a random order, cut evenly into batches."""

    order_R: I64
    first_R: I64
    """`[rows of the log]` where the batch of a click begins in `order_R` ..."""
    end_R: I64
    """... and where it ends."""

    @classmethod
    def of(cls, clicks: I64, hour_R: I64, size: int, rng: np.random.Generator) -> "_Batches":
        order = rng.permutation(clicks)
        order = order[np.argsort(hour_R[order], kind="stable")]
        _, start_H, count_H = np.unique(hour_R[order], return_index=True, return_counts=True)
        batches_H: I64 = -(-count_H // size)
        edges = [np.append(start_H, len(order))]
        owner, nth = _places(batches_H)
        edges.append(start_H[owner] + nth * count_H[owner] // np.maximum(batches_H[owner], 1))
        edge_B = np.unique(np.concatenate(edges))
        batch = np.searchsorted(edge_B, np.arange(len(order)), side="right") - 1
        first_R, end_R = np.zeros(len(hour_R), np.int64), np.zeros(len(hour_R), np.int64)
        first_R[order], end_R[order] = edge_B[batch], edge_B[batch + 1]
        return cls(order_R=order, first_R=first_R, end_R=end_R)

    def draw(self, click_D: I64, live: _Live, rng: np.random.Generator) -> tuple[I64, I64]:
        """The item of a random click of the same batch."""
        first_D, end_D = self.first_R[click_D], self.end_R[click_D]
        row_D = self.order_R[first_D + np.floor(rng.random(len(click_D)) * (end_D - first_D)).astype(np.int64)]
        return live.pair_R[row_D], row_D


def _reject(click_D: I64, own: _Own, draw: _Draw) -> tuple[I64, I64]:
    """Draws until no draw is an item of its click's user; pairs and rows, -1 where it was given up."""
    pair_D, item_D = np.full(len(click_D), -1), np.full(len(click_D), -1)
    waiting = np.arange(len(click_D))
    for _ in range(MAX_ROUNDS):
        if not len(waiting):
            break
        pairs, rows = draw(click_D[waiting])
        good = ~own.has(click_D[waiting], rows)
        pair_D[waiting[good]], item_D[waiting[good]] = pairs[good], rows[good]
        waiting = waiting[~good]
    return pair_D, item_D


def _codes(values: I64, sorted_values: I64) -> I64:
    return np.searchsorted(sorted_values, values).astype(np.int64)


def _find(sorted_keys: I64, keys: I64) -> I64:
    """The place of each key among unique sorted ones; -1 for none."""
    if not len(sorted_keys):
        return np.full(len(keys), -1)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[place] == keys, place, -1)


def _places(counts: I64) -> tuple[I64, I64]:
    """For lists of these lengths, laid end to end: whose each element is, and its number within its list."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
