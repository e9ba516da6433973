"""One item takes 60 % of an hour's rows: are batches representative, is it learned at once, and do the others suffer?

After ordinary hours, the next one has the same rows as ever, and half as many again, all of one item that was never seen: its
users and contexts are those of ordinary rows, its true CTR is four times the average. The model learns that hour once. The item
is judged on fresh impressions; all others in the hour after, beside the model that learned the same hours without the burst.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import log_loss

from data_schemas.examples import F32, I64, U64, Examples, concatenate
from data_schemas.hashing import mix64
from pipeline.config import SamplingConfig
from pipeline.training.sampling import SampledWindow
from sampled.streams import Encoder, Hour, Model, examples_of, mean_and_range, synthetic_spec
from sampling.minibatches import BatchCursor

SHARE = 0.6
BASE_CTR, HOT_CTR = 0.05, 0.20
FRESH_IMPRESSIONS, WATCHED_IMPRESSIONS = 20_000, 512
NEAR = 0.10
"""The item counts as learned once its mean prediction is within this share of its CTR."""
WATCH_EVERY = 5
"""Steps."""
ITEM = mix64(np.array([10**9], np.uint64))
AUTHOR = mix64(np.array([2 * 10**9], np.uint64))
MOST_ROWS = 2_000
BOTH = SamplingConfig(strata=("label", "item_popularity"), stratified_batches=True)
SAMPLINGS = {
    "all rows": SamplingConfig(),
    "batches by label": SamplingConfig(strata=("label",), stratified_batches=True),
    "batches by label and popularity": BOTH,
    f"at most {MOST_ROWS:,} rows an item": SamplingConfig(max_rows_per_item=MOST_ROWS),
    "the same, batches by both": BOTH.model_copy(update={"max_rows_per_item": MOST_ROWS}),
}


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """The hours of a seed."""

    ordinary: list[Examples]
    burst: Examples
    """The hour of the burst, all rows."""
    fresh: Examples
    """Impressions of the item, one hour later."""


def run(hours: int, rows: int, seeds: int) -> None:
    """Each seed is a stream and a model of its own."""
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in SAMPLINGS}
    for seed in range(seeds):
        stream = _stream(hours, rows, seed)
        without = _others_loss(_learned(stream, SamplingConfig(), seed, burst=False), stream)
        for name, sampling in SAMPLINGS.items():
            figures[name].append(_figures(stream, sampling, seed, without))
    table = Table(title=f"an item with {SHARE:.0%} of an hour's {rows / (1 - SHARE):,.0f} rows, {seeds} seeds")
    heads = ("capped", "share of a batch", "sd of it", "rows until learned", "predicted / true CTR", "others' log loss, change")
    for head in ("", *heads):
        table.add_column(head, justify="right" if head else "left")
    for name, lines in figures.items():
        columns = [list(column) for column in zip(*lines, strict=True)]
        table.add_row(name, *(mean_and_range(column, d) for column, d in zip(columns, (0, 3, 4, 0, 3, 5), strict=True)))
    Console(width=200).print(table)


@dataclass(frozen=True, kw_only=True)
class _Learned:
    model: Model
    encoder: Encoder
    hour: Hour
    sampled: SampledWindow
    until_learned: float
    """Rows of the item that were learned when its prediction was near for the first time; NaN: never."""


def _stream(hours: int, rows: int, seed: int) -> _Stream:
    ordinary = list(examples_of(synthetic_spec(), ctr=BASE_CTR, hours=hours + 2, rows=rows, seed=seed))
    hot = _of_the_item(ordinary[hours], round(ordinary[hours].num_rows * SHARE / (1 - SHARE)), np.random.default_rng([seed, 1]))
    fresh = _of_the_item(ordinary[hours + 1], FRESH_IMPRESSIONS, np.random.default_rng([seed, 2]))
    return _Stream(ordinary=ordinary, burst=concatenate([ordinary[hours], hot]), fresh=fresh)


def _of_the_item(like: Examples, num_rows: int, rng: np.random.Generator) -> Examples:
    """Users and contexts of ordinary rows, item and author of its own."""
    rows = like.take(rng.integers(0, like.num_rows, num_rows))
    single: dict[str, U64] = {**rows.single_ids, "item_id": ITEM.repeat(num_rows), "author_id": AUTHOR.repeat(num_rows)}
    labels_R: F32 = (rng.random(num_rows) < HOT_CTR).astype(np.float32)
    return replace(rows, single_ids=single, item_R=single["item_id"], labels_R=labels_R)


def _learned(stream: _Stream, sampling: SamplingConfig, seed: int, *, burst: bool) -> _Learned:
    spec = synthetic_spec()
    model, encoder = Model(spec, sampling, seed), Encoder(spec)
    for examples in stream.ordinary[:-2]:
        hour = encoder.encoded(examples)
        model.learn(hour)
        encoder.count(hour)
    hour = encoder.encoded(stream.burst if burst else stream.ordinary[-2])
    watched = encoder.encoded(stream.fresh.take(np.arange(WATCHED_IMPRESSIONS)))
    near: list[int] = []
    sampled = model.learn(hour, _watch(lambda: float(model.predict(watched.window).mean()), near))
    encoder.count(hour)
    share = float((hour.examples.item_R[_order(hour, sampled, seed)] == ITEM).mean())
    until = near[0] * share if near else float("nan")
    return _Learned(model=model, encoder=encoder, hour=hour, sampled=sampled, until_learned=until)


def _watch(predicted: Callable[[], float], near: list[int]) -> Callable[[int, int], None]:
    """Writes down how many rows of the pass were learned when the item was predicted well for the first time."""
    steps = iter(range(10**9))

    def watch(done: int, rows: int) -> None:
        if not near and next(steps) % WATCH_EVERY == 0 and abs(predicted() / HOT_CTR - 1) <= NEAR:
            near.append(done)

    return watch


def _order(hour: Hour, sampled: SampledWindow, seed: int) -> I64:
    """Rows as the model of that seed learned them."""
    return BatchCursor.of(
        hour.window.num_rows, seed=[seed, hour.start], stratum_R=sampled.stratum_R, kept_R=sampled.kept_R
    ).order_R


def _figures(stream: _Stream, sampling: SamplingConfig, seed: int, without: float) -> tuple[float, ...]:
    done = _learned(stream, sampling, seed, burst=True)
    hot_R = done.hour.examples.item_R[_order(done.hour, done.sampled, seed)] == ITEM
    size = done.model.config.training.batch_size
    shares = hot_R[: len(hot_R) // size * size].reshape(-1, size).mean(axis=1)
    fresh = done.encoder.encoded(stream.fresh)
    return (
        float(done.sampled.plan.capped) if done.sampled.plan else 0.0,
        float(shares.mean()),
        float(shares.std()),
        done.until_learned,
        float(done.model.predict(fresh.window).mean()) / HOT_CTR,
        _others_loss(done, stream) - without,
    )


def _others_loss(done: _Learned, stream: _Stream) -> float:
    after = done.encoder.encoded(stream.ordinary[-1])
    return float(log_loss(after.examples.labels_R, done.model.predict(after.window).astype(np.float64)))
