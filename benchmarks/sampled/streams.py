"""Hours of a synthetic stream, encoded once, and models that learn them under one sampling or another."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.examples import F32, Examples
from models.memory import Memory
from pipeline.config import SamplingConfig, UpdateConfig, load_config
from pipeline.data.encode import EncodedWindow, encode, num_normalised
from pipeline.data.loader import to_examples
from pipeline.data.normalise import RunningMoments
from pipeline.data.synthetic import SyntheticConfig, SyntheticStream
from pipeline.evaluation.score import probabilities
from pipeline.model_state import restore_or_create
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.sampling import sample_window


@dataclass(frozen=True, kw_only=True)
class Hour:
    """A window, and the hour (since 1970) that it begins at."""

    start: int
    examples: Examples
    window: EncodedWindow


def hours_of(spec: DatasetSpec, *, ctr: float, hours: int, rows: int, seed: int) -> Iterator[Hour]:
    """Encoded as an update encodes them; an hour is counted in once the next is asked for."""
    stream = SyntheticStream(SyntheticConfig(hours=hours, rows_per_hour=rows, traffic_ratio=1.0, base_ctr=ctr, seed=seed))
    memory, moments = Memory(spec), None
    for number in range(hours):
        examples = to_examples(stream.hour(number).table, spec)
        start = int(np.median(examples.hour_R))
        window = encode(examples, spec, memory, moments, hour=start)
        yield Hour(start=start, examples=examples, window=window)
        before = moments or RunningMoments.nothing_seen(num_normalised(spec))
        moments = before.after(window.raw_dense_NR)
        memory.add(examples, start)


class Model:
    """A model that learns hour after hour with its own sampling, and how long that took."""

    def __init__(self, spec: DatasetSpec, sampling: SamplingConfig, seed: int, *overrides: str) -> None:
        self.spec, self.sampling, self.seed = spec, sampling, seed
        self.config = settings(seed, *overrides)
        self.learner = restore_or_create(self.config, spec).learner
        self.rows_learned = 0
        self.sampling_seconds = 0.0
        self.learning_seconds = 0.0

    def learn(self, hour: Hour) -> None:
        training, seed = self.config.training, (self.seed, hour.start)
        policy = FixedBatch(batch_size=training.batch_size, learning_rate=training.dense_learning_rate)
        started = time.process_time()
        sampled = sample_window(self.sampling, hour.examples, hour.window, self.spec, seed=seed)
        drawn = time.process_time()
        done = learn(self.learner, sampled.window, seed=seed, policy=policy, stratum_R=sampled.stratum_R, kept_R=sampled.kept_R)
        self.rows_learned += done.rows
        self.sampling_seconds += drawn - started
        self.learning_seconds += time.process_time() - drawn

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
