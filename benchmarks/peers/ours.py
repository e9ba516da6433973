"""This project's learner, by the functions that an update calls; and the same, frozen after a day."""

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from peers.contender import Contender, Hour, Settings
from pipeline.config import load_config
from pipeline.evaluation.score import probabilities
from pipeline.model_state import restore_or_create
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn


def contenders(overrides: Sequence[str]) -> list[Contender]:
    """Ours, and ours frozen after 24 hours, which still gets counters of later hours; searched are factors of the rates that
    the data set's TOML has.

    Args:
        overrides: settings such as `model.kind=dcnv2` for every trial.
    """
    grid: dict[str, Sequence[Any]] = {
        "times_dense_learning_rate": (1, 3, 0.5),
        "times_sparse_learning_rate": (1, 2, 0.5),
        "times_wide_learning_rate": (1, 2, 0.5),
    }

    def build(spec: DatasetSpec, settings: Settings, seed: int) -> "Tidemark":
        own = load_config(None, [f"dataset={spec.name}", *overrides]).training
        rates = {times.removeprefix("times_"): factor for times, factor in settings.items()}
        chosen = [f"training.{name}={getattr(own, name) * factor}" for name, factor in rates.items()]
        return Tidemark(spec, [*overrides, *chosen, f"training.seed={seed}"])

    return [
        Contender(name="ours", build=build, grid=grid, random=True),
        Contender(name="frozen", build=build, grid=grid, random=True, searched_as="ours", frozen_after_hours=24),
    ]


class Tidemark:
    """The learner of `pipeline/`, without the click log, the gate and publishing."""

    def __init__(self, spec: DatasetSpec, overrides: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory() as nothing_saved:
            defaults = [f"dataset={spec.name}", f"state_dir={nothing_saved}", "training.precision=fp32"]
            config = load_config(None, [*defaults, *overrides])
            self._learner = restore_or_create(config, spec).learner
        training = config.training
        self._seed = training.seed
        self._policy = FixedBatch(batch_size=training.batch_size, learning_rate=training.dense_learning_rate)

    def prepare(self, hour: Hour) -> Hour:
        """Nothing to do: the hour is encoded."""
        return hour

    def predict(self, hour: Hour) -> F32:
        """By the weights that an update would publish."""
        learner = self._learner
        return probabilities(learner.model, learner.dense_weights(averaged=True), hour.encoded, device=learner.device)

    def learn(self, hour: Hour) -> None:
        """One pass, without a deadline."""
        learned = learn(self._learner, hour.encoded, seed=(self._seed, hour.start), policy=self._policy)
        if learned.skipped_steps:
            print(f"ours: {learned.skipped_steps} steps were skipped: loss not finite", file=sys.stderr)
