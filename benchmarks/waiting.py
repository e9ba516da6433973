"""How long does the learner wait for its rows, and what does overlapping reading and cutting with learning save?

In:  nothing; synthetic clicks are generated in a temporary folder. Out: two tables. The first, one line a batch size: a pass
     over one window with its batches cut between the steps, and cut ahead: seconds, share of them that the learner waited, and
     chunks that were cut for nothing. The second: a backfill without any overlap, and with what a backfill overlaps.

    python benchmarks/waiting.py [--rows 50000] [--hours 6] [--repetitions 5] [--seed 0]

Both ways take turns, pass by pass and hour by hour. Passes begin with the same weights and learn the same bits, which is
checked. Figures of passes are medians; those of the backfill are sums over its hours, the first left out. Wanted: the learner
waits for less than 5 % of the time. `load` reads and hashes before the first step: a window is evaluated before it is learned,
so that only the window after it can be read meanwhile; `load + waited` counts all of it as waiting, encoding and counters too.
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from data_schemas.dataset import load_spec
from data_schemas.examples import Examples
from flows.catching_up import reads_of
from pipeline import update
from pipeline.config import UpdateConfig, load_config
from pipeline.data.encode import encode
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine, RowRange
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.data.windows import as_time
from pipeline.model_state import ModelState, admit_ids, restore_or_create
from pipeline.training.batch_size import batch_policy
from pipeline.training.learn import Learned, learn
from pipeline.training.processes import Processes

T = TypeVar("T")

WANTED_SHARE = 0.05
SHAPES = ((128, 0), (256, 2048), (1024, 0), (4096, 0), (1024, 8192))
"""Batch size and rows of a sparse step; the first is the data set's own."""


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rows", type=int, default=50_000, help="of an hour")
    cli.add_argument("--hours", type=int, default=6)
    cli.add_argument("--repetitions", type=int, default=5)
    cli.add_argument("--seed", type=int, default=0)
    options = cli.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stream = SyntheticConfig(seed=options.seed, hours=options.hours, rows_per_hour=options.rows, traffic_ratio=1.0)
        write_landing(stream, folder / "landing")
        ways = {way: _config(folder, way) for way in ("one after the other", "overlapped")}
        for config in ways.values():
            _ingest(config)
        _print_passes(ways["overlapped"], options.repetitions)
        _print_backfill(ways["one after the other"], ways["overlapped"], options.hours)


def _config(folder: Path, way: str, *overrides: str) -> UpdateConfig:
    quiet = ["tracking.enabled=false", "gate.action=off", "alarms.action=off", "training.precision=fp32"]
    # Not measured anew for each pass: both ways have to learn the same bits.
    quiet += ["training.micro_batch_size=512", f"training.threads={torch.get_num_threads()}"]
    return load_config(overrides=[f"landing={folder / 'landing'}", f"state_dir={folder / way}", *quiet, *overrides])


def _ingest(config: UpdateConfig) -> None:
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))


def _print_passes(config: UpdateConfig, repetitions: int) -> None:
    spec = load_spec(config.dataset)
    log = ClickLog.open_or_create(config.log_path, spec)
    first = log.files()[0].hour
    ranges = [RowRange.whole(file) for file in log.files() if file.hour == first]
    examples = to_examples(log.read(ranges, columns_to_read(spec)), spec)
    print(f"passes over {examples.num_rows:,} rows, {torch.get_num_threads()} threads for tensors")
    head = (
        f"{'batch':>6} {'chunk':>6} {'cut between, s':>15} {'waited':>8} {'cut ahead, s':>13} {'waited':>8} {'for nothing':>12}"
    )
    print(f"{head} {'ratio':>6}")
    for batch_size, chunk_rows in SHAPES:
        own = {"batch_size": batch_size, "sparse_step_rows": chunk_rows}
        shaped = config.model_copy(update={"training": config.training.model_copy(update=own)})
        passes: dict[bool, list[Learned]] = {False: [], True: []}
        for _ in range(repetitions):
            weights = []
            for ahead in passes:
                learned, state = _pass(shaped, examples, first, ahead=ahead)
                passes[ahead].append(learned)
                weights.append(torch.cat([value.flatten() for value in state.learner.dense_weights(averaged=False).values()]))
            assert torch.equal(*weights), "both ways learn the same bits"
        seconds = {ahead: statistics.median(learned.seconds for learned in done) for ahead, done in passes.items()}
        shares = {ahead: statistics.median(learned.waiting_share or 0.0 for learned in done) for ahead, done in passes.items()}
        print(
            f"{batch_size:6,} {chunk_rows or batch_size:6,} {seconds[False]:15.2f} {shares[False]:8.1%} {seconds[True]:13.2f} "
            f"{shares[True]:8.1%} {passes[True][-1].thrown_away:12,} {seconds[True] / seconds[False]:6.2f}"
        )


def _pass(config: UpdateConfig, examples: Examples, hour: int, *, ahead: bool) -> tuple[Learned, ModelState]:
    """By a new model."""
    spec = load_spec(config.dataset)
    state = restore_or_create(config, spec, Processes())
    window = encode(examples, spec, state.memory, None, hour=hour, ids=state.ids)
    window, _ = admit_ids(state, examples, window, spec, hour=hour)
    return learn(state.learner, window, seed=[0], policy=batch_policy(config.training), ahead=ahead), state


@dataclass
class _Way:
    """One of the two, with what it took."""

    config: UpdateConfig
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    waiting: float = 0.0
    whole: float = 0.0
    cpu: float = 0.0


def _print_backfill(plain: UpdateConfig, overlapped: UpdateConfig, hours: int) -> None:
    ways = {"one after the other": _Way(plain), "overlapped": _Way(overlapped)}
    with ReadAhead() as read_ahead:
        for hour in range(hours):
            for name, way in ways.items():
                _one_hour(way, read_ahead if name == "overlapped" else None, counts=hour > 0)
    print(f"\nbackfill of {hours - 1} hours after the first; files that were there when they were needed: {read_ahead.taken}")
    print(f"{'':20} {'whole, s':>9} {'CPU s':>7} {'load':>7} {'learn':>7} {'waited':>7} {'load + waited':>14}")
    for name, way in ways.items():
        load, learning = way.seconds["load"], way.seconds["learn"]
        print(
            f"{name:20} {way.whole:9.2f} {way.cpu:7.2f} {load:7.2f} {learning:7.2f} {way.waiting / learning:7.1%} "
            f"{(load + way.waiting) / (load + learning):14.1%}"
        )
    print(f"wanted: waited for less than {WANTED_SHARE:.0%}")


def _one_hour(way: _Way, read_ahead: ReadAhead | None, *, counts: bool) -> None:
    update.learn = partial(learn, ahead=None if read_ahead else False)  # type: ignore[attr-defined]
    try:
        started, cpu = time.perf_counter(), time.process_time()
        report = update.run_update(way.config, stage=_stage(way.config, read_ahead), read_ahead=read_ahead)
        assert report is not None, "an hour waits"
        if counts:
            way.whole += time.perf_counter() - started
            way.cpu += time.process_time() - cpu
            way.waiting += (report.waiting_share or 0.0) * report.seconds["learn"]
            for name, seconds in report.seconds.items():
                way.seconds[name] += seconds
    finally:
        update.learn = learn  # type: ignore[attr-defined]


def _stage(config: UpdateConfig, read_ahead: ReadAhead | None) -> update.StageRunner:
    """As a backfill runs stages: once a window is loaded, the next one's files are read."""

    def stage(name: str, work: Callable[[], T]) -> T:
        done = work()
        if name == "load" and read_ahead is not None:
            coming = int(done.examples.hour_R.max()) + 1  # type: ignore[attr-defined]
            read_ahead.expect(reads_of(config, [as_time(coming)]))
        return done

    return stage


if __name__ == "__main__":
    main()
