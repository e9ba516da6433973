"""Which rows of a table have changed since a moment: a byte a row, so that noting one costs a store.

Enters: row numbers as they are looked up to be learned. Leaves: the changed ones; finding them reads the bytes, 10^8 of which
take hundredths of a second.
"""

import numpy as np
import torch

from data_schemas.examples import I64


class ChangedRows:
    """Marks on the rows of one table.

    >>> changed = ChangedRows(100)
    >>> changed.add(np.array([70, 3, 70]))
    >>> changed.rows()
    array([ 3, 70])
    """

    def __init__(self, num_rows: int, device: torch.device | None = None) -> None:
        """No row has changed.

        Args:
            num_rows: of the table.
            device: that the rows to mark are on; None for the CPU.
        """
        self._marks = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def add(self, rows: torch.Tensor | I64) -> None:
        """Marks these rows, which may repeat."""
        if self._marks.device.type == "cpu":
            self._marks.numpy()[rows.numpy() if isinstance(rows, torch.Tensor) else rows] = True
        else:
            self._marks[torch.as_tensor(rows, device=self._marks.device)] = True

    def rows(self) -> I64:
        """Those that are marked, rising."""
        return np.flatnonzero(self._marks.cpu().numpy())

    def clear(self) -> None:
        """No row has changed from here."""
        self._marks.zero_()
