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

    def __init__(
        self, num_rows: int, device: "torch.device | None" = None, *, marks: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """No row has changed.

        Args:
            num_rows: of the table.
            device: that the rows to mark are on; None for the CPU.
            marks: bytes to use, one a row, all False; None: of its own.
        """
        self._marks: npt.NDArray[np.bool_] | torch.Tensor
        if marks is not None:
            self._marks = marks
        else:
            self._marks = np.zeros(num_rows, bool) if device is None or device.type == "cpu" else _marks_on(device, num_rows)

    def add(self, rows: "torch.Tensor | I64") -> None:
        """Marks these rows, which may repeat."""
        self._marks[np.asarray(rows) if isinstance(self._marks, np.ndarray) else rows] = True

    def rows(self) -> I64:
        """Those that are marked, rising."""
        return np.flatnonzero(self._marks if isinstance(self._marks, np.ndarray) else self._marks.cpu().numpy())

    def clear(self) -> None:
        """No row has changed from here."""
        self._marks[:] = False


def one_after_the_other(num_rows: Mapping[str, int]) -> tuple[npt.NDArray[np.bool_], dict[str, ChangedRows]]:
    """Of several tables by name, and the marks of all of them, in that order, so that rows of all can be noted at once.

    >>> marks, changed = one_after_the_other({"user": 5, "item": 3})
    >>> marks[[4, 6]] = True
    >>> changed["user"].rows(), changed["item"].rows()
    (array([4]), array([1]))
    """
    marks, changed, start = np.zeros(sum(num_rows.values()), bool), dict[str, ChangedRows](), 0
    for name, rows in num_rows.items():
        changed[name] = ChangedRows(rows, marks=marks[start : start + rows])
        start += rows
    return marks, changed


def _marks_on(device: "torch.device", num_rows: int) -> "torch.Tensor":
    import torch

    return torch.zeros(num_rows, dtype=torch.bool, device=device)
