"""The fewest threads with which a pass is as fast as with any; they hold while rows are learned, and in that alone."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch

from data_schemas.dataset import DatasetSpec, History, load_spec
from data_schemas.examples import Examples
from models.memory import Memory
from pipeline.config import ModelConfig, TrainingConfig, UpdateConfig
from pipeline.data.encode import encode
from pipeline.model_state import architecture, restore_or_create
from pipeline.training import choose_threads as module
from pipeline.training.batch_size import FixedBatch
from pipeline.training.choose_threads import ChosenThreads, choose_threads
from pipeline.training.learn import learn
from pipeline.training.learner import Learner
from pipeline.training.processes import Processes
from pipeline.training.threads import torch_threads

CPU = torch.device("cpu")


@pytest.fixture
def four_threads() -> Iterator[None]:
    with torch_threads(4):
        yield


def _choose(spec: DatasetSpec, processes: Processes | None = None, **settings: Any) -> ChosenThreads:
    head = architecture(ModelConfig(hidden=(8,), interaction_dim=8))
    training = TrainingConfig(micro_batch_size=256, batch_size=256, **settings)
    return choose_threads(training, spec, head, device=CPU, processes=processes or Processes())


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 4.0, 2: 8.0, 4: 9.0}, 1),
        ({1: 4.0, 2: 2.0, 4: 3.0}, 2),
        ({1: 4.0, 2: 3.0, 4: 2.0}, 4),
        ({1: 2.09, 2: 2.0, 4: 2.2}, 1),
        ({1: 2.2, 2: 2.09, 4: 2.0}, 2),
    ],
)
def test_the_fewest_that_are_as_fast_as_any(
    small_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], chosen: int
) -> None:
    laps, shown = list[int](), list[float]()

    def timed(learner: object, window: object, threads: int, *, at_most: float) -> float:
        laps.append(threads)
        assert at_most == (math.inf if len(laps) == 1 else pytest.approx(2 * min(shown)))
        shown.append(100.0 if len(laps) <= len(seconds) else seconds[threads])
        return shown[-1]

    monkeypatch.setattr(module, "_seconds_a_row", timed)
    choice = _choose(small_spec)
    assert choice.fastest == chosen
    assert laps == [1, 2, 4] * 4, "in turns, after one that warms up"
    assert choice.notes[0].startswith(f"threads of one operation: {chosen} (")


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("dataset", ["small", "with a history", "synthetic"])
def test_real_passes_are_timed_with_each_number(small_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    history = History(of=("item",), length=5)
    specs = {"small": small_spec, "with a history": small_spec.model_copy(update={"history": history})}
    monkeypatch.setattr(module, "ROWS", 512)
    asked, in_force = list[int | None](), set[tuple[int | None, int]]()

    def noted(learner: Learner, *args: Any, **kwargs: Any) -> object:
        asked.append(learner.threads)
        now = lambda done, rows: in_force.add((learner.threads, torch.get_num_threads()))  # noqa: E731
        return learn(learner, *args, progress=now, **kwargs)

    monkeypatch.setattr(module, "learn", noted)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    choice = _choose(specs.get(dataset) or load_spec(dataset), sparse_step_rows=0)
    assert torch.equal(torch.random.get_rng_state(), before), "what is drawn afterwards does not depend on it"
    assert asked == [1, 2, 4] * 4
    assert (1, 1) in in_force, "the first pass is a whole one"
    assert all(threads == really for threads, really in in_force)
    assert all(f"us a row with {number}" in choice.notes[0] for number in (1, 2, 4))


def test_where_there_is_nothing_to_choose_nothing_is_timed(small_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_seconds_a_row", lambda *args: pytest.fail("timed"))
    nothing = ChosenThreads(fastest=None)
    assert _choose(small_spec) == nothing, "with one thread"
    with torch_threads(2):
        assert _choose(small_spec, threads=7) == nothing
        assert _choose(small_spec, Processes(rank=0, count=2)) == nothing


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_they_hold_while_rows_are_learned(
    small_spec: DatasetSpec, small_examples: Callable[..., Examples], threads: int
) -> None:
    before, as_given = torch.get_num_threads(), _after_a_pass(small_spec, small_examples, "auto")
    weights = _after_a_pass(small_spec, small_examples, threads)
    assert torch.get_num_threads() == before
    for name, expected in as_given.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def _after_a_pass(
    spec: DatasetSpec, examples: Callable[..., Examples], threads: int | Literal["auto"]
) -> dict[str, torch.Tensor]:
    training = {"threads": threads, "batch_size": 512, "micro_batch_size": 512, "precision": "fp32"}
    config = UpdateConfig.model_validate({"training": training, "state_dir": "/nonexistent"})
    learner = restore_or_create(config, spec).learner
    window, in_force = encode(examples(4096), spec, Memory(spec), None, hour=0), set()
    policy = FixedBatch(batch_size=512, learning_rate=0.01)
    learn(learner, window, seed=[1], policy=policy, progress=lambda done, rows: in_force.add(torch.get_num_threads()))
    assert in_force == {torch.get_num_threads() if threads == "auto" else threads}
    return {piece.name: piece.tensor for piece in learner.model.tables.slices()} | learner.dense_weights(averaged=False)


def test_a_pass_that_takes_too_long_ends_early(small_spec: DatasetSpec) -> None:
    config = TrainingConfig(batch_size=128, micro_batch_size=128, sparse_step_rows=0)
    head = architecture(ModelConfig(hidden=(8,), interaction_dim=8))
    learner, window = module._copy(config, small_spec, head)
    whole = module._seconds_a_row(learner, window, 1, at_most=math.inf)
    before = learner.steps
    module._seconds_a_row(learner, window, 1, at_most=whole / 20)
    assert learner.steps - before < before / 2
