"""Checkpoints: everything that the next update depends on, published atomically and verified on reading.

    <model_dir>/checkpoints/v000007/manifest.json            what was consumed, how it was learned, the hash of every part
                                   /dense.safetensors        dense weights, optimizer, averages
                                   /tables-0-of-1.safetensors    this process's rectangles of tables and accumulators
                                   /memory.safetensors       counters and histories, ids that have a row
                                   /rows.safetensors         past rows: of replay, of late clicks, of the gate
                                   /pending.safetensors      bitmaps of rows still to be learned
    <model_dir>/checkpoints/v000008/manifest.json            "base": 7, and the hashes of that version's parts as well
                                   /tables-0-of-1.changed.safetensors, memory.changed.safetensors    what changed since
    <model_dir>/checkpoints/v000009.unpublished/             learned, but not proven: the next update goes on from it
    <model_dir>/checkpoints/v000009.forgotten/               empty: its number is not given to another model
    <model_dir>/CURRENT                                      the name of the version that serves

A version is whole, or holds of tables and memory only what changed since a whole one, its base: all of it, so that a restore
reads the base and one delta. A base is published and stays as long as a version that is kept builds on it. A new base is due
once the deltas since the last one would have come to as many bytes as it has: each update then costs what it touched, and all
of them together at most about twice the least that they could.

A version is written into a temporary folder, synced, renamed, and only then does CURRENT move: a reader sees the old model
or the new one. Nothing here is a pickle.
"""

from __future__ import annotations  # torch and torchrec, which take seconds to import, are named in signatures alone

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from pipeline.training.room import tells_of_memory

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
FORMAT = 3
READABLE = (1, 2, FORMAT)
"""In format 1 every version is whole, past rows lie among the memory, and averages of table rows among the dense tensors; up to
format 2 features made of the time have wide weights, which are passed over."""
TIMES_WITHOUT_WEIGHT = 3
"""The first format in which features made of the time have no wide weight."""
Content = Literal["dense", "tables", "memory", "rows", "pending"]
Kind = Literal["base", "delta"]
OF_CURSOR: tuple[Content, ...] = ("pending",)
"""Parts that tell what a model has consumed."""
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)
"""Errors that say nothing of what a file holds: too many are open, no memory, the disk or the server does not answer."""


class _Saved(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Part(_Saved):
    """One file of a checkpoint."""

    kind: Kind
    """A delta holds only what was touched since the base."""
    content: Content
    of: int | None = None
    """The version whose folder holds the file; None: the one that the manifest is of."""
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
    micro_batch_size: int | None = None
    """Rows that went through the dense network at once in the last step; None in old checkpoints."""
    micro_batch_halvings: tuple[tuple[int, int], ...] = ()
    """Where memory did not suffice in the update: steps of the model before, and rows of a micro-batch from there on."""
    fastest_threads: int | None = None
    """With which a pass was found to be fastest; None: not measured."""
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
    base: int | None = None
    """The whole version that this one tells the changes of; None: it is whole itself."""
    delta_bytes: int = 0
    """What the deltas since the base hold together, this one included."""
    decays: tuple[float, ...] = ()
    """Factors that all accumulators were multiplied by since the base, in their order."""
    parts: tuple[Part, ...] = ()
    digest: str = ""
    """SHA-256 of the manifest as it is written with this empty; empty: nothing tells whether it has changed."""

    def plan_records(self) -> tuple[PlanRecord, ...]:
        """The plan trace of the update that made this checkpoint."""
        return tuple(PlanRecord(**record) for record in self.plan)


@dataclass(frozen=True, kw_only=True)
class Base:
    """A whole version that others can be told by their difference from."""

    version: int
    parts: tuple[Part, ...]
    """Its tables and its memory, as the manifest of a delta names them."""
    delta_bytes: int = 0
    """What the deltas since then hold together."""

    @property
    def bytes(self) -> int:
        """Of what a delta need not repeat."""
        return sum(part.bytes for part in self.parts)


def base_of(model_dir: Path, manifest: Manifest) -> Base | None:
    """What the version after this one can build on; None where that has to be whole.

    What is not published can be forgotten, and what an older tidemark wrote is not cut into the parts of today.
    """
    if manifest.format != FORMAT:
        return None
    if manifest.base is not None:
        parts = tuple(part for part in manifest.parts if part.of is not None)
        return Base(version=manifest.base, parts=parts, delta_bytes=manifest.delta_bytes)
    if manifest.version not in versions(model_dir):
        return None
    own = (part for part in manifest.parts if part.content in ("tables", "memory"))
    return Base(version=manifest.version, parts=tuple(part.model_copy(update={"of": manifest.version}) for part in own))


def is_due(base: Base, delta_bytes: int) -> bool:
    """Whether a new whole version costs less than going on with deltas of about this size.

    With deltas that grow by as much each time, a new base after n of them costs `F / n + r * n / 2` bytes an update, F those of
    the base and r what an update adds: least where all the deltas together come to F.
    """
    return base.delta_bytes + delta_bytes > base.bytes


def save_checkpoint(
    model_dir: Path,
    manifest: Manifest,
    *,
    dense: Mapping[str, torch.Tensor],
    tables: Iterable[Mapping[str, torch.Tensor]],
    memory: Mapping[str, npt.NDArray[Any]],
    rows: Mapping[str, npt.NDArray[Any]],
    pending: Mapping[str, torch.Tensor],
    base: Base | None = None,
    keep: int,
    processes: Processes,
    published: bool = True,
) -> Manifest:
    """Writes version `manifest.version` and makes it the current one; the older ones but for the last `keep` go.

    Each process writes its own rectangles of the tables; the first one writes everything else and publishes. One that is not
    to be `published` becomes the head instead: the next update goes on from it, and CURRENT stays.

    Args:
        model_dir: folder of the model.
        manifest: without its parts.
        dense: every dense tensor.
        tables: what each file of this process's rectangles holds: all of them, or what changed since `base`.
        memory: counters and the like, all of them, or what changed since `base`; only the first process's are looked at, and
            so it is with `dense` and `rows`.
        rows: past rows that are kept.
        pending: bitmaps.
        base: None for a version that is whole.
        keep: how many versions stay.
        processes: all of them call this.
        published: whether it serves.

    Returns:
        The manifest with its parts.

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
        own = list(_write_tables(staged, tables, processes, changed=base is not None))
        files = [name for names in processes.gather(own) for name in names]

        def publish() -> Manifest:
            complete = _finish(
                staged, final, manifest, files, dense=dense, memory=memory, rows=rows, pending=pending, base=base
            )
            settle(model_dir, manifest.version, published=published, keep=keep)
            return complete

        return processes.from_first(publish)
    except BaseException:
        if processes.is_first:  # it may be publishing still when another has failed
            shutil.rmtree(staged, ignore_errors=True)
        raise


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
    """Gives a corrupt version another name, so that it neither serves nor counts among those that are kept.

    Versions that build on it go on reading those of its files that are as they were written.
    """
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
    path = _folder(model_dir, version or 0)
    try:
        return _manifest_in(path).window_end
    except (OSError, ValueError):
        return None


def read_manifest(model_dir: Path, version: int, contents: Collection[Content] | None = None) -> Manifest:
    """The manifest, after every part was compared with its hash, those of the base included.

    Args:
        model_dir: folder of the model.
        version: one that is kept, whatever became of it.
        contents: compare only parts of these; None: all.

    Raises:
        CorruptCheckpoint: a part is missing or has changed.
    """
    folder = _folder(model_dir, version)
    try:
        manifest = _manifest_in(folder)
    except (OSError, ValidationError, ValueError) as error:
        if _is_of_the_machine(error, folder / MANIFEST):
            raise
        raise CorruptCheckpoint(f"checkpoint {_name(version)}: its manifest cannot be read ({error})") from error
    if manifest.format not in READABLE:
        raise CorruptCheckpoint(f"checkpoint {_name(version)}: format {manifest.format} is unknown to this tidemark; update it")
    for part in manifest.parts:
        if contents is None or part.content in contents:
            _verify(model_dir, manifest, part)
    return manifest


def load_dense(model_dir: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The tensors of the dense part, copied: what lives on must not hang on a mapped file.

    Raises:
        CorruptCheckpoint: the part holds no tensors, whatever its hash says. So do the loaders below.
    """
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in _files(model_dir, manifest, "dense"):
        with reading(path):
            tensors |= {name: tensor.clone() for name, tensor in load_file(path).items()}
    return tensors


def load_memory(model_dir: Path, manifest: Manifest) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The arrays of counters, histories and ids, then those of what changed since, where the version is not whole."""
    for path in _files(model_dir, manifest, "memory"):
        yield _load_arrays(path)


def load_rows(model_dir: Path, manifest: Manifest) -> dict[str, npt.NDArray[Any]]:
    """The arrays of past rows that are kept."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for path in _files(model_dir, manifest, "memory" if manifest.format == 1 else "rows"):
        arrays |= _load_arrays(path)
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
    """Turns what a file raises that does not hold what it should into `CorruptCheckpoint`; nothing in it is executed.

    What the machine fails in goes on as it is: a version that is sound must not be set aside for it.
    """
    try:
        yield
    except (SafetensorError, ValidationError, ValueError, LookupError, RuntimeError, OSError) as error:
        if _is_of_the_machine(error, path):
            raise
        raise CorruptCheckpoint(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _is_of_the_machine(error: Exception, path: Path) -> bool:
    """Whether the file may be sound all the same. Where no more files can be open, safetensors says that there is none."""
    if isinstance(error, OSError):
        return error.errno in OF_THE_MACHINE or (isinstance(error, FileNotFoundError) and path.is_file())
    return tells_of_memory(error) or (isinstance(error, RuntimeError) and "CUDA" in str(error))


def load_tables(
    model_dir: Path,
    manifest: Manifest,
    tables: EmbeddingTables,
    *,
    averages: Iterable[TableSlice] = (),
    new_tables: Collection[str] = (),
) -> None:
    """Fills `tables`, which may be cut otherwise than the saved ones, and the averages of their rows.

    What was touched since the base is marked as changed in `tables`.

    Args:
        model_dir: folder of the model.
        manifest: of the version.
        tables: filled, but for `new_tables`, which stay as they are.
        averages: filled as far as they are in the checkpoint.
        new_tables: `deep.<name>` and `wide.<name>` of tables that the checkpoint does not have.
    """
    from models.embeddings import Filling
    from pipeline.publishing.table_files import read_changed, read_whole

    own = [piece for piece in tables.slices() if piece.name.rpartition(".")[0] not in new_tables]
    filling, filling_averages = Filling(own), Filling(averages)
    for path in _files(model_dir, manifest, "tables", kind="base"):
        with reading(path):
            read_whole(path, filling, filling_averages)
    filling.require_whole()
    for factor in manifest.decays:
        tables.decay_accumulators(factor)
    for path in _files(model_dir, manifest, "tables", kind="delta"):
        with reading(path):
            read_changed(path, tables.changed, filling, filling_averages)


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


def _write_tables(
    staged: Path, tables: Iterable[Mapping[str, torch.Tensor]], processes: Processes, *, changed: bool
) -> Iterator[str]:
    """Writes this process's files; their names."""
    for number, content in enumerate(tables):
        name = _tables_file(processes.rank, processes.count, number, changed=changed)
        _write_tensors(staged / name, content)
        yield name


def _finish(
    staged: Path,
    final: Path,
    manifest: Manifest,
    files: Sequence[str],
    *,
    dense: Mapping[str, torch.Tensor],
    memory: Mapping[str, npt.NDArray[Any]],
    rows: Mapping[str, npt.NDArray[Any]],
    pending: Mapping[str, torch.Tensor],
    base: Base | None,
) -> Manifest:
    """Writes what is left, then the manifest over all parts, and gives the folder its name.

    Raises:
        OSError: one of `files`, which the processes say they have written, is not there.
    """
    if absent := [name for name in files if not (staged / name).is_file()]:
        raise OSError(
            f"{', '.join(absent)} of the other processes cannot be seen in {staged}; nothing is published. Give all of them "
            "one state_dir on a file system that they share, and run again"
        )
    kind: Kind = "delta" if base else "base"
    _write_tensors(staged / "dense.safetensors", dense)
    parts = [_describe(staged, "dense", "dense.safetensors")]
    parts += [_describe(staged, "tables", name, kind) for name in sorted(files)]
    if memory:
        parts.append(_write_arrays(staged, "memory", memory, kind))
    if rows:
        parts.append(_write_arrays(staged, "rows", rows, "base"))
    if pending:
        _write_tensors(staged / "pending.safetensors", pending)
        parts.append(_describe(staged, "pending", "pending.safetensors"))
    complete = manifest.model_copy(update={"parts": tuple(parts)} if base is None else _as_delta(base, parts))
    complete = complete.model_copy(update={"digest": hashlib.sha256(_as_json(complete)).hexdigest()})
    write_durably(staged / MANIFEST, _as_json(complete))
    _sync_folder(staged)
    staged.rename(final)
    _sync_folder(final.parent)
    return complete


def _as_delta(base: Base, parts: list[Part]) -> dict[str, Any]:
    """What the manifest of a version says that builds on `base`; the base's parts come first."""
    own_bytes = sum(part.bytes for part in parts if part.kind == "delta")
    return {"parts": (*base.parts, *parts), "base": base.version, "delta_bytes": base.delta_bytes + own_bytes}


_CHANGED = ".changed"


def _tables_file(rank: int, count: int, number: int, *, changed: bool) -> str:
    further = f"-{number:05d}" if number else ""
    return f"tables-{rank}-of-{count}{further}{_CHANGED if changed else ''}.safetensors"


def _load_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    with reading(path):
        arrays: dict[str, npt.NDArray[Any]] = load_arrays(path)
    return arrays


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    with writing(path):
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    _sync_file(path)


def _write_arrays(staged: Path, content: Content, arrays: Mapping[str, npt.NDArray[Any]], kind: Kind) -> Part:
    path = staged / f"{content}{_CHANGED if kind == 'delta' else ''}.safetensors"
    with writing(path):
        save_arrays(dict(arrays), path)
    _sync_file(path)
    return _describe(staged, content, path.name, kind)


def _sync_file(path: Path) -> None:
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _as_json(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=1).encode()


def _manifest_in(folder: Path) -> Manifest:
    content = (folder / MANIFEST).read_bytes()
    manifest = Manifest.model_validate_json(content)
    if manifest.digest and hashlib.sha256(content.replace(manifest.digest.encode(), b"", 1)).hexdigest() != manifest.digest:
        raise ValueError("it has changed since it was written")
    return manifest


def _describe(folder: Path, content: Content, file: str, kind: Kind = "base") -> Part:
    path = folder / file
    return Part(kind=kind, content=content, file=file, bytes=path.stat().st_size, sha256=_sha256(path))


def _files(model_dir: Path, manifest: Manifest, content: str, kind: str | None = None) -> Iterator[Path]:
    """Of this content; those of the base before those of what changed."""
    parts = (part for part in manifest.parts if part.content == content and kind in (None, part.kind))
    return (_place(model_dir, manifest, part) for part in parts)


def _place(model_dir: Path, manifest: Manifest, part: Part) -> Path:
    """Where a part lies; the version that holds it may have been set aside for another of its parts."""
    if part.of is None:
        return _folder(model_dir, manifest.version) / part.file
    folder = _folder(model_dir, part.of)
    aside = folder.with_name(f"{_name(part.of)}{CORRUPT}")
    return (aside if not folder.is_dir() and aside.is_dir() else folder) / part.file


def _verify(model_dir: Path, manifest: Manifest, part: Part) -> None:
    whose = "" if part.of is None else f" of {_name(part.of)}, which it builds on,"
    what = f"checkpoint {_name(manifest.version)}: {part.file}{whose}"
    path = _place(model_dir, manifest, part)
    if Path(part.file).name != part.file:
        raise CorruptCheckpoint(f"checkpoint {_name(manifest.version)}: part {part.file!r} is not a plain file name")
    if not path.is_file():
        raise CorruptCheckpoint(f"{what} is missing")
    found = _sha256(path)
    if found != part.sha256:
        raise CorruptCheckpoint(f"{what} has hash {found[:12]}, the manifest {part.sha256[:12]}")


def _prune(folder: Path, keep: int) -> None:
    """All but the last `keep` go, and what those build on.

    Where all of them build on the same base, the newest version that does not stays too: one file that breaks must not leave
    nothing to go back to.
    """
    serving, undone = versions(folder.parent), undone_versions(folder.parent)
    root = {number: _base_or_itself(folder.parent, number) for number in (*serving, *undone)}
    stay = [*serving[-keep:], *undone[-keep:]]
    others = [number for number in serving if root[number] != root[serving[-1]]] if serving else []
    needed = {*stay, *others[-1:], *(_base_or_itself(folder.parent, number) for number in _numbers(folder.parent, UNPUBLISHED))}
    needed |= {root[number] for number in (*stay, *others[-1:])}
    for numbers, ending in ((serving, ""), (undone, UNDONE)):
        for number in reversed(numbers):  # a base after what builds on it
            if number not in needed:
                shutil.rmtree(folder / f"{_name(number)}{ending}")


def _base_or_itself(model_dir: Path, version: int) -> int:
    """What a version builds on; itself where it is whole, or cannot be read."""
    try:
        return _manifest_in(_folder(model_dir, version)).base or version
    except (OSError, ValueError):
        return version


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
