"""Rows a second from Parquet to updated weights, beside Vowpal Wabbit from text.

In:  the folder of brunch's hourly Parquet files, beside the repository unless --data names it.
Out: one table: rows a second by wall time, CPU seconds, ratios to Vowpal Wabbit; and where our own time goes.

Ours: the windows of a click log, one update after the other, as `run_update` learns them: find the window, read it and verify
checksums, hash ids, take counters and histories as of before it, encode, learn, count the window in. Evaluation, checkpoint and
publishing are not in it: Vowpal Wabbit has none. Once with the data set as declared, once without histories, and once as a
linear model (`model.kind = "linear"`), which is what Vowpal Wabbit without crosses learns, but for the hour.

Vowpal Wabbit: the same rows with the same ids and the same counters as text, written before the clock starts, one file for the
hours of a repetition. Its own parser reads the file and its own driver learns, in a thread each, through the binding's
`run_parser`: what `vw -d FILE` does; no line passes through Python. Only that is timed, not the start of the workspace. Without
crosses, with crosses and `--ftrl`, and the latter with the ids of the user's history as well.

    pip install --no-deps -r requirements/peers.txt
    python benchmarks/learning_speed.py [--warm 24] [--hours 3] [--repetitions 5] [--threads auto]

All have learned the `--warm` hours before the first repetition, each repetition learns the next hours, and all take turns.
Figures are medians over repetitions. The log loss is that of predicting each row just before it is learned, for Vowpal Wabbit
as it reports it: it shows that something was learned, and compares with nothing else.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from peers.contender import Hour
from peers.hashed import Cross
from peers.streams import DATA, brunch_hours
from peers.vowpal_wabbit import VowpalWabbit

from data_schemas.dataset import DatasetSpec, load_spec
from pipeline.config import load_config
from pipeline.data.encode import encode
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.normalise import RunningMoments
from pipeline.data.windows import next_window, read_window
from pipeline.model_state import admit_ids, restore_or_create
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.room import keep_freed_memory

LONG_AFTER = datetime(2100, 1, 1, tzinfo=UTC)
CROSSES: tuple[Cross, ...] = (("user_id", "item_id"), ("user_id", "author_id"))
HISTORY = 50
AS_DECLARED, WITHOUT_HISTORIES, LINEAR = "ours, brunch.toml as it is", "ours, counters without histories", "ours, linear"
PLAIN, CROSSED, WITH_HISTORY = "vw", "vw, crosses, --ftrl", "vw, crosses, --ftrl, history"
WANTED = {
    AS_DECLARED: (0.5, (PLAIN, CROSSED, WITH_HISTORY)),
    WITHOUT_HISTORIES: (1.0, (PLAIN, CROSSED)),
    LINEAR: (1.0, (PLAIN,)),
}
"""Of Vowpal Wabbit's rows a second; only the last of its lines has what `brunch.toml` has."""


def main() -> None:
    options = _command_line()
    keep_freed_memory()  # as an update does
    num_hours = options.warm + options.hours * options.repetitions
    with tempfile.TemporaryDirectory() as name:
        folder, spec, settings = Path(name), load_spec("brunch"), [f"training.threads={options.threads}", *options.set]
        log = _click_log(options.data, spec, folder, num_hours)
        ours = {
            AS_DECLARED: Ours(log, spec, folder, settings),
            WITHOUT_HISTORIES: Ours(log, spec.model_copy(update={"history": None}), folder, settings),
            LINEAR: Ours(log, spec.linear(), folder, [*settings, "model.kind=linear"]),
        }
        peers = {
            PLAIN: FromText(spec, folder / "plain"),
            CROSSED: FromText(spec, folder / "crossed", "--ftrl", crosses=CROSSES),
            WITH_HISTORY: FromText(spec, folder / "history", "--ftrl", crosses=CROSSES, history=HISTORY),
        }
        hours = brunch_hours(options.data, spec, num_hours)
        _take_turns({**ours, **peers}, hours, [options.warm])
        for own in ours.values():
            own.seconds.clear()
        laps = _take_turns({**ours, **peers}, hours, [options.hours] * options.repetitions)
    _print_table(laps)
    for name, own in ours.items():
        print(f"\n{name}: threads of one operation: {own.threads}{', chosen' if options.threads == 'auto' else ''}", end="")
        _print_stages(name, own.seconds, sum(laps[name].rows))


@dataclass(frozen=True, kw_only=True)
class Laps:
    """What the repetitions of one system took."""

    rows: list[int] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Seconds of all threads."""

    @property
    def rows_per_second(self) -> float:
        """By wall time."""
        return statistics.median(rows / wall for rows, wall in zip(self.rows, self.wall, strict=True))

    @property
    def rows_per_cpu_second(self) -> float:
        """By the time of all threads, which other work on the machine does not change much."""
        return statistics.median(rows / cpu for rows, cpu in zip(self.rows, self.cpu, strict=True))


class System(Protocol):
    """What takes turns."""

    log_loss: float
    """Of the last hours, each row predicted just before it was learned."""

    def prepare(self, hours: Sequence[Hour]) -> None:
        """Not timed."""

    def learn(self, hours: int) -> None:
        """The next hours."""


class Ours:
    """Updates without evaluation, checkpoint and publishing."""

    def __init__(self, log: ClickLog, spec: DatasetSpec, folder: Path, overrides: Sequence[str]) -> None:
        self._log, self._spec = log, spec
        self._config = load_config(None, [f"dataset={spec.name}", f"state_dir={folder}", *overrides])
        self._state = restore_or_create(self._config, spec)
        training = self._config.training
        self._policy = FixedBatch(batch_size=training.batch_size, learning_rate=training.dense_learning_rate)
        self.seconds: dict[str, float] = {}
        self.log_loss = 0.0

    @property
    def threads(self) -> int:
        """Of one operation while it learns."""
        return self._state.learner.threads or torch.get_num_threads()

    def prepare(self, hours: Sequence[Hour]) -> None:
        """Remembers how many rows there are to learn."""
        self._rows_left = sum(hour.num_rows for hour in hours)

    def learn(self, hours: int) -> None:
        """The windows of the next hours."""
        for _ in range(hours):
            self._update()
        assert self._rows_left == 0, "the click log holds other rows than the text"

    def _update(self) -> None:
        state, spec = self._state, self._spec
        with self._stage("find window"):
            window = next_window(self._log, state.cursor, self._config.window, LONG_AFTER)
            assert window is not None
        with self._stage("read and verify"):
            table = read_window(self._log, window, columns_to_read(spec))
        with self._stage("hash ids"):
            examples = to_examples(table, spec)
        with self._stage("counters, histories, table rows"):
            encoded = encode(examples, spec, state.memory, state.moments, hour=window.start, ids=state.ids)
            encoded, _ = admit_ids(state, examples, encoded, spec, hour=window.start)
        with self._stage("learn"):
            learned = learn(state.learner, encoded, seed=(0, window.end), policy=self._policy)
        with self._stage("count the window in"):
            moments = (state.moments or RunningMoments.nothing_seen(len(encoded.raw_dense_NR))).after(encoded.raw_dense_NR)
            state.memory.add(examples, window.start)
        self._state = dataclasses.replace(state, moments=moments, cursor=window.cursor_after())
        self._rows_left -= learned.rows
        self.log_loss = statistics.mean(point.log_loss for point in learned.loss_curve)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class FromText:
    """Vowpal Wabbit; each file is learned by a new workspace that goes on from the weights of the one before."""

    def __init__(
        self, spec: DatasetSpec, folder: Path, arguments: str = "", *, crosses: Sequence[Cross] = (), history: int = 0
    ) -> None:
        """Args other than the folder of its files: as of `VowpalWabbit`, which writes the lines."""
        folder.mkdir()
        self._writer = VowpalWabbit(spec, arguments, crosses, scale="raw", history=history)
        self._text, self._weights = folder / "rows.txt", folder / "weights.vw"
        self._workspace: Any = None
        self.log_loss = 0.0

    def prepare(self, hours: Sequence[Hour]) -> None:
        """Writes the text, and starts the workspace that will learn it."""
        import pylibvw

        if self._workspace is not None:
            self._workspace.save(str(self._weights))
        with self._text.open("w") as file:
            for hour in hours:
                file.writelines(f"{line}\n" for line in self._writer.prepare(hour).labelled)
        known = ["-i", str(self._weights)] if self._workspace is not None else []
        self._workspace = pylibvw.vw([*self._writer.arguments.split(), "--no_stdin", "-d", str(self._text), *known])
        self._loss_before, self._rows_before = self._workspace.get_sum_loss(), self._workspace.get_weighted_examples()

    def learn(self, hours: int) -> None:
        """The whole text."""
        self._workspace.run_parser()
        rows = self._workspace.get_weighted_examples() - self._rows_before
        self.log_loss = (self._workspace.get_sum_loss() - self._loss_before) / rows


def _command_line() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--data", type=Path, default=DATA / "brunch/impressions", help="folder of the data")
    cli.add_argument("--warm", type=int, default=24, help="hours that all have learned before")
    cli.add_argument("--hours", type=int, default=3, help="of a repetition")
    cli.add_argument("--repetitions", type=int, default=5)
    cli.add_argument("--threads", default="auto", help="of one operation of ours while it learns; the data take two, in turn")
    cli.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of ours")
    return cli.parse_args()


def _click_log(data: Path, spec: DatasetSpec, folder: Path, num_hours: int) -> ClickLog:
    files = sorted(data.glob("*.parquet"))[:num_hours]
    if len(files) < num_hours:
        raise SystemExit(f"{data} has {len(files)} hours, {num_hours} are needed; use fewer --repetitions, or name --data")
    landing = folder / "landing"
    landing.mkdir()
    for file in files:
        (landing / file.name).symlink_to(file.resolve())
    log = ClickLog.open_or_create(folder / "click_log", spec)
    ingest_landing(str(landing), log, Quarantine.open_or_create(folder / "quarantine"), spec, now=LONG_AFTER)
    return log


def _take_turns(systems: dict[str, Any], hours: Iterator[Hour], repetitions: Sequence[int]) -> dict[str, Laps]:
    """Each system learns the hours of each repetition."""
    laps = {name: Laps() for name in systems}
    for count in repetitions:
        chosen = list(itertools.islice(hours, count))
        for name, system in systems.items():
            system.prepare(chosen)
            wall, cpu = time.perf_counter(), time.process_time()
            system.learn(count)
            laps[name].wall.append(time.perf_counter() - wall)
            laps[name].cpu.append(time.process_time() - cpu)
            laps[name].rows.append(sum(hour.num_rows for hour in chosen))
        losses = ", ".join(f"{name} {system.log_loss:.4f}" for name, system in systems.items())
        print(f"{count} hours, {laps[PLAIN].rows[-1]:,} rows; log loss: {losses}", file=sys.stderr, flush=True)
    return laps


def _print_table(laps: dict[str, Laps]) -> None:
    peers = (PLAIN, CROSSED, WITH_HISTORY)
    print(f"{'':34} {'rows/s':>9} {'CPU s per 1M rows':>18}" + "".join(f"{'x ' + peer:>31}" for peer in peers))
    for name, lap in laps.items():
        print(f"{name:34} {lap.rows_per_second:9,.0f} {1e6 / lap.rows_per_cpu_second:18.2f}", end="")
        for peer in peers:
            by_wall = lap.rows_per_second / laps[peer].rows_per_second
            by_cpu = lap.rows_per_cpu_second / laps[peer].rows_per_cpu_second
            print(f"{f'{by_wall:.2f} (CPU {by_cpu:.2f})':>31}", end="")
        print()
    for name, (wanted, against) in WANTED.items():
        for peer in against:
            ratio = laps[name].rows_per_second / laps[peer].rows_per_second
            print(f"{name}: {ratio:.2f} of {peer}, wanted {wanted}: {'reached' if ratio >= wanted else 'missed'}")


def _print_stages(name: str, seconds: dict[str, float], num_rows: int) -> None:
    print(f"\n{name}, seconds of wall time per 1M rows")
    for stage, spent in seconds.items():
        print(f"  {stage:34} {1e6 * spent / num_rows:6.2f}")


if __name__ == "__main__":
    main()
