"""Past rows in an update: as of their own time, bounded, and the same after a restart."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from data_schemas.dataset import DatasetSpec, History
from data_schemas.examples import Examples
from models.id_table import IdTables
from models.memory import Memory
from pipeline.config import SamplingConfig
from pipeline.data.encode import EncodedWindow, encode
from pipeline.training.replay import ReplayMemory, after_window, with_replay
from pipeline.training.sampling import SampledWindow

SAMPLING = SamplingConfig(replay_share=0.25, replay_capacity=60)


@pytest.fixture
def spec(small_spec: DatasetSpec) -> DatasetSpec:
    return small_spec.model_copy(update={"history": History(of=("item",), length=4), "ages": ("item",)})


def _sampled(window: EncodedWindow) -> SampledWindow:
    return SampledWindow(window=window, stratum_R=None, kept_R=None, plan=None)


def _hours(spec: DatasetSpec, make: Callable[..., Examples], hours: int) -> tuple[ReplayMemory, Memory, list[EncodedWindow]]:
    replay, memory, windows = ReplayMemory.empty(SAMPLING), Memory(spec), []
    for hour in range(hours):
        examples = make(100, seed=hour, hour=hour)
        window = encode(examples, spec, memory, windows[0].moments if windows else None, hour=hour)
        replay = after_window(replay, examples, _sampled(window), memory, np.arange(100), seed=[hour])
        memory.add(examples, hour)
        windows.append(window)
    return replay, memory, windows


def test_a_replayed_row_is_the_row_as_it_was_first_learned(spec: DatasetSpec, small_examples: Callable[..., Examples]) -> None:
    replay, memory, windows = _hours(spec, small_examples, 3)
    assert replay.held is not None
    assert replay.held.examples.num_rows == 60
    now = encode(small_examples(100, seed=9, hour=3), spec, memory, windows[0].moments, hour=3)
    mixed = with_replay(replay, _sampled(now), SAMPLING, spec, IdTables(spec), seed=[0], hour=3).window
    assert mixed.num_rows - 100 == round(100 / 3)
    own = {_key(window, row): window.minibatch(np.array([row])) for window in windows for row in range(100)}
    for row in range(100, mixed.num_rows):
        batch, was = mixed.minibatch(np.array([row])), own[_key(mixed, row)]
        for new, old in ((batch.deep, was.deep), (batch.wide, was.wide)):
            assert new.values().tolist() == old.values().tolist()
            assert new.weights().tolist() == old.weights().tolist()
            assert new.lengths().tolist() == old.lengths().tolist()
        assert batch.dense_BN.tolist() == was.dense_BN.tolist()
        assert batch.labels_B.tolist() == was.labels_B.tolist()


def _key(window: EncodedWindow, row: int) -> str:
    """Numbers, user and label tell rows apart."""
    return repr((window.raw_dense_NR[:, row].tolist(), int(window.user_R[row]), window.labels_R[row]))


def test_past_rows_have_their_share_of_the_weight(spec: DatasetSpec, small_examples: Callable[..., Examples]) -> None:
    replay, memory, windows = _hours(spec, small_examples, 3)
    examples = small_examples(120, seed=9, hour=3).with_weights(np.full(120, 5.0, np.float32))
    now = encode(examples, spec, memory, windows[0].moments, hour=3)
    mixed = with_replay(replay, _sampled(now), SAMPLING, spec, IdTables(spec), seed=[0], hour=3).window
    assert mixed.weights_R[120:].sum() / mixed.weights_R.sum() == pytest.approx(0.25, rel=1e-5)
    seen = np.concatenate([window.labels_R for window in windows]).mean()
    assert np.average(mixed.labels_R[120:], weights=mixed.weights_R[120:]) == pytest.approx(seen, rel=1e-5)


def test_what_was_left_out_by_sampling_is_not_held(spec: DatasetSpec, small_examples: Callable[..., Examples]) -> None:
    memory, examples = Memory(spec), small_examples(50)
    window = encode(examples, spec, memory, None, hour=0)
    kept_R = np.arange(50) < 20
    sampled = replace(_sampled(window), kept_R=kept_R, stratum_R=np.zeros(50, np.int32))
    replay = after_window(ReplayMemory.empty(SAMPLING), examples, sampled, memory, np.arange(10, 50), seed=[0])
    assert replay.reservoir.seen_S.sum() == 10
    mixed = with_replay(replay, sampled, SAMPLING, spec, IdTables(spec), seed=[1], hour=1)
    assert mixed.stratum_R is not None
    assert mixed.kept_R is not None
    assert (mixed.stratum_R[50:] == 1).all()
    assert mixed.kept_R[50:].all()
    assert len(mixed.kept_R) == mixed.window.num_rows > 50


def test_going_on_from_a_checkpoint_equals_not_having_stopped(
    spec: DatasetSpec, small_examples: Callable[..., Examples]
) -> None:
    replay, memory, windows = _hours(spec, small_examples, 3)
    dense = len(windows[0].raw_dense_NR)
    restored = ReplayMemory.load(replay.arrays(), SAMPLING, spec, dense)
    examples = small_examples(100, seed=9, hour=3)
    now = encode(examples, spec, memory, windows[0].moments, hour=3)
    after = [after_window(each, examples, _sampled(now), memory, np.arange(100), seed=[3]) for each in (replay, restored)]
    first, second = ({name: array.tobytes() for name, array in each.arrays().items()} for each in after)
    assert first == second
    larger = SAMPLING.model_copy(update={"replay_capacity": 80})
    assert ReplayMemory.load(replay.arrays(), larger, spec, dense).held is None
    assert ReplayMemory.load(replay.arrays(), SAMPLING, spec, dense + 1).held is None


@pytest.mark.parametrize(("power", "expected"), [(0.0, 2.5), (2.0, 100 / 30)])
def test_with_an_age_power_older_rows_come_back_more_often(
    spec: DatasetSpec, small_examples: Callable[..., Examples], power: float, expected: float
) -> None:
    replay, memory, windows = _hours(spec, small_examples, 4)
    now = encode(small_examples(3, seed=9, hour=4), spec, memory, windows[0].moments, hour=4)
    age = {_key(window, row): 4 - hour for hour, window in enumerate(windows) for row in range(100)}
    sampling, ages = SAMPLING.model_copy(update={"replay_age_power": power}), []
    for seed in range(400):
        mixed = with_replay(replay, _sampled(now), sampling, spec, IdTables(spec), seed=[seed], hour=4).window
        ages += [age[_key(mixed, row)] for row in range(3, mixed.num_rows)]
    assert np.mean(ages) == pytest.approx(expected, abs=0.2)
