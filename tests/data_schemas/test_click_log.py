"""Rows that fit the spec, and rows that do not."""

import math
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.click_log import Validated, click_log_schema, validate
from data_schemas.dataset import Categorical, DatasetSpec, LabelColumn, Numeric, TimeColumn
from data_schemas.errors import BrokenFile, SpecError

NOW = datetime(2024, 6, 1, 12, tzinfo=UTC)
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def make_spec(
    *,
    time: TimeColumn | None = None,
    label: LabelColumn | None = None,
    event_key: tuple[str, ...] = ("key",),
    user_type: str = "integer",
    tags_type: str = "string",
) -> DatasetSpec:
    return DatasetSpec.model_validate(
        {
            "name": "shop",
            "time": time or TimeColumn(column="at"),
            "label": label or LabelColumn(column="clicked"),
            "event_key": event_key,
            "categorical": (
                Categorical.model_validate({"name": "user", "type": user_type}),
                Categorical(name="item"),
                Categorical.model_validate({"name": "tags", "type": tags_type, "many": True, "max_length": 3}),
            ),
            "numeric": (Numeric(name="price", lower=0.0, upper=1000.0), Numeric(name="score")),
        }
    )


def one_row(**changed: Any) -> dict[str, list[Any]]:
    row = {
        "key": "k1",
        "at": "2024-05-01T12:00:00Z",
        "clicked": "1",
        "user": "7",
        "item": "a",
        "tags": "x|y",
        "price": "1.5",
        "score": "-2",
    }
    return {name: [value] for name, value in (row | changed).items()}


def check(columns: dict[str, list[Any]] | pa.Table, spec: DatasetSpec | None = None) -> Validated:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    return validate(table, spec or make_spec(), now=NOW, rows=np.arange(1, table.num_rows + 1))


def accepted(**changed: Any) -> dict[str, Any]:
    got = check(one_row(**changed))
    assert got.rejected == ()
    return dict(got.accepted.to_pylist()[0])


def reason(**changed: Any) -> str:
    got = check(one_row(**changed))
    assert got.accepted.num_rows == 0
    return got.rejected[0].reason


def test_a_good_row_is_kept_as_it_is() -> None:
    got = check(one_row())
    assert got.accepted.schema == click_log_schema(make_spec())
    row = got.accepted.to_pylist()[0]
    row.pop("event_key")
    assert row == {
        "event_time": NOON,
        "label": 1,
        "user": 7,
        "item": "a",
        "tags": ["x", "y"],
        "price": 1.5,
        "score": -2.0,
    }


def test_empty_text_is_missing() -> None:
    row = accepted(user="", item="", tags="", price="", score="NaN")
    assert [row[name] for name in ("user", "item", "tags", "price", "score")] == [None, None, [], None, None]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        (" 12 ", 12),
        ("12.0", 12),
        ("+12", 12),
        ("-3", -3),
        ("1e3", 1000),
        ("nan", None),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("0007", 7),
    ],
)
def test_an_integer_is_read_however_it_is_written(text: str, value: int | None) -> None:
    assert accepted(user=text)["user"] == value


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"user": "abc"}, "user: is not an integer, got 'abc'"),
        ({"user": "12.5"}, "user: is not an integer, got '12.5'"),
        ({"user": "1_000"}, "user: is not an integer"),
        ({"user": "0x1f"}, "user: is not an integer"),
        ({"user": "9223372036854775808"}, "user: does not fit into 64 bits"),
        ({"user": "9" * 5000}, "user: does not fit into 64 bits"),
        ({"item": "z" * 1025}, "item: is longer than 1024 bytes"),
        ({"item": b"\xff"}, "item: is not valid UTF-8"),
        ({"tags": "a|b|c|d"}, "tags: has more than 3 ids, got 'a|b|c|d'"),
        ({"tags": b"a|\xff"}, "tags: is not valid UTF-8"),
        ({"price": "cheap"}, "price: is not a number, got 'cheap'"),
        ({"price": "-1"}, "price: is outside [0, 1000], got '-1'"),
        ({"price": "inf"}, "price: is not finite"),
        ({"score": "-Infinity"}, "score: is not finite"),
        ({"score": "1e999"}, "score: is not finite"),
        ({"score": "1e300"}, "score: does not fit into a 32-bit float"),
        ({"clicked": ""}, "clicked: is missing"),
        ({"clicked": "2"}, "clicked: is neither 0 nor 1, got '2'"),
        ({"clicked": "yes"}, "clicked: is not a number, got 'yes'"),
        ({"at": ""}, "at: is missing"),
        ({"at": "yesterday"}, "at: is no time of the format 'iso', got 'yesterday'"),
        ({"at": "2024-13-01T00:00:00"}, "at: is no time of the format 'iso'"),
        ({"at": "2024-06-01T13:00:01Z"}, "at: is more than 60 minutes in the future"),
        ({"at": "1969-12-31T23:00:00Z"}, "at: is before 1970"),
        ({"key": ""}, "key: is missing"),
        ({"key": b"\xfe"}, "key: is no text"),
    ],
)
def test_a_bad_value_rejects_its_row_and_is_named(changed: dict[str, Any], words: str) -> None:
    assert reason(**changed).startswith(words)


def test_a_row_has_the_reason_of_its_first_bad_column_and_its_number_in_the_file() -> None:
    columns = {name: values * 3 for name, values in one_row().items()}
    columns |= {"user": ["1", "x", "y"], "price": ["1", "-5", "1"], "key": ["a", "b", "c"]}
    got = validate(pa.table(columns), make_spec(), now=NOW, rows=np.array([10, 12, 15]))
    assert [row.row for row in got.rejected] == [12, 15]
    assert [row.kind for row in got.rejected] == ["user: is not an integer"] * 2
    assert '"price":"-5"' in got.rejected[0].raw
    assert got.accepted.num_rows == 1


def test_a_long_value_is_shortened_in_the_reason_and_the_raw_row() -> None:
    row = check(one_row(user="7" * 10_000)).rejected[0]
    assert len(row.reason) < 200
    assert len(row.raw.encode()) <= 4096


@pytest.mark.parametrize(
    ("text", "expected"), [("true", 1), ("False", 0), ("TRUE", 1), ("0", 0), ("1.0", 1), (" 1", 1), ("0e0", 0)]
)
def test_labels_are_zero_or_one(text: str, expected: int) -> None:
    assert accepted(clicked=text)["label"] == expected


def test_ratings_become_clicks_from_the_threshold_on() -> None:
    spec = make_spec(label=LabelColumn(column="clicked", positive_from=4.0))
    columns = {name: values * 4 for name, values in one_row().items()} | {"clicked": ["3.5", "4", "5", "0.5"]}
    assert check(columns, spec).accepted.column("label").to_pylist() == [0, 1, 1, 0]


def test_a_log_of_clicks_only_has_no_label() -> None:
    spec = make_spec().model_copy(update={"label": None})
    columns = one_row()
    del columns["clicked"]
    assert "label" not in check(columns, spec).accepted.column_names


@pytest.mark.parametrize(
    ("text", "zone", "expected"),
    [
        ("2024-05-01T12:00:00Z", "Asia/Seoul", NOON),
        ("2024-05-01 12:00:00+00:00", "Asia/Seoul", NOON),
        ("2024-05-01T21:00:00+0900", "UTC", NOON),
        ("2024-05-01T21:00", "Asia/Seoul", NOON),
        ("2024-05-01 12", "UTC", NOON),
        ("2024-05-01", "UTC", NOON.replace(hour=0)),
        ("2024-05-01 12:00:00.123456789", "UTC", NOON.replace(microsecond=123456)),
        ("2024-05-01T14:00:00", "Europe/Berlin", NOON),
    ],
)
def test_iso_times_with_a_zone_keep_it_and_others_get_the_declared_one(text: str, zone: str, expected: datetime) -> None:
    got = check(one_row(at=text), make_spec(time=TimeColumn(column="at", zone=zone)))
    assert got.accepted.column("event_time").to_pylist() == [expected]


@pytest.mark.parametrize("text", ["2024-03-31T02:30:00", "2023-10-29T02:30:00"])
def test_local_times_that_clocks_skip_or_repeat_are_rejected(text: str) -> None:
    spec = make_spec(time=TimeColumn(column="at", zone="Europe/Berlin"))
    assert "clocks change" in check(one_row(at=text), spec).rejected[0].reason
    naive = pa.table(one_row()).set_column(1, "at", pa.array([datetime.fromisoformat(text)], pa.timestamp("ms")))
    assert "clocks change" in check(naive, spec).rejected[0].reason


def test_mixed_times_in_one_column_are_judged_row_by_row() -> None:
    times = ["2024-05-01T12:00:00Z", "2024-05-01T12:00:00", "nonsense", "2024-05-01 13:00:00.5+01:00"]
    columns = {name: values * 4 for name, values in one_row().items()} | {"at": times}
    got = check(columns)
    assert [row.row for row in got.rejected] == [3]
    assert got.accepted.column("event_time").to_pylist() == [NOON, NOON, NOON.replace(microsecond=500_000)]


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("unix_seconds", "1714564800"),
        ("unix_seconds", 1714564800),
        ("unix_seconds", 1714564800.0),
        ("unix_milliseconds", "1714564800000"),
        ("unix_milliseconds", 1714564800000),
        ("%y%m%d%H", "24050112"),
        ("%y%m%d%H", 24050112),
        ("%d/%m/%Y %H:%M %z", "01/05/2024 14:00 +0200"),
    ],
)
def test_times_of_other_formats(form: str, value: Any) -> None:
    got = check(one_row(at=value), make_spec(time=TimeColumn(column="at", format=form)))
    assert got.accepted.column("event_time").to_pylist() == [NOON]


@pytest.mark.parametrize("value", ["soon", "1e30", "inf", "-5", ""])
def test_unix_times_out_of_range_are_rejected(value: str) -> None:
    spec = make_spec(time=TimeColumn(column="at", format="unix_seconds"))
    assert check(one_row(at=value), spec).accepted.num_rows == 0


def test_a_wrong_time_pattern_is_an_error_of_the_spec() -> None:
    with pytest.raises(SpecError, match="%Q"):
        check(one_row(), make_spec(time=TimeColumn(column="at", format="%Q")))


def test_rows_without_a_clock_are_spread_over_hours_in_order() -> None:
    time = TimeColumn(format="row_order", start="2024-05-01T12:00:00Z", rows_per_hour=2)
    columns = {name: values * 5 for name, values in one_row().items() if name != "at"}
    got = validate(pa.table(columns), make_spec(time=time), now=NOW, rows=np.arange(1, 6), rows_before=2)
    assert [t.hour * 60 + t.minute for t in got.accepted.column("event_time").to_pylist()] == [780, 810, 840, 870, 900]


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("user", pa.array([7], pa.int32()), 7),
        ("user", pa.array([7.0]), 7),
        ("user", pa.array([math.nan]), None),
        ("user", pa.array([7], pa.uint64()), 7),
        ("user", pa.array(["7"]).dictionary_encode(), 7),
        ("item", pa.array([7]), "7"),
        ("item", pa.array(["a"]).dictionary_encode(), "a"),
        ("item", pa.array([None], pa.null()), None),
        ("tags", pa.array([["x", None, ""]]), ["x"]),
        ("tags", pa.array([["x"]], pa.large_list(pa.string())), ["x"]),
        ("tags", pa.array([[1, 2]]), ["1", "2"]),
        ("tags", pa.array([None], pa.list_(pa.string())), []),
        ("price", pa.array([2], pa.int8()), 2.0),
        ("price", pa.array([None], pa.float32()), None),
        ("clicked", pa.array([True]), 1),
        ("at", pa.array([datetime(2024, 5, 1, 12)], pa.timestamp("ns")), NOON),
        ("at", pa.array([NOON], pa.timestamp("s", tz="Asia/Seoul")), NOON),
        ("at", pa.array([date(2024, 5, 1)]), NOON.replace(hour=0)),
    ],
)
def test_typed_columns_are_taken_as_they_are(column: str, values: pa.Array, expected: Any) -> None:
    table = pa.table(one_row())
    got = check(table.set_column(table.column_names.index(column), column, values))
    assert got.rejected == ()
    stored = {"at": "event_time", "clicked": "label"}.get(column, column)
    assert got.accepted.column(stored).to_pylist() == [expected]


def test_sliced_lists_keep_their_rows() -> None:
    lists = pa.array([["no"], ["a", "b"], None, ["c"], ["no"]])[1:4]
    table = pa.table({name: values * 3 for name, values in one_row().items()})
    got = check(table.set_column(table.column_names.index("tags"), "tags", lists))
    assert got.accepted.column("tags").to_pylist() == [["a", "b"], [], ["c"]]


def test_integers_beyond_64_bits_in_a_typed_column_are_rejected() -> None:
    table = pa.table(one_row())
    got = check(table.set_column(3, "user", pa.array([2**63], pa.uint64())))
    assert "64 bits" in got.rejected[0].reason


def test_a_column_of_an_impossible_type_breaks_the_file() -> None:
    table = pa.table(one_row()).set_column(4, "item", pa.array([{"a": 1}]))
    with pytest.raises(BrokenFile, match=r"'item' has type struct"):
        check(table)


def test_missing_columns_break_the_file_and_are_listed_with_what_was_found() -> None:
    columns = one_row()
    del columns["user"], columns["price"]
    with pytest.raises(BrokenFile, match=r"\['user', 'price'\].*'clicked'"):
        check(columns)


def key(spec: DatasetSpec, **changed: Any) -> int:
    return int(check(one_row(**changed), spec).accepted.column("event_key")[0].as_py())


@pytest.mark.parametrize(
    ("column", "same"),
    [
        ("key", ["12", 12]),
        ("user", ["7", "7.0", 7, 7.0]),
        ("item", ["5", 5]),
        ("tags", ["x|y", "x||y", ["x", "y"]]),
        ("price", ["1.50", 1.5]),
        ("at", ["2024-05-01T12:00:00Z", "2024-05-01T14:00:00+02:00", NOON]),
        ("clicked", ["1", 1, True]),
    ],
)
def test_an_event_has_one_key_in_every_format(column: str, same: list[Any]) -> None:
    spec = make_spec(event_key=(column,))
    assert len({key(spec, **{column: value}) for value in same}) == 1


def test_the_whole_row_as_key_heeds_every_column() -> None:
    spec = make_spec(event_key=("*",))
    other = {"at": "2024-05-01T12:00:01Z", "clicked": "0", "user": "8", "item": "b", "price": "2", "score": "0"}
    lists = {"tags": "y|x"}
    keys = {key(spec), *(key(spec, **{name: value}) for name, value in (other | lists).items())}
    assert len(keys) == 8
    assert key(spec, key="another") == key(spec)


def test_swapped_key_columns_are_other_events() -> None:
    spec = make_spec(event_key=("user", "item"), user_type="string")
    assert key(spec, user="a", item="b") != key(spec, user="b", item="a")
    assert key(spec, user="", item="b") != key(spec, user="b", item="")


CELLS = st.one_of(
    st.none(),
    st.sampled_from([b"", b"1", b"0", b"nan", b"inf", b"1e400", b"x|y", b"2024-05-01", b"true", b"\xff", b" 1.0 ", b"-"]),
    st.binary(max_size=12),
    st.text(max_size=12).map(str.encode),
)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), rows=st.integers(0, 6), form=st.sampled_from(["iso", "unix_seconds", "%Y%m%d"]))
def test_any_bytes_in_any_column_are_accepted_or_rejected_and_each_row_alone(data: st.DataObject, rows: int, form: str) -> None:
    spec = make_spec(time=TimeColumn(column="at", format=form, zone="Europe/Berlin"))
    cells = {name: data.draw(st.lists(CELLS, min_size=rows, max_size=rows)) for name in one_row()}
    table = pa.table({name: pa.array(values, pa.binary()) for name, values in cells.items()})
    together = check(table, spec)
    alone = [check(table.slice(row, 1), spec) for row in range(rows)]
    assert together.accepted.num_rows + len(together.rejected) == rows
    assert together.accepted.to_pylist() == [row for one in alone for row in one.accepted.to_pylist()]
    assert [row.reason for row in together.rejected] == [row.reason for one in alone for row in one.rejected]
