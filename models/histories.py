"""What each user clicked last: a ring of ids a user, newest last.

Enters: a window's examples. Leaves: for each distinct user of the window a list of the ids that they clicked before it, so that
a pooled history is computed once a user, not once a row. Take the histories first, add the window after.

Letters: R rows, F features of the history, L its length, S slots of users, U distinct users of a window, V ids of all lists.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import History
from data_schemas.errors import SpecMismatch
from data_schemas.examples import I64, U64, Examples, IdLists
from data_schemas.hashing import MISSING
from models.distinct import distinct, run_starts
from models.key_index import KeyChanges, KeyIndex


@dataclass(frozen=True, kw_only=True)
class Histories:
    """The histories of a window's users."""

    position_R: I64
    """`[R]` the place of each row's user among the distinct users, in `[0, U)`."""
    lists: Mapping[str, IdLists]
    """By feature of the history: `[U]` lists of hashed ids, newest last, empty for a user of whom nothing is known. The
    lists of a user are equally long in all features: the n-th ids are of the same row, `hashing.MISSING` included."""

    hour_V: I64
    """Hours since the epoch at which each of those rows was clicked."""

    @property
    def num_users(self) -> int:
        """U; the rows without a user count as one user."""
        return next(len(lists.offsets) for lists in self.lists.values()) - 1


class HistoryBank:
    """The last `length` clicked rows of each user."""

    def __init__(self, history: History) -> None:
        """Nobody has clicked yet."""
        self.history = history
        self._index = KeyIndex(history.capacity)
        self._ids_FSL = np.zeros((len(history.of) + 1, self._index.num_slots, history.length), np.uint64)
        """The last of the F planes holds the hour of the click."""
        self._written_S = np.zeros(self._index.num_slots, np.int64)
        """Rows ever written to a ring; the next goes to this place modulo L."""

    def lookup(self, examples: Examples) -> Histories:
        """The history of each row's user, from what was added so far."""
        user_U, position_R = distinct(examples.user_R)
        slot_U = self._index.find(user_U)
        values_FV, offsets = self._lists(slot_U)
        lists = {
            name: IdLists(values_V=ids_V, offsets=offsets) for name, ids_V in zip(self.history.of, values_FV[:-1], strict=True)
        }
        return Histories(position_R=position_R, lists=lists, hour_V=values_FV[-1].view(np.int64))

    def add(self, examples: Examples) -> tuple[KeyChanges, int]:
        """Append a closed window's clicked rows, in their order; rows without a user belong to no history.

        Returns:
            what happened to the stored users, and how many clicked rows were left out because their user had more than
            `max_events_per_window` of them.
        """
        clicked = np.flatnonzero((examples.labels_R > 0) & (examples.user_R != MISSING))
        rows = clicked[np.argsort(examples.user_R[clicked], kind="stable")]
        first_U = run_starts(examples.user_R[rows])
        clicks_U = np.diff(first_U, append=len(rows))
        user_U = examples.user_R[rows[first_U]]
        now = int(examples.hour_R.max(initial=0))
        slot_U, fresh_U, num_evicted = self._index.find_or_add(user_U, now)
        self._written_S[slot_U[fresh_U]] = 0
        kept_U = np.where(slot_U >= 0, np.minimum(clicks_U, self.history.max_events_per_window), 0)
        self._append(examples, rows, slot_U, first_U + clicks_U, kept_U)
        refused_rows = int(clicks_U[slot_U < 0].sum())
        changes = KeyChanges(new_keys=int(fresh_U.sum()), evicted_keys=num_evicted, refused_rows=refused_rows)
        return changes, int((clicks_U - kept_U).sum()) - refused_rows

    def arrays(self, *, changed: bool = False) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint keeps; as large as the histories that are stored, or `changed` since `mark_saved`."""
        index = self._index.arrays(changed=changed)
        ids_FV, offsets = self._lists(index["slots"])
        return index | {"ids": ids_FV, "num_ids": np.diff(offsets)}

    def mark_saved(self) -> None:
        """What is touched from here on has changed."""
        self._index.mark_saved()

    def load(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `arrays()` gave, and then from what had changed.

        Raises:
            SpecMismatch: it was kept with another capacity, length or list of features.
        """
        ids_FV, num_ids = arrays["ids"], arrays["num_ids"]
        if len(ids_FV) != len(self.history.of) + 1 or num_ids.max(initial=0) > self.history.length:
            raise SpecMismatch(
                f"histories of {len(ids_FV) - 1} features and up to {num_ids.max(initial=0)} rows were saved, the spec has "
                f"{list(self.history.of)} and length {self.history.length}: set them back, or start without them"
            )
        slots = self._index.load(arrays)
        self._written_S[slots] = num_ids
        owner_V, nth_V = _places(num_ids)
        self._ids_FSL[:, slots[owner_V], nth_V] = ids_FV

    def _lists(self, slots: I64) -> tuple[U64, I64]:
        """`[F, V]` ids of the rings at these slots (-1 for none), oldest first, and where each list starts and ends."""
        length = self.history.length
        written = np.where(slots >= 0, self._written_S[slots], 0)
        counts = np.minimum(written, length)
        owner_V, nth_V = _places(counts)
        place_V = (written - counts).take(owner_V) + nth_V
        at_V = slots.take(owner_V) * length + place_V % length
        values_FV = np.stack([plane_SL.reshape(-1).take(at_V) for plane_SL in self._ids_FSL])
        return values_FV, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def _append(self, examples: Examples, rows: I64, slot_U: I64, end_U: I64, kept_U: I64) -> None:
        """Write the last `kept_U` of each user's rows, which end at `end_U` in `rows`, to the user's ring."""
        length = self.history.length
        written_U = np.minimum(kept_U, length)  # of more than a ring only the last turn stays
        owner_V, nth_V = _places(written_U)
        row_V = rows[(end_U - written_U)[owner_V] + nth_V]
        place_V = ((self._written_S[slot_U] + kept_U - written_U)[owner_V] + nth_V) % length
        planes = [*(examples.single_ids[name] for name in self.history.of), examples.hour_R.view(np.uint64)]
        for plane_SL, plane_R in zip(self._ids_FSL, planes, strict=True):
            plane_SL[slot_U[owner_V], place_V] = plane_R[row_V]
        stored_U = slot_U >= 0
        self._written_S[slot_U[stored_U]] += kept_U[stored_U]


def _places(counts: I64) -> tuple[I64, I64]:
    """For lists of these lengths, laid end to end: whose each element is, and its number within its list.

    >>> _places(np.array([2, 0, 1]))
    (array([0, 0, 2]), array([0, 1, 0]))
    """
    owner_V = np.repeat(np.arange(len(counts)), counts)
    nth_V = np.arange(len(owner_V)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner_V, nth_V
