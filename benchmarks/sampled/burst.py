"""One item takes 60 % of an hour's rows: are batches representative, is it learned at once, and do the others suffer?

After ordinary hours, the next one has the same rows as ever, and half as many again, all of one item that was never seen: its
users and contexts are those of ordinary rows, its true CTR is four times the average. The model learns that hour once. The item
is judged on fresh impressions; all others in the hour after, beside the model that learned the same hours without the burst.

The item's clicks come by one of two laws:

- `audience`: as any item's in this stream. Users, devices, placements, positions and so on move its log odds as they move those
  of the row that was copied; a constant brings the mean to the item's CTR.
- `flat`: every impression is clicked with the same probability, whoever sees it and wherever, as robots might.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.metrics import log_loss, roc_auc_score

from data_schemas.examples import F32, I64, U64, Examples, concatenate
from data_schemas.hashing import mix64
from pipeline.config import SamplingConfig
from pipeline.training.sampling import SampledWindow
from sampled.streams import Encoder, Hour, Model, examples_and_truth_of, mean_and_range, synthetic_spec
from sampling.minibatches import BatchCursor
from sampling.strata import F64

Law = Literal["audience", "flat"]

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
ALL_ROWS = "all rows"
SAMPLINGS = {
    ALL_ROWS: SamplingConfig(),
    "batches by label and popularity": BOTH,
    f"at most {MOST_ROWS:,} rows an item": SamplingConfig(max_rows_per_item=MOST_ROWS),
    "keep .5, sqrt over label and popularity": SamplingConfig(
        strata=("label", "item_popularity"), negative_keep_rate=0.5, allocation="sqrt"
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """The hours of a seed."""

    ordinary: list[Examples]
    """The last but one has no burst, the last is judged."""
    burst: dict[Law, Examples]
    """The last hour but one with the burst, all rows."""
    fresh: dict[Law, Examples]
    """Impressions of the item, one hour later."""


def run(hours: int, rows: int, seeds: int, override: str) -> None:
    """Each seed is a stream and a model of its own; all models have the setting `override`, where there is one."""
    overrides = [override] if override else []
    figures: dict[Law, dict[str, list[tuple[float, ...]]]] = {law: {name: [] for name in SAMPLINGS} for law in get_args(Law)}
    for seed in range(seeds):
        stream = _stream(hours, rows, seed)
        before = {name: _trained(stream, sampling, seed, *overrides) for name, sampling in SAMPLINGS.items()}
        without = _others(before[ALL_ROWS].after(stream.ordinary[-2], stream.fresh["audience"]), stream)
        for law, lines in figures.items():
            for name, trained in before.items():
                lines[name].append(_figures(trained.after(stream.burst[law], stream.fresh[law]), stream, law, without))
    for law, lines in figures.items():
        title = f"law {law}: an item with {SHARE:.0%} of an hour's {rows / (1 - SHARE):,.0f} rows, {seeds} seeds {override}"
        _print_table(title, lines)


def _print_table(title: str, figures: dict[str, list[tuple[float, ...]]]) -> None:
    table = Table(title=title)
    heads = ("capped", "share of a batch", "sd", "rows until learned", "predicted / true CTR")
    for head in ("", *heads, "others' log loss, change", "others' AUC, change", "others' COPC ratio"):
        table.add_column(head, justify="right" if head else "left")
    digits = (0, 3, 4, 0, 3, 5, 4, 3)
    for name, lines in figures.items():
        columns = [list(column) for column in zip(*lines, strict=True)]
        table.add_row(name, *(mean_and_range(column, d) for column, d in zip(columns, digits, strict=True)))
    Console(width=240).print(table)


@dataclass(frozen=True, kw_only=True)
class _Others:
    """How all other items are predicted in the hour after."""

    log_loss: float
    auc: float
    copc: float
    """Clicks over predicted clicks."""


@dataclass(frozen=True, kw_only=True)
class _Learned:
    """A model that learned an hour after all ordinary ones."""

    model: Model
    encoder: Encoder
    hour: Hour
    sampled: SampledWindow
    until_learned: float
    """Rows of the item that were learned when its prediction was near for the first time; NaN: never."""


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A model that learned the ordinary hours."""

    model: Model
    encoder: Encoder

    def after(self, examples: Examples, fresh: Examples) -> _Learned:
        """A copy that learned these too, watched at impressions of the item."""
        model, encoder = deepcopy(self.model), deepcopy(self.encoder)
        hour = encoder.encoded(examples)
        watched = encoder.encoded(fresh.take(np.arange(WATCHED_IMPRESSIONS)))
        near: list[int] = []
        sampled = model.learn(hour, _watch(lambda: float(model.predict(watched.window).mean()), near))
        encoder.count(hour)
        share = float((hour.examples.item_R[_order(hour, sampled, model.seed)] == ITEM).mean())
        until = near[0] * share if near else float("nan")
        return _Learned(model=model, encoder=encoder, hour=hour, sampled=sampled, until_learned=until)


def _trained(stream: _Stream, sampling: SamplingConfig, seed: int, *overrides: str) -> _Trained:
    spec = synthetic_spec()
    model, encoder = Model(spec, sampling, seed, *overrides), Encoder(spec)
    for examples in stream.ordinary[:-2]:
        hour = encoder.encoded(examples)
        model.learn(hour)
        encoder.count(hour)
    return _Trained(model=model, encoder=encoder)


def _stream(hours: int, rows: int, seed: int) -> _Stream:
    every = list(examples_and_truth_of(synthetic_spec(), ctr=BASE_CTR, hours=hours + 2, rows=rows, seed=seed))
    ordinary = [examples for examples, _ in every]
    burst_rows = round(ordinary[hours].num_rows * SHARE / (1 - SHARE))
    burst, fresh = {}, {}
    for law in get_args(Law):
        hot = _of_the_item(*every[hours], burst_rows, law, np.random.default_rng([seed, 1]))
        burst[law] = concatenate([ordinary[hours], hot])
        fresh[law] = _of_the_item(*every[hours + 1], FRESH_IMPRESSIONS, law, np.random.default_rng([seed, 2]))
    return _Stream(ordinary=ordinary, burst=burst, fresh=fresh)


def _of_the_item(like: Examples, truth_R: F32, num_rows: int, law: Law, rng: np.random.Generator) -> Examples:
    """Users and contexts of ordinary rows, item and author of its own."""
    places = rng.integers(0, like.num_rows, num_rows)
    rows = like.take(places)
    single: dict[str, U64] = {**rows.single_ids, "item_id": ITEM.repeat(num_rows), "author_id": AUTHOR.repeat(num_rows)}
    probability_R = np.full(num_rows, HOT_CTR) if law == "flat" else _moved_to_hot_ctr(truth_R[places].astype(np.float64))
    labels_R: F32 = (rng.random(num_rows) < probability_R).astype(np.float32)
    return replace(rows, single_ids=single, item_R=single["item_id"], labels_R=labels_R)


def _moved_to_hot_ctr(probability_R: F64) -> F64:
    """One constant on all log odds, such that the mean probability is the item's CTR."""
    log_odds_R = logit(probability_R)
    return expit(log_odds_R + brentq(lambda constant: expit(log_odds_R + constant).mean() - HOT_CTR, -20, 20))


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


def _figures(done: _Learned, stream: _Stream, law: Law, without: _Others) -> tuple[float, ...]:
    seed = done.model.seed
    hot_R = done.hour.examples.item_R[_order(done.hour, done.sampled, seed)] == ITEM
    size = done.model.config.training.batch_size
    shares = hot_R[: len(hot_R) // size * size].reshape(-1, size).mean(axis=1)
    fresh, others = done.encoder.encoded(stream.fresh[law]), _others(done, stream)
    return (
        float(done.sampled.plan.capped) if done.sampled.plan else 0.0,
        float(shares.mean()),
        float(shares.std()),
        done.until_learned,
        float(done.model.predict(fresh.window).mean()) / HOT_CTR,
        others.log_loss - without.log_loss,
        others.auc - without.auc,
        others.copc / without.copc,
    )


def _others(done: _Learned, stream: _Stream) -> _Others:
    after = done.encoder.encoded(stream.ordinary[-1])
    labels_R, predicted_R = after.examples.labels_R, done.model.predict(after.window).astype(np.float64)
    return _Others(
        log_loss=float(log_loss(labels_R, predicted_R)),
        auc=float(roc_auc_score(labels_R, predicted_R)),
        copc=float(labels_R.sum() / predicted_R.sum()),
    )
