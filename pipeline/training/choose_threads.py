"""How many threads a pass is fastest with, on this machine and for this model.

Enters: settings and a declaration. Leaves: `ChosenThreads`, which the model keeps.

A step of a small network is some hundred operations of microseconds each, between which Python runs. Threads that wait for the
next operation then take more from the one that cuts batches, and from each other, than they give, which no operation timed by
itself shows. So a real pass is timed: `learn` over made-up rows, on a copy of the model with small tables. Small tables are
kinder to lookups than the model's own; in a pass these are the lesser part.

Letters: N dense columns, R rows, U users, V ids of all lists.
"""

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import I64, U64, Examples, IdLists
from models.ctr import Architecture, build_model
from models.histories import Histories
from models.id_table import IdTables
from models.tables import table_layout
from pipeline.config import TrainingConfig
from pipeline.data.encode import EncodedWindow, encode_known, linear_only_places, num_dense_columns, num_normalised
from pipeline.data.normalise import RunningMoments
from pipeline.training.batch_size import FixedBatch
from pipeline.training.budget import Deadline
from pipeline.training.learn import learn
from pipeline.training.learner import Arithmetic, Learner
from pipeline.training.processes import Processes

ROWS = 8_192
"""Of a timed pass at least: two chunks, of which the second is cut while the first is learned, or one batch may be more."""
ROUNDS = 3
CAPACITY = 16_384
"""Rows of a table at most: enough that lookups leave the processor's first cache."""
GIVEN_UP_AT = 2.0
"""Times the seconds of the quickest pass after which a slower one ends: on a busy machine many threads can take fifty times as
long, and an update waits meanwhile."""
LEARNING_RATE = 1e-6
"""Of all weights: what is learned does not matter, and must not diverge."""
ROWS_A_USER = 8
WORTH_A_THREAD = 0.05
"""Share by which the fewest threads may be slower than the fastest."""


@dataclass(frozen=True, kw_only=True)
class ChosenThreads:
    """For the passes of a new model."""

    fastest: int | None
    """None where there was nothing to choose."""
    notes: tuple[str, ...] = ()
    """What was chosen from."""


def choose_threads(
    config: TrainingConfig, spec: DatasetSpec, architecture: Architecture, *, device: torch.device, processes: Processes
) -> ChosenThreads:
    """The fewest with which a pass is about as fast as with any, up to those that torch has.

    Nothing is timed where the settings say a number, with several processes, each of which has its share of the cores, or on a
    GPU. Where the settings leave the arithmetic or the micro-batch open, fp32 and the smallest are timed.

    Args:
        config: settings.
        spec: of the rows.
        architecture: of the dense network.
        device: of the model.
        processes: that train it.
    """
    given = torch.get_num_threads()
    if config.threads != "auto" or given == 1 or processes.count > 1 or device.type != "cpu":
        return ChosenThreads(fastest=None)
    numbers = [*(2**power for power in range(given.bit_length()) if 2**power < given), given]
    learner, window = _copy(config, spec, architecture)
    took = {number: list[float]() for number in numbers}
    least = math.inf
    for _ in range(ROUNDS + 1):
        for number in numbers:
            took[number].append(_seconds_a_row(learner, window, number, at_most=GIVEN_UP_AT * least))
            least = min(least, took[number][-1])
    median = {number: statistics.median(laps[1:]) for number, laps in took.items()}
    chosen = min(number for number in numbers if median[number] <= (1 + WORTH_A_THREAD) * min(median.values()))
    tried = ", ".join(f"{1e6 * seconds:.1f} us a row with {number}" for number, seconds in median.items())
    return ChosenThreads(fastest=chosen, notes=(f"threads of one operation: {chosen} ({tried})",))


def _seconds_a_row(learner: Learner, window: EncodedWindow, threads: int, *, at_most: float) -> float:
    """Of learning the window once more; a pass that takes longer than `at_most` ends early."""
    learner.fastest_threads = threads
    policy = FixedBatch(batch_size=learner.config.smallest_batch, learning_rate=LEARNING_RATE)
    started = time.monotonic()
    deadline = Deadline(started=started, budget_seconds=at_most * window.num_rows, reserve_seconds=0.0)
    learned = learn(learner, window, seed=[0], policy=policy, deadline=deadline)
    return (time.monotonic() - started) / max(learned.rows, 1)


def _copy(config: TrainingConfig, spec: DatasetSpec, architecture: Architecture) -> tuple[Learner, EncodedWindow]:
    """A model with small tables, and made-up rows for it."""
    small = _small(spec)
    with torch.random.fork_rng():
        model = build_model(
            architecture,
            table_layout(small),
            num_dense=num_dense_columns(small),
            linear_only=linear_only_places(small),
            sparse_optimizer=config.sparse_optimizer,
            sparse_learning_rate=LEARNING_RATE,
            wide_learning_rate=LEARNING_RATE,
            wide_beta=config.wide_beta,
            device=torch.device("cpu"),
            seed=config.seed,
        )
    rows = max(ROWS, 2 * config.sparse_step_rows, config.smallest_batch)
    precision: Arithmetic = "fp32" if config.precision == "auto" else config.precision
    return Learner(model, config, precision=precision, device=torch.device("cpu")), _made_up(small, rows)


def _small(spec: DatasetSpec) -> DatasetSpec:
    """The same with tables of at most `CAPACITY` rows."""
    features = tuple(feature.model_copy(update={"capacity": min(feature.capacity, CAPACITY)}) for feature in spec.categorical)
    return spec.model_copy(update={"categorical": features, "cross_capacity": min(spec.cross_capacity, CAPACITY)})


def _made_up(spec: DatasetSpec, num_rows: int) -> EncodedWindow:
    """A window of random rows, of users with full histories."""
    rng = np.random.default_rng(0)
    num_users = -(-num_rows // ROWS_A_USER)
    user_R = rng.integers(0, num_users, num_rows)
    single = [feature for feature in spec.categorical if not feature.many]
    raw_dense_NR = rng.normal(size=(num_normalised(spec), num_rows)).astype(np.float32)
    examples = Examples(
        single_ids={
            feature.name: rng.integers(0, feature.capacity if feature.from_time else 2**63, num_rows, np.uint64)
            for feature in single
        },
        list_ids={feature.name: _lists(rng, rng.integers(1, 5, num_rows)) for feature in spec.categorical if feature.many},
        numeric_NR=raw_dense_NR[: len(spec.numeric)],
        labels_R=(rng.random(num_rows) < 0.1).astype(np.float32),
        weights_R=np.ones(num_rows, np.float32),
        user_R=user_R.astype(np.uint64),
        item_R=user_R.astype(np.uint64),
        hour_R=np.zeros(num_rows, np.int64),
    )
    histories = None
    if spec.history:
        clicks_U = np.full(num_users, spec.history.length)
        histories = Histories(
            position_R=user_R,
            lists={name: _lists(rng, clicks_U) for name in spec.history.of},
            hour_V=np.zeros(clicks_U.sum(), np.int64),
        )
    moments = RunningMoments.nothing_seen(len(raw_dense_NR)).after(raw_dense_NR)
    return encode_known(examples, spec, IdTables(spec), moments, raw_dense_NR=raw_dense_NR, histories=histories, hour=0)


def _lists(rng: np.random.Generator, lengths: I64) -> IdLists:
    values_V: U64 = rng.integers(0, 2**63, lengths.sum(), np.uint64)
    return IdLists(values_V=values_V, offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
