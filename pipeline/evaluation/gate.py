"""The gate: is the challenger good enough to serve?

Enters: held-out rows with what the serving model (the champion) and the model after learning (the challenger) predicted, and
what the gate saw in earlier windows. Leaves: a `GateVerdict` with every figure and the reason.

- `reject`: the challenger is broken, or significantly worse, or too good to be true;
- `hold`: there is too little evidence to tell; the rows are pooled with those of the next window;
- `publish`: neither.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.evaluation.metrics import Interval, log_odds, measure
from pipeline.evaluation.paired import Difference, Differences, Paired, differences

Decision = Literal["publish", "hold", "reject"]

TESTS = 2
"""Significance tests that share `false_rejections`: AUC and log loss."""
ENOUGH_FREEDOM = 9.0
"""Degrees of freedom from which on the margin counts: ten users who clicked."""
LEAST_GAIN = 0.003
"""Of AUC: below it no spread of earlier gains makes a gain suspicious."""
MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the gate allows."""

    false_rejections: float = 0.02
    """Chance that a challenger equal to the champion is called worse, by all significance tests of all windows that are pooled:
    half of it is spent at the first, half of the rest at each further one."""
    auc_margin: float = 0.02
    """Half the width of the 95 % interval of the AUC difference from which on it can decide."""
    max_windows: int = 6
    """Windows that are pooled at most; then too little evidence of harm is enough."""
    copc_bounds: tuple[float, float] = (0.5, 2.0)
    """Clicks over predicted clicks of the challenger."""
    max_churn: float = 1.0
    """Mean absolute move of the log odds of a row."""
    leak_factor: float = 10.0
    """Robust deviations by which a gain of AUC may exceed the median of earlier ones."""
    min_history: int = 12
    """Earlier gains that must be known before one can be too good."""
    max_skipped_share: float = 0.05
    """Of the steps."""
    bootstrap_samples: int = 500


@dataclass(frozen=True, kw_only=True)
class GateFigure:
    """One figure that the gate looked at."""

    name: str
    value: float | None
    """None where the rows have none."""
    low: float | None
    high: float | None
    """What is allowed, or for a difference its 95 % interval; None where there is no bound."""
    passed: bool
    sentence: str


@dataclass(frozen=True, kw_only=True)
class GateVerdict:
    """What becomes of the challenger, and why."""

    decision: Decision
    reason: str
    figures: tuple[GateFigure, ...]
    rows: int
    clicks: int
    users: int
    windows: int
    """Learned since the champion was published, this one among them."""
    auc_difference: float | None
    """Challenger less champion; None without both classes."""
    auc_interval: Interval | None
    """95 %, over users."""
    delong_interval: Interval | None
    """95 %, as if rows were independent."""
    log_loss_difference: float | None
    """Relative to the champion's, above 0 where the challenger's is lower."""
    log_loss_interval: Interval | None


def judge(
    pair: Paired,
    *,
    limits: Limits,
    windows: int,
    past_gains: Sequence[float],
    skipped_steps: int,
    steps: int,
    seed: Sequence[int],
) -> GateVerdict:
    """Compares challenger with champion.

    Args:
        pair: held-out rows, pooled over windows that could not decide; may be empty.
        limits: what is allowed.
        windows: that were learned since the champion was published, this one among them.
        past_gains: differences of AUC in earlier windows.
        skipped_steps: whose loss was not finite.
        steps: of the pass.
        seed: of the bootstrap.
    """
    finite, champion_is_finite = (bool(np.isfinite(own).all()) for own in (pair.challenger_H, pair.champion_H))
    figures = [_finite(pair), _skipped(skipped_steps, steps, limits)]
    found: Differences | None = None
    if finite and champion_is_finite and len(pair.labels_H):
        found = differences(pair, num_samples=limits.bootstrap_samples, seed=seed)
        figures += [*_harm(found, windows, limits), _calibration(pair, limits), _churn(pair, limits)]
        figures += [_leak(found, past_gains, limits)]
    enough = _evidence(found, pair, windows, limits) if champion_is_finite else _no_champion(pair)
    decision: Decision = "publish"
    if wrong := [figure for figure in figures if not figure.passed]:
        decision, reason = "reject", "; ".join(figure.sentence for figure in wrong)
    elif not enough.passed:
        decision, reason = "hold", enough.sentence
    else:
        reason = "; ".join(figure.sentence for figure in figures if figure.name in ("AUC", "log loss")) or enough.sentence
    auc, log_loss = (found.auc, found.log_loss) if found else (None, None)
    return GateVerdict(
        decision=decision,
        reason=reason,
        figures=(*figures, enough),
        rows=len(pair.labels_H),
        clicks=int(np.count_nonzero(pair.labels_H)),
        users=found.num_users if found else 0,
        windows=windows,
        auc_difference=auc.value if auc else None,
        auc_interval=auc.interval() if auc else None,
        delong_interval=found.delong if found else None,
        log_loss_difference=log_loss.value if log_loss else None,
        log_loss_interval=log_loss.interval() if log_loss else None,
    )


def _finite(pair: Paired) -> GateFigure:
    wrong = int((~np.isfinite(pair.challenger_H)).sum())
    return GateFigure(
        name="finite",
        value=float(wrong),
        low=None,
        high=0.0,
        passed=wrong == 0,
        sentence=f"{wrong:,} of {len(pair.challenger_H):,} predictions are not finite",
    )


def _no_champion(pair: Paired) -> GateFigure:
    """Any model whose predictions are finite is better than one whose are not."""
    wrong = int((~np.isfinite(pair.champion_H)).sum())
    return GateFigure(
        name="evidence",
        value=None,
        low=None,
        high=None,
        passed=True,
        sentence=f"{wrong:,} of {len(pair.champion_H):,} predictions of the model that serves are not finite",
    )


def _skipped(skipped_steps: int, steps: int, limits: Limits) -> GateFigure:
    share = skipped_steps / max(steps, 1)
    return GateFigure(
        name="skipped steps",
        value=share,
        low=None,
        high=limits.max_skipped_share,
        passed=share <= limits.max_skipped_share,
        sentence=f"{skipped_steps:,} of {steps:,} steps had a loss that is not finite",
    )


def _harm(found: Differences, windows: int, limits: Limits) -> Iterator[GateFigure]:
    level = limits.false_rejections / TESTS / 2**windows
    for name, difference in (("AUC", found.auc), ("log loss", found.log_loss)):
        if difference is not None:
            yield _difference(name, difference, level)


def _difference(name: str, difference: Difference, level: float) -> GateFigure:
    chance, interval = difference.chance_of_harm_by_luck(), difference.interval()
    shown = f"{difference.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    if name == "log loss":
        shown = f"{-difference.value:+.2%} [{-interval.high:+.2%}, {-interval.low:+.2%}]"
    luck = f", which luck alone makes with p = {chance:.2g}" if chance < level else ""
    return GateFigure(
        name=name,
        value=difference.value,
        low=interval.low,
        high=interval.high,
        passed=chance >= level,
        sentence=f"{name} {shown}{luck}",
    )


def _calibration(pair: Paired, limits: Limits) -> GateFigure:
    """Out of bounds for certain, and farther from 1 than the champion: a click rate that moved is no fault of the
    challenger."""
    rows = (pair.labels_H, pair.user_H, pair.weights_H)
    challenger = measure(rows[0], np.clip(pair.challenger_H, 0, 1), rows[1], rows[2])
    champion = measure(rows[0], np.clip(pair.champion_H, 0, 1), rows[1], rows[2])
    (low, high), interval = limits.copc_bounds, challenger.copc_interval
    outside = interval is not None and (interval.high < low or interval.low > high)
    worse = _distance(challenger.copc) > _distance(champion.copc)
    shown = "none" if challenger.copc is None else f"{challenger.copc:.3f}"
    return GateFigure(
        name="COPC",
        value=challenger.copc,
        low=low,
        high=high,
        passed=not (outside and worse),
        sentence=f"clicks over predicted clicks are {shown}, allowed are {low:g} to {high:g}",
    )


def _distance(copc: float | None) -> float:
    return abs(math.log(copc)) if copc else 0.0


def _churn(pair: Paired, limits: Limits) -> GateFigure:
    moved = float(np.average(np.abs(log_odds(pair.challenger_H) - log_odds(pair.champion_H)), weights=pair.weights_H))
    return GateFigure(
        name="churn",
        value=moved,
        low=None,
        high=limits.max_churn,
        passed=moved <= limits.max_churn,
        sentence=f"the log odds of a row moved by {moved:.3f} in the mean, allowed are {limits.max_churn:g}",
    )


def _leak(found: Differences, past_gains: Sequence[float], limits: Limits) -> GateFigure:
    """A gain far above all earlier ones is no skill: something in the rows knows the label."""
    gain = found.auc.value if found.auc else None
    high: float | None = None
    if len(past_gains) >= limits.min_history:
        median = float(np.median(past_gains))
        spread = MAD_TO_DEVIATION * float(np.median(np.abs(np.array(past_gains) - median)))
        high = median + limits.leak_factor * max(spread, LEAST_GAIN)
    lucky = found.auc is None or found.auc.interval(0.98).low <= 0
    return GateFigure(
        name="gain of AUC",
        value=gain,
        low=None,
        high=high,
        passed=gain is None or high is None or gain <= high or lucky,
        sentence="too little is known of earlier gains"
        if gain is None or high is None
        else f"the AUC rose by {gain:+.4f}, where {len(past_gains):,} earlier windows make up to {high:+.4f} likely: a feature "
        "that knows the label would do that",
    )


def _evidence(found: Differences | None, pair: Paired, windows: int, limits: Limits) -> GateFigure:
    """Whether there is enough of it to decide: the challenger is surely better, or how much better or worse is known closely
    enough, or `max_windows` have gone by."""
    half = None
    if found and found.auc and found.auc.error > 0 and found.auc.freedom >= ENOUGH_FREEDOM:
        interval = found.auc.interval()
        half = (interval.high - interval.low) / 2
    known = [difference for difference in ((found.auc, found.log_loss) if found else ()) if difference]
    better = any(difference.freedom >= ENOUGH_FREEDOM and difference.interval().low > 0 for difference in known)
    same = found is not None and np.array_equal(pair.champion_H, pair.challenger_H)
    shown = "is not known, too few users clicked" if half is None else f"is known to +-{half:.4f}"
    return GateFigure(
        name="evidence",
        value=half,
        low=None,
        high=limits.auc_margin,
        passed=same or better or windows >= limits.max_windows or (half is not None and half <= limits.auc_margin),
        sentence=f"the AUC difference on {len(pair.labels_H):,} held-out rows of {windows} "
        f"{'window' if windows == 1 else 'windows'} {shown}, wanted is +-{limits.auc_margin:g}",
    )
