"""The synthetic stream keeps its promises: reproducible, of the declared law, and true to its own probabilities."""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from sklearn.metrics import log_loss, roc_auc_score

from data_schemas.dataset import load_spec
from data_schemas.errors import ConfigError
from pipeline.data.synthetic import (
    NULLABLE_COLUMNS,
    PEAK_HOUR,
    QUIET_HOUR,
    SyntheticConfig,
    SyntheticHour,
    SyntheticStream,
    oracle_table,
    write_landing,
)

SMALL = SyntheticConfig(hours=30, rows_per_hour=400, num_users=300, num_items=60, num_authors=20)


@pytest.fixture(scope="module")
def day() -> list[SyntheticHour]:
    """A day of the default law."""
    stream = SyntheticStream(SyntheticConfig())
    return [stream.hour(index) for index in range(24)]


def column(hours: list[SyntheticHour], name: str) -> Any:
    return pa.chunked_array([hour.table[name].combine_chunks() for hour in hours])


def test_an_hour_is_the_same_alone_and_after_others() -> None:
    alone = SyntheticStream(SMALL).hour(7)
    stream = SyntheticStream(SMALL)
    later = [stream.hour(index) for index in (20, 0, 6, 7)][-1]
    assert alone.table.equals(later.table)
    np.testing.assert_array_equal(alone.true_probability_R, later.true_probability_R)
    np.testing.assert_array_equal(alone.is_late_R, later.is_late_R)


def test_a_longer_stream_begins_with_the_shorter_one() -> None:
    longer = SyntheticStream(SyntheticConfig(hours=500, rows_per_hour=400, num_users=300, num_items=60, num_authors=20))
    assert longer.hour(29).table.equals(SyntheticStream(SMALL).hour(29).table)


def test_another_seed_is_another_stream() -> None:
    other = SyntheticConfig(seed=1, hours=30, rows_per_hour=400, num_users=300, num_items=60, num_authors=20)
    assert not SyntheticStream(other).hour(7).table.equals(SyntheticStream(SMALL).hour(7).table)


def test_the_law_is_frozen() -> None:
    """Figures measured on the stream are compared over months: a change of this digest makes them worthless."""
    table = SyntheticStream(SyntheticConfig()).hour(7).table
    digest = hashlib.sha256(json.dumps(table.drop_columns(["event_time"]).to_pylist()).encode()).hexdigest()[:16]
    assert digest == "ffba2106427ab498"


def test_columns_are_those_of_the_spec(day: list[SyntheticHour]) -> None:
    spec, schema = load_spec("synthetic"), day[0].table.schema
    assert set(schema.names) == set(spec.source_columns())
    assert schema.field(spec.time.column).type == pa.timestamp("us", tz="UTC")
    for feature in spec.logged_categorical():
        found = schema.field(feature.source).type
        single = found.value_type if feature.many else found
        assert feature.many == pa.types.is_list(found)
        assert pa.types.is_integer(single) if feature.type == "integer" else pa.types.is_string(single)
    for number in spec.numeric:
        values = pc.drop_null(column(day, number.source)).to_numpy()
        assert np.issubdtype(values.dtype, np.number)
        assert number.lower <= values.min() <= values.max() <= number.upper


def test_ids_fit_the_declared_capacities(day: list[SyntheticHour]) -> None:
    for feature in load_spec("synthetic").logged_categorical():
        ids = column(day, feature.source)
        assert len((pc.list_flatten(ids) if feature.many else ids).unique()) <= feature.capacity


def test_tags_of_a_row_are_distinct_and_never_none_unless_null(day: list[SyntheticHour]) -> None:
    for tags in column(day[:6], "tags").to_pylist():
        assert tags is None or 1 <= len(tags) == len(set(tags)) <= 4


@pytest.mark.parametrize("base_ctr", [0.02, 0.15, 0.5])
def test_base_ctr_is_the_mean_probability(base_ctr: float) -> None:
    stream = SyntheticStream(SyntheticConfig(base_ctr=base_ctr, hours=48, rows_per_hour=1000, num_items=500))
    chances = np.concatenate([stream.hour(index).true_probability_R for index in range(48)])
    assert chances.mean() == pytest.approx(base_ctr, rel=0.05)


def test_labels_agree_with_their_probabilities_in_every_decile(day: list[SyntheticHour]) -> None:
    new = [~hour.is_repeat_R for hour in day]
    chances = np.concatenate([hour.true_probability_R[keep] for hour, keep in zip(day, new, strict=True)]).astype(float)
    labels = np.concatenate([hour.table["label"].to_numpy()[keep] for hour, keep in zip(day, new, strict=True)])
    squares = 0.0
    for rows in np.array_split(np.argsort(chances), 10):
        variance = (chances[rows] * (1 - chances[rows])).sum()
        squares += (labels[rows].sum() - chances[rows].sum()) ** 2 / variance
    assert squares < chi2.ppf(0.999, 10)


def test_evening_has_seventeen_times_the_rows_of_the_night(day: list[SyntheticHour]) -> None:
    happened = np.zeros(24, dtype=int)
    for hour in day:
        hours = pc.hour(hour.table["event_time"]).to_numpy()[~hour.is_repeat_R]
        happened += np.bincount(hours, minlength=24)
    assert (happened.argmax(), happened.argmin()) == (PEAK_HOUR, QUIET_HOUR)
    assert happened.max() / happened.min() == pytest.approx(17, rel=0.01)
    assert happened.mean() == pytest.approx(8334, rel=0.01)


@pytest.mark.parametrize("traffic_ratio", [1.0, 5.0])
def test_traffic_ratio_is_settable(traffic_ratio: float) -> None:
    config = SyntheticConfig(traffic_ratio=traffic_ratio, rows_per_hour=100_000)
    counts = [config.events_in_hour(index) for index in range(24)]
    assert max(counts) / min(counts) == pytest.approx(traffic_ratio, rel=0.001)


@pytest.mark.parametrize(("name", "exponent"), [("user_id", 0.6), ("item_id", 0.9)])
def test_popularity_follows_zipfs_law(name: str, exponent: float) -> None:
    config = SyntheticConfig(rows_per_hour=80_000, num_users=2000, num_items=1000, traffic_ratio=1.0)
    counts = np.sort(SyntheticStream(config).hour(0).table[name].value_counts().field("counts").to_numpy())[::-1]
    ranks = np.arange(10, 300)
    slope = np.polyfit(np.log(ranks), np.log(counts[ranks - 1]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.2)


def test_items_are_born_hot_fade_and_die() -> None:
    config = SyntheticConfig(hours=200, rows_per_hour=20_000, num_items=200, traffic_ratio=1.0)
    stream = SyntheticStream(config)
    first, next_day, last = (stream.hour(index).table for index in (10, 34, 190))
    items = [set(table["item_id"].to_pylist()) for table in (first, next_day, last)]
    assert len(items[0] & items[1]) < 0.8 * len(items[0])
    assert len(items[0] & items[2]) < 0.3 * len(items[0])
    by_item = next_day.group_by(["item_id", "item_age_hours"]).aggregate([([], "count_all")])
    ages, counts = by_item["item_age_hours"].to_numpy(), by_item["count_all"].to_numpy()
    assert (ages == 0).any()
    assert counts[ages <= 3].mean() > 2 * counts[ages > 24].mean()


def test_an_item_keeps_its_attributes_while_it_lives() -> None:
    stream = SyntheticStream(SyntheticConfig(hours=30, rows_per_hour=2000, num_items=50, missing_share=0.0))
    names = ["category", "author_id", "item_price"]
    seen = pa.concat_tables([stream.hour(index).table.select(["item_id", *names]) for index in range(30)])
    distinct = seen.group_by("item_id").aggregate([(name, "count_distinct") for name in names])
    for name in names:
        assert pc.max(distinct[f"{name}_count_distinct"]).as_py() == 1


def test_late_events_come_as_often_and_as_late_as_set(day: list[SyntheticHour]) -> None:
    delays: list[int] = []
    for hour in day:
        happened = hour.table["event_time"].cast(pa.int64()).to_numpy() // 3_600_000_000
        delay = int(hour.start.timestamp()) // 3600 - happened
        assert (delay[~hour.is_late_R & ~hour.is_repeat_R] == 0).all()
        delays.extend(delay[hour.is_late_R])
    counts = np.bincount(delays, minlength=4)
    assert counts[0] == 0
    assert counts[1] > counts[2] > counts[3] > 0
    assert counts.sum() / 200_016 == pytest.approx(0.02, rel=0.2)


def test_duplicates_repeat_the_whole_event_as_often_as_set(day: list[SyntheticHour]) -> None:
    table = pa.concat_tables([hour.table for hour in day])
    repeat = np.concatenate([hour.is_repeat_R for hour in day])
    assert len(table["event_id"].unique()) == (~repeat).sum()
    assert repeat.mean() == pytest.approx(0.01, rel=0.1)
    ids = table["event_id"].to_numpy()
    twice = table.filter(pa.array(np.isin(ids, ids[repeat]))).to_pylist()
    assert len(twice) == 2 * repeat.sum()
    assert len({json.dumps(row, default=str) for row in twice}) == repeat.sum()


def test_repeats_come_in_the_same_file_and_in_the_next(day: list[SyntheticHour]) -> None:
    within, across = 0, 0
    for hour in day:
        hours = pc.hour(hour.table["event_time"]).to_numpy()[hour.is_repeat_R]
        within += int((hours == hour.start.hour).sum())
        across += int((hours != hour.start.hour).sum())
    assert within == pytest.approx(across, rel=0.1)


@pytest.mark.parametrize("missing_share", [0.0, 0.03, 0.3])
def test_missing_values_are_as_many_as_set(missing_share: float) -> None:
    table = SyntheticStream(SyntheticConfig(missing_share=missing_share, rows_per_hour=10_000, num_items=500)).hour(0).table
    for name in table.column_names:
        share = table[name].null_count / table.num_rows
        expected = missing_share if name in NULLABLE_COLUMNS else 0.0
        assert share == pytest.approx(expected, abs=4 * np.sqrt(expected / table.num_rows))


def test_ctr_of_an_item_drifts_and_stands_still_without_drift() -> None:
    def change(drift_strength: float) -> float:
        config = SyntheticConfig(
            hours=13, rows_per_hour=20_000, num_items=20, item_lifetime_hours=5000, interaction_strength=0.0,
            drift_strength=drift_strength, traffic_ratio=1.0, num_users=50,
        )  # fmt: skip
        stream = SyntheticStream(config)
        means = []
        for index in (0, 12):
            hour = stream.hour(index)
            table = hour.table.append_column("chance", pa.array(hour.true_probability_R)).filter(pc.field("position") == 0)
            means.append(
                dict(zip(*table.group_by("item_id").aggregate([("chance", "mean")]).to_pydict().values(), strict=True))
            )
        return float(np.median([abs(np.log(means[0][item] / means[1][item])) for item in means[0].keys() & means[1].keys()]))

    assert change(1.0) > 3 * change(0.0)


def test_the_oracle_ranks_better_the_stronger_the_interactions() -> None:
    def auc(interaction_strength: float) -> float:
        config = SyntheticConfig(interaction_strength=interaction_strength, hours=1, rows_per_hour=10_000, num_items=500)
        return float(oracle_table(SyntheticStream(config))["auc"][0].as_py())

    assert auc(0.0) + 0.02 < auc(1.0) < auc(2.0) - 0.02


def test_oracle_table_equals_scikit_learn() -> None:
    stream = SyntheticStream(SMALL)
    table = oracle_table(stream)
    assert table.num_rows == 30
    hour = stream.hour(20)
    keep = ~hour.is_repeat_R
    labels, chances = hour.table["label"].to_numpy()[keep], hour.true_probability_R[keep].astype(float)
    found = table.slice(20, 1).to_pylist()[0]
    assert found["hour"] == datetime(2026, 1, 1, 20, tzinfo=UTC)
    assert (found["rows"], found["clicks"]) == (len(labels), labels.sum())
    assert found["auc"] == pytest.approx(roc_auc_score(labels, chances))
    assert found["log_loss"] == pytest.approx(log_loss(labels, chances), rel=1e-6)


def test_truth_is_not_in_the_log(day: list[SyntheticHour]) -> None:
    chances = day[20].true_probability_R
    for name in ("item_price", "item_age_hours", "user_age", "position", "user_id", "event_id"):
        values = day[20].table[name].to_numpy(zero_copy_only=False).astype(float)
        known = ~np.isnan(values)
        assert abs(np.corrcoef(values[known], chances[known])[0, 1]) < 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1), ("hours", 0), ("rows_per_hour", 0), ("rows_per_hour", 2.5), ("traffic_ratio", 0.5), ("base_ctr", 0.0),
        ("base_ctr", float("nan")), ("num_users", 0), ("num_items", True), ("num_authors", -3), ("user_zipf", -0.1),
        ("item_zipf", "1"), ("item_lifetime_hours", 1), ("interaction_strength", -1.0), ("drift_strength", float("inf")),
        ("drift_speed", 0.0), ("late_share", 0.6), ("max_late_hours", 0), ("duplicate_share", -0.1), ("missing_share", 1.1),
        ("start", datetime(2026, 1, 1)), ("start", datetime(2026, 1, 1, 0, 30, tzinfo=UTC)),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must"):
        SyntheticConfig(**{name: value})


def test_an_hour_outside_the_stream_is_refused() -> None:
    with pytest.raises(IndexError, match="hour 30 is outside the stream of 30 hours"):
        SyntheticStream(SMALL).hour(30)


@settings(max_examples=12, deadline=None)
@given(
    rows_per_hour=st.integers(1, 200),
    num_users=st.integers(1, 50),
    num_items=st.integers(1, 50),
    late_share=st.floats(0, 0.5),
    duplicate_share=st.floats(0, 0.5),
    missing_share=st.floats(0, 1),
    max_late_hours=st.integers(1, 24),
)
def test_every_valid_setting_gives_each_event_once_or_twice(**chosen: Any) -> None:
    stream = SyntheticStream(SyntheticConfig(hours=40, num_authors=5, **chosen))
    hours = [stream.hour(index) for index in (0, 1, 2, 3, 30)]
    for hour in hours:
        assert ((hour.true_probability_R > 0) & (hour.true_probability_R < 1)).all()
        assert hour.table.num_rows == len(hour.is_late_R) == len(hour.is_repeat_R)
        assert not (hour.is_late_R & hour.is_repeat_R).any()
    delivered = np.concatenate([hour.table["event_id"].to_numpy() for hour in hours[:4]])
    repeat = np.concatenate([hour.is_repeat_R for hour in hours[:4]])
    assert len(np.unique(delivered)) == (~repeat).sum()


def read_csv(path: Path) -> pa.Table:
    types = {name: pa.string() for name in ("category", "tags")}
    options = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=True)
    return pa.csv.read_csv(path, convert_options=options)


@pytest.mark.parametrize(
    ("options", "suffix", "read"),
    [
        ({"format": "parquet"}, ".parquet", pq.read_table),
        ({"format": "csv"}, ".csv", read_csv),
        ({"format": "csv", "compress": True}, ".csv.gz", read_csv),
        ({"format": "jsonl"}, ".jsonl", pa.json.read_json),
        ({"format": "jsonl", "compress": True}, ".jsonl.gz", None),
    ],
)
def test_files_hold_the_rows_of_their_hour(
    tmp_path: Path, options: Any, suffix: str, read: Callable[[Path], pa.Table] | None
) -> None:
    written = write_landing(SMALL, tmp_path, **options)
    assert [path.name for path in written] == sorted(path.name for path in tmp_path.glob(f"hour-*{suffix}"))
    assert written[20].name == f"hour-2026-01-01T20{suffix}"
    if read is None:
        read = lambda path: pa.json.read_json(pa.input_stream(path, compression="gzip"))  # noqa: E731
    expected, found = SyntheticStream(SMALL).hour(20).table, read(written[20])
    assert found.column_names == expected.column_names
    for name in expected.column_names:
        wanted = expected[name]
        if suffix.startswith(".csv") and name == "tags":
            wanted = pc.binary_join(wanted, "|")
        if suffix.startswith(".jsonl") and name == "event_time":
            wanted = pc.strftime(wanted.cast(pa.timestamp("s", tz="UTC")), format="%Y-%m-%d %H:%M:%S").cast(found[name].type)
        assert found[name].to_pylist() == wanted.to_pylist(), name


def test_writing_again_changes_nothing_and_a_longer_stream_is_continued(tmp_path: Path) -> None:
    shorter = SyntheticConfig(hours=3, rows_per_hour=50, num_users=10, num_items=10)
    assert len(write_landing(shorter, tmp_path)) == 3
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    assert write_landing(shorter, tmp_path) == []
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before
    longer = SyntheticConfig(hours=5, rows_per_hour=50, num_users=10, num_items=10)
    assert [path.name for path in write_landing(longer, tmp_path)] == [
        "hour-2026-01-01T03.parquet",
        "hour-2026-01-01T04.parquet",
    ]
    assert not list(tmp_path.glob(".*.tmp"))


def test_another_stream_is_not_mixed_into_a_folder(tmp_path: Path) -> None:
    write_landing(SyntheticConfig(hours=1, rows_per_hour=50), tmp_path)
    with pytest.raises(ConfigError, match="rows_per_hour 50, not 51"):
        write_landing(SyntheticConfig(hours=1, rows_per_hour=51), tmp_path)
    with pytest.raises(ConfigError, match="format 'parquet', not 'csv'"):
        write_landing(SyntheticConfig(hours=1, rows_per_hour=50), tmp_path, format="csv")


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['parquet', 'csv', 'jsonl'\], got 'xlsx'"):
        write_landing(SMALL, tmp_path, format="xlsx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="compress applies to csv and jsonl"):
        write_landing(SMALL, tmp_path, compress=True)
    assert list(tmp_path.iterdir()) == []
