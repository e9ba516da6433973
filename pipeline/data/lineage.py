"""Where rows went: files of the click log that were written anew, and which row of which file became which.

Enters: rows of files that a model knows, and the log. Leaves: the same rows in the files that are active now, and the rows
that are new. The commit that writes a file anew carries what it was made of, so a model that comes back after a year, or a
version that a rollback brings back, follows its rows through every rewrite since.

Letters: N rows of an old file, M rows of the file that it became part of.
"""

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.errors import DataError
from pipeline.data.lake import ClickLog, LogFile

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of one file of the click log."""

    file: LogFile
    mask: Mask | None = None
    """`[file.num_rows]`, True for the rows that belong; None: all of them."""

    @property
    def num_rows(self) -> int:
        """Rows that belong."""
        return self.file.num_rows if self.mask is None else int(self.mask.sum())

    @property
    def rows(self) -> Mask:
        """`[file.num_rows]`, never None."""
        return np.ones(self.file.num_rows, bool) if self.mask is None else self.mask

    def split(self, num_rows: int) -> tuple["Piece", "Piece"]:
        """The first `num_rows` rows, and the others."""
        mask = self.rows
        first = mask & (np.cumsum(mask) <= num_rows)
        return replace(self, mask=first), replace(self, mask=mask & ~first)


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """One file that took the place of others."""

    into: LogFile | None
    """Begins with the rows of `origins` that were kept, in order; further rows are new. None: all rows left the log."""
    origins: tuple[Piece, ...]
    """Each a file that is gone, with the rows of it that were kept."""

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`."""
        into = self.into and {"path": self.into.path, "hour": self.into.hour, "rows": self.into.num_rows}
        origins = [{"path": o.file.path, "rows": o.file.num_rows, "kept": packed_mask(o.mask)} for o in self.origins]
        return {"into": into, "from": origins}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Rewrite":
        """The inverse of `to_json`."""
        into = record["into"] and LogFile(
            hour=record["into"]["hour"], path=record["into"]["path"], num_rows=record["into"]["rows"]
        )
        hour = into.hour if into else 0
        files = [LogFile(hour=hour, path=origin["path"], num_rows=origin["rows"]) for origin in record["from"]]
        kept = [unpacked_mask(origin["kept"], origin["rows"]) for origin in record["from"]]
        return cls(into=into, origins=tuple(Piece(file=f, mask=m) for f, m in zip(files, kept, strict=True)))


def added_between(log: ClickLog, old: int | None, new: int) -> list[Piece]:
    """Rows of version `new` that version `old` did not have, in whatever files; all of them, where `old` is None.

    Raises:
        DataError: files of version `old` are gone, and no commit since says what became of their rows.
    """
    active = log.files(new)
    known = {file.path: file for file in log.files(old)} if old is not None else {}
    gone = [Piece(file=file) for path, file in known.items() if path not in {file.path for file in active}]
    if not gone:
        return [Piece(file=file) for file in active if file.path not in known]
    carried, lost = carry(log, gone, old or 0, new)
    if lost:
        raise DataError(
            f"{len(lost)} files of the click log's version {old} were rewritten or removed by version {new} "
            f"({min(piece.file.path for piece in lost)} is one): which rows are new cannot be told. Restore version {old} with "
            "DeltaTable.restore, or start a new model under another model_name"
        )
    had = {piece.file.path: piece.rows for piece in carried}
    found = [Piece(file=file, mask=~had[file.path] if file.path in had else None) for file in active if file.path not in known]
    return [piece for piece in found if piece.num_rows]


def carry(log: ClickLog, pieces: Sequence[Piece], old: int, new: int) -> tuple[list[Piece], list[Piece]]:
    """The same rows in the files of version `new`, rows of one file together; and pieces whose files are gone without a trace.

    Rows that left the log on purpose (their hour was replaced, or outlived its retention) are in neither.

    Args:
        log: their click log.
        pieces: of version `old`, or of any version since.
        old: commits after it are searched.
        new: a later version.
    """
    active = {file.path for file in log.files(new)}
    if all(piece.file.path in active for piece in pieces):
        return merged(pieces), []
    became = _became(log, old, new)
    carried: list[Piece] = []
    lost: list[Piece] = []
    for piece in pieces:
        now = _follow(piece, became)
        if now is None:
            continue
        (carried if now.file.path in active else lost).append(now if now.file.path in active else piece)
    return merged(carried), lost


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """One piece a file, in the order hour, file."""
    by_path: dict[str, Piece] = {}
    for piece in pieces:
        before = by_path.get(piece.file.path)
        by_path[piece.file.path] = piece if before is None else replace(piece, mask=before.rows | piece.rows)
    whole = (replace(piece, mask=None) if piece.rows.all() else piece for piece in by_path.values())
    return sorted(whole, key=lambda piece: (piece.file.hour, piece.file.path))


def without(pieces: Iterable[Piece], others: Iterable[Piece]) -> list[Piece]:
    """The rows of `pieces` that are not among `others`; files without such rows are left out."""
    taken = {piece.file.path: piece.rows for piece in merged(others)}
    rest = [
        replace(piece, mask=piece.rows & ~taken[piece.file.path]) if piece.file.path in taken else piece for piece in pieces
    ]
    return [piece for piece in rest if piece.num_rows]


def packed_mask(mask: Mask | None) -> str | None:
    """A mask as text; None for None."""
    return None if mask is None else base64.b64encode(zlib.compress(np.packbits(mask).tobytes())).decode()


def unpacked_mask(text: str | None, num_rows: int) -> Mask | None:
    """The inverse of `packed_mask`."""
    if text is None:
        return None
    return np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8), count=num_rows).astype(bool)


def _became(log: ClickLog, old: int, new: int) -> dict[str, tuple[Rewrite, int]]:
    """By path of a file that is gone: what it went into, and its place among the origins."""
    became: dict[str, tuple[Rewrite, int]] = {}
    for record in log.rewrites(old, new):
        rewrite = Rewrite.from_json(record)
        became |= {origin.file.path: (rewrite, place) for place, origin in enumerate(rewrite.origins)}
    return became


def _follow(piece: Piece, became: Mapping[str, tuple[Rewrite, int]]) -> Piece | None:
    """The piece as far as it can be followed; None where no row of it is in the log any more."""
    while piece.file.path in became:
        rewrite, place = became[piece.file.path]
        if rewrite.into is None:
            return None
        start = sum(origin.num_rows for origin in rewrite.origins[:place])
        kept_N, mask_M = rewrite.origins[place].rows, np.zeros(rewrite.into.num_rows, bool)
        inside = piece.rows[kept_N]
        mask_M[start : start + len(inside)] = inside
        if not mask_M.any():
            return None
        piece = Piece(file=rewrite.into, mask=mask_M)
    return piece
