"""A stream of clicks that a fault is planted in, and a model on its way through it.

Enters: a seed and faults. Leaves: what the diagnosis of the pipeline says of each, and what its probes saw.

A run learns some healthy days, hour by hour. A fault of the rate or of the batch begins six hours before the hour that is
diagnosed; drift begins with that hour.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

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

DAYS, HOURS_OF_FAULT, PROBE_ROWS = 3, 6, 256
HEALTHY_BATCH = 256
NUM_USERS, NUM_ITEMS = 400, 300


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong, and the verdict that names it."""

    name: str
    expected: Verdict
    rate_times: float = 1.0
    """On all learning rates."""
    batch_size: int = HEALTHY_BATCH
    drifts: bool = False
    """The items change their click rates among each other."""

    @property
    def begins_early(self) -> bool:
        """In the hours before the one that is diagnosed."""
        return self.rate_times != 1.0 or self.batch_size != HEALTHY_BATCH


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of one hour."""

    diagnosis: Diagnosis
    probed: Probed


def diagnosed(seed: int, faults: Sequence[Fault], *, days: int = DAYS) -> dict[str, Found]:
    """What is found in the first hour after `days` healthy days, which all faults share; by the name of the fault."""
    last = 24 * days
    training = TrainingConfig(batch_size=HEALTHY_BATCH, micro_batch_size=HEALTHY_BATCH, precision="fp32", seed=seed)
    run = Run(FaultyStream(seed), training)
    early: dict[str, Run] = {}
    for hour in range(last):
        if hour == last - HOURS_OF_FAULT:
            early = {fault.name: run.copy(fault) for fault in faults if fault.begins_early}
        run.learn(hour)
    found = {}
    for fault in faults:
        other = early.get(fault.name) or run.copy(fault)
        for hour in range(last - HOURS_OF_FAULT, last) if fault.begins_early else ():
            other.learn(hour)
        found[fault.name] = other.learn(last, shifted=fault.drifts, probes=True)
    return found


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


class Run:
    """A model on its way through the hours of a stream."""

    def __init__(self, stream: FaultyStream, config: TrainingConfig) -> None:
        self.stream = stream
        self.learner = _new_learner(config, stream.seed)
        self.moments: RunningMoments | None = None
        self.history: list[dict[str, Any]] = []

    def learn(self, hour: int, *, shifted: bool = False, probes: bool = False) -> Found:
        """Predicts an hour, learns it, and says what was seen. Only hours that are compared with are predicted."""
        learner, config = self.learner, self.learner.config
        window = encode(self.stream.hour(hour, shifted=shifted), SPEC, Memory(SPEC), self.moments, hour=hour)
        before = None
        if hour and hour % 24 == 0:
            scored = probabilities(learner.model, learner.dense_weights(averaged=True), window, device=torch.device("cpu"))
            before = measure(window.labels_R, scored, window.user_R)
        policy = FixedBatch(batch_size=config.batch_size, learning_rate=config.dense_learning_rate)
        learned = learn(learner, window, seed=[self.stream.seed, hour], policy=policy, probe_rows=PROBE_ROWS if probes else 0)
        probed = learned.probed or Probed(steps=(), log_losses=(), gradient_norms=())
        seen = (probed.steps, probed.log_losses, probed.gradient_norms)
        _, found = judge_steadiness(*seen, hour=hour, before=before, probabilities=None, history=self.history)
        start = datetime.fromtimestamp(3600 * hour, UTC).isoformat()
        self.history.append({"window_start": start, "before": asdict(before) if before else None})
        self.moments = (self.moments or RunningMoments.nothing_seen(num_normalised(SPEC))).after(window.raw_dense_NR)
        return Found(diagnosis=found, probed=probed)

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
        times = fault.rate_times
        learner.model.tables.set_learning_rates(
            sparse=times * config.sparse_learning_rate, wide=times * config.wide_learning_rate
        )
        changed = {"dense_learning_rate": times * config.dense_learning_rate, "batch_size": fault.batch_size}
        learner.config = config.model_copy(update=changed)
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


def _zipf(count: int, exponent: float) -> npt.NDArray[np.float64]:
    weights: npt.NDArray[np.float64] = np.arange(1.0, count + 1) ** -exponent
    return np.asarray(weights / weights.sum(), np.float64)
