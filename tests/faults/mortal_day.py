"""A day of a state folder, lived by processes that can be killed at any moment.

Run as a script it is a server: it imports everything once, then forks a process for each order that it reads from its standard
input, so that a life is work and not imports, and a kill falls on work. One JSON object a line, in and out:

    {"do": "live", "folder": ..., "tracked": true, "kill_after": 0.7}  ->  {"ended": "killed", "stage": "learn", "seconds": 0.7}
    {"do": "live", "folder": ..., "tracked": true, "kill_at": 12}      ->  {"ended": "killed", "stage": "publishing: 12, ...}
    {"do": "inspect", "folder": ..., "tracked": true}                 ->  {"ended": "done", ..., "result": {...}}

Enters: a folder as `lay_out` makes it. Leaves: the same state folder, however often the process that makes it was killed.
"""

import hashlib
import json
import mmap
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.errors import TidemarkError
from pipeline.config import UpdateConfig, load_config
from pipeline.data.compaction import compact
from pipeline.data.held import held_windows
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine, RowRange
from pipeline.publishing import checkpoint
from pipeline.publishing.checkpoint import current_version, head_version, load_cursor, read_manifest, versions
from pipeline.publishing.report import read_history
from pipeline.publishing.tracking import UPDATE_TAG, open_experiment, prepare_mlflow, quiet_mlflow
from pipeline.update import run_update
from pipeline.vacuum import vacuum

T = TypeVar("T")

TOML = """
name = "mortal"
user = "user"
item = "item"
event_key = ["event_id"]
ages = ["item"]
[time]
column = "time"
[label]
column = "label"
[[categorical]]
name = "user"
type = "integer"
capacity = 42
embedding_dim = 8
ids = "admitted"
admit_after = 4
[[categorical]]
name = "item"
capacity = 64
embedding_dim = 8
[[categorical]]
name = "tags"
many = true
capacity = 32
embedding_dim = 8
[[numeric]]
name = "price"
lower = 0.0
[[counters]]
over = ["item"]
half_lives_hours = [1.0, 24.0]
[history]
of = ["item"]
length = 5
"""
SETTINGS = (
    "model.hidden=[8]",
    "model.interaction_dim=8",
    "training.precision='fp32'",
    "training.batch_size=64",
    "training.micro_batch_size=32",
    "sampling.replay_share=0.2",
    "sampling.replay_capacity=200",
    "evaluation.frozen_after_updates=1",
    "gate.action='enforce'",
    "gate.max_windows=2",
    "delta_checkpoints_from_mib=0",
    "maintenance.compact_files=2",
    "maintenance.compact_after_hours=0",
    "maintenance.removed_files_hours=1.0",
    "maintenance.orphan_hours=1.0",
)
START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = START + timedelta(hours=12)
ARRIVALS = ((0,), (1,), (2, 3))
"""Hours whose files arrive together; each but the first brings late rows of the hour before."""
LATER = timedelta(hours=200)
"""After which a vacuum takes everything that nothing needs."""


def lay_out(folder: Path, *, rows_per_hour: int) -> None:
    """The declaration, and what will arrive; the same bytes for the same arguments."""
    folder.mkdir(parents=True)
    (folder / "mortal.toml").write_text(TOML)
    (folder / "landing").mkdir()
    for number, hours in enumerate(ARRIVALS):
        coming = folder / "coming" / f"{number:02d}"
        coming.mkdir(parents=True)
        for hour in hours:
            rows = _rows(hour, rows_per_hour)
            pq.write_table(pa.Table.from_pylist(rows), coming / f"hour-{hour}.parquet")
            if hour:
                late = [{**row, "event_id": f"late-{row['event_id']}"} for row in _rows(hour - 1, rows_per_hour // 5)]
                late[0]["price"] = -1.0
                lines = "".join(json.dumps(row, default=datetime.isoformat) + "\n" for row in late)
                (coming / f"late-{hour}.jsonl").write_text(lines)
        (coming / f"broken-{number}.parquet").write_bytes(b"PAR1 and no more")


def config_of(folder: Path, *, tracked: bool) -> UpdateConfig:
    """Settings under which an update is a function of its rows alone."""
    places = [f"dataset={folder / 'mortal.toml'}", f"landing={folder / 'landing'}", f"state_dir={folder / 'state'}"]
    return load_config(overrides=[*places, *SETTINGS, f"tracking.enabled={str(tracked).lower()}"])


STEPS = ("_stage", "_write_tensors", "_write_arrays", "_sync_file", "write_durably", "_sync_folder", "point_to", "_prune")
"""Of publishing a version, in `checkpoint.py`; beside them renames, and folders that are deleted."""


def count_steps(kill_at: int, stage: Callable[[str], None]) -> Callable[[], int]:
    """From here on this process kills itself right before or right after the step of publishing of that number; how many there
    were."""
    done = 0

    def step(name: str) -> None:
        nonlocal done
        done += 1
        if done == kill_at:
            stage(f"publishing: {name}")
            os.kill(os.getpid(), signal.SIGKILL)

    def between(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **more: Any) -> Any:
            step(f"before {name}")
            result = work(*args, **more)
            step(f"after {name}")
            return result

        return stepped

    for name in STEPS:
        setattr(checkpoint, name, between(name, getattr(checkpoint, name)))
    for owner, name in ((Path, "rename"), (shutil, "rmtree")):
        setattr(owner, name, between(name, getattr(owner, name)))
    return lambda: done


def live(folder: Path, *, tracked: bool, stage: Callable[[str], None]) -> None:
    """Files arrive, are ingested and learned, and the table is kept small; a second life goes on where the first one ended."""
    config = config_of(folder, tracked=tracked)
    spec = load_spec(config.dataset)

    def staged(name: str, work: Callable[[], T]) -> T:
        stage(name)
        return work()

    for number in range(len(ARRIVALS)):
        _arrive(folder, number)
        stage("ingest")
        log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
        ingest_landing(config.landing, log, quarantine, spec, now=NOW)
        while run_update(config, stage=staged, now=NOW):
            stage("between updates")
        stage("compact")
        compact(log, config.maintenance)
        stage("vacuum")
        vacuum(config, spec, now=datetime.now(UTC) + LATER)


def inspect(folder: Path, *, tracked: bool) -> dict[str, Any]:
    """Everything that two state folders with the same past must agree on."""
    config = config_of(folder, tracked=tracked)
    spec = load_spec(config.dataset)
    held = [[window.id, window.status, window.num_rows] for window in held_windows(config.model_dir)]
    seen = {"log": _log(config, spec), "checkpoints": _checkpoints(config), "history": _history(config), "held": held}
    return seen | ({"mlflow": _mlflow(config)} if tracked else {}) | {"left behind": _left_behind(config, spec)}


def _rows(hour: int, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng([hour, count])
    users, items = rng.integers(0, 50, count), rng.integers(0, 30, count)
    clicked = rng.random(count) < 1 / (1 + np.exp(1 - np.sin(users) - np.cos(items)))
    return [
        {
            "event_id": f"{hour}-{place}",
            "time": START + timedelta(hours=hour, seconds=place),
            "label": int(clicked[place]),
            "user": int(users[place]),
            "item": f"i{items[place]}",
            "tags": [f"t{items[place] % 5}"] * int(items[place] % 3),
            "price": None if items[place] % 7 == 0 else float(items[place]),
        }
        for place in range(count)
    ]


def _arrive(folder: Path, number: int) -> None:
    coming = folder / "coming" / f"{number:02d}"
    if coming.is_dir():
        coming.rename(folder / "landing" / coming.name)


def _log(config: UpdateConfig, spec: DatasetSpec) -> dict[str, Any]:
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    files = log.files()
    table = log.read([RowRange.whole(file) for file in files], log.schema.names)
    keys = table.column("event_key").to_pylist()
    bad = [(Path(row["file"]).name, row["row"], row["reason"]) for row in quarantine.rows().to_pylist()]
    return {
        "version": log.version,
        "files": [[file.hour, file.source, file.num_rows] for file in files],
        "rows": len(keys),
        "keys": len(set(keys)),
        "content": hashlib.sha256("\n".join(map(str, table.to_pylist())).encode()).hexdigest(),
        "quarantined": sorted(map(str, bad)),
    }


def _checkpoints(config: UpdateConfig) -> dict[str, Any]:
    """Every weight, counter and bitmap as its hash, and what was consumed; without names of files and the time of day."""
    folder, found = config.model_dir, {}
    head = head_version(folder)
    for version in [*versions(folder), *([head] if head else [])]:
        manifest = read_manifest(folder, version)
        told = manifest.model_dump(mode="json", exclude={"created", "digest", "log_id", "pending", "spec"})
        pending = [(piece.file.hour, piece.file.source, piece.num_rows) for piece in load_cursor(folder, manifest).pending]
        found[str(version)] = json.dumps([told, pending], sort_keys=True)
    frozen = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("frozen/*"))}
    return {"current": current_version(folder), "head": head, "versions": found, "frozen": frozen}


def _history(config: UpdateConfig) -> list[list[Any]]:
    names = ("window_start", "outcome", "version", "serving", "log_version", "rows", "late_rows", "rows_learned", "before")
    return [[record[name] for name in names] for record in read_history(config.model_dir)]


def _mlflow(config: UpdateConfig) -> dict[str, Any]:
    with quiet_mlflow():
        client, experiment = open_experiment(config)
        runs = client.search_runs([experiment])
        updates = sorted([run.data.tags[UPDATE_TAG], run.info.status] for run in runs if UPDATE_TAG in run.data.tags)
        timelines = [run for run in runs if UPDATE_TAG not in run.data.tags]
        points = {run.info.run_id: client.get_metric_history(run.info.run_id, "rows/window") for run in timelines}
        name = f"mortal-{config.model_name}"
        model = client.get_registered_model(name)
        aliases = {
            alias: client.get_model_version(name, version).tags["checkpoint_version"]
            for alias, version in model.aliases.items()
        }
    values = [sorted((point.step, point.value) for point in history) for history in points.values()]
    return {"updates": updates, "timelines": values, "aliases": aliases}


def _left_behind(config: UpdateConfig, spec: DatasetSpec) -> list[str]:
    """Files that nothing names once a vacuum has run."""
    log, folder = ClickLog.open_or_create(config.log_path, spec), config.model_dir
    orphans = {str(path.relative_to(log.root)) for path in log.root.rglob("part-*.parquet")} - log.active_paths()
    kept = [*versions(folder), *filter(None, [head_version(folder)])]
    orphans -= {piece.path for version in kept for piece in read_manifest(folder, version).pending}
    orphans -= {piece.file.path for window in held_windows(folder) for piece in window.pieces}
    unfinished = [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]
    return sorted([*orphans, *unfinished])


def _serve() -> None:
    torch.set_num_threads(1)
    prepare_mlflow()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_obey(json.loads(line))) + "\n")
        answers.flush()


def _obey(order: dict[str, Any]) -> dict[str, Any]:
    """Forks a process for the order and waits for its end, or brings it about."""
    folder, told = Path(order["folder"]), mmap.mmap(-1, 256)
    result, started = folder / "result.json", time.monotonic()
    child = os.fork()
    if child == 0:
        _do(order, folder, told, result)
    descriptor = os.pidfd_open(child)
    try:
        ended, _, _ = select.select([descriptor], [], [], order.get("kill_after", 600))
        if not ended:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    finally:
        os.close(descriptor)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    answer = {"ended": "killed" if killed else "done" if status == 0 else "failed"}
    answer |= {"stage": told[:].rstrip(b"\0").decode(), "seconds": time.monotonic() - started}
    if answer["ended"] == "failed" or (order["do"] == "inspect" and status == 0):
        answer["result"] = json.loads(result.read_text())
    return answer


def _do(order: dict[str, Any], folder: Path, told: mmap.mmap, result: Path) -> None:
    """In the child; never returns."""

    def stage(name: str) -> None:
        told[:] = name.encode().ljust(256, b"\0")

    try:
        match order["do"]:
            case "live":
                steps = count_steps(order["kill_at"], stage) if "kill_at" in order else lambda: 0
                live(folder, tracked=order["tracked"], stage=stage)
                stage(f"{steps()} steps")
            case "inspect":
                result.write_text(json.dumps(inspect(folder, tracked=order["tracked"])))
            case "lay out":
                lay_out(folder, rows_per_hour=order["rows_per_hour"])
            case "open mlflow":
                open_experiment(config_of(folder, tracked=True))
    except BaseException as error:  # noqa: BLE001 - told to the parent
        traceback.print_exc()
        ours = isinstance(error, TidemarkError | OSError)
        result.write_text(json.dumps({"error": f"{type(error).__name__}: {error}", "named": ours}))
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _serve()
