"""A click stream whose truth is known: every row comes with the probability that its label was drawn from.

Enters: a `SyntheticConfig`. Leaves: hours of a click log in the raw form of the data set `synthetic`, the true probability of
each row beside them, and the figures of an oracle that knows the truth.

Every event has a number, and each of its draws is the splitmix64 word (Steele et al. 2014) at that number: any hour can be made
without the earlier ones, a longer stream begins with the shorter one, and the words are the same with every version of numpy.

What happens in the stream:
- Users are active by Zipf's law, each around a favourite hour; the busiest hour has `traffic_ratio` times the rows of the
  quietest.
- Items live in slots whose popularity follows Zipf's law. An item is born hot, fades and dies; another then takes its slot.
- The log odds of a click add up from users, items, authors, categories and tags; from a product of latent factors of the user
  with those of the item's author, category and tags; from crosses of fields; from curved effects of numbers; and from drift:
  items and categories rise and fall by sums of sinusoids, so that no hour is special.
- Some events arrive in a later hour's file, some arrive twice, some values are missing. The truth does not heed what is
  missing: no model sees all that the oracle sees.

Letters: R rows, U users, I live items, A authors, C categories, G tags, J tags of an item at most, K latent factors.
"""

import gzip
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from scipy.special import expit, logit, ndtri

from data_schemas.errors import ConfigError
from data_schemas.hashing import mix64
from pipeline.evaluation.metrics import measure

Bools = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

FileFormat = Literal["parquet", "csv", "jsonl"]

NULLABLE_COLUMNS = ("author_id", "country", "tags", "item_price", "user_age")
"""Columns that have nulls, independently of each other and of the label."""

PEAK_HOUR, QUIET_HOUR = 20, 4
"""Hours of the day (UTC) with the most and the fewest rows."""

NUM_CATEGORIES, TAGS_PER_CATEGORY, MAX_TAGS = 24, 20, 4
NUM_COUNTRIES, NUM_FACTORS = 24, 3
DEVICES = ("android_phone", "ios_phone", "desktop", "android_tablet", "laptop", "ios_tablet", "television", "console")
PLACEMENTS = ("feed", "search", "story", "sidebar", "video", "banner", "related", "mail", "popup", "footer")

MANIFEST_NAME = ".synthetic.json"
"""Hidden file beside the written hours: the settings that made them."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The law of a stream. Streams that differ only in `hours` share their first hours.

    Raises:
        ConfigError: a value out of range; the message names the setting.
    """

    seed: int = 0
    start: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    """First hour: with a time zone, on a whole hour of UTC."""
    hours: int = 24
    """Number of files, one an hour."""
    rows_per_hour: int = 8334
    """Mean number of events an hour, over a day."""
    traffic_ratio: float = 17.0
    """Rows of the busiest hour of a day over those of the quietest."""
    base_ctr: float = 0.15
    """Mean true probability over a long stream; of a single day it may be off by a tenth of that value."""
    num_users: int = 6_000
    num_items: int = 4_000
    """Items alive at any time; over a day several times as many are seen."""
    num_authors: int = 300
    user_zipf: float = 0.6
    """Activity of the user of rank r is proportional to r ** -user_zipf."""
    item_zipf: float = 0.9
    """Popularity of the item slot of rank r is proportional to r ** -item_zipf, before items fade."""
    item_lifetime_hours: float = 24.0
    """Median life of an item."""
    interaction_strength: float = 1.0
    """Scale of all effects of more than one field; at 0 the log odds are a sum of effects of single fields."""
    drift_strength: float = 1.0
    """Scale of the changes of CTR over time; at 0 births, fading and deaths are the only change."""
    drift_speed: float = 1.0
    """At 1 CTRs swing with periods of 10 to 60 hours, at 2 of 5 to 30 hours."""
    late_share: float = 0.02
    """Share of the events that are delivered in the file of a later hour."""
    max_late_hours: int = 3
    """The latest delivery; each further hour of delay is half as likely as the one before."""
    duplicate_share: float = 0.01
    """Share of the events that are delivered twice: half of them in one file, half in two files in a row."""
    missing_share: float = 0.03
    """Share of nulls in each of `NULLABLE_COLUMNS`."""

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            _check_bounds(name, getattr(self, name), low, high)
        if self.start.tzinfo is None:
            raise ConfigError(f"start must have a time zone, got {self.start.isoformat()}; add tzinfo=UTC")
        if self.start.timestamp() % 3600 != 0:
            raise ConfigError(f"start must be on a whole hour of UTC, got {self.start.isoformat()}")

    def hour_start(self, index: int) -> datetime:
        """Start of hour `index`, UTC."""
        return self.start.astimezone(UTC) + timedelta(hours=index)

    def events_in_hour(self, index: int) -> int:
        """Number of events that happen in hour `index`, at least 1; the file of that hour has others too, late or repeated."""
        share = _day_profile(self.traffic_ratio)[self.hour_start(index).hour]
        return max(1, round(self.rows_per_hour * float(share)))


_BOUNDS: Mapping[str, tuple[int, int] | tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "hours": (1, 100_000),
    "rows_per_hour": (1, 2_000_000),
    "traffic_ratio": (1.0, 1000.0),
    "base_ctr": (0.001, 0.9),
    "num_users": (1, 100_000_000),
    "num_items": (1, 10_000_000),
    "num_authors": (1, 10_000_000),
    "user_zipf": (0.0, 2.0),
    "item_zipf": (0.0, 2.0),
    "item_lifetime_hours": (2.0, 10_000.0),
    "interaction_strength": (0.0, 5.0),
    "drift_strength": (0.0, 5.0),
    "drift_speed": (0.01, 100.0),
    "late_share": (0.0, 0.5),
    "max_late_hours": (1, 24),
    "duplicate_share": (0.0, 0.5),
    "missing_share": (0.0, 1.0),
}
"""Least and greatest value of each setting; whole numbers where the bounds are."""


@dataclass(frozen=True, kw_only=True)
class SyntheticHour:
    """The file of one hour, and the truth that is not in it. Rows are in order of arrival."""

    index: int
    start: datetime
    """Start of the hour, UTC."""
    table: pa.Table
    """R rows with the columns of the data set `synthetic`."""
    true_probability_R: F32
    """`[R]` probability of label 1."""
    is_late_R: Bools
    """`[R]` the event happened in an earlier hour and is delivered for the first time."""
    is_repeat_R: Bools
    """`[R]` the event was delivered before."""


class SyntheticStream:
    """The stream of a config, hour by hour in any order.

    >>> stream = SyntheticStream(SyntheticConfig(rows_per_hour=50, num_users=100, num_items=20))
    >>> stream.hour(7).table.equals(stream.hour(7).table)
    True
    """

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self._users = _draw_users(config)
        self._catalogue = _draw_catalogue(config)
        self._markets: dict[int, _Market] = {}
        self._intercept = self._calibrate()

    def hour(self, index: int) -> SyntheticHour:
        """The file of hour `index` in [0, hours).

        Raises:
            IndexError: no such hour.
        """
        if not 0 <= index < self.config.hours:
            raise IndexError(f"hour {index} is outside the stream of {self.config.hours} hours")
        number_R, is_repeat_R = _deliveries(self.config, index)
        events = self._events(number_R)
        probability_R = expit(self._intercept + self._log_odds(events))
        label_R = _uniform(self.config.seed, "label", number_R) < probability_R
        return SyntheticHour(
            index=index,
            start=self.config.hour_start(index),
            table=_as_table(self.config, events, label_R),
            true_probability_R=probability_R.astype(np.float32),
            is_late_R=(events.hour_R < index) & ~is_repeat_R,
            is_repeat_R=is_repeat_R,
        )

    def _calibrate(self) -> float:
        """The intercept at which the mean probability is `base_ctr`: bisection on events of the first 48 hours."""
        profile = _day_profile(self.config.traffic_ratio)
        hours = range(48)
        sizes = [round(500 * float(profile[self.config.hour_start(hour).hour])) for hour in hours]
        numbers = [_first_number(hour) + np.arange(size) for hour, size in zip(hours, sizes, strict=True)]
        log_odds_R = self._log_odds(self._events(np.concatenate(numbers)))
        low, high = logit(self.config.base_ctr) - 20.0, logit(self.config.base_ctr) + 20.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if expit(middle + log_odds_R).mean() < self.config.base_ctr else (low, middle)
        return float((low + high) / 2)

    def _events(self, number_R: I64) -> "_Events":
        """What the events with these numbers are, but for the label."""
        seed = self.config.seed
        hour_R = number_R // _EVENTS_PER_HOUR
        user_R, item_R = np.empty_like(number_R), np.empty_like(number_R)
        hours = np.unique(hour_R).tolist()
        markets = [self._market(hour) for hour in hours]
        for place, (hour, market) in enumerate(zip(hours, markets, strict=True)):
            rows = np.flatnonzero(hour_R == hour)
            active_U = self._users.activity_at(self.config.hour_start(hour).hour)
            user_R[rows] = _pick(active_U, _uniform(seed, "user", number_R[rows]))
            item_R[rows] = _pick(market.popularity_I, _uniform(seed, "item", number_R[rows]))
            item_R[rows] += place * self.config.num_items
        other_device_R = _pick(_zipf(len(DEVICES), 0.8), _uniform(seed, "device", number_R))
        stays_R = _uniform(seed, "keeps device", number_R) < 0.75
        return _Events(
            number_R=number_R,
            hour_R=hour_R,
            hour_of_day_R=(hour_R + self.config.hour_start(0).hour) % 24,
            user_R=user_R,
            item_R=item_R,
            items=_join_markets(markets),
            age_R=self._users.age_U[user_R],
            country_R=self._users.country_U[user_R],
            device_R=np.where(stays_R, self._users.device_U[user_R], other_device_R),
            placement_R=_pick(_zipf(len(PLACEMENTS), 0.7), _uniform(seed, "placement", number_R)),
            position_R=np.minimum(-6.0 * np.log(_uniform(seed, "position", number_R)), 49.0).astype(np.int64),
        )

    def _log_odds(self, events: "_Events") -> F64:
        """`[R]` true log odds of a click, but for the intercept."""
        catalogue, users, items = self._catalogue, self._users, events.items
        category_R = items.category_I[events.item_R]
        since_peak_R = events.hour_of_day_R - catalogue.peak_hour_C[category_R]
        alone_R = (
            users.bias_U[events.user_R]
            + items.log_odds_I[events.item_R]
            + catalogue.country_effect_N[events.country_R]
            + catalogue.device_effect_D[events.device_R]
            + catalogue.placement_effect_P[events.placement_R]
            - 0.45 * np.log1p(events.position_R)
        )
        liking_R = np.zeros(len(alone_R))
        for factor in range(NUM_FACTORS):
            liking_R += users.factors_KU[factor][events.user_R] * items.factors_KI[factor][events.item_R]
        appeal_R = np.cos((events.age_R - catalogue.best_age_C[category_R]) / 9.0)
        afford_R = np.abs(items.log_price_I[events.item_R] - 3.0 - catalogue.wealth_N[events.country_R])
        together_R = (
            0.45 * liking_R
            + catalogue.cross_DP[events.device_R, events.placement_R]
            + 0.50 * appeal_R
            - 0.40 * afford_R
            + 0.30 * np.cos(2 * np.pi * since_peak_R / 24)
        )
        combined: F64 = alone_R + self.config.interaction_strength * together_R
        return combined

    def _market(self, hour: int) -> "_Market":
        """The items alive in `hour`; the last few hours are kept, for late events ask for them again."""
        if hour not in self._markets:
            while len(self._markets) > self.config.max_late_hours + 1:
                del self._markets[next(iter(self._markets))]
            self._markets[hour] = _open_market(self.config, self._catalogue, hour)
        return self._markets[hour]


def write_landing(
    config: SyntheticConfig, folder: Path, *, format: FileFormat = "parquet", compress: bool = False
) -> list[Path]:
    """Write one file an hour, such as `hour-2026-01-01T00.parquet`, each whole or not at all.

    Files that are there already are left alone, so that a second call does nothing and a longer stream is continued. Names that
    begin with a dot are not data: the manifest, and files in the making.

    Args:
        compress: gzip, for `csv` and `jsonl`; Parquet compresses itself.

    Returns:
        The files written now, in order of time.

    Raises:
        ConfigError: `folder` holds a stream of other settings, or the format is unknown.
    """
    if format not in get_args(FileFormat):
        raise ConfigError(f"format must be one of {list(get_args(FileFormat))}, got {format!r}")
    if compress and format == "parquet":
        raise ConfigError("compress applies to csv and jsonl; Parquet compresses itself, so leave compress out")
    folder.mkdir(parents=True, exist_ok=True)
    _claim_folder(config, folder, format, compress)
    suffix = f".{format}.gz" if compress else f".{format}"
    paths = {index: folder / f"hour-{config.hour_start(index):%Y-%m-%dT%H}{suffix}" for index in range(config.hours)}
    missing = {index: path for index, path in paths.items() if not path.exists()}
    if missing:
        stream = SyntheticStream(config)
        for index, path in missing.items():
            _write_atomically(path, _encode(stream.hour(index).table, format, compress))
    _log.info("synthetic stream: %d hours written, %d were there, in %s", len(missing), len(paths) - len(missing), folder)
    return list(missing.values())


def oracle_table(stream: SyntheticStream) -> pa.Table:
    """What a model that knew the truth would score, hour by hour: the ceiling for every model.

    Returns:
        One row an hour: `hour` (its start), `rows` and `clicks` (repeats left out, late events in the hour of delivery), `auc`
        (null with one class), `log_loss`, and `mean_probability`.
    """
    rows = []
    for index in range(stream.config.hours):
        hour = stream.hour(index)
        new_R = ~hour.is_repeat_R
        label_R = hour.table["label"].to_numpy()[new_R]
        figures = measure(label_R, hour.true_probability_R[new_R], hour.table["user_id"].to_numpy()[new_R])
        rows.append(
            {
                "hour": hour.start,
                "rows": figures.rows,
                "clicks": figures.clicks,
                "auc": figures.auc,
                "log_loss": figures.log_loss,
                "mean_probability": figures.mean_probability,
            }
        )
    return pa.Table.from_pylist(rows)


# An event's number is its hour, its kind of delivery and its place among the events of that hour and kind.
_EVENTS_PER_KIND = 2**24
_EVENTS_PER_HOUR = 2**29


@dataclass(frozen=True, kw_only=True)
class _Users:
    activity_U: F64
    favourite_hour_U: F64
    bias_U: F64
    age_U: I64
    """Years."""
    country_U: I64
    device_U: I64
    """The device that the user has most often."""
    factors_KU: F64

    def activity_at(self, hour_of_day: int) -> F64:
        """`[U]` cumulative activity in that hour of the day."""
        swing_U = 1 + 0.7 * np.cos(2 * np.pi * (hour_of_day - self.favourite_hour_U) / 24)
        return np.cumsum(self.activity_U * swing_U)


@dataclass(frozen=True, kw_only=True)
class _Catalogue:
    """What is common to all hours. D devices, P placements, N countries."""

    author_category_A: I64
    author_bias_A: F64
    author_factors_KA: F64
    category_bias_C: F64
    category_factors_KC: F64
    best_age_C: F64
    peak_hour_C: F64
    tag_weight_G: F64
    tag_factors_KG: F64
    wealth_N: F64
    country_effect_N: F64
    device_effect_D: F64
    placement_effect_P: F64
    cross_DP: F64
    lifetime_I: I64
    """Hours that an item of the slot lives, at least 2."""
    first_age_I: I64
    """Age in hours, at hour 0, of the item in the slot."""


@dataclass(frozen=True, kw_only=True)
class _Market:
    """The items of an hour, or of several one after the other."""

    item_number_I: I64
    """Never used twice: which item of its slot it is, times the number of slots, plus the slot."""
    author_I: I64
    category_I: I64
    tag_IJ: I64
    num_tags_I: I64
    """In [1, J]."""
    log_price_I: F64
    age_hours_I: I64
    popularity_I: F64
    """Cumulative within an hour."""
    log_odds_I: F64
    """Effect of the item, its author, category, tags and age at this hour."""
    factors_KI: F64


@dataclass(frozen=True, kw_only=True)
class _Events:
    number_R: I64
    hour_R: I64
    hour_of_day_R: I64
    user_R: I64
    item_R: I64
    """Index into `items`."""
    items: _Market
    age_R: I64
    country_R: I64
    device_R: I64
    placement_R: I64
    position_R: I64


def _draw_users(config: SyntheticConfig) -> _Users:
    seed, user_U = config.seed, np.arange(config.num_users)
    country_U = _pick(_zipf(NUM_COUNTRIES, 1.0), _uniform(seed, "user country", user_U))
    own_KU = _normals(seed, "user factors", NUM_FACTORS, config.num_users)
    shared_KN = _normals(seed, "country factors", NUM_FACTORS, NUM_COUNTRIES)
    return _Users(
        activity_U=_zipf_weights(config.num_users, config.user_zipf),
        favourite_hour_U=24 * _uniform(seed, "user hour", user_U),
        bias_U=0.35 * _normal(seed, "user bias", user_U),
        age_U=np.clip(np.rint(38 + 14 * _normal(seed, "user age", user_U)), 13, 90).astype(np.int64),
        country_U=country_U,
        device_U=_pick(_zipf(len(DEVICES), 0.8), _uniform(seed, "user device", user_U)),
        factors_KU=0.45 * own_KU + 0.9 * shared_KN[:, country_U],
    )


def _draw_catalogue(config: SyntheticConfig) -> _Catalogue:
    seed = config.seed
    author_A, slot_I = np.arange(config.num_authors), np.arange(config.num_items)
    category_C, tag_G = np.arange(NUM_CATEGORIES), np.arange(NUM_CATEGORIES * TAGS_PER_CATEGORY)
    device_D, placement_P = np.arange(len(DEVICES)), np.arange(len(PLACEMENTS))
    pair_DP = np.arange(len(DEVICES) * len(PLACEMENTS)).reshape(len(DEVICES), len(PLACEMENTS))
    life_I = np.rint(config.item_lifetime_hours * np.exp(0.8 * _normal(seed, "lifetime", slot_I)))
    lifetime_I = np.clip(life_I, 2, 50 * config.item_lifetime_hours).astype(np.int64)
    return _Catalogue(
        author_category_A=_pick(_zipf(NUM_CATEGORIES, 0.5), _uniform(seed, "author category", author_A)),
        author_bias_A=0.40 * _normal(seed, "author bias", author_A),
        author_factors_KA=_normals(seed, "author factors", NUM_FACTORS, config.num_authors),
        category_bias_C=0.35 * _normal(seed, "category bias", category_C),
        category_factors_KC=_normals(seed, "category factors", NUM_FACTORS, NUM_CATEGORIES),
        best_age_C=15 + 50 * _uniform(seed, "best age", category_C),
        peak_hour_C=24 * _uniform(seed, "peak hour", category_C),
        tag_weight_G=0.45 * _normal(seed, "tag weight", tag_G),
        tag_factors_KG=_normals(seed, "tag factors", NUM_FACTORS, len(tag_G)),
        wealth_N=0.8 * _normal(seed, "wealth", np.arange(NUM_COUNTRIES)),
        country_effect_N=0.30 * _normal(seed, "country effect", np.arange(NUM_COUNTRIES)),
        device_effect_D=0.30 * _normal(seed, "device effect", device_D),
        placement_effect_P=0.50 * _normal(seed, "placement effect", placement_P),
        cross_DP=0.35 * _normal(seed, "cross", pair_DP),
        lifetime_I=lifetime_I,
        first_age_I=(_uniform(seed, "first age", slot_I) * lifetime_I).astype(np.int64),
    )


def _open_market(config: SyntheticConfig, catalogue: _Catalogue, hour: int) -> _Market:
    """The items alive in `hour`, one a slot."""
    seed = config.seed
    slot_I = np.arange(config.num_items)
    generation_I, age_I = np.divmod(hour + catalogue.first_age_I, catalogue.lifetime_I)
    item_I = generation_I * config.num_items + slot_I
    author_I = _pick(_zipf(config.num_authors, 0.6), _uniform(seed, "item author", item_I))
    strays_I = _uniform(seed, "item strays", item_I) < 0.2
    stray_I = _pick(_zipf(NUM_CATEGORIES, 0.5), _uniform(seed, "item category", item_I))
    category_I = np.where(strays_I, stray_I, catalogue.author_category_A[author_I])
    tag_IJ, num_tags_I = _draw_tags(seed, item_I, category_I)
    has_IJ = (np.arange(MAX_TAGS) < num_tags_I[:, None]) / np.sqrt(num_tags_I)[:, None]
    log_odds_I = (
        0.30 * _normal(seed, "item bias", item_I)
        + catalogue.author_bias_A[author_I]
        + catalogue.category_bias_C[category_I]
        + (catalogue.tag_weight_G[tag_IJ] * has_IJ).sum(axis=1)
        + 0.50 * np.exp(-age_I / 6.0)
        + config.drift_strength * 0.40 * _swing(config, "item", item_I, hour)
        + config.drift_strength * 0.30 * _swing(config, "category", np.arange(NUM_CATEGORIES), hour)[category_I]
    )
    factors_KI = 0.70 * catalogue.author_factors_KA[:, author_I] + 0.40 * catalogue.category_factors_KC[:, category_I]
    factors_KI += 0.60 * (catalogue.tag_factors_KG[:, tag_IJ] * has_IJ).sum(axis=2)
    fading_I = 0.1 + 0.9 * np.exp(-4.0 * age_I / catalogue.lifetime_I)
    return _Market(
        item_number_I=item_I,
        author_I=author_I,
        category_I=category_I,
        tag_IJ=tag_IJ,
        num_tags_I=num_tags_I,
        log_price_I=3.0 + 0.9 * _normal(seed, "item price", item_I),
        age_hours_I=age_I,
        popularity_I=np.cumsum(_zipf_weights(config.num_items, config.item_zipf) * fading_I),
        log_odds_I=log_odds_I,
        factors_KI=factors_KI,
    )


def _draw_tags(seed: int, item_I: I64, category_I: I64) -> tuple[I64, I64]:
    """`[I, J]` tags, distinct within an item, most of them of its category; and `[I]` how many of them count."""
    drawn_IJ = item_I[:, None] * MAX_TAGS + np.arange(MAX_TAGS)
    other_IJ = (NUM_CATEGORIES * _uniform(seed, "tag category", drawn_IJ)).astype(np.int64)
    home_IJ = np.where(_uniform(seed, "tag at home", drawn_IJ) < 0.7, category_I[:, None], other_IJ)
    first_I = (TAGS_PER_CATEGORY * _uniform(seed, "first tag", item_I)).astype(np.int64)
    within_IJ = (first_I[:, None] + 7 * np.arange(MAX_TAGS)) % TAGS_PER_CATEGORY  # 7 and 20 share no factor: no tag twice
    num_tags_I = 1 + (MAX_TAGS * _uniform(seed, "number of tags", item_I)).astype(np.int64)
    return home_IJ * TAGS_PER_CATEGORY + within_IJ, num_tags_I


def _swing(config: SyntheticConfig, of: str, number_I: I64, hour: int) -> F64:
    """`[I]` the sum of two sinusoids of random phase and period at `hour`: mean 0, variance 1, the same law at every hour."""
    total_I = np.zeros(len(number_I))
    for wave in range(2):
        period_I = 10.0 * 6.0 ** _uniform(config.seed, f"{of} period {wave}", number_I) / config.drift_speed
        phase_I = _uniform(config.seed, f"{of} phase {wave}", number_I)
        total_I += np.cos(2 * np.pi * (hour / period_I + phase_I))
    return total_I


def _join_markets(markets: Sequence[_Market]) -> _Market:
    first, *others = markets
    if not others:
        return first
    joined = {
        name: np.concatenate([getattr(market, name) for market in markets], axis=-1 if name.endswith("_KI") else 0)
        for name in _Market.__dataclass_fields__
    }
    return _Market(**joined)


def _deliveries(config: SyntheticConfig, index: int) -> tuple[I64, Bools]:
    """`[R]` numbers of the events in the file of hour `index` in order of arrival, and whether each was delivered before."""
    numbers, repeats = [], []
    for kind, (_, delays) in enumerate(_delivery_kinds(config)):
        for copy, delay in enumerate(delays):
            if delay <= index:
                number = _numbers_of_kind(config, index - delay, kind)
                numbers.append(number)
                repeats.append(np.full(len(number), copy > 0))
    number_R, is_repeat_R = np.concatenate(numbers), np.concatenate(repeats)
    arrival_R = 3600 * _uniform(config.seed, "second", number_R)
    arrival_R[is_repeat_R] += 300
    order = np.argsort(arrival_R.astype(np.uint16), kind="stable")
    return number_R[order], is_repeat_R[order]


def _delivery_kinds(config: SyntheticConfig) -> list[tuple[float, tuple[int, ...]]]:
    """For each kind of event its share, and after how many hours it is delivered, once or twice."""
    late = 0.5 ** np.arange(config.max_late_hours)
    late = config.late_share * late / late.sum()
    twice = config.duplicate_share / 2
    kinds: list[tuple[float, tuple[int, ...]]] = [(1.0 - config.late_share - 2 * twice, (0,)), (twice, (0, 0)), (twice, (0, 1))]
    return kinds + [(float(share), (delay,)) for delay, share in enumerate(late, start=1)]


def _numbers_of_kind(config: SyntheticConfig, hour: int, kind: int) -> I64:
    shares = np.array([share for share, _ in _delivery_kinds(config)])
    last = np.rint(np.cumsum(shares) * config.events_in_hour(hour)).astype(np.int64)
    size = int(np.diff(last, prepend=0)[kind])
    return _first_number(hour) + kind * _EVENTS_PER_KIND + np.arange(size)


def _first_number(hour: int) -> int:
    return hour * _EVENTS_PER_HOUR


def _day_profile(traffic_ratio: float) -> F64:
    """`[24]` traffic of each hour of the day over the mean: quietest at QUIET_HOUR, busiest at PEAK_HOUR."""
    hour = (np.arange(24) - QUIET_HOUR) % 24
    rise = (PEAK_HOUR - QUIET_HOUR) % 24
    angle = np.where(hour <= rise, np.pi * hour / rise, np.pi * (1 + (hour - rise) / (24 - rise)))
    profile = np.exp(-0.5 * np.log(traffic_ratio) * np.cos(angle))
    normalised: F64 = profile / profile.mean()
    return normalised


def _as_table(config: SyntheticConfig, events: _Events, label_R: Bools) -> pa.Table:
    """The columns of the data set `synthetic`, in the order of its declaration."""
    items, item_R = events.items, events.item_R
    second_R = (3600 * _uniform(config.seed, "second", events.number_R)).astype(np.int64)
    microsecond_R = (int(config.hour_start(0).timestamp()) + 3600 * events.hour_R + second_R) * 1_000_000
    missing = {name: _uniform(config.seed, f"no {name}", events.number_R) < config.missing_share for name in NULLABLE_COLUMNS}
    columns = {
        "event_time": pa.array(microsecond_R).cast(pa.timestamp("us", tz="UTC")),
        "label": pa.array(label_R.astype(np.int8)),
        "user_id": pa.array(100_000 + events.user_R),
        "item_id": _numbered("item", items.item_number_I[item_R]),
        "category": _named(_numbered_names("category", NUM_CATEGORIES), items.category_I[item_R]),
        "author_id": _named(_numbered_names("author", config.num_authors), items.author_I[item_R], missing["author_id"]),
        "device": _named(DEVICES, events.device_R),
        "country": _named(_numbered_names("country", NUM_COUNTRIES), events.country_R, missing["country"]),
        "placement": _named(PLACEMENTS, events.placement_R),
        "tags": _tag_lists(items, item_R, missing["tags"]),
        "item_price": pa.array(np.rint(100 * np.exp(items.log_price_I))[item_R] / 100, mask=missing["item_price"]),
        "item_age_hours": pa.array(items.age_hours_I[item_R]),
        "user_age": pa.array(events.age_R, mask=missing["user_age"]),
        "position": pa.array(events.position_R),
        "event_id": pa.array(events.number_R),
    }
    return pa.table(columns)


def _numbered(prefix: str, number_R: I64) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(number_R).cast(pa.string()), "-")


def _numbered_names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


def _named(names: Sequence[str], index_R: I64, missing_R: Bools | None = None) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(index_R, mask=missing_R))


def _tag_lists(items: _Market, item_R: I64, missing_R: Bools) -> pa.Array:
    length_R = np.where(missing_R, 0, items.num_tags_I[item_R])
    offsets = np.concatenate([[0], np.cumsum(length_R)]).astype(np.int32)
    tag_RJ = items.tag_IJ[item_R]
    tags = _named(_numbered_names("tag", NUM_CATEGORIES * TAGS_PER_CATEGORY), tag_RJ[np.arange(MAX_TAGS) < length_R[:, None]])
    return pa.ListArray.from_arrays(pa.array(offsets), tags, mask=pa.array(missing_R))


def _uniform(seed: int, purpose: str, number: I64) -> F64:
    """A number in (0, 1) for each of `number` (any shape): the splitmix64 word at that place of the purpose's own sequence."""
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    state = number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(int.from_bytes(digest, "little"))
    return ((mix64(state) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _normal(seed: int, purpose: str, number: I64) -> F64:
    drawn: F64 = ndtri(_uniform(seed, purpose, number))
    return drawn


def _normals(seed: int, purpose: str, num_rows: int, num_columns: int) -> F64:
    return _normal(seed, purpose, np.arange(num_rows * num_columns).reshape(num_rows, num_columns))


def _zipf(count: int, exponent: float) -> F64:
    """`[count]` cumulative weights of ranks 1 to count, for `_pick`."""
    return np.cumsum(_zipf_weights(count, exponent))


def _zipf_weights(count: int, exponent: float) -> F64:
    weights: F64 = np.arange(1.0, count + 1.0) ** -exponent
    return weights


def _pick(cumulative: F64, uniform_R: F64) -> I64:
    """`[R]` places drawn by the weights whose cumulative sum is given."""
    places = np.searchsorted(cumulative, uniform_R * cumulative[-1], side="right")
    within: I64 = np.minimum(places, len(cumulative) - 1)
    return within


def _check_bounds(name: str, value: Any, low: float, high: float) -> None:
    whole = isinstance(low, int)
    wanted: type[int] | tuple[type[int], type[float]] = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} must be {kind} from {low} to {high}, got {value!r}")


def _claim_folder(config: SyntheticConfig, folder: Path, format: FileFormat, compress: bool) -> None:
    """Leave the settings in `folder`, or find there the same ones (but for `hours`)."""
    settings = {**asdict(config), "start": config.hour_start(0).isoformat(), "format": format, "compress": compress}
    del settings["hours"]
    path = folder / MANIFEST_NAME
    if not path.exists():
        _write_atomically(path, json.dumps(settings, indent=2).encode())
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not readable as JSON ({error}); empty the folder or use another") from error
    changed = [f"{name} {found.get(name)!r}, not {value!r}" for name, value in settings.items() if found.get(name) != value]
    if changed:
        raise ConfigError(f"{folder} holds a stream with {'; '.join(changed)}; use another folder or the same settings")


def _encode(table: pa.Table, format: FileFormat, compress: bool) -> bytes:
    match format:
        case "parquet":
            sink = pa.BufferOutputStream()
            pa.parquet.write_table(table, sink)
            return bytes(sink.getvalue().to_pybytes())
        case "csv":
            sink = pa.BufferOutputStream()
            flat = _with_iso_times(table)
            joined = pc.binary_join(flat["tags"], "|")
            pa.csv.write_csv(flat.set_column(flat.column_names.index("tags"), "tags", joined), sink)
            text = bytes(sink.getvalue().to_pybytes())
        case "jsonl":
            text = _with_iso_times(table).to_pandas().to_json(orient="records", lines=True).encode()
    return gzip.compress(text, compresslevel=6, mtime=0) if compress else text


def _with_iso_times(table: pa.Table) -> pa.Table:
    times = pc.strftime(table["event_time"].cast(pa.timestamp("s", tz="UTC")), format="%Y-%m-%dT%H:%M:%SZ")
    return table.set_column(table.column_names.index("event_time"), "event_time", times)


def _write_atomically(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name.lstrip('.')}.tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)
