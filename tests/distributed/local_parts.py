"""What the processes of the tests of local updates do; they import it by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from data_schemas.dataset import load_spec
from pipeline.config import UpdateConfig, load_config
from pipeline.data.encode import EncodedWindow, encode
from pipeline.data.loader import to_examples
from pipeline.data.synthetic import SyntheticConfig, SyntheticStream
from pipeline.model_state import ModelState, restore_or_create
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.learner import Learner

ROWS, BATCH, RATE = 240, 24, 0.05


def config_of(state_dir: str, *more: str) -> UpdateConfig:
    settings = ["training.precision='fp32'", f"training.batch_size={BATCH}", "training.micro_batch_size=4", "model.hidden=[8]"]
    return load_config(overrides=[f"state_dir={state_dir}", *settings, *more])


def new_model(config: UpdateConfig) -> tuple[ModelState, EncodedWindow]:
    """And the rows that it is to learn."""
    spec = load_spec("synthetic")
    state = restore_or_create(config, spec)
    examples = to_examples(SyntheticStream(SyntheticConfig(hours=1)).hour(0).table.slice(0, ROWS), spec)
    return state, encode(examples, spec, state.memory, state.moments, hour=0, ids=state.ids)


def learn_in_every_way(folder: str, ways: dict[str, list[str]]) -> dict[str, Any]:
    """`learn_together` by name of its settings, and `exchanges_of_a_step` by size of its micro-batches."""
    learned = {name: learn_together(f"{folder}/{name}", settings) for name, settings in ways.items()}
    return {"learned": learned, "exchanges": [exchanges_of_a_step(f"{folder}/step", size) for size in (3, BATCH)]}


def learn_together(state_dir: str, settings: list[str]) -> dict[str, Any]:
    """One pass: the weights it ends with, after which steps processes agreed on everything, and sizes of large exchanges."""
    config = config_of(state_dir, *settings)
    state, window = new_model(config)
    learner, agreed = state.learner, list[bool]()

    def compare(done: int, rows: int) -> None:
        copies = learner.processes.gather(_dense(learner))
        agreed.append(all(other == copies[0] for other in copies))

    with counted() as sizes:
        learn(learner, window, seed=[1], policy=FixedBatch(batch_size=BATCH, learning_rate=RATE), progress=compare)
    copies = learner.processes.gather(_dense(learner))
    dense = sum(parameter.numel() for parameter in learner.parameters.values())
    return {
        "weights": {name: weight.tolist() for name, weight in learner.dense_weights(averaged=False).items()},
        "averaged": {name: weight.tolist() for name, weight in learner.dense_weights(averaged=True).items()},
        "tables": {piece.name: float(piece.tensor.double().square().sum()) for piece in learner.model.tables.slices()},
        "agreed": agreed,
        "agree at the end": all(other == copies[0] for other in copies),
        "exchanges of dense size": sum(size >= dense for size in sizes),
        "steps": learner.steps,
    }


def exchanges_of_a_step(state_dir: str, micro_batch_size: int) -> list[int]:
    """Numbers that each all_reduce of one step adds up."""
    config = config_of(state_dir, f"training.micro_batch_size={micro_batch_size}")
    state, window = new_model(config)
    learner = state.learner
    chunk = learner.look_up(window.minibatch(torch.arange(BATCH).numpy()))
    with counted() as sizes:
        learner.step(chunk, slice(0, BATCH), divisor=BATCH * learner.processes.count, learning_rate=RATE)
    return [*sizes, sum(parameter.numel() for parameter in learner.parameters.values())]


@contextmanager
def counted() -> Iterator[list[int]]:
    sizes: list[int] = []
    exchange = dist.all_reduce

    def noted(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
        sizes.append(tensor.numel())
        return exchange(tensor, *args, **more)

    dist.all_reduce = noted
    try:
        yield sizes
    finally:
        dist.all_reduce = exchange


def _dense(learner: Learner) -> list[list[float]]:
    return [tensor.reshape(-1).tolist() for tensor in learner._dense_state()]
