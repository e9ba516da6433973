"""A data set, declared by one TOML file.

Enters: a path, or the name of a file in `data_schemas/datasets/`.
Leaves: a frozen `DatasetSpec`; or a `SpecError` that names the field, its value and what is allowed.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_schemas.errors import SpecError

DATASETS_FOLDER = Path(__file__).parent / "datasets"

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]

OWN_COLUMNS = frozenset({"event_time", "label", "event_key", "event_date", "event_hour", "is_click"})
"""Columns that the click log adds itself; a feature may only be called so where it is that very column."""


class _Declared(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")


class TimeColumn(_Declared):
    """When an event happened."""

    column: str = ""
    """Name in the file; empty only where `format` is `row_order`."""
    zone: str = "UTC"
    """IANA zone of times that carry none, such as `Asia/Seoul`; times that a change of clocks skips or repeats are
    rejected."""
    format: str = "iso"
    """`iso`, `unix_seconds`, `unix_milliseconds`, `row_order`, or a strptime pattern such as `%y%m%d%H`."""
    start: str = ""
    """With `row_order`: the ISO time of the first row of the first file."""
    rows_per_hour: Annotated[int, Field(ge=0)] = 0
    """With `row_order`: how many rows make an hour. For logs in order of time that lost their time column."""

    @field_validator("zone")
    @classmethod
    def _zone_exists(cls, zone: str) -> str:
        try:
            ZoneInfo(zone)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(f"{zone!r} is not an IANA time zone; use a name such as 'UTC' or 'Europe/Berlin'") from error
        return zone

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.format == "row_order":
            if not self.start or self.rows_per_hour < 1:
                raise ValueError("format 'row_order' needs 'start' (an ISO time) and 'rows_per_hour' of at least 1")
        elif not self.column:
            raise ValueError("'column' must name the time column of the file")
        if self.format not in ("iso", "unix_seconds", "unix_milliseconds", "row_order") and "%" not in self.format:
            raise ValueError(
                f"unknown format {self.format!r}; use 'iso', 'unix_seconds', 'unix_milliseconds', 'row_order' "
                "or a strptime pattern such as '%Y-%m-%d %H:%M'"
            )
        return self


class LabelColumn(_Declared):
    """What counts as a click."""

    column: str
    """Name in the file."""
    positive_from: float = 1.0
    """A value of at least this is a click, a smaller one is none: 1 for 0/1 labels, 4 for ratings of 1 to 5."""


class Clicks(_Declared):
    """Clicks that are events of their own, joined to their impressions by the event key."""

    attribution_minutes: Annotated[int, Field(ge=1, le=10_080)] = 360
    """A click belongs to the impression with its event key that was shown at most so long before."""
    column: str = ""
    """Column that tells what an event is, where clicks stand among the impressions in the same files."""
    value: str = "click"
    """With `column`: what it says of a click; all other rows are impressions."""
    files: str = ""
    """Pattern of files that hold clicks only, compared from the right: `clicks-*` for names, `clicks/*` for those of a folder.
    They need the time and the columns of the event key, under the same names."""

    @field_validator("files")
    @classmethod
    def _stays_in_the_landing_folder(cls, files: str) -> str:
        if escapes(files):
            raise ValueError(
                f"{files!r} leaves the landing folder; write a pattern of names in it, such as 'clicks-*' or 'clicks/*'"
            )
        return files

    @model_validator(mode="after")
    def _can_be_told(self) -> Self:
        if bool(self.column) == bool(self.files):
            raise ValueError("set either 'column', which tells clicks from impressions, or 'files', the files of clicks")
        return self

    @property
    def attribution_hours(self) -> int:
        """Whole hours that an impression may lie before the hour of its click."""
        return -(-self.attribution_minutes // 60)


class FileDialect(_Declared):
    """How a delimited text file is written."""

    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """Between the values of a row."""
    columns: tuple[str, ...] = ()
    """Names of the columns where the file has no header line."""


class Categorical(_Declared):
    """One id, or a list of ids, looked up in an embedding table of its own, unless `embedding_dim` is 0."""

    name: Name
    """Name in the click log and in requests to the published model."""
    column: str = ""
    """Name in the file, where it differs from `name`."""
    type: Literal["integer", "string"] = "string"
    """`integer`: whole numbers that fit into 64 bits; `string`: any text of up to 1024 bytes."""
    many: bool = False
    """True: each row has a list of ids, whose embeddings are averaged."""
    separator: Annotated[str, Field(min_length=1, max_length=1)] = "|"
    """Between the ids of a list in a text file."""
    max_length: Annotated[int, Field(ge=1, le=1000)] = 100
    """A list longer than this rejects its row."""
    capacity: Annotated[int, Field(ge=2, le=2**40)] = 2**20
    """Rows of the table."""
    ids: Literal["hashed", "admitted"] = "hashed"
    """`hashed`: every id has the row that its hash says, and may share it with others. `admitted`: an id gets a row of its
    own once it was seen `admit_after` times; until then it uses a row that all such ids share. Needs a `capacity` of 4 to
    2^30, of which one row is shared and one is that of a missing id."""
    admit_after: Annotated[int, Field(ge=1, le=1_000_000)] = 2
    """With `ids = "admitted"`: sightings that earn an id its row."""
    evict_after_hours: Annotated[int, Field(ge=1)] | None = None
    """With `ids = "admitted"`: an id that was not seen for so long gives its row back. Without it, and in a full table, the
    least recently seen id gives way to a new one."""
    embedding_dim: Annotated[int, Field(ge=0, le=1024, multiple_of=4)] = 16
    """Length of an id's embedding; a multiple of 4, as the fused kernels need. 0: no embedding, the id has its wide weight
    alone; not with `from_time`, which has none."""
    from_time: Literal["hour_of_day", "hour_of_week"] | None = None
    """Derived from the event time instead of read from a column. One feature at least has to be logged."""

    @property
    def source(self) -> str:
        """Name of the column in the file."""
        return self.column or self.name

    @model_validator(mode="after")
    def _derived_is_single(self) -> Self:
        if self.from_time and (self.many or self.column):
            raise ValueError(f"{self.name!r} is derived from the time: leave out 'many' and 'column'")
        if self.from_time and not self.embedding_dim:
            raise ValueError(
                f"{self.name!r} is derived from the time and has no wide weight, so that nothing would be learned of it with "
                "embedding_dim = 0; leave it out, or give it one of 4 or more"
            )
        return self

    @model_validator(mode="after")
    def _admission_is_asked_for(self) -> Self:
        if self.ids == "admitted":
            if self.from_time:
                raise ValueError(f"{self.name!r} is derived from the time, where every value has its row: leave out 'ids'")
            if not 4 <= self.capacity <= 2**30:
                raise ValueError(f"ids = 'admitted' needs a 'capacity' of 4 to 2^30, {self.name!r} has {self.capacity}")
        elif self.admit_after != 2 or self.evict_after_hours is not None:
            raise ValueError(f"'admit_after' and 'evict_after_hours' of {self.name!r} need ids = 'admitted'")
        return self


class Numeric(_Declared):
    """One number, normalised by its running mean and variance; a missing value has a flag of its own."""

    name: Name
    """Name in the click log and in requests to the published model."""
    column: str = ""
    """Name in the file, where it differs from `name`."""
    lower: float = float("-inf")
    """A value below it rejects its row."""
    upper: float = float("inf")
    """A value above it rejects its row."""
    transform: Literal["none", "log1p"] = "none"
    """`log1p` is sign(x) * log(1 + |x|), for counts and prices."""

    @property
    def source(self) -> str:
        """Name of the column in the file."""
        return self.column or self.name

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if not self.lower < self.upper:
            raise ValueError(f"'lower' must be below 'upper', got {self.lower} and {self.upper}")
        return self


class Counter(_Declared):
    """Decayed clicks, impressions and click rate of an id, or of a pair of ids, as dense columns."""

    over: Annotated[tuple[Name, ...], Field(min_length=1, max_length=2)]
    """Logged single-id features: one, or two for the pair of their ids."""
    of: Annotated[tuple[Literal["clicks", "impressions", "ctr"], ...], Field(min_length=1)] = ("clicks", "impressions", "ctr")
    """Which statistics; a log of clicks only has nothing but `clicks`."""
    half_lives_hours: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=16)] = (
        1.0,
        24.0,
        168.0,
    )
    """After this long an event counts half; `inf` is a plain total."""
    capacity: Annotated[int, Field(ge=2, le=2**30)] = 2**20
    """Most keys that are counted at a time; the least recently seen gives way."""
    prior_rows: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Impressions at the average click rate that every key is given in advance, so that few rows make no extreme `ctr`."""
    linear_only: tuple[Literal["clicks", "impressions", "ctr"], ...] = ()
    """Statistics of `of` that are added to the logit, with one weight a column, and kept from the network: a network that
    sees what new items lack learns from hot ones that what has no past is clicked."""

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for field in ("over", "of", "half_lives_hours", "linear_only"):
            _refuse_repeats(field, getattr(self, field))
        return self

    @model_validator(mode="after")
    def _counts_what_is_linear(self) -> Self:
        if unknown := [name for name in self.linear_only if name not in self.of]:
            raise ValueError(
                f"'linear_only' has {unknown}, but 'of' counts {list(self.of)} only; add them to 'of', or leave them out"
            )
        return self


class History(_Declared):
    """The last clicked rows of each user, as lists of ids."""

    of: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Logged single-id features whose ids are kept; not the user."""
    length: Annotated[int, Field(ge=1, le=1000)] = 50
    """Clicked rows that are kept of a user."""
    capacity: Annotated[int, Field(ge=2, le=2**30)] = 2**18
    """Most users that have a history at a time; the one whose last click is oldest gives way."""
    max_events_per_window: Annotated[int, Field(ge=1)] = 1000
    """Of a user who clicks more often in a window (a crawler), only the last this many are kept; the rest is counted."""
    pool_half_lives_hours: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=4)] = (
        float("inf"),
        6.0,
    )
    """Embeddings of what was clicked are averaged with weights that halve in so many hours, once for each; `inf` is the
    plain mean."""
    attended_clicks: Annotated[int, Field(ge=0, le=200)] = 0
    """Beside the means: a small network weighs so many of the last clicks anew for each candidate (DIN's attention); 0: none.
    Costs time in proportion."""

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for field in ("of", "pool_half_lives_hours"):
            _refuse_repeats(field, getattr(self, field))
        return self

    @model_validator(mode="after")
    def _attends_to_what_is_kept(self) -> Self:
        if self.attended_clicks > self.length:
            raise ValueError(f"'attended_clicks' is {self.attended_clicks}, but 'length' keeps {self.length}; raise 'length'")
        return self


class DatasetSpec(_Declared):
    """Everything tidemark knows about a click log before it reads the first row."""

    name: Name
    """Of the data set; the registered model is called `NAME-MODEL`."""
    description: str = ""
    """For readers."""
    time: TimeColumn
    label: LabelColumn | None = None
    """None: the log holds clicks only, or has them as events of their own."""
    clicks: Clicks | None = None
    """Set where clicks come later than their impressions, as events of their own."""
    user: Name | None = None
    """Name of the feature that identifies the user; left out: no figures by user."""
    item: Name | None = None
    """Name of the feature that identifies the item."""
    item_features: tuple[Name, ...] = ()
    """Features that belong to the item, such as its author or price: a negative that is drawn for a log of clicks only has
    them from its own item, and all others from the click that it stands beside."""
    event_key: Annotated[tuple[str, ...], Field(min_length=1)]
    """Columns of the file that make an event unique, features or not; a second row with the same values is a duplicate
    (but see `repeats`). `*` alone means every column that the spec names."""
    repeats: Literal["drop", "keep"] = "drop"
    """What a second row with the same event key is within one file. `drop`: a duplicate. `keep`: an event of its own, for
    logs without a unique id. The n-th row of an hour with that key in one file is then the same event as the n-th one
    in another file: a file that comes again changes nothing, repeated rows within a file stay."""
    file: FileDialect = FileDialect()
    categorical: Annotated[tuple[Categorical, ...], Field(min_length=1)]
    numeric: tuple[Numeric, ...] = ()
    crosses: tuple[Annotated[tuple[Name, ...], Field(min_length=2, max_length=3)], ...] = ()
    """Pairs or triples of logged single-id features; each combination of ids has a weight of its own."""
    cross_capacity: Annotated[int, Field(ge=2, le=2**40)] = 2**20
    """Weights of each cross. Combinations are hashed into them."""
    counters: tuple[Counter, ...] = ()
    """Statistics of ids up to the window's start."""
    ages: tuple[Name, ...] = ()
    """Logged single-id features whose ids carry the hours since they were first seen."""
    age_capacity: Annotated[int, Field(ge=2, le=2**30)] = 2**20
    """Most ids of each of `ages` whose first hour is known at a time; the least recently seen gives way."""
    history: History | None = None
    """What each user clicked last, up to the window's start."""
    settings: dict[str, Any] = {}
    """Settings of an update that suit this data set, such as `[settings.training] batch_size = 1024`; a settings file, the
    environment and the command line go before them."""

    @field_validator(
        "event_key", "item_features", "categorical", "numeric", "crosses", "counters", "ages", "history", mode="before"
    )
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return _as_tuples(value)

    @model_validator(mode="after")
    def _names_fit_together(self) -> Self:
        names = [*(feature.name for feature in self.categorical), *(feature.name for feature in self.numeric)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"feature {name!r} is declared {names.count(name)} times; give each its own name")
            if name in OWN_COLUMNS:
                raise ValueError(f"feature name {name!r} is taken by the click log; choose another 'name' and set 'column'")
        for role in ("user", "item"):
            feature = getattr(self, role)
            known = [c.name for c in self.categorical if not c.many and not c.from_time]
            if feature is not None and feature not in known:
                raise ValueError(f"{role!r} is {feature!r}, which is no single-id categorical feature; choose one of {known}")
        if "*" in self.event_key and self.event_key != ("*",):
            raise ValueError("event_key '*' (the whole row) stands alone; leave out the other columns")
        return self

    @model_validator(mode="after")
    def _something_is_logged(self) -> Self:
        if all(feature.from_time for feature in self.categorical):
            times = [feature.name for feature in self.categorical]
            raise ValueError(f"'categorical' has features made of the time only, {times}; declare one that is logged as well")
        return self

    @model_validator(mode="after")
    def _clicks_find_their_impressions(self) -> Self:
        if self.clicks is None:
            return self
        if "*" in self.event_key or self.time.column in self.event_key or self.time.format == "row_order":
            raise ValueError(
                f"'clicks' are joined by 'event_key', which is {list(self.event_key)}: name columns that a click shares "
                "with its impression, so not its time, and give events a time of their own"
            )
        if self.label:
            raise ValueError("'clicks' are what the label is made of: leave out 'label', or 'clicks'")
        if self.repeats == "keep":
            raise ValueError("'clicks' need event keys that are unique: leave out repeats = 'keep'")
        return self

    @model_validator(mode="after")
    def _items_have_their_features(self) -> Self:
        logged = [*(feature.name for feature in self.logged_categorical()), *(feature.name for feature in self.numeric)]
        known = [name for name in logged if name not in (self.user, self.item)]
        for name in self.item_features:
            if name not in known:
                raise ValueError(f"'item_features' names {name!r}, which is no logged feature besides user and item: {known}")
        _refuse_repeats("item_features", self.item_features)
        if self.item_features and not self.item:
            raise ValueError("'item_features' belong to an item; set 'item' to the feature that identifies it")
        return self

    @model_validator(mode="after")
    def _memory_fits_the_features(self) -> Self:
        known = [feature.name for feature in self.logged_categorical() if not feature.many]
        for field, names in self._names_by_field():
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"'{field}' names {name!r}, which is no single-id categorical feature of the log; choose from {known}"
                    )
            _refuse_repeats(field, names)
        _refuse_repeats("crosses", [tuple(sorted(cross)) for cross in self.crosses])
        _refuse_repeats("counters", [tuple(sorted(counter.over)) for counter in self.counters])
        self._counts_what_is_logged()
        return self

    def _counts_what_is_logged(self) -> None:
        for place, counter in enumerate(self.counters):
            if not self.has_labels and counter.of != ("clicks",):
                raise ValueError(
                    f"'counters.{place}.of' is {list(counter.of)}, but a log without 'label' holds clicks only; "
                    'set of = ["clicks"]'
                )
        if self.history and not self.user:
            raise ValueError("'history' is kept by user; set 'user' to the feature that identifies the user")
        if self.history and self.user in self.history.of:
            raise ValueError(f"'history.of' names {self.user!r}, the user whose history it is; leave it out")
        if self.history:
            self._pools_embeddings(self.history.of)

    def _pools_embeddings(self, names: Sequence[str]) -> None:
        for feature in self.categorical:
            if feature.name in names and not feature.embedding_dim:
                raise ValueError(
                    f"'history.of' names {feature.name!r}, which has no embedding to pool (embedding_dim = 0); give it one of "
                    "4 or more, or leave it out"
                )

    def _names_by_field(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        yield from ((f"crosses.{place}", cross) for place, cross in enumerate(self.crosses))
        yield from ((f"counters.{place}.over", counter.over) for place, counter in enumerate(self.counters))
        yield "ages", self.ages
        yield "history.of", self.history.of if self.history else ()

    @property
    def has_labels(self) -> bool:
        """False for a log of clicks only."""
        return self.label is not None or self.clicks is not None

    def linear(self) -> "DatasetSpec":
        """The same for a linear model: without embeddings, and so without histories, which are pools of them, and without
        features derived from the time, which have nothing else.

        >>> linear = load_spec("brunch").linear()
        >>> [(feature.name, feature.embedding_dim) for feature in linear.categorical], linear.history
        ([('user_id', 0), ('item_id', 0), ('author_id', 0)], None)
        """
        without = tuple(feature.model_copy(update={"embedding_dim": 0}) for feature in self.logged_categorical())
        return self.model_copy(update={"categorical": without, "history": None})

    def logged_categorical(self) -> Iterator[Categorical]:
        """The categorical features that are stored in the click log (not those derived from the time)."""
        return (feature for feature in self.categorical if feature.from_time is None)

    def source_columns(self) -> list[str]:
        """Columns that a file must have, in the order of the spec."""
        label = [self.label.column] if self.label else []
        time = [self.time.column] if self.time.column else []
        kind = [self.clicks.column] if self.clicks and self.clicks.column else []
        features = [f.source for f in self.logged_categorical()] + [f.source for f in self.numeric]
        keys = [key for key in self.event_key if key != "*"]
        return list(dict.fromkeys([*time, *kind, *label, *features, *keys]))

    def of_clicks(self) -> "DatasetSpec":
        """What a click must have: its time and the columns of the event key, read as those of an impression are."""
        keyed = [feature for feature in self.logged_categorical() if feature.source in self.event_key]
        numbers = [number for number in self.numeric if number.source in self.event_key]
        return self.model_copy(
            update={"label": None, "clicks": None, "categorical": tuple(keyed), "numeric": tuple(numbers), "crosses": ()}
        )

    def fingerprint(self) -> str:
        """16 hex digits that change when the features change, and not with names, descriptions or file dialects."""
        features = [f.model_dump() for f in (*self.categorical, *self.numeric)]
        memory = self.model_dump(include={"crosses", "cross_capacity", "counters", "ages", "age_capacity", "history"})
        text = json.dumps([features, self.user, self.item, self.has_labels, memory], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def escapes(path: str) -> bool:
    r"""True where `path`, taken from a folder, may lie outside of it: absolute, with `..`, another drive or another system.

    >>> [escapes(path) for path in ("clicks/2026", "/etc", "a/../../b", "s3://bucket", "C:x", "a\0b")]
    [False, True, True, True, True, True]
    """
    parts = path.replace("\\", "/").split("/")
    elsewhere = parts[0] == "" or parts[0].startswith("~") or "://" in path or re.match(r"[A-Za-z]:", path)
    return path != "" and (".." in parts or bool(elsewhere) or "\0" in path)


def load_spec(name_or_path: str | Path) -> DatasetSpec:
    """The spec in a TOML file, or the shipped one of that name.

    >>> load_spec("brunch").item
    'item_id'

    Raises:
        SpecError: no such file, not TOML, or a field is wrong; the message names the field.
    """
    path = _find(name_or_path)
    try:
        declared = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SpecError(
            f"cannot read the data set file {path}: {reason}; the shipped ones are in {DATASETS_FOLDER.name}/"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not valid TOML: {error}") from error
    try:
        return DatasetSpec.model_validate(_as_tuples(declared))
    except ValidationError as error:
        raise SpecError(f"{path.name}: " + "; ".join(_explain(problem) for problem in error.errors())) from error


def known_datasets() -> list[str]:
    """Names of the shipped specs."""
    return sorted(path.stem for path in DATASETS_FOLDER.glob("*.toml"))


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml":
        return path
    shipped = DATASETS_FOLDER / f"{name_or_path}.toml"
    if str(name_or_path) not in known_datasets():
        raise SpecError(f"unknown data set {str(name_or_path)!r}; use one of {known_datasets()} or a path that ends in .toml")
    return shipped


def _refuse_repeats(field: str, values: Sequence[object]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"'{field}' has {value!r} {values.count(value)} times; name each once")


def _as_tuples(value: Any) -> Any:
    match value:
        case dict():
            return {key: _as_tuples(inner) for key, inner in value.items()}
        case list():
            return tuple(_as_tuples(inner) for inner in value)
        case _:
            return value


def _explain(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "the file"
    match problem["type"]:
        case "extra_forbidden":
            return f"{field}: unknown setting"
        case "missing":
            return f"{field}: missing"
        case "value_error":
            return f"{field}: {problem['ctx']['error']}"
        case _:
            return f"{field}: {problem['msg']}, got {problem['input']!r}"
