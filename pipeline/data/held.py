"""Windows that are held aside: learned by nobody until a person releases or discards them.

    <model_dir>/held/2026-01-01T05.json      which rows, why, and what became of them

Enters: a window's rows and the reason. Leaves: one file, written whole. No checkpoint knows of it: the rows of a held window
are taken out of what waits, whatever version a rollback brings back, and a released window is learned once by each version that
does not name it among those it has learned.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_schemas.errors import CheckpointError
from pipeline.data.lake import LogFile
from pipeline.data.lineage import Piece, packed_mask, unpacked_mask

Kind = Literal["alarm", "gate"]
HeldStatus = Literal["held", "released", "discarded"]


@dataclass(frozen=True, kw_only=True)
class HeldWindow:
    """A window that was not learned, or whose model was not published."""

    id: str
    """Its first hour, such as `2026-01-01T05`; with a number where that hour was held before."""
    start: int
    end: int
    """Hours since 1970, half-open."""
    log_version: int
    """Of the click log, in which `pieces` are."""
    pieces: tuple[Piece, ...]
    kind: Kind
    """Who held it: an alarm before it was learned, or the gate after."""
    reason: str
    """In words."""
    held_at: str
    """ISO 8601, UTC."""
    status: HeldStatus = "held"

    @property
    def num_rows(self) -> int:
        """Of all pieces."""
        return sum(piece.num_rows for piece in self.pieces)


def hold_aside(
    model_dir: Path,
    *,
    start: int,
    end: int,
    log_version: int,
    pieces: Sequence[Piece],
    kind: Kind,
    reason: str,
    now: datetime,
) -> HeldWindow:
    """Writes down that a window is held; from then on it no longer waits.

    Args:
        model_dir: folder of the model.
        start: first hour of the window, since 1970.
        end: hour at which it ends.
        log_version: of the click log, in which `pieces` are.
        pieces: rows of the window.
        kind: who holds it.
        reason: in words.
        now: aware.

    Raises:
        OSError: the disk is full or not writable; the window waits as before.
    """
    window = HeldWindow(
        id=_free_id(model_dir, start),
        start=start,
        end=end,
        log_version=log_version,
        pieces=tuple(pieces),
        kind=kind,
        reason=reason,
        held_at=now.astimezone(UTC).isoformat(timespec="seconds"),
    )
    _write(model_dir, window)
    return window


def held_windows(model_dir: Path) -> list[HeldWindow]:
    """All windows that were ever held, those released and discarded too, in the order of their hours.

    Raises:
        CheckpointError: a file of `held/` cannot be read: what it holds aside would be learned.
    """
    return sorted((_read(path) for path in _folder(model_dir).glob("*.json")), key=lambda window: (window.start, window.id))


def decide(model_dir: Path, id: str, status: Literal["released", "discarded"]) -> HeldWindow:
    """Lets a held window be learned after all, or never.

    Raises:
        CheckpointError: no window of that id is held, or it was decided on before.
    """
    known = {window.id: window for window in held_windows(model_dir)}
    if id not in known:
        held = ", ".join(name for name, window in known.items() if window.status == "held") or "none"
        raise CheckpointError(f"no window {id!r} is held aside in {model_dir}; held are: {held}")
    if known[id].status != "held":
        raise CheckpointError(f"window {id} was {known[id].status} before; only a window that is held can be decided on")
    decided = HeldWindow(**(vars(known[id]) | {"status": status}))
    _write(model_dir, decided)
    return decided


class _Rows(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    hour: int
    num_rows: int
    mask: str | None


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    start: int
    end: int
    log_version: int
    rows: tuple[_Rows, ...]
    kind: Kind
    reason: str
    held_at: str
    status: HeldStatus


def _folder(model_dir: Path) -> Path:
    return model_dir / "held"


def _free_id(model_dir: Path, start: int) -> str:
    hour = datetime.fromtimestamp(start * 3600, UTC).strftime("%Y-%m-%dT%H")
    taken = {path.stem for path in _folder(model_dir).glob("*.json")}
    names = (hour if number == 1 else f"{hour}-{number}" for number in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _write(model_dir: Path, window: HeldWindow) -> None:
    rows = tuple(
        _Rows(path=piece.file.path, hour=piece.file.hour, num_rows=piece.file.num_rows, mask=packed_mask(piece.mask))
        for piece in window.pieces
    )
    own = {name: value for name, value in vars(window).items() if name not in ("id", "pieces")}
    folder = _folder(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{window.id}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(_Record(rows=rows, **own).model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / f"{window.id}.json")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> HeldWindow:
    try:
        record = _Record.model_validate_json(path.read_bytes())
        pieces = tuple(
            Piece(
                file=LogFile(path=rows.path, hour=rows.hour, num_rows=rows.num_rows),
                mask=unpacked_mask(rows.mask, rows.num_rows),
            )
            for rows in record.rows
        )
    except (OSError, ValidationError, ValueError) as error:
        raise CheckpointError(
            f"{path} says which rows are held aside, and cannot be read ({error}); restore it, or "
            "remove it to have its rows learned"
        ) from error
    return HeldWindow(id=path.stem, pieces=pieces, **{name: getattr(record, name) for name in _OWN})


_OWN = ("start", "end", "log_version", "kind", "reason", "held_at", "status")
