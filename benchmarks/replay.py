"""What replay saves of an old distribution, and what it costs the current one.

    python benchmarks/replay.py [--old-hours 12] [--between-hours 48] [--rows 4000] [--shares 0.1 0.2] [--age-powers 0 1]
                                [--seeds 3]

A synthetic stream shows one market for 12 hours, another one for 48, and then the first again. `--change`:

- `market`: other users, other authors with their items, and another law of clicks; countries, devices, categories and tags are
  shared, and mean something else.
- `audience`: the law of clicks is the same, users and authors are others; a row of ten is of any.
- `law`: the same users, items and contexts, but what they click is drawn from another stream's law; the two agree in nothing,
  and nothing in a row tells which of them is on.

Every hour is predicted, then learned. A fifth of each old hour is never learned: *forgetting* is the rise of its log loss over
the 48 hours, from the end of the first hours to when they return. *Current* is the log loss of the 48 hours, each before it is
learned. Models differ in `sampling.replay_share` and `sampling.replay_age_power` alone.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sampled.streams import Encoder, Model, examples_of, mean_and_range, synthetic_spec
from sklearn.metrics import log_loss

from data_schemas.examples import I64, U64, Examples, concatenate
from data_schemas.hashing import mix64
from pipeline.config import SamplingConfig

Change = Literal["market", "audience", "law"]

HELD_OUT = 5
"""One row of so many of the old hours is judged and never learned."""
GUESTS = 0.1
"""With `audience`: share of the rows that are not of the market's own users and authors."""
OTHER_LAW = 1000
"""Added to the seed of the stream."""
BASE_CTR = 0.15
LEAST_FALL, MOST_RISE = 0.30, 0.001
NO_REPLAY = (0.0, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--change", choices=get_args(Change), default="market")
    parser.add_argument("--old-hours", type=int, default=12)
    parser.add_argument("--between-hours", type=int, default=48)
    parser.add_argument("--rows", type=int, default=4_000, help="an hour")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2], help="sampling.replay_share")
    parser.add_argument("--age-powers", type=float, nargs="+", default=[0.0], help="sampling.replay_age_power")
    parser.add_argument("--capacity", type=int, default=100_000, help="sampling.replay_capacity")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    grid = [NO_REPLAY, *product(options.shares, options.age_powers)]
    results: dict[tuple[float, float], list[_Result]] = {point: [] for point in grid}
    for seed in range(options.seeds):
        old, between = _stream(options.change, options.old_hours, options.between_hours, options.rows, seed)
        for (share, power), lines in results.items():
            sampling = SamplingConfig(replay_share=share, replay_capacity=options.capacity, replay_age_power=power)
            lines.append(_run(old, between, Model(synthetic_spec(), sampling, seed)))
    _print_table(results, options)


@dataclass(frozen=True, kw_only=True)
class _Result:
    """Log losses of one model, and what it took."""

    old_before: float
    """Of rows of the old hours that were never learned, at the end of the old hours ..."""
    old_after: float
    """... and when they return."""
    current: float
    """Mean over the hours between, each before it was learned."""
    seconds: float


def _stream(change: Change, old_hours: int, between_hours: int, rows: int, seed: int) -> tuple[list[Examples], list[Examples]]:
    """The old hours and those between."""
    hours, rng = old_hours + between_hours, np.random.default_rng([seed, 1])
    match change:
        case "law":
            first, second = (_hours(hours, rows, seed + other) for other in (0, OTHER_LAW))
            return [next(first) for _ in range(old_hours)], list(second)[old_hours:]
        case "market":
            first, second = (_hours(hours, 5 * rows, seed + other) for other in (0, OTHER_LAW))
            old = [_of_market(next(first), 0, rows, 0.0, rng) for _ in range(old_hours)]
            return old, [_of_market(examples, 1, rows, 0.0, rng) for examples in list(second)[old_hours:]]
        case "audience":
            every = enumerate(_hours(hours, 4 * rows, seed))
            shown = [_of_market(examples, int(number >= old_hours), rows, GUESTS, rng) for number, examples in every]
            return shown[:old_hours], shown[old_hours:]


def _hours(hours: int, rows: int, seed: int) -> Iterator[Examples]:
    return examples_of(synthetic_spec(), ctr=BASE_CTR, hours=hours, rows=rows, seed=seed)


def _of_market(examples: Examples, market: int, rows: int, guest_share: float, rng: np.random.Generator) -> Examples:
    """`rows` of an hour, in order of time: most of both a user and an author of the market, the others of any."""
    own_R = (_coin(examples.user_R) == market) & (_coin(examples.single_ids["author_id"]) == market)
    own, others = np.flatnonzero(own_R), np.flatnonzero(~own_R)
    guests = round(guest_share * rows)
    hosts = min(rows - guests, len(own))
    return examples.take(np.sort(np.concatenate([rng.permutation(own)[:hosts], rng.permutation(others)[:guests]])))


def _coin(ids_R: U64) -> I64:
    """0 or 1 by the id alone."""
    return (mix64(ids_R) >> np.uint64(63)).astype(np.int64)


def _run(old: Sequence[Examples], between: Sequence[Examples], model: Model) -> _Result:
    encoder = Encoder(model.spec)
    for examples in old:
        _learn(model, encoder, examples.take(np.flatnonzero(np.arange(examples.num_rows) % HELD_OUT != 0)))
    never_learned = concatenate([e.take(np.arange(0, e.num_rows, HELD_OUT)) for e in old])
    before = _loss(model, encoder, never_learned)
    current = []
    for examples in between:
        current.append(_loss(model, encoder, examples))
        _learn(model, encoder, examples)
    return _Result(
        old_before=before,
        old_after=_loss(model, encoder, never_learned),
        current=float(np.mean(current)),
        seconds=model.sampling_seconds + model.learning_seconds,
    )


def _learn(model: Model, encoder: Encoder, examples: Examples) -> None:
    hour = encoder.encoded(examples)
    model.learn(hour)
    encoder.count(hour)


def _loss(model: Model, encoder: Encoder, examples: Examples) -> float:
    predicted_R = model.predict(encoder.encoded(examples).window).astype(np.float64)
    return float(log_loss(examples.labels_R, predicted_R))


def _print_table(results: dict[tuple[float, float], list[_Result]], options: argparse.Namespace) -> None:
    hours = f"{options.old_hours} hours, {options.between_hours} others, and back"
    table = Table(title=f"{options.change}: {hours}; {options.rows:,} rows an hour, {options.seeds} seeds")
    heads = ("old, at the end", "old, on return", "forgetting", "falls by", "current", "change", "CPU time")
    table.add_column("share")
    table.add_column("age power")
    for head in heads:
        table.add_column(head, justify="right")
    plain = results[NO_REPLAY]
    for (share, power), lines in results.items():
        forgotten = [line.old_after - was.old_before for line, was in zip(lines, plain, strict=True)]
        falls = [1 - rise / (was.old_after - was.old_before) for rise, was in zip(forgotten, plain, strict=True)]
        changes = [line.current - was.current for line, was in zip(lines, plain, strict=True)]
        times = [line.seconds / was.seconds for line, was in zip(lines, plain, strict=True)]
        columns = ([line.old_before for line in lines], [line.old_after for line in lines], forgotten)
        cells = [mean_and_range(values, 4) for values in columns]
        cells += [mean_and_range(falls, 2), mean_and_range([line.current for line in lines], 4)]
        table.add_row(f"{share:g}", f"{power:g}" if share else "", *cells, mean_and_range(changes, 5), mean_and_range(times, 2))
        if share:
            reached = np.mean(falls) >= LEAST_FALL and np.mean(changes) <= MOST_RISE
            verdict = "reached" if reached else "NOT reached"
            wanted = f"forgetting -{LEAST_FALL:.0%} and current +{MOST_RISE} at most"
            print(f"share {share:g}, age power {power:g}: {wanted}: {verdict}")
    Console(width=220).print(table)


if __name__ == "__main__":
    main()
