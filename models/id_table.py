"""Ids that live: a row of an embedding table is earned by being seen, and given back when it is no longer used.

Enters: hashed ids of a window. Leaves: their table rows, never out of range; and which rows have a new owner, so that the
caller starts those afresh.

A window is *predicted* with the rows known before it. Then, before it is learned, `admit` counts its ids: those seen
`admit_after` times get a row of their own, and are learned there at once. All others train the shared row.

The sightings of ids that wait are counted in a second index as large as the first, where the least recently seen gives way:
memory is bounded whatever arrives, also by a burst of nothing but new ids. The count of a waiting id is exact but for two
things: an id that had to give way, or was not seen for `evict_after_hours`, starts from zero; and a row that an update did
not reach is counted again by the update that learns it.

Ids lie in buckets chosen by hash, so that a range of buckets could be a process's partition. For now each of several
processes holds the whole table of ids: all of them see all rows of a window, so the tables stay the same on each.

Letters: V ids, U distinct ids of a window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import Categorical, DatasetSpec
from data_schemas.errors import SpecMismatch
from data_schemas.examples import I64, U64, Examples
from data_schemas.hashing import MISSING
from models.distinct import run_starts
from models.ids import table_rows
from models.key_index import KeyIndex, as_stored

SHARED_ROW = 0
"""Of all ids that have no row of their own."""
MISSING_ROW = 1
"""Of rows without an id."""
NUM_COMMON_ROWS = 2
"""Rows before the first that an id can own."""


@dataclass(frozen=True, kw_only=True)
class IdFigures:
    """What a window did to the ids of a feature."""

    stored: int
    """Ids with a row of their own, after the window was counted."""
    admitted: int
    """Ids that got a row in this window."""
    evicted: int
    """Ids that lost theirs: to a new id, or because they were not seen for `evict_after_hours`."""
    waiting: int
    """Ids seen, but not often enough."""
    forgotten: int
    """Waiting ids whose sightings were given up."""
    new_share: float
    """Of the window's ids, the share predicted from the shared row."""
    shared_share: float
    """Of the window's ids, the share that trains the shared row, after admission."""


@dataclass(frozen=True, kw_only=True)
class Admission:
    """A window's ids, counted."""

    fresh_rows: I64
    """Table rows that have a new owner; each once."""
    figures: IdFigures


class IdTables:
    """The table rows of all features of a spec: admitted ids by a table, hashed ids by their hash.

    >>> spec = DatasetSpec.model_validate({"name": "x", "time": {"column": "t"}, "event_key": ("t",),
    ...     "categorical": ({"name": "item", "ids": "admitted", "capacity": 10},)})
    >>> ids = IdTables(spec)
    >>> ids.rows(spec.categorical[0], np.array([0, 7, 9], np.uint64))
    array([1, 0, 0])
    """

    def __init__(self, spec: DatasetSpec) -> None:
        """No id is known yet."""
        self._tables = {feature.name: IdTable(feature) for feature in spec.categorical if feature.ids == "admitted"}

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features whose ids are admitted."""
        return tuple(self._tables)

    def rows(self, feature: Categorical, ids: U64) -> I64:
        """The row of each id in the feature's table."""
        table = self._tables.get(feature.name)
        return table_rows(feature, ids) if table is None else table.rows(ids)

    def admit(self, examples: Examples, hour: int) -> dict[str, Admission]:
        """Count the ids of a window that is about to be learned, by feature.

        Args:
            examples: all rows of the window.
            hour: its start, in hours since 1970; later of its rows if there are any.
        """
        now = max(hour, int(examples.hour_R.max(initial=hour)))
        return {name: table.admit(_ids_of(examples, name), now) for name, table in self._tables.items()}

    def arrays(self, *, changed: bool = False) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint keeps, under names such as `ids(item_id)/row keys`; unsigned keys as `int64` of the same bits.

        Every array is contiguous, as safetensors needs it.

        Args:
            changed: only of the ids that were seen since `mark_saved`, with the slots of those that were evicted.
        """
        tables = {name: table.arrays(changed=changed) for name, table in self._tables.items()}
        kept = {f"ids({name})/{part}": array for name, arrays in tables.items() for part, array in arrays.items()}
        return as_stored(kept)

    def mark_saved(self) -> None:
        """What is touched from here on has changed."""
        for table in self._tables.values():
            table.mark_saved()

    def load(self, arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[str, ...]:
        """Go on from what `arrays()` gave, and then from what had changed.

        Returns:
            features that the arrays know nothing of; none of their ids is known.

        Raises:
            SpecMismatch: the ids of a feature were kept with another capacity, or are not whole.
        """
        absent = []
        for name, table in self._tables.items():
            prefix = f"ids({name})/"
            saved = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            if not saved:
                absent.append(name)
                continue
            if missing := sorted(table.arrays(changed=True).keys() - saved.keys() - {"row freed", "waiting freed"}):
                raise SpecMismatch(f"the saved ids of {name} lack {missing}; take another checkpoint")
            table.load({part: array.view(np.uint64) if part.endswith("keys") else array for part, array in saved.items()})
        return tuple(absent)


class IdTable:
    """The ids of one feature that have a row, and those that wait for one."""

    def __init__(self, feature: Categorical) -> None:
        """No id is known yet.

        Args:
            feature: with `ids = "admitted"`.
        """
        self.feature = feature
        self._owners = KeyIndex(feature.capacity - NUM_COMMON_ROWS)
        self._waiting = KeyIndex(feature.capacity)
        self._sightings_S = np.zeros(self._waiting.num_slots, np.int32)

    def rows(self, ids: U64) -> I64:
        """The row of each id, in `[0, capacity)`: its own, `SHARED_ROW` or `MISSING_ROW`."""
        slots = self._owners.find(ids)
        slots += NUM_COMMON_ROWS
        without = np.flatnonzero(slots < NUM_COMMON_ROWS)
        slots[without] = np.where(ids[without] == MISSING, MISSING_ROW, SHARED_ROW)
        return slots

    def admit(self, ids_V: U64, now_hour: int) -> Admission:
        """Count a window's ids, and give a row to those that were seen often enough.

        The result does not depend on the order of `ids_V`.

        Args:
            ids_V: ids, as often as they were seen.
            now_hour: in hours since 1970.
        """
        num_stale = self._expire_waiting(now_hour)
        id_U, count_U = _counted(ids_V[ids_V != MISSING])
        known_U = self._owners.find(id_U) >= 0
        waits_U = self._waiting.find(id_U)
        sightings_U = count_U + np.where(waits_U >= 0, self._sightings_S[np.maximum(waits_U, 0)], 0)
        asks_U = known_U | (sightings_U >= self.feature.admit_after)
        slots, fresh, num_evicted = self._owners.find_or_add(id_U[asks_U], now_hour)
        owns_U = asks_U.copy()
        owns_U[asks_U] = slots >= 0
        self._waiting.remove(waits_U[owns_U])
        num_forgotten = self._wait(id_U[~owns_U], sightings_U[~owns_U], now_hour)
        num_evicted += self._expire_owners(now_hour)
        figures = IdFigures(
            stored=len(self._owners),
            admitted=int(fresh.sum()),
            evicted=num_evicted,
            waiting=len(self._waiting),
            forgotten=num_forgotten + num_stale,
            new_share=float(count_U[~known_U].sum() / max(len(ids_V), 1)),
            shared_share=float(count_U[~owns_U].sum() / max(len(ids_V), 1)),
        )
        return Admission(fresh_rows=slots[fresh] + NUM_COMMON_ROWS, figures=figures)

    def arrays(self, *, changed: bool = False) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint keeps; as large as the number of ids that are stored, or `changed` since `mark_saved`."""
        waiting = self._waiting.arrays(changed=changed)
        owners = {f"row {part}": array for part, array in self._owners.arrays(changed=changed).items()}
        waits = {f"waiting {part}": array for part, array in waiting.items()}
        return owners | waits | {"waiting sightings": self._sightings_S[waiting["slots"]]}

    def mark_saved(self) -> None:
        """What is touched from here on has changed."""
        self._owners.mark_saved()
        self._waiting.mark_saved()

    def load(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `arrays()` gave, and then from what had changed.

        Raises:
            SpecMismatch: it was kept with another capacity.
        """
        owners, waiting = (
            {name.removeprefix(kind): array for name, array in arrays.items() if name.startswith(kind)}
            for kind in ("row ", "waiting ")
        )
        self._owners.load(owners)
        self._sightings_S[self._waiting.load(waiting)] = waiting["sightings"]

    def _wait(self, id_U: U64, sightings_U: I64, now_hour: int) -> int:
        """Keep the sightings of ids that have no row; returns how many ids were given up for them, or not taken."""
        slots_U, _, num_forgotten = self._waiting.find_or_add(id_U, now_hour)
        kept_U = slots_U >= 0
        self._sightings_S[slots_U[kept_U]] = np.minimum(sightings_U[kept_U], self.feature.admit_after)
        return num_forgotten + int(np.count_nonzero(~kept_U))

    def _expire_owners(self, now_hour: int) -> int:
        """Free the rows of ids that were not seen for `evict_after_hours`, this window included."""
        return _remove_unused(self._owners, now_hour, self.feature.evict_after_hours)

    def _expire_waiting(self, now_hour: int) -> int:
        """Forget the sightings of ids that were not seen for `evict_after_hours`, up to this window."""
        return _remove_unused(self._waiting, now_hour, self.feature.evict_after_hours)


def _remove_unused(index: KeyIndex, now_hour: int, after_hours: int | None) -> int:
    """Removes keys that were not used for so long; how many."""
    if after_hours is None:
        return 0
    unused = index.unused_since(now_hour - after_hours)
    index.remove(unused)
    return len(unused)


def _ids_of(examples: Examples, feature: str) -> U64:
    lists = examples.list_ids.get(feature)
    return examples.single_ids[feature] if lists is None else lists.values_V


def _counted(ids: U64) -> tuple[U64, I64]:
    """Distinct ids, ascending, and how often each stands there."""
    ids = np.sort(ids)
    first_U = run_starts(ids)
    return ids[first_U], np.diff(first_U, append=len(ids)).astype(np.int64)
