"""A click log as the list of windows that every strategy learns, encoded once.

Enters: the click log that the settings name. Leaves: `RecordedWindow`s in order of time, encoded as an update encodes them:
counters, histories, admitted ids and normalisation know the earlier windows only. What they know does not depend on what a
strategy learns, so all strategies and seeds share one encoding. It is held in memory: 100 bytes to 1 KB a row.

Letters: R rows of a window.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import ConfigError, NothingToLearn
from data_schemas.examples import I64, Examples
from models.id_table import IdTables
from models.memory import Memory
from pipeline.config import UpdateConfig
from pipeline.data.encode import EncodedWindow, encode, look_up_again, num_normalised
from pipeline.data.lake import ClickLog
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.normalise import RunningMoments
from pipeline.data.windows import Cursor, Window, as_time, next_window, read_window


@dataclass(frozen=True, kw_only=True)
class RecordedWindow:
    """One window of the stream."""

    start: int
    """Hours since 1970-01-01T00Z."""
    end: int
    examples: Examples
    """Which rows a strategy leaves out depends on them."""
    predicted: EncodedWindow
    """As its rows are predicted, before its own ids are admitted."""
    learned: EncodedWindow
    """As its rows are learned; the same object where no feature admits ids."""
    fresh_rows: Mapping[str, I64]
    """By feature with admitted ids: table rows that get a new owner before the window is learned."""

    @property
    def num_rows(self) -> int:
        """R."""
        return self.predicted.num_rows


def recorded_stream(config: UpdateConfig, spec: DatasetSpec, *, hours: int | None = None) -> list[RecordedWindow]:
    """The windows of the click log from its first hour on; `hours` ends the stream that long after its start.

    Raises:
        ConfigError: a log of clicks only: settings draw its negatives, so that strategies would be judged on other rows.
        NothingToLearn: the click log is empty.
    """
    if not spec.has_labels:
        raise ConfigError(
            f"the data set {spec.name!r} is a log of clicks only, whose negatives are drawn; strategies are compared on a log "
            "that holds what was shown and not clicked"
        )
    log = ClickLog.open_or_create(config.log_path, spec)
    windows = list(_encoded(log, config, spec, hours))
    if not windows:
        raise NothingToLearn(
            f"the click log {config.log_path} has no window of {config.window.hours} h to compare on; put click logs into "
            f"landing = {config.landing!r}, or name another state_dir"
        )
    return windows


def _encoded(log: ClickLog, config: UpdateConfig, spec: DatasetSpec, hours: int | None) -> Iterator[RecordedWindow]:
    memory, ids, moments = Memory(spec), IdTables(spec), RunningMoments.nothing_seen(num_normalised(spec))
    for number, window in enumerate(_windows(log, config, hours)):
        examples = to_examples(read_window(log, window, columns_to_read(spec)), spec)
        predicted = encode(examples, spec, memory, moments if number else None, hour=window.start, ids=ids)
        admissions = ids.admit(examples, window.start)
        yield RecordedWindow(
            start=window.start,
            end=window.end,
            examples=examples,
            predicted=predicted,
            learned=look_up_again(predicted, examples, spec, ids) if admissions else predicted,
            fresh_rows={name: admission.fresh_rows for name, admission in admissions.items()},
        )
        moments = moments.after(predicted.raw_dense_NR)
        memory.add(examples, window.start)


def _windows(log: ClickLog, config: UpdateConfig, hours: int | None) -> Iterator[Window]:
    """All windows that are closed, as an update would take them one after the other."""
    cursor, first = Cursor(), None
    now = datetime.now(UTC)
    while window := next_window(log, cursor, config.window, now):
        first = window.start if first is None else first
        if hours is not None and as_time(window.end) > as_time(first) + timedelta(hours=hours):
            return
        yield window
        cursor = window.cursor_after()
