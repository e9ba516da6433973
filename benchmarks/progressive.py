"""Who learns most from the same clicks, seen once? Hourly test-then-train, side by side.

In:  a data set: brunch and amexpert from a folder beside the repository, synthetic from its generator.
Out: every trial of the search, then one table: AUC, log loss, rows learned a second.

Every row of an hour is predicted with what was learned from earlier hours, then learned. Figures are means of the hourly ones
weighted by rows, after the warm-up. All systems are fed the same ids, numbers and counters. Each runs with the best of the same
number of trials, chosen by log loss on an early part of the stream.

    python benchmarks/progressive.py brunch [--only ours vw-ftrl] [--trials 6] [--hours 48]
    python benchmarks/progressive.py brunch --only reproduce
    pip install --no-deps -r requirements/peers.txt

Rows a second are those of learning alone, by the CPU time of all threads, so that other work on the machine does not count.
What is not in it: reading, hashing, counters, and bringing rows into the form that a system takes; for Vowpal Wabbit that form
is text, and parsing it counts.
"""

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peers import counting, lightgbm_daily, ours, reproduced, river_logistic, sgd, vowpal_wabbit
from peers.contender import Contender, Hour, Settings
from peers.streams import Stream, load_streams
from rich.console import Console
from rich.table import Table
from scipy import stats
from sklearn.metrics import log_loss, roc_auc_score

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from pipeline.config import load_config, spec_of

SMALLEST = 1e-6
"""Probabilities are cut to [1e-6, 1 - 1e-6] before they are judged."""
NO_WORK = 1e8
"""Rows a second above which learning is no work, so that a figure says nothing."""
MOST_CROSSES_SHOWN = 5
OTHERS = ("constant", "popularity", "sgd", "river", "vw", "vw-crosses", "vw-ftrl", "vw-history", "lightgbm")
NAMES = ("ours", "frozen", *OTHERS, "reproduce")


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one run over the stream gave."""

    auc: float
    log_loss: float
    rows_per_second: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table."""

    name: str
    scores: tuple[Score, ...] = ()
    """One a seed."""
    settings: str = ""
    """Or why there is no score."""

    def mean(self, figure: str) -> float:
        """Over seeds."""
        return float(np.mean([getattr(score, figure) for score in self.scores]))


def main() -> None:
    options = _command_line()
    torch.set_num_threads(1)
    config = load_config(None, [f"dataset={options.spec or options.dataset}", *options.set])
    if config.model.kind == "linear" and not set(options.only or NAMES) <= {"ours", "frozen"}:
        raise SystemExit(
            "a linear model is given neither histories nor the hour, which the peers shall have: run it with --only ours"
        )
    spec = spec_of(config)
    streams = load_streams(options.dataset, spec, data=options.data, hours=options.hours)
    for stream in streams:
        warmup = stream.warmup_hours if options.warmup is None else options.warmup
        judge = Judge(stream, warmup, options.search_hours or stream.search_hours)
        lines = [_oracle(judge)] if stream.hours[0].true_probability_R is not None else []
        best: dict[str, Settings] = {}
        for contender in _chosen(stream.spec, options):
            lines.append(_compete(contender, judge, best, options))
            _say(f"{lines[-1].name}: {_figures(lines[-1])}")
        _print_table(stream, warmup, lines)


class Judge:
    """Runs a system over a stream."""

    def __init__(self, stream: Stream, warmup_hours: int, search_hours: int) -> None:
        self.stream = stream
        self.first_judged = stream.hours[0].start + warmup_hours
        self.search_end = stream.hours[0].start + search_hours
        if self.first_judged >= min(self.search_end, stream.hours[-1].start + 1):
            raise SystemExit(
                f"nothing is left to judge after a warm-up of {warmup_hours} hours; use more --hours or less --warmup"
            )

    def run(self, contender: Contender, settings: Settings, seed: int, *, search: bool = False) -> Score:
        """Test, then train, hour by hour; a search ends early."""
        system = contender.build(self.stream.spec, settings, seed)
        hours = [hour for hour in self.stream.hours if not search or hour.start < self.search_end]
        learned, seconds, judged = 0, 0.0, []
        for hour in hours:
            prepared = system.prepare(hour)
            if hour.start >= self.first_judged:
                judged.append((hour, system.predict(prepared)))
            if not _is_frozen(contender, hour, hours[0]):
                started = time.process_time()
                system.learn(prepared)
                seconds += time.process_time() - started
                learned += hour.num_rows
        return score(judged, learned / max(seconds, 1e-9))


def score(judged: Sequence[tuple[Hour, F32]], rows_per_second: float) -> Score:
    """Row-weighted means of hourly figures; an hour of one class has no AUC."""
    losses, areas = [], []
    for hour, probability_R in judged:
        labels_R = hour.examples.labels_R
        cut_R = np.clip(probability_R.astype(np.float64), SMALLEST, 1 - SMALLEST)
        losses.append((log_loss(labels_R, cut_R, labels=[0, 1]), hour.num_rows))
        if 0 < labels_R.sum() < hour.num_rows:
            areas.append((roc_auc_score(labels_R, cut_R), hour.num_rows))
    return Score(auc=_weighted_mean(areas), log_loss=_weighted_mean(losses), rows_per_second=rows_per_second)


def _command_line() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("dataset", choices=("brunch", "amexpert", "synthetic"))
    cli.add_argument("--hours", type=int, help="length of the stream; the whole by default")
    cli.add_argument("--warmup", type=int, help="hours that are not judged: 24, for synthetic 1")
    cli.add_argument("--seeds", type=int, default=3, help="runs of each system that depends on chance")
    cli.add_argument("--trials", type=int, default=6, help="settings that each system tries; 1: its first, without a search")
    cli.add_argument("--search-hours", type=int, help="settings are chosen before this hour of the stream")
    cli.add_argument("--only", nargs="+", choices=NAMES, help="systems to run; all but reproduce by default")
    cli.add_argument("--data", type=Path, help="folder of the data")
    cli.add_argument("--spec", help="another TOML file for the data set")
    cli.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of ours, for every trial")
    return cli.parse_args()


def _chosen(spec: DatasetSpec, options: argparse.Namespace) -> list[Contender]:
    """The contenders that were asked for, in the order of `NAMES`."""
    everyone = [
        *ours.contenders([*([f"dataset={options.spec}"] if options.spec else []), *options.set]),
        *counting.contenders(spec),
        *sgd.contenders(spec),
        *river_logistic.contenders(spec),
        *vowpal_wabbit.contenders(spec),
        *lightgbm_daily.contenders(spec),
    ]
    wanted = options.only or ("ours", "frozen", *OTHERS)
    chosen = [contender for contender in everyone if contender.name in wanted]
    if "reproduce" in wanted:
        if options.dataset != "brunch":
            raise SystemExit("reproduce is for brunch: the known figures are of that week")
        chosen += reproduced.contenders()
    if not chosen:
        raise SystemExit(f"{' '.join(wanted)}: nothing to run; vw-history needs a data set that declares [history]")
    return chosen


def _compete(contender: Contender, judge: Judge, best: dict[str, Settings], options: argparse.Namespace) -> Line:
    """Searches, unless the same system was searched before, then runs the whole stream with the best settings."""
    if contender.package and importlib.util.find_spec(contender.package) is None:
        missing = f"{contender.package} is not installed: pip install --no-deps -r requirements/peers.txt"
        return Line(name=contender.name, settings=missing)
    frozen_after = contender.frozen_after_hours
    if frozen_after and judge.stream.hours[-1].start < judge.stream.hours[0].start + frozen_after:
        return Line(name=contender.name, settings=f"the stream is not longer than {frozen_after} hours")
    searched = contender.searched_as or contender.name
    if searched not in best:
        best[searched] = _search(contender, judge, options.trials)
    settings = best[searched]
    seeds = range(options.seeds if contender.random else 1)
    scores = tuple(judge.run(contender, settings, seed) for seed in seeds)
    return Line(name=contender.name, scores=scores, settings=_describe(settings))


def _search(contender: Contender, judge: Judge, count: int) -> Settings:
    """The trial with the least log loss on the early part of the stream."""
    trials = contender.trials(count)
    if len(trials) == 1:
        return trials[0]
    scores = []
    for number, settings in enumerate(trials, start=1):
        scores.append(judge.run(contender, settings, seed=0, search=True))
        _say(
            f"{contender.name} trial {number} of {len(trials)}: AUC {scores[-1].auc:.4f}  log loss {scores[-1].log_loss:.4f}  "
            f"{_describe(settings)}"
        )
    return trials[int(np.argmin([tried.log_loss for tried in scores]))]


def _oracle(judge: Judge) -> Line:
    """Who knows the probability that each label was drawn with."""
    hours = [hour for hour in judge.stream.hours if hour.start >= judge.first_judged]
    known = [(hour, hour.true_probability_R) for hour in hours if hour.true_probability_R is not None]
    return Line(name="oracle", scores=(score(known, math.nan),), settings="knows the truth")


def _print_table(stream: Stream, warmup: int, lines: Sequence[Line]) -> None:
    oracle = next((line for line in lines if line.name == "oracle"), None)
    last = stream.hours[-1].start + stream.hours[-1].span_hours - stream.hours[0].start
    table = Table(title=f"{stream.title}, judged on hours {warmup} to {last}", caption=_lead(lines), caption_justify="left")
    table.add_column("system", no_wrap=True)
    for heading in ("AUC", "log loss", *(["gap to oracle"] if oracle else []), "rows/s learned", "seeds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("settings")
    for line in lines:
        gap = [f"{line.mean('log_loss') - oracle.mean('log_loss'):.4f}" if line.scores else ""] if oracle else []
        figures = (
            [_with_interval(line, "auc"), _with_interval(line, "log_loss"), *gap, _rate(line)]
            if line.scores
            else [""] * (3 + len(gap))
        )
        table.add_row(line.name, *figures, str(len(line.scores) or "-"), line.settings)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for line in lines:
        if line.name in reproduced.KNOWN and line.scores:
            print(_compare_with_known(line))


def _lead(lines: Sequence[Line]) -> str:
    """Ours against the peer with the greatest AUC, and against the one with the least log loss."""
    mine = next((line for line in lines if line.name == "ours" and line.scores), None)
    peers = [line for line in lines if line.name in OTHERS and line.scores]
    if mine is None or not peers:
        return ""
    by_auc, by_loss = max(peers, key=lambda p: p.mean("auc")), min(peers, key=lambda p: p.mean("log_loss"))
    return (
        f"ours: AUC {mine.mean('auc') - by_auc.mean('auc'):+.4f} against {by_auc.name}, "
        f"log loss {mine.mean('log_loss') - by_loss.mean('log_loss'):+.4f} against {by_loss.name}"
    )


def _compare_with_known(line: Line) -> str:
    auc, loss = reproduced.KNOWN[line.name]
    apart = max(abs(line.mean("auc") - auc), abs(line.mean("log_loss") - loss))
    verdict = "reproduced" if apart <= reproduced.TOLERANCE else "NOT reproduced"
    return f"{line.name}: known AUC {auc:.4f}, log loss {loss:.4f}; at most {apart:.4f} apart: {verdict}"


def _with_interval(line: Line, figure: str) -> str:
    """Mean and half-width of the 95 % interval over seeds (Student's t)."""
    values = [getattr(one, figure) for one in line.scores]
    if len(values) < 2:
        return f"{values[0]:.4f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):.4f} ± {half:.4f}"


def _rate(line: Line) -> str:
    rate = line.mean("rows_per_second")
    return f"{rate:,.0f}" if rate < NO_WORK else "-"


def _figures(line: Line) -> str:
    if not line.scores:
        return line.settings
    return (
        f"AUC {_with_interval(line, 'auc')}  log loss {_with_interval(line, 'log_loss')}  {_rate(line)} rows/s  {line.settings}"
    )


def _describe(settings: Settings) -> str:
    """Such as `-l 0.5, crosses: user_id x item_id`."""
    words = []
    for name, value in settings.items():
        if name != "crosses":
            words.append(f"{name} {value}")
        elif len(value) > MOST_CROSSES_SHOWN:
            words.append(f"{len(value)} crosses")
        else:
            words.append(f"crosses: {', '.join(' x '.join(cross) for cross in value) or 'none'}")
    return ", ".join(words) or "nothing to set"


def _is_frozen(contender: Contender, hour: Hour, first: Hour) -> bool:
    after = contender.frozen_after_hours
    return after is not None and hour.start >= first.start + after


def _weighted_mean(pairs: Sequence[tuple[float, int]]) -> float:
    if not pairs:
        return math.nan
    values, weights = zip(*pairs, strict=True)
    return float(np.average(values, weights=weights))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
