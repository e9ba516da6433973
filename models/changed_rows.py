"""Which rows of a table have changed since a moment: a byte a row, so that noting one costs a store.

Enters: row numbers as they are looked up to be learned. Leaves: the changed ones; finding them reads the bytes, 10^8 of which
take hundredths of a second.
"""

from typing import TYPE_CHECKING

import numpy as np

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


def _marks_on(device: "torch.device", num_rows: int) -> "torch.Tensor":
    import torch

    return torch.zeros(num_rows, dtype=torch.bool, device=device)
