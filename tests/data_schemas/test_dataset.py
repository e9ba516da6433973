"""The declaration of a data set."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_schemas.dataset import DATASETS_FOLDER, DatasetSpec, known_datasets, load_spec
from data_schemas.errors import SpecError

GOOD = """
name = "shop"
user = "user_id"
event_key = ["event_id"]
[time]
column = "at"
[label]
column = "clicked"
[[categorical]]
name = "user_id"
type = "integer"
[[categorical]]
name = "tags"
many = true
[[categorical]]
name = "hour"
from_time = "hour_of_day"
[[numeric]]
name = "price"
lower = 0.0
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "shop.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", known_datasets())
def test_every_shipped_spec_loads_under_its_own_name(name: str) -> None:
    assert load_spec(name).name == name


def test_a_spec_is_found_by_path_and_lists_the_columns_that_a_file_needs(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD))
    assert spec.source_columns() == ["at", "clicked", "user_id", "tags", "price", "event_id"]
    assert [feature.name for feature in spec.logged_categorical()] == ["user_id", "tags"]
    assert spec.has_labels


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('column = "at"', 'column = "at"\nzone = "Mars/Base"', ["time.zone", "Mars/Base"]),
        ('column = "at"', 'column = "at"\nzone = "../../etc/passwd"', ["time.zone", "../../etc/passwd"]),
        ('column = "at"', 'column = "at"\nzone = "a\\u0000b"', ["time.zone", "IANA"]),
        ('name = "shop"', 'name = "../shop"', ["name", "../shop"]),
        ('name = "shop"', 'name = "/shop"', ["name", "/shop"]),
        ('name = "shop"', 'name = "shop\\u0000"', ["name", "shop"]),
        ('name = "shop"', 'name = "shop\\n"', ["name", "shop"]),
        ('name = "tags"', 'name = "../tags"', ["categorical.1.name", "../tags"]),
        ('name = "price"', 'name = "/price"', ["numeric.0.name", "/price"]),
        ('[label]\ncolumn = "clicked"', '[clicks]\nfiles = "../clicks-*"', ["clicks.files", "leaves the landing folder"]),
        ('[label]\ncolumn = "clicked"', '[clicks]\nfiles = "/clicks-*"', ["clicks.files", "leaves the landing folder"]),
        ('[label]\ncolumn = "clicked"', '[clicks]\nfiles = "a\\u0000*"', ["clicks.files", "leaves the landing folder"]),
        ('column = "at"', 'column = "at"\nformat = "epoch"', ["time", "epoch", "unix_seconds"]),
        ('column = "at"', 'format = "row_order"', ["time", "rows_per_hour"]),
        ('type = "integer"', 'type = "float"', ["categorical.0.type", "float"]),
        ('type = "integer"', "capacity = 1", ["categorical.0.capacity", "1"]),
        ('type = "integer"', "capacity = 0", ["categorical.0.capacity", "greater than or equal to 2", "got 0"]),
        ('type = "integer"', "embedding_dim = 6", ["categorical.0.embedding_dim"]),
        ('type = "integer"', "embedding_dim = -4", ["categorical.0.embedding_dim", "-4"]),
        (
            'from_time = "hour_of_day"',
            'from_time = "hour_of_day"\nembedding_dim = 0',
            ["categorical.2", "hour", "nothing would"],
        ),
        ('type = "integer"', "colour = 3", ["categorical.0.colour", "unknown"]),
        ('user = "user_id"', 'user = "tags"', ["user", "tags", "user_id"]),
        ('name = "tags"', 'name = "user_id"', ["user_id", "2 times"]),
        ('name = "tags"', 'name = "label"', ["label", "taken"]),
        ('name = "tags"', 'name = "ta gs"', ["categorical.1.name"]),
        ("lower = 0.0", "lower = 2.0\nupper = 1.0", ["numeric.0", "lower", "upper"]),
        ('event_key = ["event_id"]', "event_key = []", ["event_key"]),
        ('event_key = ["event_id"]', 'event_key = ["*", "a"]', ["event_key", "*"]),
        ('from_time = "hour_of_day"', 'from_time = "hour_of_day"\nmany = true', ["categorical.2", "hour"]),
        ('name = "shop"', "", ["name", "missing"]),
        ('name = "shop"', "name = shop", ["TOML"]),
    ],
)
def test_a_wrong_spec_fails_at_load_and_names_the_field(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path, GOOD.replace(old, new)))
    assert [word for word in words if word not in str(caught.value)] == []


def test_features_made_of_the_time_are_not_enough() -> None:
    declared = {"name": "x", "time": {"column": "t"}, "label": {"column": "y"}, "event_key": ("t",)}
    hour = {"name": "hour", "from_time": "hour_of_day", "capacity": 24}
    with pytest.raises(ValidationError, match=r"made of the time only, \['hour'\]; declare one that is logged"):
        DatasetSpec.model_validate(declared | {"categorical": (hour,)})
    DatasetSpec.model_validate(declared | {"categorical": (hour, {"name": "item"})})


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"unknown data set 'brunhc'.*'brunch'"):
        load_spec("brunhc")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nowhere"):
        load_spec(tmp_path / "nowhere.toml")


def test_the_fingerprint_changes_with_features_and_with_nothing_else(tmp_path: Path) -> None:
    before = load_spec(write(tmp_path, GOOD)).fingerprint()
    assert load_spec(write(tmp_path, GOOD.replace('"shop"', '"shop2"'))).fingerprint() == before
    assert load_spec(write(tmp_path, GOOD.replace("lower = 0.0", "lower = 1.0"))).fingerprint() != before
    assert load_spec(write(tmp_path, GOOD.replace('[label]\ncolumn = "clicked"', ""))).fingerprint() != before


REMEMBERING = (
    """crosses = [["user_id", "item"], ["user_id", "item", "city"]]
ages = ["item"]
"""
    + GOOD
    + """
[[categorical]]
name = "item"
[[categorical]]
name = "city"
[[counters]]
over = ["item"]
half_lives_hours = [1, 24.0, inf]
[[counters]]
over = ["user_id", "item"]
of = ["clicks"]
capacity = 1024
[history]
of = ["item", "city"]
length = 20
"""
)


def test_crosses_counters_ages_and_a_history_are_declared(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, REMEMBERING))
    assert spec.crosses == (("user_id", "item"), ("user_id", "item", "city"))
    assert spec.ages == ("item",)
    assert spec.counters[0].half_lives_hours == (1.0, 24.0, float("inf"))
    assert spec.counters[0].of == ("clicks", "impressions", "ctr")
    assert spec.counters[1].capacity == 1024
    assert spec.history is not None
    assert (spec.history.length, spec.history.max_events_per_window) == (20, 1000)
    assert DatasetSpec.model_validate(tomllib.loads(REMEMBERING)) == spec


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('["user_id", "item"],', '["user_id", "colour"],', ["crosses.0", "colour", "'item'", "'city'"]),
        ('["user_id", "item"],', '["user_id", "user_id"],', ["crosses.0", "user_id", "2 times"]),
        ('["user_id", "item"],', '["user_id"],', ["crosses.0"]),
        ('["user_id", "item"],', '["item", "city", "user_id"],', ["crosses", "2 times"]),
        ('["user_id", "item"],', '["user_id", "tags"],', ["crosses.0", "tags", "single-id"]),
        ('["user_id", "item"],', '["user_id", "hour"],', ["crosses.0", "hour", "of the log"]),
        ('ages = ["item"]', 'ages = ["price"]', ["ages", "price"]),
        ('ages = ["item"]', 'ages = ["item", "item"]', ["ages", "item", "2 times"]),
        ('ages = ["item"]', "age_capacity = 0", ["age_capacity", "0"]),
        ('ages = ["item"]', "cross_capacity = 0", ["cross_capacity", "0"]),
        ('over = ["item"]', 'over = ["hour"]', ["counters.0.over", "hour"]),
        ('over = ["item"]', 'over = ["colour"]', ["counters.0.over", "colour", "'item'"]),
        ('over = ["user_id", "item"]', 'over = ["user_id", "colour"]', ["counters.1.over", "colour", "'item'"]),
        ('over = ["item"]', "over = []", ["counters.0.over"]),
        ('over = ["item"]', 'over = ["item", "user_id"]', ["counters", "2 times"]),
        ('over = ["item"]', 'over = ["item", "item"]', ["counters.0", "over", "2 times"]),
        ('of = ["clicks"]', "of = []", ["counters.1.of"]),
        ('of = ["clicks"]', 'of = ["views"]', ["counters.1.of.0", "views", "impressions"]),
        ('of = ["clicks"]', 'of = ["clicks", "clicks"]', ["counters.1", "of", "2 times"]),
        ("capacity = 1024", "capacity = 0", ["counters.1.capacity", "0"]),
        ('of = ["clicks"]', 'of = ["clicks"]\nlinear_only = ["ctr"]', ["counters.1", "linear_only", "ctr", "add them to 'of'"]),
        ('of = ["clicks"]', 'of = ["clicks"]\nlinear_only = ["clicks", "clicks"]', ["counters.1", "linear_only", "2 times"]),
        ("capacity = 1024", "prior_rows = 0.0", ["counters.1.prior_rows"]),
        ("capacity = 1024", "prior_rows = inf", ["counters.1.prior_rows"]),
        ("[1, 24.0, inf]", "[1.0, 0.0]", ["counters.0.half_lives_hours.1"]),
        ("[1, 24.0, inf]", "[nan]", ["counters.0.half_lives_hours.0"]),
        ("[1, 24.0, inf]", "[1, 1.0]", ["counters.0", "half_lives_hours", "2 times"]),
        ('of = ["item", "city"]', 'of = ["item", "colour"]', ["history.of", "colour"]),
        ('of = ["item", "city"]', 'of = ["item", "user_id"]', ["history.of", "user_id", "whose history"]),
        ('of = ["item", "city"]', 'of = ["city", "city"]', ["history", "of", "2 times"]),
        ('name = "city"', 'name = "city"\nembedding_dim = 0', ["history.of", "city", "no embedding to pool"]),
        ("length = 20", "length = 0", ["history.length", "0"]),
        ("length = 20", "length = 1001", ["history.length", "1001"]),
        ("length = 20", "length = 20\nattended_clicks = 21", ["history", "attended_clicks", "21", "raise 'length'"]),
        ("length = 20", "capacity = 0", ["history.capacity", "0"]),
        ("length = 20", "max_events_per_window = 0", ["history.max_events_per_window", "0"]),
        ('user = "user_id"', "", ["history", "set 'user'"]),
        ('[label]\ncolumn = "clicked"', "", ["counters.0.of", "without 'label'", '["clicks"]']),
    ],
)
def test_a_wrong_cross_counter_age_or_history_names_the_field(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in REMEMBERING
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path, REMEMBERING.replace(old, new, 1)))
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_log_of_clicks_only_may_count_clicks(tmp_path: Path) -> None:
    text = REMEMBERING.replace('[label]\ncolumn = "clicked"', "").replace(
        "half_lives_hours", 'of = ["clicks"]\nhalf_lives_hours'
    )
    assert not load_spec(write(tmp_path, text)).has_labels


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (', ["user_id", "item", "city"]', ""),
        ('ages = ["item"]', 'ages = ["city"]'),
        ('ages = ["item"]', 'ages = ["item"]\nage_capacity = 64'),
        ('ages = ["item"]', 'ages = ["item"]\ncross_capacity = 64'),
        ("[1, 24.0, inf]", "[1, 24.0]"),
        ("length = 20", "length = 21"),
    ],
)
def test_the_fingerprint_changes_with_what_is_remembered(tmp_path: Path, old: str, new: str) -> None:
    before = load_spec(write(tmp_path, REMEMBERING)).fingerprint()
    assert old in REMEMBERING
    assert load_spec(write(tmp_path, REMEMBERING.replace(old, new))).fingerprint() != before


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places_in(declared: dict[str, Any]) -> list[tuple[str, ...]]:
    tables = [(name, key) for name, value in declared.items() if isinstance(value, dict) for key in value]
    return [(name,) for name in declared] + tables


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), name=st.sampled_from(known_datasets()))
def test_a_spec_with_any_value_replaced_is_a_spec_or_an_error_of_validation(data: st.DataObject, name: str) -> None:
    declared = tomllib.loads((DATASETS_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    *parents, last = data.draw(st.sampled_from(places_in(declared)))
    level: Any = declared
    for parent in parents:
        level = level[parent]
    level[last] = data.draw(VALUES)
    try:
        spec = DatasetSpec.model_validate(declared)
    except ValueError:
        return
    assert spec.source_columns()


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=200), cut=st.integers(0, len(GOOD)))
def test_any_bytes_in_a_spec_are_a_spec_or_a_spec_error(tmp_path: Path, noise: bytes, cut: int) -> None:
    path = tmp_path / "noise.toml"
    path.write_bytes(GOOD[:cut].encode() + noise + GOOD[cut:].encode())
    try:
        load_spec(path)
    except SpecError:
        return
