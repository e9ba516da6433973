"""One exchange of gradients a step; or none, and weights that are averaged now and then."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data_schemas.errors import ConfigError
from models.loss import weighted_log_loss_sum
from pipeline.config import load_config
from pipeline.data.encode import EncodedWindow
from pipeline.launch import run_together
from pipeline.model_state import ModelState
from pipeline.training.learn import click_rate
from pipeline.training.local_updates import Sharing
from pipeline.training.processes import Processes
from sampling.minibatches import BatchCursor
from tests.distributed.local_parts import BATCH, RATE, ROWS, config_of, learn_together, new_model

STEPS = ROWS // BATCH
slow = pytest.mark.slow  # two processes are a quarter of a minute of processor time
PLAIN = ["training.dense_optimizer=sgd", "training.weight_ema=0", f"training.sparse_step_rows={ROWS}"]
"""Plain gradient descent; tables do not step before all rows have been looked up."""
WAYS = {
    f"{name}, {every}": [*settings, f"training.share_gradients_every={every}"]
    for name, settings in (("adam", list[str]()), ("plain", PLAIN))
    for every in (0, 1, 4)
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, in every way."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parent))
        patched.syspath_prepend(str(Path(__file__).parents[2]))
        patched.setenv("OMP_NUM_THREADS", "1")
        arguments = {"folder": str(tmp_path_factory.mktemp("two")), "ways": WAYS}
        return run_together("local_parts:learn_in_every_way", 2, arguments)


@slow
def test_a_step_of_many_micro_batches_exchanges_dense_gradients_once(two: list[dict[str, Any]]) -> None:
    for one in two:
        many, whole = one["exchanges"]
        *sizes, dense = many
        assert sizes == [1, dense, 1, 1]  # whether memory sufficed; gradients; the loss, and whether all were finite
        assert whole == many


@slow
@pytest.mark.parametrize("way", WAYS)
def test_processes_agree_when_they_have_shared_and_at_the_end(two: list[dict[str, Any]], way: str) -> None:
    """On weights, the optimizer's moments and the average of the weights."""
    every = int(way[-1])
    first, second = (one["learned"][way] for one in two)
    assert first["weights"] == second["weights"]
    assert first["averaged"] == second["averaged"]
    assert first["agree at the end"]
    shared = {0: [], 1: range(1, STEPS + 1), 4: range(4, STEPS + 1, 4)}[every]
    assert first["agreed"] == [step in shared for step in range(1, STEPS + 1)]
    assert first["exchanges of dense size"] == len(shared) + (every != 1)
    assert first["steps"] == STEPS


@slow
def test_sharing_every_step_is_what_one_process_does(two: list[dict[str, Any]], tmp_path: Path) -> None:
    one = learn_together(str(tmp_path), WAYS["plain, 1"])
    for name, values in one["weights"].items():
        shared = torch.tensor(two[0]["learned"]["plain, 1"]["weights"][name])
        torch.testing.assert_close(shared, torch.tensor(values), rtol=1e-4, atol=1e-6, msg=name)


@slow
@pytest.mark.parametrize("every", [0, 4])
def test_local_steps_equal_plain_gradient_descent_in_each_process(
    two: list[dict[str, Any]], tmp_path: Path, every: int
) -> None:
    """Stich 2019, algorithm 1, by hand."""
    expected = _by_hand(*new_model(config_of(str(tmp_path), *PLAIN)), every=every)
    for name, weight in expected.items():
        found = torch.tensor(two[0]["learned"][f"plain, {every}"]["weights"][name])
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-7, msg=name)


def _by_hand(state: ModelState, window: EncodedWindow, *, every: int) -> dict[str, torch.Tensor]:
    model = state.learner.model
    state.learner.start_at(click_rate(window))
    start = {name: weight.detach().clone() for name, weight in model.net.named_parameters()}
    own = [dict(start), dict(start)]
    cursor = BatchCursor.of(window.num_rows, seed=[1])
    for step in range(1, STEPS + 1):
        rows = cursor.next_rows(BATCH)
        for rank in range(2):
            batch = window.minibatch(rows[rank::2])
            pooled = model.tables(batch.deep, batch.wide)
            inputs = (
                model.layout.with_history(pooled.deep_BS.detach(), batch.history_row_B),
                pooled.wide_BW.detach(),
                batch.dense_BN,
            )
            weights = {name: weight.requires_grad_() for name, weight in own[rank].items()}
            logits_B = torch.func.functional_call(model.net, weights, inputs)
            loss = weighted_log_loss_sum(logits_B, batch.labels_B, batch.weights_B) / (BATCH / 2)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            own[rank] = {n: (w - RATE * g).detach() for (n, w), g in zip(weights.items(), gradients, strict=True)}
        if (every and step % every == 0) or step == STEPS:
            mean = {name: (own[0][name] + own[1][name]) / 2 for name in start}
            own = [dict(mean), dict(mean)]
    return own[0]


class TwoAlike(Processes):
    """One of two processes, as it looks to itself where the other always has the same plus 2."""

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor += 1


@pytest.mark.parametrize(("every", "shared_after"), [(1, []), (2, [2, 4]), (3, [3]), (0, [])])
def test_weights_are_averaged_every_k_steps_and_once_more_at_the_end(every: int, shared_after: list[int]) -> None:
    sharing, weight = Sharing(every, TwoAlike(count=2)), torch.zeros(3)
    seen = list[float]()
    for step in range(1, 6):
        sharing.stepped(step, [weight])
        seen.append(float(weight[0]))
    assert seen == [sum(step >= after for after in shared_after) for step in range(1, 6)]
    assert float(sharing.mean({"weight": weight})["weight"][0]) == seen[-1] + (every != 1)
    assert float(weight[0]) == seen[-1]
    sharing.share([weight])
    sharing.share([weight])
    assert float(weight[0]) == seen[-1] + (every != 1)


def test_gradients_that_are_not_shared_count_as_if_all_rows_were_alike() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, -0.5])
    Sharing(4, TwoAlike(count=2)).share_gradients([parameter])
    assert parameter.grad.tolist() == [2.0, -1.0]


def test_alone_a_process_shares_with_nobody(tmp_path: Path) -> None:
    alone = [learn_together(str(tmp_path / str(every)), WAYS[f"adam, {every}"]) for every in (0, 1, 4)]
    assert alone[0] == alone[1] == alone[2]


def test_the_noise_scale_needs_the_gradient_of_the_whole_batch() -> None:
    with pytest.raises(ConfigError, match=r"share_gradients_every = 4 leaves no gradient of the whole batch"):
        load_config(overrides=["training.share_gradients_every=4", "training.batch_policy=goodput"])
