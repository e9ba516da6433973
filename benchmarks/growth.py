"""What an update costs as its rows and as the model's tables grow: in seconds, in bytes written, in memory.

In:  nothing; click logs are generated in a temporary folder (`--folder` for another disk).
Out: two tables and three rates. Rows: one model, windows of 1 to 64 times as many rows, and the slope of log time over log
     rows (1: in proportion). Tables: windows of the same number of rows, one feature with 10^5 to 10^8 ids; what the version
     that was published wrote, and in how many seconds; beside it the whole version that a new model begins with.

    python benchmarks/growth.py [--rows 10000] [--times 1 4 16 64] [--ids 100000 1000000 10000000 100000000]
                                [--dim 8] [--repeat 3]

Every update runs in a process of its own, whose peak of resident memory is shown; figures are medians over `--repeat` updates.
A size whose memory or disk is not free is not run, and the table says so. Ids are drawn evenly, so that nearly every row
touches another row of the table.
"""

import argparse
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from data_schemas.dataset import load_spec
from data_schemas.hashing import mix64
from models.changed_rows import ChangedRows
from pipeline.config import UpdateConfig, load_config
from pipeline.data.lake import ClickLog
from pipeline.publishing.checkpoint import read_manifest
from pipeline.training.room import free_bytes
from pipeline.update import run_update

TOML = """
name = "growth"
user = "user"
item = "item"
event_key = ["*"]
[time]
column = "at"
[label]
column = "label"
[[categorical]]
name = "user"
type = "integer"
capacity = 65536
embedding_dim = 8
[[categorical]]
name = "item"
type = "integer"
capacity = {ids}
embedding_dim = {dim}
"""
SETTINGS = (
    "tracking.enabled=false",
    "alarms.action=off",
    "gate.action=off",
    "training.precision=fp32",
    "training.batch_size=2048",
    "training.micro_batch_size=2048",
    "delta_checkpoints_from_mib=0",
)
"""Deltas at every size, so that the smallest can be compared with the largest."""
START = datetime(2026, 1, 1, tzinfo=UTC)
USERS = 20_000
SMALL_TABLE = 100_000
"""Ids of the table where rows grow."""
IN_PROPORTION = ("load", "evaluate before learning", "learn", "evaluate after learning")
"""Stages whose work is rows; the others are those of any update."""
MIB, GIB = 1 << 20, 1 << 30


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rows", type=int, default=10_000, help="of a window")
    cli.add_argument("--times", type=int, nargs="*", default=[1, 4, 16, 64])
    cli.add_argument("--ids", type=int, nargs="*", default=[10**5, 10**6, 10**7, 10**8])
    cli.add_argument("--dim", type=int, default=8)
    cli.add_argument("--repeat", type=int, default=3)
    cli.add_argument("--folder", type=Path, default=None)
    cli.add_argument("--update-in", type=Path, help=argparse.SUPPRESS)
    options = cli.parse_args()
    if options.update_in:
        print(json.dumps(_update(_config(options.update_in))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.times:
            _show_rows(Path(folder), options)
        if options.ids:
            _show_tables(Path(folder), options)
            _show_rates(max(options.ids))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians over updates."""

    seconds: dict[str, float]
    """By stage, and `all`."""
    delta_bytes: float
    whole_bytes: float
    whole_seconds: float
    """Of the stage that publishes a new model, whole."""
    peak_bytes: float


def _measure(folder: Path, *, ids: int, dim: int, rows: int, repeat: int) -> Measured:
    """A new model, then updates that each restore it, in processes one after the other."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "growth.toml").write_text(TOML.format(ids=ids, dim=dim))
    config = _config(folder)
    log = ClickLog.open_or_create(config.log_path, load_spec(config.dataset))
    for hour in range(1 + repeat):
        _write_hour(log, hour, rows if hour else min(rows, 10_000))
    first, *updates = (_in_own_process(folder) for _ in range(1 + repeat))
    stages = {name: statistics.median(each["seconds"][name] for each in updates) for name in updates[0]["seconds"]}
    measured = Measured(
        seconds=stages | {"all": statistics.median(each["all"] for each in updates)},
        delta_bytes=statistics.median(each["delta_bytes"] for each in updates),
        whole_bytes=first["whole_bytes"],
        whole_seconds=first["seconds"]["checkpoint"],
        peak_bytes=statistics.median(each["peak_bytes"] for each in updates),
    )
    shutil.rmtree(folder)
    return measured


def _in_own_process(folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--update-in", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"an update failed with {done.returncode}:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _update(config: UpdateConfig) -> dict[str, Any]:
    """One update in this process."""
    report = run_update(config, now=START + timedelta(days=10))
    assert report is not None
    manifest = read_manifest(config.model_dir, report.version, ())
    stages = {name: seconds for name, seconds in report.seconds.items() if name != "publish"}
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM")]
    return {
        "seconds": stages,
        "all": sum(stages.values()),
        "delta_bytes": sum(part.bytes for part in manifest.parts if part.kind == "delta"),
        "whole_bytes": sum(part.bytes for part in manifest.parts if part.kind == "base"),
        "peak_bytes": peak,
    }


def _config(folder: Path) -> UpdateConfig:
    return load_config(overrides=[f"dataset={folder / 'growth.toml'}", f"state_dir={folder / 'state'}", *SETTINGS])


def _write_hour(log: ClickLog, hour: int, rows: int) -> None:
    rng = np.random.default_rng([hour, rows])
    since_epoch = int((START + timedelta(hours=hour)).timestamp()) // 3600
    user_R, item_R = rng.integers(0, USERS, rows), rng.integers(0, 2**62, rows)
    number_R = np.arange(rows, dtype=np.uint64) + np.uint64(hour << 40)
    columns = {
        "event_time": pa.array(np.full(rows, since_epoch * 3_600_000_000)).cast(pa.timestamp("us", tz="UTC")),
        "label": pa.array((rng.random(rows) < 0.1).astype(np.int8)),
        "event_key": pa.array(mix64(number_R).view(np.int64)),
        "user": pa.array(user_R),
        "item": pa.array(item_R),
    }
    files = log.write()
    files.add(since_epoch, pa.table(columns, schema=log.schema))
    log.append(files.close(), f"hour {hour}", rows_read=rows)


def _show_rows(folder: Path, options: argparse.Namespace) -> None:
    table = Table(title=f"Rows: tables of {SMALL_TABLE:,} ids x {options.dim}, medians of {options.repeat} updates")
    for column in ("rows", "update s", "of it in proportion s", "learn s", "us a row", "publish s", "peak MiB"):
        table.add_column(column, justify="right")
    sizes, seconds = [options.rows * times for times in options.times], []
    for rows in sizes:
        found = _measure(folder / "rows", ids=SMALL_TABLE, dim=options.dim, rows=rows, repeat=options.repeat)
        seconds.append(sum(found.seconds[name] for name in IN_PROPORTION))
        figures = (found.seconds["all"], seconds[-1], found.seconds["learn"])
        us_a_row, publish = f"{seconds[-1] / rows * 1e6:.1f}", f"{found.seconds['checkpoint']:.3f}"
        table.add_row(
            f"{rows:,}", *(f"{figure:.2f}" for figure in figures), us_a_row, publish, f"{found.peak_bytes / MIB:,.0f}"
        )
        _say(f"{rows:,} rows: {seconds[-1]:.2f} s")
    _console().print(table)
    if len(sizes) > 1:
        slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
        last = math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2])
        print(f"slope of log time over log rows: {slope:.2f}; between the two largest {last:.2f} (1: in proportion to rows)")


def _show_tables(folder: Path, options: argparse.Namespace) -> None:
    table = Table(title=f"Tables: windows of {options.rows:,} rows, ids x {options.dim}, medians of {options.repeat} updates")
    names = (
        "ids",
        "whole MiB",
        "published whole s",
        "delta MiB",
        "published s",
        "restore s",
        "learn s",
        "update s",
        "peak MiB",
    )
    for column in names:
        table.add_column(column, justify="right")
    published: list[float] = []
    for ids in options.ids:
        if why := _what_lacks(folder, ids, options.dim):
            table.add_row(f"{ids:,}", f"not run: {why}")
            continue
        found = _measure(folder / "ids", ids=ids, dim=options.dim, rows=options.rows, repeat=options.repeat)
        published.append(found.seconds["checkpoint"])
        table.add_row(
            f"{ids:,}",
            f"{found.whole_bytes / MIB:,.0f}",
            f"{found.whole_seconds:.2f}",
            f"{found.delta_bytes / MIB:.2f}",
            f"{published[-1]:.3f}",
            *(f"{found.seconds[name]:.2f}" for name in ("restore", "learn", "all")),
            f"{found.peak_bytes / MIB:,.0f}",
        )
        _say(f"{ids:,} ids: published in {published[-1]:.3f} s")
    _console().print(table)
    if len(published) > 1:
        print(f"publishing what was touched: {published[-1] / published[0]:.1f} times the seconds of the smallest table")


def _show_rates(ids: int) -> None:
    """Of what is done to each byte or id; medians of five."""
    block, rng, changed = bytes(64 * MIB), np.random.default_rng(0), ChangedRows(ids)
    rows = [torch.from_numpy(rng.integers(0, ids, 2048)) for _ in range(26)]
    digest = _median(lambda: hashlib.sha256(block).digest())
    noting = _median(lambda: [changed.add(each) for each in rows])
    finding = _median(changed.rows)
    print(f"comparing parts with their SHA-256: {len(block) / digest / 1e9:.2f} GB/s")
    print(
        f"noting 2,048 rows x 26 features as touched: {noting * 1e3:.2f} ms; finding them among {ids:,} rows: {finding:.4f} s"
    )


def _median(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    seconds = []
    for _ in range(5):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def _what_lacks(folder: Path, ids: int, dim: int) -> str | None:
    """What is not free for a table of so many ids; None where all is."""
    memory, disk = GIB + round(1.15 * ids * (4 * dim + 4 + 8 + 1)), GIB + 2 * ids * (4 * dim + 4 + 8)
    free, room = free_bytes(torch.device("cpu")), shutil.disk_usage(folder).free
    if memory > free:
        return f"needs {memory / GIB:.1f} GiB of memory, {free / GIB:.1f} are free"
    return f"needs {disk / GIB:.1f} GiB of disk, {room / GIB:.1f} are free" if disk > room else None


def _console() -> Console:
    return Console(width=160)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
