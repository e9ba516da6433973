"""Can a model learn from clicks alone what it would learn from impressions? And do the drawn negatives give themselves away?

In:  the brunch reads (clicks only, as logged) and impressions of the same hours, from a folder beside the repository.
Out: one table of mean hourly AUC and log loss on the impressions, one of what single bits tell of the labels.

Hourly test-then-train. Every system is judged on the same rows, the impressions of an hour, before it learns that hour. One
learns the impressions; each of the others learns the reads with negatives that it drew, and its counters and histories know the
reads only. Repeats within the hour are dropped, as ingesting drops them. AUC on its own rows is that on the reads and its own
draws, also before learning: where it is far above the AUC on impressions, the draws leak.

    python benchmarks/positives_only.py [--hours 72] [--seeds 0] [--only impressions popularity]
    python benchmarks/positives_only.py --probe [--hours 72]
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peers.contender import Hour
from peers.ours import Tidemark
from rich.console import Console
from rich.table import Table
from sklearn.metrics import log_loss, roc_auc_score

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.examples import F32, Examples, concatenate
from models.memory import Memory
from pipeline.config import SamplingConfig, load_config
from pipeline.data.encode import EncodedWindow, encode
from pipeline.data.loader import to_examples
from pipeline.data.negatives import Negatives, with_negatives
from pipeline.data.normalise import RunningMoments
from sampling.leaks import counts_before, decile_edges, popularity_bits, probe, strength, time_bits

DATA = Path(__file__).parents[2] / "shared/data/brunch"
SMALLEST = 1e-6
"""Probabilities are cut to [1e-6, 1 - 1e-6] before they are judged."""
TARGET = 0.010
"""How far below the model of the impressions a model of reads alone may rank."""
SYSTEMS: Mapping[str, Sequence[str]] = {
    "impressions": (),
    "popularity": (),
    "uniform": ("sampling.negatives=uniform",),
    "uniform, as drawn": ("sampling.negatives=uniform", "sampling.negative_correction=none"),
    "in_batch": ("sampling.negatives=in_batch",),
    "in_batch, logq": ("sampling.negatives=in_batch", "sampling.negative_correction=logq"),
    "hard": ("sampling.negatives=hard",),
    "trailing 24 h": ("sampling.negatives_trailing_hours=24",),
}


def main() -> None:
    options = _command_line()
    torch.set_num_threads(1)
    hours = list(_hours(options.data, options.hours))
    if options.probe:
        _print_probe(hours, options.only)
        return
    lines = {name: [_run(name, seed, hours, options.warmup) for seed in options.seeds] for name in options.only}
    _print_table(lines, hours, options)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """One hour in both forms."""

    start: int
    reads: Examples
    impressions: Examples


@dataclass(kw_only=True)
class _Stream:
    """What a system remembers between hours."""

    spec: DatasetSpec
    memory: Memory = field(init=False)
    moments: RunningMoments | None = None

    def __post_init__(self) -> None:
        self.memory = Memory(self.spec)

    def encoded(self, examples: Examples, start: int) -> EncodedWindow:
        return encode(examples, self.spec, self.memory, self.moments, hour=start)

    def count(self, learned: EncodedWindow, logged: Examples, start: int) -> None:
        raw_dense_NR = learned.raw_dense_NR
        self.moments = (self.moments or RunningMoments.nothing_seen(len(raw_dense_NR))).after(raw_dense_NR)
        self.memory.add(logged, start)


@dataclass(frozen=True, kw_only=True)
class _Score:
    auc: float
    log_loss: float
    own_auc: float


def _command_line() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--hours", type=int, default=72, help="from 2019-02-22T00")
    cli.add_argument("--warmup", type=int, default=24, help="hours that are learned and not judged")
    cli.add_argument("--seeds", type=int, nargs="+", default=[0])
    cli.add_argument("--only", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    cli.add_argument("--probe", action="store_true", help="what single bits tell of the labels, and no learning")
    cli.add_argument("--data", type=Path, default=DATA, help="folder with reads/ and impressions/")
    return cli.parse_args()


def _hours(data: Path, count: int) -> Iterator[_Pair]:
    paths = sorted((data / "impressions").glob("*.parquet"))[:count]
    if not paths:
        raise SystemExit(f"there are no impressions in {data}; name the folder that holds reads/ and impressions/ with --data")
    for path in paths:
        start = int(datetime.strptime(path.stem, "%Y-%m-%dT%H").replace(tzinfo=UTC).timestamp()) // 3600
        yield _Pair(
            start=start,
            reads=to_examples(_reads(data / "reads" / path.name), load_spec("brunch_reads")),
            impressions=to_examples(_table(path), load_spec("brunch")),
        )


def _reads(path: Path) -> pa.Table:
    """The hour's reads, each user and article once, as ingesting keeps them."""
    table = _table(path)
    keys = table.select(["user_id", "item_id"]).to_pandas()
    return table.take(pa.array(np.flatnonzero(~keys.duplicated())))


def _table(path: Path) -> pa.Table:
    return pq.read_table(path, read_dictionary=["item_id", "author_id"])


def _run(name: str, seed: int, hours: Sequence[_Pair], warmup: int) -> _Score:
    """One system over all hours."""
    on_impressions = name == "impressions"
    spec = load_spec("brunch" if on_impressions else "brunch_reads")
    system = Tidemark(spec, [*SYSTEMS[name], f"training.seed={seed}"])
    sampling = _sampling(name)
    stream, judged, own = _Stream(spec=spec), [], []
    past: list[Examples] = []
    for hour in hours:
        test = _window(hour.start, hour.impressions, stream.encoded(hour.impressions, hour.start))
        if on_impressions:
            learned = drawn = test
        else:
            before = concatenate(past[-24:]) if past and sampling.negatives_trailing_hours else None
            negatives = _draw(hour, spec, sampling, seed, system, stream, before)
            encoded = stream.encoded(negatives.examples, hour.start)
            learned = _window(hour.start, negatives.examples, replace(encoded, logit_shifts_R=negatives.shift_R))
            drawn = learned
        if hour.start >= hours[0].start + warmup:
            judged.append((hour.impressions.labels_R, system.predict(test)))
            own.append((drawn.examples.labels_R, system.predict(drawn)))
        system.learn(learned)
        logged = hour.impressions if on_impressions else hour.reads
        stream.count(learned.encoded, logged, hour.start)
        past.append(hour.reads)
    score = _Score(auc=_mean_auc(judged), log_loss=_mean_log_loss(judged), own_auc=_mean_auc(own))
    print(f"{name}, seed {seed}: {score}", file=sys.stderr, flush=True)
    return score


def _draw(
    hour: _Pair,
    spec: DatasetSpec,
    sampling: SamplingConfig,
    seed: int,
    system: Tidemark | None,
    stream: _Stream | None,
    before: Examples | None,
) -> Negatives:
    def scores(candidates: Examples) -> F32:
        assert system is not None
        assert stream is not None
        return system.predict(_window(hour.start, candidates, stream.encoded(candidates, hour.start)))

    return with_negatives(hour.reads, spec, sampling, seed=[seed, hour.start, 2], scores=scores, before=before)


def _window(start: int, examples: Examples, encoded: EncodedWindow) -> Hour:
    return Hour(start=start, span_hours=1, examples=examples, encoded=encoded)


def _sampling(name: str) -> SamplingConfig:
    return load_config(None, ["dataset=brunch_reads", *SYSTEMS[name]]).sampling


def _mean_auc(judged: Sequence[tuple[F32, F32]]) -> float:
    """Of hourly ones, weighted by rows."""
    return float(np.average([roc_auc_score(*pair) for pair in judged], weights=[len(pair[0]) for pair in judged]))


def _mean_log_loss(judged: Sequence[tuple[F32, F32]]) -> float:
    losses = [log_loss(labels, np.clip(p.astype(np.float64), SMALLEST, 1 - SMALLEST)) for labels, p in judged]
    return float(np.average(losses, weights=[len(labels) for labels, _ in judged]))


def _print_table(lines: Mapping[str, Sequence[_Score]], hours: Sequence[_Pair], options: argparse.Namespace) -> None:
    rows = sum(hour.impressions.num_rows for hour in hours[options.warmup :])
    title = f"{rows:,} impressions of hours {options.warmup} to {len(hours)}, seeds {options.seeds}"
    table = Table(title=title)
    table.add_column("learned from", no_wrap=True)
    for heading in ("AUC on impressions", "against impressions", "log loss on impressions", "AUC on its own rows"):
        table.add_column(heading, justify="right")
    reference = lines.get("impressions")
    for name, scores in lines.items():
        auc, loss, own = (float(np.mean([getattr(score, key) for score in scores])) for key in ("auc", "log_loss", "own_auc"))
        gap = f"{auc - np.mean([score.auc for score in reference]):+.4f}" if reference else ""
        table.add_row(name, f"{auc:.4f}", gap, f"{loss:.4f}", f"{own:.4f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if reference and "popularity" in lines:
        gap = float(np.mean([s.auc for s in reference]) - np.mean([s.auc for s in lines["popularity"]]))
        print(f"popularity is {gap:+.4f} below the model of the impressions; within {TARGET:.3f}: {gap <= TARGET}")


def _print_probe(hours: Sequence[_Pair], names: Sequence[str]) -> None:
    """AUC of each bit in the impressions, and for each sampler, after its correction; judged after the first day."""
    chosen = [name for name in names if name != "impressions"]
    item_P, hour_P = (np.concatenate([getattr(h.reads, key) for h in hours]) for key in ("item_R", "hour_R"))
    judged = hours[24:]
    logged = concatenate([hour.impressions for hour in judged])
    edges = decile_edges(counts_before(logged.item_R, logged.hour_R, item_P, hour_P, span_hours=24))

    def aucs(examples: Examples) -> dict[str, float]:
        bits = time_bits(examples.item_R, examples.hour_R, item_P, hour_P)
        counts_R = counts_before(examples.item_R, examples.hour_R, item_P, hour_P, span_hours=24)
        bits |= {f"{name} in 24 h": bit for name, bit in popularity_bits(counts_R, edges).items()}
        return probe(bits, examples.labels_R, examples.weights_R)

    columns = {"impressions": aucs(logged)}
    for name in chosen:
        sampling = _sampling(name)
        if sampling.negatives == "hard" or sampling.negative_correction == "logq":
            continue  # the first needs a model's scores, the second the shifted logits of one
        parts = []
        for place, hour in enumerate(judged, start=24):
            before = concatenate([past.reads for past in hours[max(place - 24, 0) : place]])
            trailing = before if sampling.negatives_trailing_hours else None
            parts.append(_draw(hour, load_spec("brunch_reads"), sampling, 0, None, None, trailing).examples)
        columns[name] = aucs(concatenate(parts))
    table = Table(title=f"AUC of single bits, hours 24 to {len(hours)}; .5 tells nothing")
    table.add_column("bit", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for bit in columns["impressions"]:
        table.add_row(bit, *(f"{values[bit]:.4f}" for values in columns.values()))
    worst = [max(strength(v[bit]) - strength(columns["impressions"][bit]) for bit in v) for v in columns.values()]
    table.add_row("most that a bit tells over impressions", *(f"{by:+.4f}" for by in worst))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
