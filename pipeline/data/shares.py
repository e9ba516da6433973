"""A window read by many processes: each reads, verifies and hashes its own row groups, and all get all rows.

Enters: pieces of the click log. Leaves: their rows as `Examples`, in the order of the log, the same in every process.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import DataError
from data_schemas.examples import U64, Examples, IdLists
from pipeline.data.lake import ClickLog, RowRange
from pipeline.data.lineage import Mask, Piece
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.training.processes import Processes

SAMPLE_ROWS = 5
"""Raw rows that go with the registered model."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """Rows of the click log that are no clicks of their own."""

    examples: Examples
    event_keys: U64 | None
    """Where clicks are events of their own."""
    sample: pd.DataFrame
    """The first rows as a caller of the published model would send them."""


def read_examples(log: ClickLog, pieces: Sequence[Piece], spec: DatasetSpec, processes: Processes) -> Read:
    """The rows of `pieces`, in order; read together.

    Raises:
        DataError: a file is missing or corrupt; it is named. Or the shares do not add up to the whole.
    """
    columns = columns_to_read(spec)
    wanted = columns if spec.clicks is None else [*columns, "is_click", "event_key"]
    own = own_share(log, pieces, processes)
    table = log.read_parts(((part.rows, part.mask) for part in own), wanted)
    num_rows = processes.total(table.num_rows)
    if num_rows != sum(piece.num_rows for piece in pieces):
        raise DataError(
            f"{int(num_rows)} rows were read of {sum(piece.num_rows for piece in pieces)}: the processes do not see the same "
            "click log; give all of them the same state_dir"
        )
    if spec.clicks is not None:
        table = table.filter(pc.invert(table["is_click"]))
    keys = None if spec.clicks is None else processes.concatenated_array(table["event_key"].to_numpy().view(np.uint64))
    table = table.select(columns)
    samples = processes.gather(raw_sample(table))
    sample = next((rows for rows in samples if len(rows)), samples[0])
    return Read(examples=_gathered(to_examples(table, spec), spec, processes), event_keys=keys, sample=sample)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one row group that belong."""

    rows: RowRange
    mask: Mask | None
    """`[rows.num_rows]`; None: all of them."""

    @property
    def num_rows(self) -> int:
        """Rows that belong."""
        return self.rows.num_rows if self.mask is None else int(self.mask.sum())


def own_share(log: ClickLog, pieces: Sequence[Piece], processes: Processes) -> list[Part]:
    """This process's row groups of some pieces: consecutive ones, about as many rows as in every other process."""
    if processes.count == 1:
        return [Part(rows=RowRange.whole(piece.file), mask=piece.mask) for piece in pieces]
    parts = [part for piece in pieces for part in _parts(log, piece)]
    owner = owners([part.num_rows for part in parts], processes.count)
    return [part for part, rank in zip(parts, owner, strict=True) if rank == processes.rank]


def owners(num_rows: Sequence[int], count: int) -> list[int]:
    """By row group the process that reads it: never falling, each where the middle of the group falls among all rows.

    >>> owners([100, 100, 100, 100], 2), owners([10], 4), owners([], 2)
    ([0, 0, 1, 1], [2], [])
    """
    rows = np.array(num_rows, np.float64)
    middles = np.cumsum(rows) - rows / 2
    shares: list[int] = np.minimum(middles * count // max(rows.sum(), 1.0), count - 1).astype(int).tolist()
    return shares


def raw_sample(table: pa.Table) -> pd.DataFrame:
    """A few rows as a caller of the published model would send them."""
    columns = [name for name in table.column_names if name != "label"]
    frame: pd.DataFrame = table.slice(0, SAMPLE_ROWS).select(columns).to_pandas(integer_object_nulls=True)
    frame["event_time"] = frame["event_time"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    return frame.astype({name: "object" for name in columns if isinstance(frame[name].dtype, pd.CategoricalDtype)})


def _parts(log: ClickLog, piece: Piece) -> Iterator[Part]:
    for rows in log.row_groups(piece.file):
        mask = None if piece.mask is None else piece.mask[rows.start : rows.stop]
        if mask is None or mask.any():
            yield Part(rows=rows, mask=mask)


def _gathered(own: Examples, spec: DatasetSpec, processes: Processes) -> Examples:
    """The examples of all processes; what stands in two places is exchanged once."""
    if processes.count == 1:
        return own
    single_ids = {name: processes.concatenated_array(ids) for name, ids in own.single_ids.items()}
    return replace(
        own,
        single_ids=single_ids,
        list_ids={name: _lists(lists, processes) for name, lists in own.list_ids.items()},
        numeric_NR=np.ascontiguousarray(processes.concatenated_array(np.ascontiguousarray(own.numeric_NR.T)).T),
        labels_R=processes.concatenated_array(own.labels_R),
        weights_R=processes.concatenated_array(own.weights_R),
        user_R=single_ids[spec.user] if spec.user else processes.concatenated_array(own.user_R),
        item_R=single_ids[spec.item] if spec.item else processes.concatenated_array(own.item_R),
        hour_R=processes.concatenated_array(own.hour_R),
    )


def _lists(own: IdLists, processes: Processes) -> IdLists:
    lengths = processes.concatenated_array(np.diff(own.offsets))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return IdLists(values_V=processes.concatenated_array(own.values_V), offsets=offsets)
