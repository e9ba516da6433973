"""Tables as files: whole, in files of a bounded size, or only the rows that changed.

    whole:    name@row,column                 a rectangle of a table or of its optimizer's state, from that row and column on
    changed:  name@row,column+height          changed rows of that rectangle, `height` rows high
              rows of table@row+height        which rows of the table those are, in this file

Enters: rectangles as a process holds them. Leaves: what the files hold, and the rectangles filled again, one file at a time: a
file is mapped, copied and let go, so that a restore needs the memory of the tables once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from data_schemas.examples import I64
from models.changed_rows import ChangedRows
from models.embeddings import Filling, TableSlice

FILE_BYTES = 256 << 20
"""Of one file at most, unless a single row is larger."""

ROW_NUMBER_BYTES = 8

_ROWS_OF = "rows of "


def whole_files(slices: Iterable[TableSlice]) -> Iterator[dict[str, torch.Tensor]]:
    """What each file holds, blocks of rows of the live storage; none where there is no slice."""

    def blocks() -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        for piece in slices:
            rows = max(FILE_BYTES // max(piece.tensor[:1].nbytes, 1), 1)
            for start in range(0, len(piece.tensor), rows):
                block = piece.tensor[start : start + rows]
                yield block.nbytes, {f"{piece.name}@{piece.row + start},{piece.column}": block}

    return _packed(blocks())


def changed_bytes(slices: Iterable[TableSlice], changed: Mapping[str, I64]) -> int:
    """That `changed_files` gives together; nothing is copied.

    Args:
        slices: rectangles of a process.
        changed: by table, the rows of all of it that changed, rising.
    """
    side_by_side = _side_by_side(slices)
    return sum(len(pieces[0].rows_inside(changed[pieces[0].table])) * _bytes_a_row(pieces) for pieces in side_by_side)


def changed_files(slices: Iterable[TableSlice], changed: Mapping[str, I64]) -> Iterator[dict[str, torch.Tensor]]:
    """What each file holds: copies of the rows that changed, with their numbers; none where no row has.

    Args:
        slices: rectangles of a process.
        changed: by table, the rows of all of it that changed, rising.
    """

    def blocks() -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        for pieces in _side_by_side(slices):
            first, height, bytes_a_row = pieces[0], len(pieces[0].tensor), _bytes_a_row(pieces)
            rows, at_once = first.rows_inside(changed[first.table]), max(FILE_BYTES // bytes_a_row, 1)
            for start in range(0, len(rows), at_once):
                block = rows[start : start + at_once]
                own = first.own_rows(block)
                tensors = {f"{piece.name}@{piece.row},{piece.column}+{height}": piece.tensor[own].cpu() for piece in pieces}
                numbers = {f"{_ROWS_OF}{first.table}@{first.row}+{height}": torch.from_numpy(block)}
                yield len(block) * bytes_a_row, numbers | tensors

    return _packed(blocks())


def read_whole(path: Path, *filling: Filling) -> None:
    """Copies a file's rectangles into those that are being filled."""
    for key, tensor in load_file(path).items():
        name, _, place = key.rpartition("@")
        row, column = (int(offset) for offset in place.split(","))
        for each in filling:
            each.take(TableSlice(name=name, row=row, column=column, tensor=tensor))


def read_changed(path: Path, changed: Mapping[str, ChangedRows], *filling: Filling) -> None:
    """Puts a file's rows over what was copied, and marks them as changed.

    Args:
        path: of what `changed_files` gave.
        changed: marks by table.
        filling: rectangles that are whole.
    """
    file = load_file(path)
    for key, tensor in file.items():
        name, _, place = key.rpartition("@")
        if key.startswith(_ROWS_OF):
            changed[name.removeprefix(_ROWS_OF)].add(tensor)
            continue
        corner, _, height = place.partition("+")
        row, column = corner.split(",")
        table = TableSlice(name=name, row=int(row), column=0, tensor=tensor).table
        rows: I64 = file[f"{_ROWS_OF}{table}@{row}+{height}"].numpy()
        for each in filling:
            each.put(name, rows, int(column), tensor)


def _packed(blocks: Iterable[tuple[int, dict[str, torch.Tensor]]]) -> Iterator[dict[str, torch.Tensor]]:
    """Blocks, each with its bytes, in files of at most `FILE_BYTES`, unless a single one is larger."""
    file: dict[str, torch.Tensor] = {}
    size = 0
    for block_bytes, tensors in blocks:
        if file and size + block_bytes > FILE_BYTES:
            yield file
            file, size = {}, 0
        file |= tensors
        size += block_bytes
    if file:
        yield file


def _side_by_side(slices: Iterable[TableSlice]) -> list[list[TableSlice]]:
    """The rectangles that hold the same rows of a table."""
    found: dict[tuple[str, int, int], list[TableSlice]] = {}
    for piece in slices:
        found.setdefault((piece.table, piece.row, len(piece.tensor)), []).append(piece)
    return list(found.values())


def _bytes_a_row(pieces: Sequence[TableSlice]) -> int:
    """Of a row that changed: its number, and what all of these rectangles hold of it."""
    return ROW_NUMBER_BYTES + sum(piece.tensor.shape[1] * piece.tensor.element_size() for piece in pieces)
