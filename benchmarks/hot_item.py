"""How fast a model learns an item that is born hot, in one hourly update.

    python benchmarks/hot_item.py [--hours 6] [--seeds 3] [--impressions 50 500] [--counters none linear network]
                                  [--set training.wide_beta=0]

The base CTR is .04. After six ordinary hours of 100,000 rows, the next hour shows 200 items never seen before, each with a true
CTR of .20 and N impressions. The model learns that hour once, and then predicts fresh impressions of the same items, by other
users: the table gives mean predicted over true CTR (1 is right), and what learning the hot items did to the log loss of all
other items in the hour after, beside a model that learned the same hour without them. The last column is the log loss of that
other model: what settings that are quick with hot items cost everybody else.

Counters are none; the click rate of an item, which goes to the linear part alone; or all that counters give, ages too, which
the network sees.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import log_loss

from data_schemas.dataset import Counter, DatasetSpec, load_spec
from data_schemas.examples import F32, Examples, concatenate
from data_schemas.hashing import mix64
from models.memory import Memory
from pipeline.config import UpdateConfig, load_config
from pipeline.data.encode import EncodedWindow, encode, num_normalised
from pipeline.data.loader import to_examples
from pipeline.data.normalise import RunningMoments
from pipeline.data.synthetic import SyntheticConfig, SyntheticStream
from pipeline.evaluation.score import probabilities
from pipeline.model_state import restore_or_create
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.learner import Learner

NUM_ITEMS = 200
BASE_CTR, HOT_CTR = 0.04, 0.20
FRESH_IMPRESSIONS = 20_000
ROWS_PER_HOUR = 100_000
"""So that at 500 impressions the hot items are half of the hour."""
Seen = Literal["none", "linear", "network"]


@dataclass(kw_only=True)
class Run:
    """A model on the way through the hours."""

    learner: Learner
    memory: Memory
    spec: DatasetSpec
    config: UpdateConfig
    moments: RunningMoments | None = None

    def encoded(self, examples: Examples, hour: int) -> EncodedWindow:
        return encode(examples, self.spec, self.memory, self.moments, hour=hour)

    def learn(self, examples: Examples, hour: int) -> None:
        window = self.encoded(examples, hour)
        training = self.config.training
        policy = FixedBatch(batch_size=training.batch_size, learning_rate=training.dense_learning_rate)
        learn(self.learner, window, seed=[training.seed, hour], policy=policy)
        before = self.moments or RunningMoments.nothing_seen(num_normalised(self.spec))
        self.moments = before.after(window.raw_dense_NR)
        self.memory.add(examples, hour)

    def predict(self, examples: Examples, hour: int) -> F32:
        weights = self.learner.dense_weights(averaged=True)
        return probabilities(self.learner.model, weights, self.encoded(examples, hour), device=torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--impressions", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--counters", choices=get_args(Seen), nargs="+", default=list(get_args(Seen)))
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings, beside those of the data set")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"{NUM_ITEMS} items born at {HOT_CTR / BASE_CTR:.0f} times the average CTR, after one hourly update")
    for name in ("counters", "impressions", "predicted / true CTR", "other items: log loss, change", "without them"):
        table.add_column(name, justify="right")
    for counters in options.counters:
        spec = _declared(counters)
        for impressions in options.impressions:
            results = [measure(spec, impressions, options.hours, seed, options.set) for seed in range(options.seeds)]
            ratios, changes, losses = zip(*results, strict=True)
            spreads = _spread(ratios, 3), _spread(changes, 5), f"{np.mean(losses):.5f}"
            table.add_row(counters, str(impressions), *spreads)
    Console().print(table)


def measure(spec: DatasetSpec, impressions: int, hours: int, seed: int, overrides: Sequence[str]) -> tuple[float, float, float]:
    """Predicted over true CTR of the hot items, the change of the other items' log loss, and that loss without hot items."""
    stream = SyntheticStream(
        SyntheticConfig(hours=hours + 2, rows_per_hour=ROWS_PER_HOUR, traffic_ratio=1.0, base_ctr=BASE_CTR, seed=seed)
    )
    ordinary = [to_examples(stream.hour(hour).table, spec) for hour in range(hours + 2)]
    first = int(np.median(ordinary[0].hour_R))
    hot = _hot_rows(ordinary[hours], NUM_ITEMS * impressions, np.random.default_rng([seed, 1]))
    fresh = _hot_rows(ordinary[hours + 1], FRESH_IMPRESSIONS, np.random.default_rng([seed, 2]))
    losses, ratio = [], 0.0
    for with_hot in (True, False):
        run = _new_run(spec, seed, overrides)
        for hour in range(hours):
            run.learn(ordinary[hour], first + hour)
        run.learn(concatenate([ordinary[hours], hot]) if with_hot else ordinary[hours], first + hours)
        after = ordinary[hours + 1]
        losses.append(log_loss(after.labels_R, run.predict(after, first + hours + 1)))
        if with_hot:
            ratio = float(run.predict(fresh, first + hours + 1).mean()) / HOT_CTR
    return ratio, losses[0] - losses[1], losses[1]


def _declared(counters: Seen) -> DatasetSpec:
    """With what is remembered beside the ids, by what part of the model sees it."""
    spec = load_spec("synthetic")
    match counters:
        case "none":
            return spec
        case "linear":
            ctr = Counter(over=("item_id",), of=("ctr",), half_lives_hours=(24.0,), linear_only=("ctr",))
            return spec.model_copy(update={"counters": (ctr,)})
        case "network":
            item = Counter(over=("item_id",), of=("impressions", "ctr"), half_lives_hours=(1.0, 24.0), prior_rows=5.0)
            author = Counter(over=("author_id",), of=("ctr",), half_lives_hours=(24.0,))
            return spec.model_copy(update={"counters": (item, author), "ages": ("item_id",)})
        case unknown:
            assert_never(unknown)


def _new_run(spec: DatasetSpec, seed: int, overrides: Sequence[str]) -> Run:
    own = ["state_dir=/nonexistent", "training.precision='fp32'", f"training.seed={seed}"]
    config = load_config(overrides=[*own, *overrides])
    return Run(learner=restore_or_create(config, spec).learner, memory=Memory(spec), spec=spec, config=config)


def _hot_rows(like: Examples, num_rows: int, rng: np.random.Generator) -> Examples:
    """Impressions of the hot items: users and contexts of ordinary rows, items and authors of their own."""
    rows = like.take(rng.integers(0, like.num_rows, num_rows))
    number = (np.arange(num_rows) % NUM_ITEMS).astype(np.uint64)
    item_R, author_R = mix64(number + np.uint64(10**9)), mix64(number + np.uint64(2 * 10**9))
    labels_R = (rng.random(num_rows) < HOT_CTR).astype(np.float32)
    single = {**rows.single_ids, "item_id": item_R, "author_id": author_R}
    return replace(rows, single_ids=single, item_R=item_R, labels_R=labels_R)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
