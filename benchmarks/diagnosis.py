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
from collections import Counter
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
    for fault, expected in EXPECTED.items():
        given: Counter[str] = Counter()
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            found = diagnosed(fault, seed)
            given[found.verdict or "not judged"] += 1
            if found.verdict != expected:
                print(f"{fault} {seed}: {found}", flush=True)
        right = f"{given[expected]} of {options.seeds}"
        table.add_row(fault, right, *(str(given[verdict] or "") for verdict in verdicts))
    Console(width=120).print(table)


def diagnosed(fault: Fault, seed: int, *, days: int = DAYS) -> Diagnosis:
    """What is said of the first hour after `days` days."""
    stream, healthy = FaultyStream(seed), TrainingConfig(batch_size=256, micro_batch_size=256, precision="fp32", seed=seed)
    learner, memory, moments = _new_learner(healthy, seed), Memory(SPEC), None
    history: list[dict[str, Any]] = []
    last = 24 * days
    for hour in range(last + 1):
        if hour == last - HOURS_OF_FAULT:
            learner.config = _faulty(learner, healthy, fault)
        window = encode(stream.hour(hour, shifted=hour == last and fault == "drift"), SPEC, memory, moments, hour=hour)
        scored = probabilities(learner.model, learner.dense_weights(averaged=hour > 0), window, device=torch.device("cpu"))
        before = measure(window.labels_R, scored, window.user_R)
        training = learner.config
        policy = FixedBatch(batch_size=training.batch_size, learning_rate=training.dense_learning_rate)
        learned = learn(learner, window, seed=[seed, hour], policy=policy, probe_rows=PROBE_ROWS if hour == last else 0)
        if hour == last:
            assert learned.probed is not None
            probed = learned.probed
            return judge_steadiness(
                probed.steps,
                probed.log_losses,
                probed.gradient_norms,
                hour=hour,
                before=before,
                probabilities=None,
                history=history,
            )[1]
        start = datetime.fromtimestamp(3600 * hour, UTC).isoformat()
        if hour:
            history.append({"window_start": start, "before": asdict(before)})
        moments = (moments or RunningMoments.nothing_seen(num_normalised(SPEC))).after(window.raw_dense_NR)
    raise AssertionError


def _faulty(learner: Learner, healthy: TrainingConfig, fault: Fault) -> TrainingConfig:
    match fault:
        case "rate":
            sparse, wide = 30 * healthy.sparse_learning_rate, 30 * healthy.wide_learning_rate
            learner.model.tables.set_learning_rates(sparse=sparse, wide=wide)
            return healthy.model_copy(update={"dense_learning_rate": 30 * healthy.dense_learning_rate})
        case "batch":
            return healthy.model_copy(update={"batch_size": 8})
        case _:
            return healthy


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
