"""Checkpoints: everything that the next update depends on, published atomically and verified on reading.

    <model_dir>/checkpoints/v000007/manifest.json            what was consumed, how it was learned, the hash of every part
                                   /dense.safetensors        dense weights, optimizer, averages
                                   /tables-0-of-1.safetensors    this process's rectangles of tables and accumulators
                                   /memory.safetensors       counters and histories
                                   /pending.safetensors      bitmaps of rows still to be learned
    <model_dir>/checkpoints/v000008.unpublished/             learned, but not proven: the next update goes on from it
    <model_dir>/checkpoints/v000008.forgotten/               empty: its number is not given to another model
    <model_dir>/CURRENT                                      the name of the version that serves

A version is written into a temporary folder, synced, renamed, and only then does CURRENT move: a reader sees the old model
or the new one. Nothing here is a pickle.
"""

from __future__ import annotations  # torch and torchrec, which take seconds to import, are named in signatures alone

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CorruptCheckpoint
from pipeline.data.lake import LogFile
from pipeline.data.lineage import Piece
from pipeline.data.normalise import RunningMoments
from pipeline.data.windows import Cursor
from pipeline.outcome import PlanRecord

if TYPE_CHECKING:
    import torch

    from models.embeddings import EmbeddingTables, TableSlice
    from pipeline.training.processes import Processes

MANIFEST = "manifest.json"
CURRENT = "CURRENT"
UNDONE = ".undone"
"""Ending of the folder of a version that a rollback took out of service."""
UNPUBLISHED = ".unpublished"
"""Ending of the folder of a version that learned on, and does not serve."""
FORGOTTEN = ".forgotten"
"""Ending of the empty folder that keeps the number of a version which was not proven."""
CORRUPT = ".corrupt"
"""Ending of the folder of a version that was set aside."""
FORMAT = 1
Content = Literal["dense", "tables", "memory", "pending"]


class _Saved(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Part(_Saved):
    """One file of a checkpoint."""

    kind: Literal["base", "delta"]
    """A delta holds only the rows touched since the base before it."""
    content: Content
    file: str
    bytes: int
    sha256: str


class PendingRows(_Saved):
    """Rows of a click-log file that are still to be learned."""

    path: str
    hour: int
    num_rows: int
    bitmap: str | None
    """Name of the packed bitmap in the `pending` part; None: all rows."""


class Moments(_Saved):
    """Running normalisation of the dense columns."""

    count: tuple[float, ...]
    mean: tuple[float, ...]
    deviations: tuple[float, ...]

    @classmethod
    def of(cls, moments: RunningMoments | None) -> Moments | None:
        """As they are written down."""
        if moments is None:
            return None
        return cls(count=tuple(moments.count_N), mean=tuple(moments.mean_N), deviations=tuple(moments.deviations_N))

    def running(self) -> RunningMoments:
        """As they go on."""
        columns = (np.array(column, np.float64) for column in (self.count, self.mean, self.deviations))
        return RunningMoments(**dict(zip(("count_N", "mean_N", "deviations_N"), columns, strict=True)))


class Sampled(_Saved):
    """How the window's rows were sampled: these settings and the window's seed give the same rows again."""

    settings: Mapping[str, Any]
    """The settings `[sampling]`."""
    plan: Mapping[str, list[Any]]
    """Column names and rows of the plan's table."""


class Manifest(_Saved):
    """What a checkpoint is."""

    format: int = FORMAT
    version: int
    created: str
    dataset: str
    spec_fingerprint: str
    spec: DatasetSpec | None = None
    """That the model was trained on, so that one with more features can go on from it."""
    model_fingerprint: str
    """Changes with everything that changes the shape of a weight or of an optimizer's state."""
    precision: Literal["fp32", "bf16", "fp16"]
    steps: int
    average_steps: Mapping[str, float] = {}
    """Observations in each moving average."""
    loss_scale: Mapping[str, float] = {}
    """State of the gradient scaler; only with fp16."""
    log_id: str
    log_version: int | None
    window_start: int
    window_end: int
    """Hours since the epoch."""
    window_seed: tuple[int, ...]
    permutation_position: int
    """Rows of the seeded permutation that the pass came to: where a replay of the plan stops."""
    plan: tuple[dict[str, Any], ...]
    """`PlanRecord`s."""
    sampling: Sampled | None = None
    """None where every row was learned, in no order but the seed's."""
    pending: tuple[PendingRows, ...]
    released: tuple[str, ...] = ()
    """Windows that were held aside, released, and learned."""
    moments: Moments | None
    parts: tuple[Part, ...] = ()

    def plan_records(self) -> tuple[PlanRecord, ...]:
        """The plan trace of the update that made this checkpoint."""
        return tuple(PlanRecord(**record) for record in self.plan)


def save_checkpoint(
    model_dir: Path,
    manifest: Manifest,
    *,
    dense: Mapping[str, torch.Tensor],
    tables: EmbeddingTables,
    memory: Mapping[str, npt.NDArray[Any]],
    pending: Mapping[str, torch.Tensor],
    keep: int,
    processes: Processes,
    published: bool = True,
) -> Path:
    """Writes version `manifest.version` and makes it the current one; the older ones but for the last `keep` go.

    Each process writes its own rectangles of the tables; the first one writes everything else and publishes. One that is not
    to be `published` becomes the head instead: the next update goes on from it, and CURRENT stays.

    Raises:
        OSError: the disk is full or not writable; the version before stays current and nothing is left behind.
    """
    folder = model_dir / "checkpoints"
    staged = folder / f"{_name(manifest.version)}.tmp"
    final = folder / f"{_name(manifest.version)}{'' if published else UNPUBLISHED}"
    if processes.rank == 0:
        _stage(folder, staged)
    processes.wait()
    try:
        _write_tensors(staged / _tables_file(processes.rank, processes.count), _by_key(tables))
        processes.wait()
        if processes.rank == 0:
            _finish(staged, final, manifest, dense=dense, memory=memory, pending=pending, num_table_files=processes.count)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if processes.rank == 0:
        settle(model_dir, manifest.version, published=published, keep=keep)
    processes.wait()
    return final


def settle(model_dir: Path, version: int, *, published: bool, keep: int) -> None:
    """Makes a whole version the current one, or the head if it is not `published`; all but the last `keep` go."""
    if published:
        point_to(model_dir, version)
    _prune(model_dir / "checkpoints", keep)
    forget_unpublished(model_dir, but=None if published else version)


def versions(model_dir: Path) -> list[int]:
    """Versions on disk, oldest first, broken ones included."""
    return _numbers(model_dir, "")


def head_version(model_dir: Path) -> int | None:
    """The version that the next update goes on from where it is not the current one: later than that, and unpublished."""
    newest = max(_numbers(model_dir, UNPUBLISHED), default=None)
    current = current_version(model_dir)
    return newest if newest is not None and newest > (current or 0) else None


def publish_head(model_dir: Path, version: int) -> None:
    """Makes the head the current version as it is; a kill on the way leaves one that is restored all the same."""
    point_to(model_dir, version)
    folder = model_dir / "checkpoints"
    (folder / f"{_name(version)}{UNPUBLISHED}").rename(folder / _name(version))
    _sync_folder(folder)


def forget_unpublished(model_dir: Path, *, but: int | None = None) -> None:
    """Deletes what learned on and was not proven, except one version; its number stays taken.

    One rename takes the version away, and what it leaves is the mark of its number: no moment hands the number out again.
    """
    folder = model_dir / "checkpoints"
    for number in _numbers(model_dir, UNPUBLISHED):
        if number != but:
            (folder / f"{_name(number)}{UNPUBLISHED}").rename(folder / f"{_name(number)}{FORGOTTEN}")
    forgotten = [folder / f"{_name(number)}{FORGOTTEN}" for number in _numbers(model_dir, FORGOTTEN)]
    for mark in forgotten[:-1]:
        shutil.rmtree(mark)
    for mark in forgotten[-1:]:
        for left in mark.iterdir():
            left.unlink()


def undone_versions(model_dir: Path) -> list[int]:
    """Versions that a rollback took out of service, oldest first; they are kept as long as others are."""
    return _numbers(model_dir, UNDONE)


def next_version(model_dir: Path) -> int:
    """A number that no version had, not even one that was set aside, undone or forgotten."""
    endings = ("", UNPUBLISHED, UNDONE, CORRUPT, FORGOTTEN)
    return max((number for ending in endings for number in _numbers(model_dir, ending)), default=0) + 1


def current_version(model_dir: Path) -> int | None:
    """The version that CURRENT names; None before the first."""
    pointer = model_dir / CURRENT
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    if not name[1:].isdigit():
        raise CorruptCheckpoint(f"{pointer} says {name!r}; write the name of a folder in checkpoints/ into it, such as v000001")
    return int(name[1:])


def point_to(model_dir: Path, version: int) -> None:
    """Makes `version` the current one, in one step that a crash cannot halve."""
    pointer = model_dir / CURRENT
    temporary = pointer.with_suffix(".tmp")
    write_durably(temporary, f"{_name(version)}\n".encode())
    temporary.replace(pointer)
    _sync_folder(model_dir)


def set_aside(model_dir: Path, version: int) -> None:
    """Gives a corrupt version another name, so that it neither serves nor counts among those that are kept."""
    folder = _folder(model_dir, version)
    if folder.is_dir():
        folder.rename(folder.with_name(f"{_name(version)}{CORRUPT}"))


def go_back_to(model_dir: Path, version: int) -> None:
    """Makes a whole version current, and takes the later ones out of service: a later corrupt one must not bring them back.

    Args:
        model_dir: folder of the model.
        version: one of `versions` or `undone_versions`, whole.
    """
    folder = model_dir / "checkpoints"
    forget_unpublished(model_dir)
    for number in undone_versions(model_dir):
        if number <= version:
            (folder / f"{_name(number)}{UNDONE}").rename(folder / _name(number))
    point_to(model_dir, version)
    for number in versions(model_dir):
        if number > version:
            (folder / _name(number)).rename(folder / f"{_name(number)}{UNDONE}")
    _sync_folder(folder)


def learned_until(model_dir: Path) -> int | None:
    """End of the last window that was learned, in hours since 1970; None where no version can tell.

    The manifest alone is read, and not compared with anything.
    """
    version = head_version(model_dir) or current_version(model_dir)
    path = _folder(model_dir, version or 0) / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes()).window_end
    except (OSError, ValueError):
        return None


def read_manifest(model_dir: Path, version: int) -> Manifest:
    """The manifest, after every part was compared with its hash.

    Raises:
        CorruptCheckpoint: a part is missing or has changed.
    """
    folder = _folder(model_dir, version)
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError, ValueError) as error:
        raise CorruptCheckpoint(f"checkpoint {_name(version)}: its manifest cannot be read ({error})") from error
    if manifest.format != FORMAT:
        raise CorruptCheckpoint(f"checkpoint {_name(version)}: format {manifest.format} is unknown to this tidemark; update it")
    for part in manifest.parts:
        _verify(folder, part)
    return manifest


def load_dense(model_dir: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The tensors of the dense part.

    Raises:
        CorruptCheckpoint: the part holds no tensors, whatever its hash says. So do the loaders below.
    """
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in _files(model_dir, manifest, "dense"):
        with reading(path):
            tensors |= load_file(path)
    return tensors


def load_memory(model_dir: Path, manifest: Manifest) -> dict[str, npt.NDArray[Any]]:
    """The arrays of counters and histories."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for path in _files(model_dir, manifest, "memory"):
        with reading(path):
            arrays |= load_arrays(path)
    return arrays


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what safetensors raises of a full disk into the `OSError` that it is."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}; free space, and run again") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a file raises that does not hold what it should into `CorruptCheckpoint`; nothing in it is executed."""
    try:
        yield
    except (SafetensorError, ValidationError, ValueError, KeyError, OSError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def load_tables(
    model_dir: Path,
    manifest: Manifest,
    tables: EmbeddingTables,
    *,
    with_optimizer: bool = True,
    new_tables: Collection[str] = (),
) -> None:
    """Fills `tables`, which may be cut otherwise than the saved ones; `new_tables` stay as they are."""
    from safetensors.torch import load_file

    from models.embeddings import TableSlice

    saved: dict[str, list[TableSlice]] = {}
    for path in _files(model_dir, manifest, "tables"):
        with reading(path):
            tensors = load_file(path)
        for key, tensor in tensors.items():
            name, _, place = key.partition("@")
            row, column = (int(offset) for offset in place.split(","))
            saved.setdefault(name, []).append(TableSlice(name=name, row=row, column=column, tensor=tensor))
    tables.load_slices(saved, with_optimizer=with_optimizer, new_tables=new_tables)


def pack_pending(cursor: Cursor) -> tuple[tuple[PendingRows, ...], dict[str, torch.Tensor]]:
    """The cursor's pending rows, and the bitmaps that they name."""
    import torch

    rows: list[PendingRows] = []
    bitmaps: dict[str, torch.Tensor] = {}
    for number, piece in enumerate(cursor.pending):
        name = None if piece.mask is None else f"bitmap-{number}"
        if piece.mask is not None and name:
            bitmaps[name] = torch.from_numpy(np.packbits(piece.mask))
        file = piece.file
        rows.append(PendingRows(path=file.path, hour=file.hour, num_rows=file.num_rows, bitmap=name))
    return tuple(rows), bitmaps


def load_cursor(model_dir: Path, manifest: Manifest) -> Cursor:
    """What the checkpoint's model has consumed."""
    bitmaps: dict[str, npt.NDArray[Any]] = {}
    for path in _files(model_dir, manifest, "pending"):
        with reading(path):
            bitmaps |= load_arrays(path)
    pieces = []
    for rows in manifest.pending:
        file = LogFile(path=rows.path, hour=rows.hour, num_rows=rows.num_rows)
        mask = np.unpackbits(bitmaps[rows.bitmap], count=rows.num_rows).astype(bool) if rows.bitmap else None
        pieces.append(Piece(file=file, mask=mask))
    return Cursor(
        log_id=manifest.log_id,
        log_version=manifest.log_version,
        window_end=manifest.window_end,
        pending=tuple(pieces),
        released=manifest.released,
    )


def write_durably(path: Path, content: bytes) -> None:
    """Writes and syncs a file."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _stage(folder: Path, staged: Path) -> None:
    """An empty temporary folder; what a killed update left behind is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob("*.tmp"):
        shutil.rmtree(unfinished)
    staged.mkdir()


def _finish(
    staged: Path,
    final: Path,
    manifest: Manifest,
    *,
    dense: Mapping[str, torch.Tensor],
    memory: Mapping[str, npt.NDArray[Any]],
    pending: Mapping[str, torch.Tensor],
    num_table_files: int,
) -> None:
    """Writes what is left, then the manifest over all parts, and gives the folder its name."""
    _write_tensors(staged / "dense.safetensors", dense)
    parts = [_describe(staged, "dense", "dense.safetensors")]
    parts += [_describe(staged, "tables", _tables_file(rank, num_table_files)) for rank in range(num_table_files)]
    if memory:
        with writing(staged):
            save_arrays(dict(memory), staged / "memory.safetensors")
        _sync_file(staged / "memory.safetensors")
        parts.append(_describe(staged, "memory", "memory.safetensors"))
    if pending:
        _write_tensors(staged / "pending.safetensors", pending)
        parts.append(_describe(staged, "pending", "pending.safetensors"))
    complete = manifest.model_copy(update={"parts": tuple(parts)})
    write_durably(staged / MANIFEST, complete.model_dump_json(indent=1).encode())
    _sync_folder(staged)
    staged.rename(final)
    _sync_folder(final.parent)


def _tables_file(rank: int, count: int) -> str:
    return f"tables-{rank}-of-{count}.safetensors"


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    with writing(path):
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _describe(folder: Path, content: Content, file: str) -> Part:
    path = folder / file
    return Part(kind="base", content=content, file=file, bytes=path.stat().st_size, sha256=_sha256(path))


def _by_key(tables: EmbeddingTables) -> dict[str, torch.Tensor]:
    pieces = () if tables.saved_elsewhere else tables.slices()
    return {f"{piece.name}@{piece.row},{piece.column}": piece.tensor for piece in pieces}


def _files(model_dir: Path, manifest: Manifest, content: str) -> Iterator[Path]:
    folder = _folder(model_dir, manifest.version)
    return (folder / part.file for part in manifest.parts if part.content == content)


def _verify(folder: Path, part: Part) -> None:
    path = folder / part.file
    if Path(part.file).name != part.file:
        raise CorruptCheckpoint(f"checkpoint {folder.name}: part {part.file!r} is not a plain file name")
    if not path.is_file():
        raise CorruptCheckpoint(f"checkpoint {folder.name}: {part.file} is missing")
    found = _sha256(path)
    if found != part.sha256:
        raise CorruptCheckpoint(f"checkpoint {folder.name}: {part.file} has hash {found[:12]}, the manifest {part.sha256[:12]}")


def _prune(folder: Path, keep: int) -> None:
    for version in versions(folder.parent)[:-keep]:
        shutil.rmtree(folder / _name(version))
    for version in undone_versions(folder.parent)[:-keep]:
        shutil.rmtree(folder / f"{_name(version)}{UNDONE}")


def _numbers(model_dir: Path, ending: str) -> list[int]:
    """Of the folders with this ending, rising."""
    names = (path.name for path in (model_dir / "checkpoints").glob(f"v*{ending}"))
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(rf"v(\d{{6,}}){re.escape(ending)}", name)))


def _folder(model_dir: Path, version: int) -> Path:
    """Of a version, whatever became of it: no number is used twice."""
    folder = model_dir / "checkpoints" / _name(version)
    others = (folder.with_name(f"{folder.name}{ending}") for ending in (UNPUBLISHED, UNDONE))
    return next((path for path in (folder, *others) if path.is_dir()), folder)


def _name(version: int) -> str:
    return f"v{version:06d}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
