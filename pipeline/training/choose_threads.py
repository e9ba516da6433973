"""How many threads a pass is fastest with, on this machine and for this model.

Enters: settings and a declaration. Leaves: `ChosenThreads`, which the model keeps.

A step of a small network is some hundred operations of microseconds each, between which Python runs. Threads that wait for the
next operation then take more from the one that cuts batches, and from each other, than they give: on two cores one thread can
be twice as fast as two, which no operation timed by itself shows. So a real pass is timed: `learn` over made-up rows, on a copy
of the model with small tables.

Letters: R rows, U users, V ids of all lists.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import I64, U64, Examples, IdLists
from models.ctr import Architecture, build_model
from models.histories import Histories
from models.id_table import IdTables
from models.tables import table_layout
from pipeline.config import TrainingConfig
from pipeline.data.encode import EncodedWindow, encode_known, num_dense_columns, num_normalised
from pipeline.data.normalise import RunningMoments
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.learner import Arithmetic, Learner
from pipeline.training.processes import Processes

ROWS = 8_192
"""Of a timed pass, or two chunks where that is more: the second is cut while the first is learned."""
ROUNDS = 3
CAPACITY = 65_536
"""Rows of a table at most: enough that lookups leave the processor's first caches."""
ROWS_A_USER = 8
WORTH_A_THREAD = 0.05
"""Share of the seconds a row by which more threads have to be faster than the fewest that are as fast as any."""


@dataclass(frozen=True, kw_only=True)
class ChosenThreads:
    """For the passes of a new model."""

    number: int | Literal["auto"]
    """`auto` where there is nothing to choose: as many as torch is given."""
    notes: tuple[str, ...] = ()
    """What was chosen from."""


def choose_threads(
    config: TrainingConfig,
    spec: DatasetSpec,
    architecture: Architecture,
    *,
    precision: Arithmetic,
    device: torch.device,
    processes: Processes,
) -> ChosenThreads:
    """What is asked for; where that is `auto` the fewest with which a pass is as fast as with any, up to those that torch has.

    Nothing is timed with several processes, each of which has its share of the cores, or on a GPU.

    Args:
        config: its `micro_batch_size` is the one that the model will have.
        spec: of the rows.
        architecture: of the dense network.
        precision: that was chosen.
        device: of the model.
        processes: that train it.
    """
    given = torch.get_num_threads()
    if config.threads != "auto" or given == 1 or processes.count > 1 or device.type != "cpu":
        return ChosenThreads(number=config.threads)
    numbers = [*(2**power for power in range(given.bit_length()) if 2**power < given), given]
    passes = {number: _pass(config, spec, architecture, precision, number) for number in numbers}
    laps = [{number: timed() for number, timed in passes.items()} for _ in range(ROUNDS + 1)][1:]
    took = {number: statistics.median(lap[number] for lap in laps) for number in numbers}
    chosen = min(number for number in numbers if took[number] <= (1 + WORTH_A_THREAD) * min(took.values()))
    tried = ", ".join(f"{1e6 * seconds:.1f} us a row with {number}" for number, seconds in took.items())
    return ChosenThreads(number=chosen, notes=(f"threads of one operation: {chosen} ({tried})",))


def _pass(
    config: TrainingConfig, spec: DatasetSpec, architecture: Architecture, precision: Arithmetic, threads: int
) -> Callable[[], float]:
    """Learns made-up rows once more, and gives the seconds that a row took."""
    small = _small(spec)
    with torch.random.fork_rng():
        model = build_model(
            architecture,
            table_layout(small),
            num_dense=num_dense_columns(small),
            sparse_optimizer=config.sparse_optimizer,
            sparse_learning_rate=config.sparse_learning_rate,
            wide_learning_rate=config.wide_learning_rate,
            wide_beta=config.wide_beta,
            device=torch.device("cpu"),
            seed=config.seed,
        )
    own = config.model_copy(update={"threads": threads})
    learner = Learner(model, own, precision=precision, device=torch.device("cpu"))
    policy = FixedBatch(batch_size=config.smallest_batch, learning_rate=config.dense_learning_rate)
    window = _made_up(small, max(ROWS, 2 * config.sparse_step_rows, 2 * config.smallest_batch))

    def timed() -> float:
        started = time.perf_counter()
        learn(learner, window, seed=[config.seed], policy=policy)
        return (time.perf_counter() - started) / window.num_rows

    return timed


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
