"""Which rows of a window are kept, and how often each one counts so that the kept rows stand for all.

Enters: strata, a keep rate for each, caps. Leaves: for each row how often it was drawn, and its inclusion probability.

A kept row weighs one over its probability, and the loss stays an unbiased estimate of the loss of all rows. Or weights stay as
they are and the logits are shifted: where clicks are kept with probability p and other rows with q, the odds among kept rows
are p / q times the true ones, so a model whose logit z is judged as z + log(p / q) on kept rows learns the true log odds (King
and Zeng 2001, Political Analysis 9:137, eq. 7; He et al. 2014, ADKDD, sec. 6.3: a probability P learned from negatives kept at
rate q is P / (P + (1 - P) / q)).

Letters: R rows, S strata, G distinct ids, O ids over a cap.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt

from data_schemas.errors import ConfigError
from data_schemas.examples import F32, I64
from data_schemas.hashing import MISSING
from sampling.counting import CountedIds, grouped
from sampling.strata import F64, Strata, draw

Bools = npt.NDArray[np.bool_]
Method = Literal["poisson", "fixed"]
Correction = Literal["weights", "logit_shift"]


@dataclass(frozen=True, kw_only=True)
class Thinned:
    """The outcome of one draw over all rows."""

    times_R: npt.NDArray[np.int32]
    """How often each row was drawn: 0 or 1 without replacement."""
    rate_S: F64
    """Expected times of a row of the stratum: its inclusion probability without replacement."""
    factor_R: F32
    """`times / rate` on the row's weight; 0 where it is left out."""

    @property
    def kept_R(self) -> Bools:
        """Rows that are learned."""
        return self.times_R > 0


def thin(
    strata: Strata,
    rate_S: F64,
    rng: np.random.Generator,
    *,
    method: Method = "poisson",
    replacement: bool = False,
    among_R: Bools | None = None,
) -> Thinned:
    """Keeps rows of each stratum at its rate.

    Args:
        strata: of all rows.
        rate_S: in (0, 1].
        rng: the only source of chance.
        method: `poisson` draws each row by itself (Poisson sampling); `fixed` takes the nearest whole number of rows of
            each stratum, at least one, and a row's probability is that number over the count.
        replacement: the same row may be taken several times; only with `fixed`.
        among_R: rows that a cap left in; the others are never drawn.

    Raises:
        ConfigError: a rate outside (0, 1], or replacement with `poisson`.
    """
    rate_S = np.asarray(rate_S, np.float64)
    if len(wrong := rate_S[~((rate_S > 0) & (rate_S <= 1))]):
        raise ConfigError(f"keep_rate must be in (0, 1], got {wrong[0]}; use 1.0 to keep every row")
    if replacement and method == "poisson":
        raise ConfigError("sampling.replacement = true needs sampling.draw = 'fixed': 'poisson' draws a row once at most")
    match method:
        case "poisson":
            times_R = (rng.random(len(strata.stratum_R)) < rate_S[strata.stratum_R]).astype(np.int32)
            if among_R is not None:
                times_R *= among_R
        case "fixed":
            times_R, rate_S = _fixed(strata, rate_S, rng, replacement=replacement, among_R=among_R)
        case _:
            assert_never(method)
    factor_R = times_R * (1 / rate_S).astype(np.float32)[strata.stratum_R]
    return Thinned(times_R=times_R, rate_S=rate_S, factor_R=factor_R)


def logit_shift(rate_of_clicks: F64, rate_of_others: F64) -> F32:
    """What to add to a model's logit before it is judged on kept rows: `log(p / q)`.

    Its negative brings the logit of a model back that was trained on kept rows as they are: `log(keep_rate)` where all clicks
    are kept.

    >>> round(float(logit_shift(np.array([1.0]), np.array([0.1]))[0]), 4)
    2.3026
    """
    return np.log(np.asarray(rate_of_clicks) / np.asarray(rate_of_others)).astype(np.float32)


def within_cap(counted: CountedIds, cap: int, rng: np.random.Generator) -> Bools:
    """`[R]` true for at most `cap` rows of each id, drawn uniformly among its rows; true for all rows where `cap` is 0.

    Rows whose id is missing are nobody's, and are never over a cap. A cap is a rule, not an estimate: nothing makes up for the
    rows it leaves out, and an id above it counts for less.
    """
    within_R = np.ones(len(counted.ids_R), bool)
    if cap == 0 or not len(within_R):
        return within_R
    over_G = (counted.counts_G > cap) & (counted.ids_G != MISSING)
    over_R = np.flatnonzero(over_G[counted.code_R])
    if len(over_R):
        count_O, number_G = counted.counts_G[over_G], np.cumsum(over_G) - 1
        shuffled_R = rng.permutation(over_R)
        by_id_R = shuffled_R[grouped(number_G[counted.code_R[shuffled_R]], len(count_O))]
        place_R = np.arange(len(by_id_R)) - np.repeat(np.cumsum(count_O) - count_O, count_O)
        within_R[by_id_R[place_R >= cap]] = False
    return within_R


def effective_rows(factor_R: F32) -> float:
    """Kish's effective sample size of the kept rows (Kish 1965, Survey Sampling, 11.7): `sum(w) ** 2 / sum(w ** 2)`.

    >>> round(effective_rows(np.array([1, 1, 0, 2], np.float32)), 3)
    2.667
    """
    total = float(np.sum(factor_R, dtype=np.float64))
    return total**2 / float(np.square(factor_R, dtype=np.float64).sum()) if total > 0 else 0.0


def _fixed(
    strata: Strata, rate_S: F64, rng: np.random.Generator, *, replacement: bool, among_R: Bools | None
) -> tuple[npt.NDArray[np.int32], F64]:
    rows = np.arange(len(strata.stratum_R)) if among_R is None else np.flatnonzero(among_R)
    stratum = strata.stratum_R[rows]
    counts: I64 = np.bincount(stratum, minlength=len(rate_S)).astype(np.int64)
    taken_S = np.minimum(np.maximum(np.rint(counts * rate_S).astype(np.int64), 1), counts)
    chosen, _ = draw(stratum, taken_S, rng, replacement)
    times_R = np.bincount(rows[chosen], minlength=len(strata.stratum_R)).astype(np.int32)
    return times_R, np.where(counts > 0, taken_S / np.maximum(counts, 1), 1.0)
