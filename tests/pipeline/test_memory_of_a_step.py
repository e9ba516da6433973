"""Out of memory inside a step: it starts anew in smaller parts, and what is learned is what those parts would have learned."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import OutOfMemory
from data_schemas.examples import Examples
from models.ctr import CtrModel, build_model
from models.memory import Memory
from models.tables import table_layout
from pipeline.config import ModelConfig, TrainingConfig
from pipeline.data.encode import EncodedWindow, encode, num_dense_columns
from pipeline.model_state import architecture
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.learner import Arithmetic, Learner
from pipeline.training.precision import Chosen, choose_arithmetic
from pipeline.training.processes import Processes

CPU = torch.device("cpu")
MakeExamples = Callable[..., Examples]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    MemoryError(),
]


class LittleMemory:
    """A network that fails from the second micro-batch of a step on, where one has more than so many rows."""

    compiles, note = False, ""

    def __init__(self, net: torch.nn.Module, most_rows: int, error: Exception) -> None:
        self._net, self._most_rows, self._error = net, most_rows, error
        self._calls = self.failures = 0

    def __call__(self, deep_mS: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if len(deep_mS) > self._most_rows and self._calls > 1:
            self.failures, self._calls = self.failures + 1, 0
            raise self._error
        logits_m: torch.Tensor = self._net(deep_mS, *others)
        return logits_m


@dataclass(frozen=True, kw_only=True)
class WithAPoorNeighbour(Processes):
    """One process, to which another seems to have told once that its memory does not suffice."""

    told: list[bool] = field(default_factory=lambda: [True])

    def total(self, value: float) -> float:
        return value + float(self.told.pop()) if self.told else value


def _learner(spec: DatasetSpec, micro: int, precision: Arithmetic = "fp32", processes: Processes | None = None) -> Learner:
    config = TrainingConfig(
        micro_batch_size=micro, batch_size=128, learning_rate_scaling="noise_scale", sparse_step_rows=256, weight_ema=0.9
    )
    model = build_model(
        architecture(ModelConfig(hidden=(16,), interaction_dim=8)),
        table_layout(spec),
        num_dense=num_dense_columns(spec),
        sparse_optimizer=config.sparse_optimizer,
        sparse_learning_rate=0.1,
        wide_learning_rate=0.1,
        device=CPU,
        seed=0,
    )
    return Learner(model, config, precision=precision, device=CPU, processes=processes)


def _learn(learner: Learner, spec: DatasetSpec, examples: Examples) -> None:
    window = encode(examples, spec, Memory(spec), None, hour=0)
    learn(learner, window, seed=[1], policy=FixedBatch(batch_size=128, learning_rate=0.01))


def _state(learner: Learner) -> dict[str, Any]:
    weights = {piece.name: piece.tensor.tolist() for piece in learner.model.tables.slices()}
    weights |= {name: parameter.tolist() for name, parameter in learner.parameters.items()}
    moments = [value["exp_avg"].tolist() for value in learner.optimizer.state.values()]
    noise = np.nan_to_num(learner.noise_scale.state(), nan=-1).tolist()
    return weights | {"moments": moments, "noise": noise, "scale": learner.scaler.get_scale(), "steps": learner.steps}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_memory_equals_one_with_the_smaller_micro_batches_from_the_start(
    small_spec: DatasetSpec, small_examples: MakeExamples, error: Exception, precision: Arithmetic
) -> None:
    examples = small_examples(640)
    poor, small = (_learner(small_spec, micro, precision) for micro in (64, 16))
    poor.net = net = LittleMemory(poor.net, 16, error)  # type: ignore[assignment]
    for learner in (poor, small):
        _learn(learner, small_spec, examples)
    assert net.failures == 2
    assert poor.halvings == [(0, 32), (0, 16)]
    assert _state(poor) == _state(small)
    assert "micro_batch_size = 16" in poor.notes()[-1]
    assert small.notes() == ()


def test_a_process_that_lacks_nothing_starts_anew_with_the_one_that_does(
    small_spec: DatasetSpec, small_examples: MakeExamples
) -> None:
    together, small = _learner(small_spec, 64, processes=WithAPoorNeighbour()), _learner(small_spec, 32)
    window = encode(small_examples(128), small_spec, Memory(small_spec), None, hour=0)
    for learner in (together, small):
        chunk = learner.look_up(window.minibatch(np.arange(128)))
        learner.step(chunk, slice(0, 128), divisor=128, learning_rate=0.01)
        learner.finish(chunk)
    assert together.halvings == [(0, 32)]
    assert _state(together) == _state(small)


def test_a_step_that_never_fits_says_what_to_do_and_learns_nothing(
    small_spec: DatasetSpec, small_examples: MakeExamples
) -> None:
    learner = _learner(small_spec, 64)
    before = {name: parameter.tolist() for name, parameter in learner.parameters.items() if name != "bias"}
    learner.net = LittleMemory(learner.net, 0, ERRORS[0])  # type: ignore[assignment]
    with pytest.raises(OutOfMemory, match=r"128 rows does not fit.*CUDA out of memory.*Lower training.batch_size"):
        _learn(learner, small_spec, small_examples(128))
    assert {name: parameter.tolist() for name, parameter in learner.parameters.items() if name != "bias"} == before


def test_tables_that_do_not_fit_say_what_to_do(
    small_spec: DatasetSpec, small_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = _learner(small_spec, 64)

    def fail(*_: object) -> None:
        raise ERRORS[1]

    monkeypatch.setattr(learner.model.tables, "forward", fail)
    with pytest.raises(OutOfMemory, match=r"looking up \d+ rows does not fit.*embedding_dim"):
        _learn(learner, small_spec, small_examples(128))


def test_batches_that_do_not_fit_say_what_to_do(
    small_spec: DatasetSpec, small_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(EncodedWindow, "minibatch", fail)
    with pytest.raises(OutOfMemory, match=r"cutting \d+ rows does not fit.*MemoryError.*sparse_step_rows"):
        _learn(_learner(small_spec, 64), small_spec, small_examples(128))


def test_other_errors_are_not_taken_for_a_lack_of_memory(small_spec: DatasetSpec, small_examples: MakeExamples) -> None:
    learner = _learner(small_spec, 64)
    learner.net = LittleMemory(learner.net, 0, RuntimeError("shapes do not fit"))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        _learn(learner, small_spec, small_examples(128))


@pytest.mark.parametrize(
    ("training", "free_gigabytes", "possible"),
    [
        ({"micro_batch_size": 48}, 8.0, {48}),
        ({"batch_size": 256}, 8.0, {512}),
        ({"batch_size": 2048}, 8.0, {512, 1024, 2048}),
        ({"batch_size": 2048}, 0.0, {512}),
        ({"batch_policy": "deadline", "min_batch_size": 1536}, 8.0, {512}),
    ],
)
def test_a_size_is_chosen_that_memory_and_the_batch_have_room_for(
    small_spec: DatasetSpec, training: dict[str, Any], free_gigabytes: float, possible: set[int]
) -> None:
    model, config = _learner(small_spec, 64).model, TrainingConfig(**training, precision="fp32")
    chosen = _chosen(config, model, small_spec, free_bytes=int(free_gigabytes * 2**30))
    assert chosen.micro_batch_size in possible
    assert chosen.precision == "fp32"
    assert bool(chosen.notes) == (len(possible) > 1)
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_size_that_turns_out_not_to_fit_is_not_chosen(
    small_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model, config = _learner(small_spec, 64).model, TrainingConfig(batch_size=2048, precision="fp32")
    forward = model.net.forward

    def poor(deep_BS: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if len(deep_BS) > 512:
            raise error
        return forward(deep_BS, *others)

    monkeypatch.setattr(model.net, "forward", poor)
    chosen = _chosen(config, model, small_spec, free_bytes=8 * 2**30)
    assert chosen.micro_batch_size == 512


def _chosen(config: TrainingConfig, model: CtrModel, spec: DatasetSpec, *, free_bytes: int) -> Chosen:
    return choose_arithmetic(
        config,
        model.net,
        deep_width=sum(model.layout.deep_dims),
        wide_width=len(model.layout.wide_keys),
        num_dense=num_dense_columns(spec),
        device=CPU,
        free=lambda device: free_bytes,
    )
