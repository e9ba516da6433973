"""What a model still has before it: rows that wait in the click log, and windows that are held aside.

Enters: the settings. Leaves: counts, from the state folder alone; nothing is made or changed.
"""

from dataclasses import dataclass
from datetime import datetime

from data_schemas.errors import CheckpointError
from pipeline.config import UpdateConfig
from pipeline.data.held import HeldWindow, held_windows
from pipeline.data.lake import ClickLog
from pipeline.data.windows import as_time, waiting_pieces
from pipeline.publishing.checkpoint import OF_CURSOR, current_version, head_version, load_cursor, read_manifest


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What waits."""

    rows: int
    """In the click log, neither learned nor held aside."""
    since: datetime | None
    """Oldest hour of them, UTC; None for no rows."""
    until: datetime | None
    """End of their newest hour."""
    held: tuple[HeldWindow, ...]
    """Windows that a person has to decide on."""
    released: tuple[HeldWindow, ...]
    """Windows that the next update learns."""


def pending_of(config: UpdateConfig) -> Pending:
    """What waits for the model.

    Raises:
        CheckpointError: what it has consumed cannot be told: it has no checkpoint yet, or one that cannot be read.
        DataError: the click log cannot be read.
    """
    folder = config.model_dir
    version = head_version(folder) or current_version(folder)
    if version is None:
        raise CheckpointError("the model has no checkpoint yet")
    manifest = read_manifest(folder, version, OF_CURSOR)
    if manifest.spec is None or not (config.log_path / "_delta_log").is_dir():
        raise CheckpointError(f"there is no click log in {config.log_path} that version {version} could be compared with")
    cursor, held = load_cursor(folder, manifest), held_windows(folder)
    waiting, _ = waiting_pieces(ClickLog.open_or_create(config.log_path, manifest.spec), cursor, held)
    hours = [piece.file.hour for piece in waiting]
    return Pending(
        rows=sum(piece.num_rows for piece in waiting),
        since=as_time(min(hours)) if hours else None,
        until=as_time(max(hours) + 1) if hours else None,
        held=tuple(window for window in held if window.status == "held"),
        released=tuple(window for window in held if window.status == "released" and window.id not in cursor.released),
    )
