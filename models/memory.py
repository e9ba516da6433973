"""Everything a model remembers of the log besides its weights: counters, ages and histories, as of a window's start.

Enters: a window's examples. Leaves: dense columns `[C, R]` and the users' histories as they were known before the window;
then `add` counts the window in. The order is always *columns, histories, add*: rows of one window never see each other.

It shards by hash: all state of a key lies in one slot of one bank and depends on the rows of that key alone. With P processes,
process p keeps the keys with `rows_of(key, P) == p`, a row's columns come from the owner of its key, and each window's `add`
goes to the owners. Only the click rate of all keys together, which `ctr` is relative to, is a sum over the processes. Which
keys a full bucket gives up depends on the number of buckets, so on P.

Letters: R rows, C columns.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import SpecMismatch
from data_schemas.examples import F32, Examples
from models.counters import AgeBank, CounterBank, counter_columns, linear_only_columns
from models.histories import Histories, HistoryBank
from models.key_index import KeyChanges, as_stored

THREADS = 2
"""Banks that work at a time; they share nothing, so the result does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """What counting a window in did, all banks together."""

    new_keys: int
    """Ids, pairs of ids and users that got a slot."""
    evicted_of: Mapping[str, int]
    """By bank, as `counter(item_id)` or `history`: keys whose state was given up for a new one, where there were any."""
    refused_rows: int
    """Rows that a bank could not count: the keys of the window overfilled a bucket of its table."""
    capped_history_events: int
    """Clicked rows left out of a history, because the user had more than `max_events_per_window` of them."""

    @property
    def evicted_keys(self) -> int:
        """Those of all banks."""
        return sum(self.evicted_of.values())


def column_names(spec: DatasetSpec) -> list[str]:
    """Names of the columns of `Memory.columns`, in their order.

    >>> from data_schemas.dataset import load_spec
    >>> column_names(load_spec("brunch").model_copy(update={"counters": (), "ages": ("item_id",)}))
    ['age(item_id)']
    """
    counters = [name for counter in spec.counters for name in counter_columns(counter)]
    return counters + [f"age({feature})" for feature in spec.ages]


def linear_only_names(spec: DatasetSpec) -> list[str]:
    """Names of those of them that go to the linear part alone."""
    return [name for counter in spec.counters for name in linear_only_columns(counter)]


class Memory:
    """All banks that a spec declares, empty at first."""

    def __init__(self, spec: DatasetSpec) -> None:
        """Nothing remembered yet. Bounded by the declared capacities, whatever the log holds."""
        self._dense: dict[str, CounterBank | AgeBank] = {}
        for counter in spec.counters:
            self._dense[f"counter({','.join(counter.over)})"] = CounterBank(counter)
        for feature in spec.ages:
            self._dense[f"age({feature})"] = AgeBank(feature, spec.age_capacity)
        self._history = HistoryBank(spec.history) if spec.history else None

    def columns(self, examples: Examples, hour: int) -> F32:
        """`[C, R]` in the order of `column_names`, as known before `hour`.

        Args:
            examples: rows to predict or to learn; their labels are not looked at.
            hour: the start of their window, in hours since 1970.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            columns = list(pool.map(lambda bank: bank.columns(examples, hour), self._dense.values()))
        return np.concatenate(columns) if columns else np.empty((0, examples.num_rows), np.float32)

    def new_shares(self, examples: Examples) -> dict[str, float]:
        """By feature that a counter or an age is kept of alone: the share of rows whose id is not known; 0 of no rows."""
        shares: dict[str, float] = {}
        for bank in self._dense.values():
            match bank:
                case AgeBank():
                    shares[bank.feature] = bank.new_share(examples)
                case CounterBank(counter=counter) if len(counter.over) == 1:
                    shares.setdefault(counter.over[0], bank.new_share(examples))
        return shares

    def histories(self, examples: Examples) -> Histories | None:
        """What the rows' users clicked before; None where the spec declares no history."""
        return self._history.lookup(examples) if self._history else None

    def add(self, examples: Examples, hour: int) -> MemoryReport:
        """Count a closed window in.

        Args:
            examples: its rows, in the order of the log; late rows count at their own hour.
            hour: the start of the window, in hours since 1970.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            changed = list(pool.map(lambda bank: bank.add(examples, hour), self._dense.values()))
        of_banks, capped = dict(zip(self._dense, changed, strict=True)), 0
        if self._history:
            of_banks["history"], capped = self._history.add(examples)
        changes = reduce(KeyChanges.plus, of_banks.values(), KeyChanges())
        return MemoryReport(
            new_keys=changes.new_keys,
            evicted_of={name: own.evicted_keys for name, own in of_banks.items() if own.evicted_keys},
            refused_rows=changes.refused_rows,
            capped_history_events=capped,
        )

    def arrays(self, *, changed: bool = False) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint keeps, under names such as `counter(item_id)/keys`; unsigned keys as `int64` of the same bits.

        Every array is contiguous: safetensors writes the memory of any other in its own order, and says nothing.

        Args:
            changed: only what was touched since `mark_saved`, with the slots that were `freed`.
        """
        banks = {name: bank.arrays(changed=changed) for name, bank in self._banks()}
        kept = {f"{name}/{part}": array for name, arrays in banks.items() for part, array in arrays.items()}
        return as_stored(kept)

    def mark_saved(self) -> None:
        """What is touched from here on has changed."""
        for _, bank in self._banks():
            bank.mark_saved()

    def load(self, arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[str, ...]:
        """Go on from what `arrays()` gave, and then from what had changed: what follows equals not having stopped.

        Returns:
            names of banks that the arrays know nothing of; they stay as they are, so in a new memory empty.

        Raises:
            SpecMismatch: a bank was kept with other settings, or is not whole.
        """
        absent = []
        for name, bank in self._banks():
            saved = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
            if not saved:
                absent.append(name)
                continue
            kinds = {part: array.dtype for part, array in bank.arrays(changed=True).items()}
            if missing := sorted(kinds.keys() - saved.keys() - {"freed"}):
                raise SpecMismatch(f"the saved {name} lacks {missing}; take another checkpoint")
            parts = [part for part in kinds if part in saved]
            bank.load({part: saved[part].view(np.uint64) if kinds[part] == np.uint64 else saved[part] for part in parts})
        return tuple(absent)

    def _banks(self) -> Iterator[tuple[str, CounterBank | AgeBank | HistoryBank]]:
        yield from self._dense.items()
        if self._history:
            yield "history", self._history
