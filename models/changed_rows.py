"""Which rows of a table have changed since a moment: a byte a row, so that noting one costs a store.

Enters: row numbers as they are looked up to be learned. Leaves: the changed ones; finding them reads the bytes, 10^8 of which
take hundredths of a second.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_schemas.examples import I64

if TYPE_CHECKING:
    import torch  # takes seconds to import, and what only looks at a model does without


class ChangedRows:
    """Marks on the rows of one table.

    >>> changed = ChangedRows(100)
    >>> changed.add(np.array([70, 3, 70]))
    >>> changed.rows()
    array([ 3, 70])
    """

    def __init__(self, num_rows: int, device: "torch.device | None" = None) -> None:
        """No row has changed.

        Args:
            num_rows: of the table.
            device: that the rows to mark are on; None for the CPU.
        """
        self._marks: npt.NDArray[np.bool_] | torch.Tensor
        self._marks = np.zeros(num_rows, bool) if device is None or device.type == "cpu" else _marks_on(device, num_rows)

    @classmethod
    def of(cls, marks: "torch.Tensor") -> "ChangedRows":
        """Over marks that someone else sets too, a bool a row."""
        made = cls(0)
        made._marks = marks
        return made

    def add(self, rows: "torch.Tensor | I64") -> None:
        """Marks these rows, which may repeat."""
        self._marks[np.asarray(rows) if isinstance(self._marks, np.ndarray) else rows] = True

    def rows(self) -> I64:
        """Those that are marked, rising."""
        return np.flatnonzero(self._marks if isinstance(self._marks, np.ndarray) else self._marks.cpu().numpy())

    def clear(self) -> None:
        """No row has changed from here."""
        self._marks[:] = False


def marks_side_by_side(num_rows: Mapping[str, int]) -> tuple["torch.Tensor", dict[str, ChangedRows]]:
    """Marks of several tables in one tensor, so that rows of all can be noted at once; and by name each table's part of it.

    >>> marks, changed = marks_side_by_side({"user": 5, "item": 3})
    >>> marks[[4, 6]] = True
    >>> changed["user"].rows(), changed["item"].rows()
    (array([4]), array([1]))
    """
    import torch

    marks = torch.zeros(sum(num_rows.values()), dtype=torch.bool)
    parts = marks.split(list(num_rows.values()))
    return marks, {name: ChangedRows.of(part) for name, part in zip(num_rows, parts, strict=True)}


def _marks_on(device: "torch.device", num_rows: int) -> "torch.Tensor":
    import torch

    return torch.zeros(num_rows, dtype=torch.bool, device=device)
