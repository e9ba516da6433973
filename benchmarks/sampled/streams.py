"""Hours of a synthetic stream, encoded once, and models that learn them under one sampling or another."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.examples import F32, Examples
from models.id_table import IdTables
from models.memory import Memory
from pipeline.config import SamplingConfig, UpdateConfig, load_config
from pipeline.data.encode import EncodedWindow, encode, num_normalised
from pipeline.data.loader import to_examples
from pipeline.data.normalise import RunningMoments
from pipeline.data.synthetic import SyntheticConfig, SyntheticStream
from pipeline.evaluation.score import probabilities
from pipeline.model_state import restore_or_create
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import Progress, learn
from pipeline.training.replay import ReplayMemory, after_window, with_replay
from pipeline.training.sampling import SampledWindow, sample_window


@dataclass(frozen=True, kw_only=True)
class Hour:
    """A window, and the hour (since 1970) that it begins at."""

    start: int
    examples: Examples
    window: EncodedWindow
    memory: Memory
    """As it was before this hour, until the hour is counted in."""


class Encoder:
    """Encodes windows as an update does, with what was counted of earlier ones."""

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec
        self._memory = Memory(spec)
        self._moments: RunningMoments | None = None

    def encoded(self, examples: Examples) -> Hour:
        """By what is known now; the rows are not counted."""
        start = int(np.median(examples.hour_R))
        window = encode(examples, self._spec, self._memory, self._moments, hour=start)
        return Hour(start=start, examples=examples, window=window, memory=self._memory)

    def count(self, hour: Hour) -> None:
        """Its rows are known from now on."""
        before = self._moments or RunningMoments.nothing_seen(num_normalised(self._spec))
        self._moments = before.after(hour.window.raw_dense_NR)
        self._memory.add(hour.examples, hour.start)


def hours_of(spec: DatasetSpec, *, ctr: float, hours: int, rows: int, seed: int) -> Iterator[Hour]:
    """Encoded as an update encodes them; an hour is counted in once the next is asked for."""
    encoder = Encoder(spec)
    for examples in examples_of(spec, ctr=ctr, hours=hours, rows=rows, seed=seed):
        hour = encoder.encoded(examples)
        yield hour
        encoder.count(hour)


def examples_of(spec: DatasetSpec, *, ctr: float, hours: int, rows: int, seed: int) -> Iterator[Examples]:
    """Hours of `rows` rows each."""
    for examples, _ in examples_and_truth_of(spec, ctr=ctr, hours=hours, rows=rows, seed=seed):
        yield examples


def examples_and_truth_of(spec: DatasetSpec, *, ctr: float, hours: int, rows: int, seed: int) -> Iterator[tuple[Examples, F32]]:
    """The same, with the probability that each label was drawn from."""
    config = SyntheticConfig(hours=hours, rows_per_hour=rows, traffic_ratio=1.0, base_ctr=ctr, seed=seed)
    stream = SyntheticStream(config)
    for number in range(hours):
        hour = stream.hour(number)
        yield to_examples(hour.table, spec), hour.true_probability_R


class Model:
    """A model that learns hour after hour with its own sampling, and how long that took."""

    def __init__(self, spec: DatasetSpec, sampling: SamplingConfig, seed: int, *overrides: str) -> None:
        self.spec, self.sampling, self.seed = spec, sampling, seed
        self.config = settings(seed, *overrides)
        self.learner = restore_or_create(self.config, spec).learner
        self.replay = ReplayMemory.empty(sampling)
        self.rows_learned = 0
        self.sampling_seconds = 0.0
        self.learning_seconds = 0.0

    def learn(self, hour: Hour, progress: Progress = lambda done, rows: None) -> SampledWindow:
        """One pass; the sample that it learned."""
        training, seed = self.config.training, (self.seed, hour.start)
        policy = FixedBatch(batch_size=training.batch_size, learning_rate=training.dense_learning_rate)
        started = time.process_time()
        sampled = sample_window(self.sampling, hour.examples, hour.window, self.spec, seed=seed)
        sampled = with_replay(self.replay, sampled, self.sampling, self.spec, IdTables(self.spec), seed=seed, hour=hour.start)
        drawn = time.process_time()
        done = learn(
            self.learner,
            sampled.window,
            seed=seed,
            policy=policy,
            progress=progress,
            stratum_R=sampled.stratum_R,
            kept_R=sampled.kept_R,
        )
        learned = time.process_time()
        if self.sampling.replay_share:
            reached = np.flatnonzero(~done.unreached_R[: hour.window.num_rows])
            self.replay = after_window(self.replay, hour.examples, sampled, hour.memory, reached, seed=seed)
        self.rows_learned += done.rows
        self.sampling_seconds += drawn - started + time.process_time() - learned
        self.learning_seconds += learned - drawn
        return sampled

    def predict(self, window: EncodedWindow) -> F32:
        weights = self.learner.dense_weights(averaged=True)
        return probabilities(self.learner.model, weights, window, device=torch.device("cpu"))


def settings(seed: int, *overrides: str) -> UpdateConfig:
    """The defaults of the data set `synthetic`, in fp32."""
    return load_config(overrides=["state_dir=/nonexistent", "training.precision='fp32'", f"training.seed={seed}", *overrides])


def synthetic_spec() -> DatasetSpec:
    return load_spec("synthetic")


def mean_and_range(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
