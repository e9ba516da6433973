"""Alarms before learning: does a window look like those before it?

Enters: the window's profile and those of earlier windows. Leaves: an `Alarm` for each figure that is out of line.

Rows and click rate are compared with the windows of the last seven days at the same hour of the day, since clicks follow the
day; before two such windows are known, with all windows of the last seven days too, and must then be far from both. Shares of
missing values and of ids never seen are compared with the last 24 windows, and only more of them is suspicious. Far is more
than `deviations` robust standard deviations (1.4826 times the median absolute deviation) and more than a least step that a
user would call a fault, since a steady stream has a deviation near zero. A range of numbers is out of line where its median
lies outside of all the ranges seen, widened by their width; a burst of clicks, where the clicks of ten users exceed the
window's click rate by `burst_factor` times what any ten did.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np

from pipeline.evaluation.profile import WindowProfile

DAYS = 7
LATEST_WINDOWS = 24
SAME_HOUR_AT_LEAST = 2
LEAST_ROWS_STEP = math.log(3.0)
"""Of the log of the count of rows."""
LEAST_CLICKS_STEP = math.log(2.0)
"""Of the log odds of a click."""
LEAST_SHARE_STEP = 0.2
"""Of the share of rows without a value, or with an id never seen."""
LEAST_USER_EXCESS = 4.0
"""Standard errors; below it chance alone may be at work."""
MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One figure that is out of line."""

    figure: str
    """Such as `rows` or `missing item_price`."""
    value: float
    low: float | None
    high: float
    """What is likely; None where nothing is too low."""
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Past:
    """An earlier window that was learned."""

    hour: int
    """Its start, in hours since 1970."""
    profile: WindowProfile


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A window as it was looked at before learning."""

    profile: WindowProfile
    alarms: tuple[Alarm, ...]


def past_of(history: Sequence[Mapping[str, Any]]) -> list[Past]:
    """The windows that have a profile, of a model's history of windows that were learned, serving or not."""
    return [
        Past(
            hour=int(datetime.fromisoformat(record["window_start"]).timestamp()) // 3600,
            profile=WindowProfile(**record["profile"]),
        )
        for record in history
        if record.get("profile")
    ]


def alarms_of(
    profile: WindowProfile, hour: int, past: Sequence[Past], *, deviations: float, burst_factor: float, min_windows: int
) -> tuple[Alarm, ...]:
    """What is out of line; nothing while fewer than `min_windows` windows of the last seven days are known.

    Args:
        profile: of the window.
        hour: its start, in hours since 1970.
        past: windows before it, in any order.
        deviations: robust standard deviations that are still in line.
        burst_factor: at least 1.
        min_windows: at least 2.
    """
    recent = [window for window in past if hour - 24 * DAYS <= window.hour < hour]
    if len(recent) < min_windows:
        return ()
    latest = sorted(recent, key=lambda window: window.hour)[-LATEST_WINDOWS:]
    found = [
        _far("rows", profile, hour, recent, _log_rows, math.exp, LEAST_ROWS_STEP, deviations),
        _far("click rate", profile, hour, recent, _log_odds, _expit, LEAST_CLICKS_STEP, deviations),
        *(_too_many("missing", name, profile, latest, deviations) for name in profile.missing),
        *(_too_many("new", name, profile, latest, deviations) for name in profile.new),
        *(_out_of_range(name, profile, recent) for name in profile.quantiles),
        _burst(profile, recent, burst_factor),
    ]
    return tuple(alarm for alarm in found if alarm is not None)


def _too_many(
    kind: Literal["missing", "new"], name: str, profile: WindowProfile, latest: Sequence[Past], deviations: float
) -> Alarm | None:
    def share(profile: WindowProfile) -> float:
        return (profile.missing if kind == "missing" else profile.new).get(name, 0.0)

    high = _bounds([share(window.profile) for window in latest], LEAST_SHARE_STEP, deviations)[1]
    return _alarm(f"{kind} {name}", share(profile), None, high)


def _far(
    figure: str,
    profile: WindowProfile,
    hour: int,
    recent: Sequence[Past],
    measure: Callable[[WindowProfile], float],
    shown: Callable[[float], float],
    least_step: float,
    deviations: float,
) -> Alarm | None:
    same_hour = [window for window in recent if (hour - window.hour) % 24 == 0]
    references = [same_hour] if len(same_hour) >= SAME_HOUR_AT_LEAST else [recent, *([same_hour] if same_hour else [])]
    bounds = [_bounds([measure(window.profile) for window in windows], least_step, deviations) for windows in references]
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    return _alarm(figure, shown(measure(profile)), shown(low), shown(high))


def _alarm(figure: str, value: float, low: float | None, high: float) -> Alarm | None:
    """None for a likely value."""
    if value <= high and (low is None or value >= low):
        return None
    likely = f"up to {_figure(high)}" if low is None else f"{_figure(low)} to {_figure(high)}"
    sentence = f"{figure}: {_figure(value)}, where the last {DAYS} days make {likely} likely"
    return Alarm(figure=figure, value=value, low=low, high=high, sentence=sentence)


def _bounds(values: Sequence[float], least_step: float, deviations: float) -> tuple[float, float]:
    median = float(np.median(values))
    spread = MAD_TO_DEVIATION * float(np.median(np.abs(np.array(values) - median)))
    step = max(least_step, deviations * spread)
    return median - step, median + step


def _out_of_range(name: str, profile: WindowProfile, recent: Sequence[Past]) -> Alarm | None:
    seen = [window.profile.quantiles[name] for window in recent if name in window.profile.quantiles]
    if not seen:
        return None
    low, high = min(low for low, _, _ in seen), max(high for _, _, high in seen)
    margin = max(high - low, abs(high), abs(low)) if high == low else high - low
    return _alarm(f"median {name}", profile.quantiles[name][1], low - margin, high + margin)


def _burst(profile: WindowProfile, recent: Sequence[Past], burst_factor: float) -> Alarm | None:
    most = max(window.profile.user_excess for window in recent)
    high = max(burst_factor * most, LEAST_USER_EXCESS)
    return _alarm("clicks of ten users, in standard errors", profile.user_excess, None, high)


def _log_rows(profile: WindowProfile) -> float:
    return math.log(max(profile.rows, 1))


def _log_odds(profile: WindowProfile) -> float:
    """Of a click, with half a click and half a row without one added, so that it is finite (Haldane 1956)."""
    return math.log((profile.clicks + 0.5) / (profile.rows - profile.clicks + 0.5))


def _expit(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
