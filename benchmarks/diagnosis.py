"""Does the diagnosis name the fault that a stream was built to have?

    python benchmarks/diagnosis.py [--seeds 50] [--first-seed 100]

In:  three days of hourly updates of a small stream of users and items whose truth is known, at healthy settings; then a fault.
Out: for each kind of stream, how often each verdict was given to the first hour of the fourth day.

    healthy   nothing changes
    rate      all learning rates times 30, in the six hours before and in this one
    batch     batches of 8, in the same hours
    drift     in this hour the items have changed their click rates among each other

The thresholds in `pipeline/evaluation/diagnosis.py` were set on seeds 0 to 5, which the default leaves out.
"""

import argparse
import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import Examples
from data_schemas.hashing import mix64
from models.ctr import build_model
from models.memory import Memory
from models.tables import table_layout
from pipeline.config import ModelConfig, TrainingConfig
from pipeline.data.encode import encode, num_dense_columns, num_normalised
from pipeline.data.normalise import RunningMoments
from pipeline.evaluation.diagnosis import Diagnosis, Verdict
from pipeline.evaluation.metrics import measure
from pipeline.evaluation.score import probabilities
from pipeline.evaluation.steadiness import judge_steadiness
from pipeline.model_state import architecture
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.learner import Learner
from pipeline.training.probes import Probed

Fault = Literal["healthy", "rate", "batch", "drift"]
EXPECTED: dict[Fault, Verdict] = {
    "healthy": "healthy",
    "rate": "learning_rate_too_high",
    "batch": "noise_limited",
    "drift": "drift",
}
DAYS, HOURS_OF_FAULT, PROBE_ROWS = 3, 6, 256
NUM_USERS, NUM_ITEMS = 400, 300
SPEC = DatasetSpec.model_validate(
    {
        "name": "faults",
        "time": {"column": "time"},
        "label": {"column": "label"},
        "user": "user",
        "item": "item",
        "event_key": ("event_id",),
        "categorical": (
            {"name": "user", "type": "integer", "capacity": 1024, "embedding_dim": 8},
            {"name": "item", "type": "integer", "capacity": 1024, "embedding_dim": 8},
            {"name": "hour_of_day", "from_time": "hour_of_day", "capacity": 24, "embedding_dim": 8},
        ),
        "numeric": ({"name": "price"},),
    }
)


class FaultyStream:
    """Clicks by users, items, their likings, a price and the hour of the day; hours of 1,000 to 4,000 rows."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 7])
        self.seed = seed
        self.user_effect_U, self.item_effect_I = 0.6 * rng.normal(size=NUM_USERS), 0.8 * rng.normal(size=NUM_ITEMS)
        self.taste_UK, self.kind_IK = rng.normal(size=(NUM_USERS, 2)), rng.normal(size=(NUM_ITEMS, 2))
        self.shifted_effect_I = rng.permutation(self.item_effect_I)
        self.peak_hour = 24 * rng.random()

    def hour(self, hour: int, *, shifted: bool = False) -> Examples:
        """The rows of an hour; `shifted` after the items changed their click rates."""
        rng = np.random.default_rng([self.seed, hour, 11])
        rows = int(1000 + 1500 * (1 + np.cos(2 * np.pi * hour / 24)))
        user_R, item_R = (
            rng.choice(NUM_USERS, rows, p=_zipf(NUM_USERS, 0.6)),
            rng.choice(NUM_ITEMS, rows, p=_zipf(NUM_ITEMS, 0.8)),
        )
        price_R = rng.normal(size=rows)
        item_effect_I = self.shifted_effect_I if shifted else self.item_effect_I
        log_odds_R = (
            -1.5
            + 0.25 * np.cos(2 * np.pi * (hour - self.peak_hour) / 24)
            + self.user_effect_U[user_R]
            + item_effect_I[item_R]
            + 0.4 * (self.taste_UK[user_R] * self.kind_IK[item_R]).sum(axis=1)
            + 0.3 * price_R
        )
        users_R, items_R = mix64(user_R.astype(np.uint64)), mix64(item_R.astype(np.uint64))
        return Examples(
            single_ids={"user": users_R, "item": items_R, "hour_of_day": np.full(rows, hour % 24, np.uint64)},
            list_ids={},
            numeric_NR=price_R[None].astype(np.float32),
            labels_R=(rng.random(rows) < 1 / (1 + np.exp(-log_odds_R))).astype(np.float32),
            weights_R=np.ones(rows, np.float32),
            user_R=users_R,
            item_R=items_R,
            hour_R=np.full(rows, hour, np.int64),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    verdicts = [*get_args(Verdict), "not judged"]
    table = Table(title=f"verdicts on {options.seeds} seeds from {options.first_seed}")
    for name in ("stream", "right", *verdicts):
        table.add_column(name, justify="left" if name == "stream" else "right")
    given: dict[Fault, Counter[str]] = {fault: Counter() for fault in EXPECTED}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for fault, found in diagnosed(seed).items():
            given[fault][found.verdict or "not judged"] += 1
            if found.verdict != EXPECTED[fault]:
                print(f"{fault} {seed}: {found}", flush=True)
    for fault, expected in EXPECTED.items():
        right = f"{given[fault][expected]} of {options.seeds}"
        table.add_row(fault, right, *(str(given[fault][verdict] or "") for verdict in verdicts))
    Console(width=120).print(table)


def diagnosed(seed: int, faults: Sequence[Fault] = tuple(EXPECTED)) -> dict[Fault, Diagnosis]:
    """What is said of the first hour of the fourth day, for each fault; all share the healthy days before it."""
    last = 24 * DAYS
    run = Run(FaultyStream(seed), TrainingConfig(batch_size=256, micro_batch_size=256, precision="fp32", seed=seed))
    found: dict[Fault, Diagnosis] = {}
    for hour in range(last):
        if hour == last - HOURS_OF_FAULT:
            faulty = {fault: run.copy(fault) for fault in faults if fault in ("rate", "batch")}
        run.learn(hour)
    for fault, other in faulty.items():
        for hour in range(last - HOURS_OF_FAULT, last):
            other.learn(hour)
        found[fault] = other.learn(last)
    if "drift" in faults:
        found["drift"] = run.copy("drift").learn(last, shifted=True)
    if "healthy" in faults:
        found["healthy"] = run.learn(last)
    return found


class Run:
    """A model on its way through the hours of a stream."""

    def __init__(self, stream: FaultyStream, config: TrainingConfig) -> None:
        self.stream = stream
        self.learner = _new_learner(config, stream.seed)
        self.moments: RunningMoments | None = None
        self.history: list[dict[str, Any]] = []

    def learn(self, hour: int, *, shifted: bool = False) -> Diagnosis:
        """Predicts an hour, learns it, and says what was seen. Only hours that are compared with are predicted."""
        learner, config = self.learner, self.learner.config
        window = encode(self.stream.hour(hour, shifted=shifted), SPEC, Memory(SPEC), self.moments, hour=hour)
        before = None
        if hour and hour % 24 == 0:
            scored = probabilities(learner.model, learner.dense_weights(averaged=True), window, device=torch.device("cpu"))
            before = measure(window.labels_R, scored, window.user_R)
        policy = FixedBatch(batch_size=config.batch_size, learning_rate=config.dense_learning_rate)
        probe_rows = PROBE_ROWS if hour == 24 * DAYS else 0
        learned = learn(learner, window, seed=[self.stream.seed, hour], policy=policy, probe_rows=probe_rows)
        probed = learned.probed or Probed(steps=(), log_losses=(), gradient_norms=())
        seen = (probed.steps, probed.log_losses, probed.gradient_norms)
        _, found = judge_steadiness(*seen, hour=hour, before=before, probabilities=None, history=self.history)
        start = datetime.fromtimestamp(3600 * hour, UTC).isoformat()
        self.history.append({"window_start": start, "before": asdict(before) if before else None})
        self.moments = (self.moments or RunningMoments.nothing_seen(num_normalised(SPEC))).after(window.raw_dense_NR)
        return found

    def copy(self, fault: Fault) -> "Run":
        """The same run, which goes on with a fault."""
        own, config = self.learner, self.learner.config
        other = Run(self.stream, config)
        other.moments, other.history, learner = self.moments, list(self.history), other.learner
        learner.model.tables.load_slices({piece.name: [piece] for piece in own.model.tables.slices()})
        learner.model.net.load_state_dict(own.model.net.state_dict())
        learner.optimizer.load_state_dict(copy.deepcopy(own.optimizer.state_dict()))
        assert own.weight_average is not None
        assert learner.weight_average is not None
        learner.weight_average.load(own.weight_average.sums, own.weight_average.steps)
        learner.steps = own.steps
        if fault == "rate":
            sparse, wide = 30 * config.sparse_learning_rate, 30 * config.wide_learning_rate
            learner.model.tables.set_learning_rates(sparse=sparse, wide=wide)
            learner.config = config.model_copy(update={"dense_learning_rate": 30 * config.dense_learning_rate})
        if fault == "batch":
            learner.config = config.model_copy(update={"batch_size": 8})
        return other


def _new_learner(config: TrainingConfig, seed: int) -> Learner:
    model = build_model(
        architecture(ModelConfig(hidden=(32, 16), interaction_dim=8)),
        table_layout(SPEC),
        num_dense=num_dense_columns(SPEC),
        sparse_optimizer=config.sparse_optimizer,
        sparse_learning_rate=config.sparse_learning_rate,
        wide_learning_rate=config.wide_learning_rate,
        device=torch.device("cpu"),
        seed=seed,
    )
    return Learner(model, config, precision="fp32", device=torch.device("cpu"))


def _zipf(count: int, exponent: float) -> np.ndarray:
    weights = np.arange(1.0, count + 1) ** -exponent
    return weights / weights.sum()


if __name__ == "__main__":
    main()
