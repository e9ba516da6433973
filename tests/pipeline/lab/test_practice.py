"""What experiments on training measure, against closed forms, other implementations and arithmetic by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from data_schemas.errors import ConfigError
from pipeline.lab import (
    devices,
    escape,
    gradient_accumulation,
    normalisation,
    rate_or_batch,
    replacement,
    warmup_length,
    weight_decay,
)
from pipeline.lab.decay_or_grow import Schedule
from pipeline.lab.devices import Sharing, average, outcomes, shard_orders, trained
from pipeline.lab.escape import expected_share, share_that_left, temperature
from pipeline.lab.gradient_accumulation import EQUAL, distance_of, distance_of_pipeline
from pipeline.lab.large_batch_rules import RULES, aucs
from pipeline.lab.many_nets import ManyNets, descend, log_losses, shuffled
from pipeline.lab.mixed_precision import lost_share, row_gradients
from pipeline.lab.normalisation import deviation_of_means, expected_deviation
from pipeline.lab.power_of_two import excess
from pipeline.lab.problems import LinearRegression, NoisyQuadratic, TwoBasins, clicks
from pipeline.lab.replacement import DRAWINGS, doubled_losses, floor, least_squares, log_slope, orders, together_distance
from pipeline.training.room import kept_bytes

DATA = clicks(512)
RATE = 0.3


def test_runs_leave_a_poor_minimum_at_the_rate_of_kramers() -> None:
    loss = TwoBasins(height=0.25, tilt=-0.15, noise_variance=64.0)
    for batch, rate, steps in ((8, 0.02, 3000), (16, 0.04, 1500)):
        assert temperature(loss, batch_size=batch, rate=rate) == pytest.approx(0.08)
        found = share_that_left(loss, batch_size=batch, rate=rate, steps=steps, runs=1000, seed=[3, batch])
        assert found == pytest.approx(expected_share(loss, batch_size=batch, rate=rate, steps=steps), abs=0.08)


@pytest.mark.parametrize("micro_batch", [2, 8, 48])
def test_accumulated_gradients_are_those_of_the_batch_without_and_with_layer_normalisation(micro_batch: int) -> None:
    for kind in ("none", "layer"):
        assert distance_of(DATA, kind, batch_size=128, micro_batch=micro_batch, seed=1) < EQUAL  # type: ignore[arg-type]


def test_accumulated_gradients_are_others_with_batch_normalisation_the_more_the_smaller_the_micro_batch() -> None:
    far = [distance_of(DATA, "batch", batch_size=128, micro_batch=size, seed=1) for size in (2, 16, 64, 128)]
    assert far[0] > far[1] > far[2] > 1000 * EQUAL
    assert far[3] == 0.0


def test_accumulation_in_the_pipeline_is_exact() -> None:
    assert distance_of_pipeline(DATA, batch_size=64, micro_batch=8, rows=128) < EQUAL


def test_networks_side_by_side_learn_what_each_learns_alone() -> None:
    features_RD, labels_R = DATA.features_RD[:512], DATA.labels_R[:512]
    rates, decays = torch.tensor([0.1, 0.5, 0.5]), torch.tensor([0.0, 0.01, 0.1])
    nets = ManyNets.of([4, 5, 4], inputs=features_RD.shape[1], hidden=8)
    alone = [[weight[k].detach().clone().requires_grad_() for weight in nets.parameters] for k in range(3)]
    order_KR = shuffled([1, 2, 1], 512)
    for start in range(0, 512, 64):
        rows_KB = order_KR[:, start : start + 64]
        descend(nets, features_RD[rows_KB], labels_R[rows_KB], rates, decays)
        for k, (first, bias, last, shift) in enumerate(alone):
            groups = [{"params": [first, last], "weight_decay": float(decays[k])}, {"params": [bias, shift]}]
            optimizer = torch.optim.SGD(groups, lr=float(rates[k]))
            optimizer.zero_grad()
            logits_B = (torch.relu(features_RD[rows_KB[k]] @ first + bias) @ last + shift).squeeze(1)
            torch.nn.functional.binary_cross_entropy_with_logits(logits_B, labels_R[rows_KB[k]]).backward()
            optimizer.step()
    for k in range(3):
        for together, own in zip(nets.parameters, alone[k], strict=True):
            torch.testing.assert_close(together[k], own, rtol=1e-4, atol=1e-6)


def test_workers_averaged_at_every_step_are_one_with_the_batch_of_all() -> None:
    workers, batch = 4, 16
    nets = trained(DATA, [Sharing(every=1)], workers=workers, batch_size=batch, rate=RATE, passes=1, seeds=1)
    whole = ManyNets.of([0], inputs=DATA.features_RD.shape[1], hidden=32)
    order_NR = shard_orders(workers, 512 // workers, seed=0, number=0)
    for start in range(0, order_NR.shape[1], batch):
        rows = order_NR[:, start : start + batch].reshape(1, -1)
        descend(whole, DATA.features_RD[rows], DATA.labels_R[rows], torch.tensor([RATE]))
    for shared, alone in zip(nets.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(shared, alone.expand_as(shared), rtol=1e-4, atol=1e-6)
    assert outcomes(nets, DATA, workers=workers, seeds=1)[0].spread < 1e-6


def test_only_groups_that_are_due_are_averaged() -> None:
    nets = ManyNets.of([0, 1, 2, 3], inputs=3, hidden=2)
    before = nets.first_KPH.detach().clone()
    average(nets, torch.tensor([False, True]))
    torch.testing.assert_close(nets.first_KPH[:2], before[:2])
    torch.testing.assert_close(nets.first_KPH[2:], before[2:].mean(dim=0, keepdim=True).expand(2, -1, -1))


def test_shards_are_the_same_rows_in_every_pass() -> None:
    first, second = (shard_orders(4, 8, seed=3, number=number) for number in (0, 1))
    assert first.flatten().unique().numel() == 32
    assert torch.equal(first.sort(dim=1).values, second.sort(dim=1).values)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("drawing", DRAWINGS)
def test_orders_hand_out_each_row_once_a_pass_but_with_replacement(drawing: replacement.Drawing) -> None:
    next_order = orders(drawing, runs=3, num_rows=50, seed=[0])
    first, second = next_order(), next_order()
    once = [len(set(row)) == 50 for row in first.tolist()]
    assert all(once) is (drawing != "with replacement")
    assert np.array_equal(first, second) is (drawing == "one order for all passes")


def test_drawn_with_replacement_the_squared_distance_is_in_proportion_to_the_rate_and_falls_faster_without() -> None:
    features_RD, labels_R = LinearRegression.of(4, condition=2.0).rows(64, [0])
    rates = (0.02, 0.04, 0.08)

    def slope_of(drawing: replacement.Drawing) -> float:
        found = [
            floor(features_RD, labels_R, drawing=drawing, batch_size=8, rate=rate, runs=64, passes=round(3 / rate), seed=[1])
            for rate in rates
        ]
        return log_slope(rates, found)

    assert slope_of("with replacement") == pytest.approx(1.0, abs=0.1)
    assert slope_of("reshuffled each pass") > 2.0


def test_doubled_rows_change_no_step_of_the_full_batch_and_none_of_copies_that_stay_together() -> None:
    features_RD, labels_R = LinearRegression.of(4).rows(64, [0])
    found = doubled_losses(features_RD, labels_R, batch_size=8, rate=0.1, runs=4, seed=0)
    once, twice = found["full batch"]
    assert once == pytest.approx(twice, rel=1e-12)
    assert found["batch of 8"][0][1] > 1.3 * found["batch of 8"][1][1]
    assert together_distance(features_RD, labels_R, batch_size=8, rate=0.1, seed=0) < 1e-12
    assert least_squares(features_RD, labels_R) == pytest.approx(
        np.linalg.solve(features_RD.T @ features_RD, features_RD.T @ labels_R)
    )


def test_a_smaller_rate_and_a_larger_batch_lower_the_noise_of_a_quadratic_alike() -> None:
    start = Schedule(batch_size=4, learning_rate=0.2, factor=4, marks=(1,))
    variances = []
    for decays, grows in ((True, False), (False, True)):
        batch, rate = Schedule(**{**vars(start), "decays": decays, "grows": grows}).at(1)
        places = NoisyQuadratic().descend(rate, batch_size=batch, steps=600, particles=400, seed=[batch])
        assert places[300:].var() == pytest.approx(NoisyQuadratic().steady_variance(rate, batch), rel=0.05)
        variances.append(places[300:].var())
    assert variances[0] == pytest.approx(variances[1], rel=0.12)
    assert start.steps(2, 64) == 32


def test_fp16_loses_more_gradients_the_larger_the_batch_and_none_of_a_scaled_loss() -> None:
    lost = [lost_share(row_gradients(DATA, batch_size=size), torch.float16, 1.0) for size in (64, 4096, 65536)]
    assert lost[0] < lost[1] < lost[2]
    assert lost_share(row_gradients(DATA, batch_size=65536), torch.float16, 65536.0) == 0.0


def test_bytes_that_are_kept_are_those_of_the_activations() -> None:
    inputs, weight = torch.randn(6, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    own = {weight.untyped_storage().data_ptr()}
    assert kept_bytes(lambda: inputs @ weight, without=own) == 6 * 4 * 4
    assert kept_bytes(lambda: (inputs @ weight).exp(), without=own) == 6 * 4 * 4 + 6 * 5 * 4


@pytest.mark.parametrize("batch", [4, 64, 512])
def test_the_mean_of_a_batch_is_off_by_the_closed_form(batch: int) -> None:
    assert deviation_of_means(DATA, batch) == pytest.approx(expected_deviation(batch, 512), rel=0.05, abs=1e-9)


def test_a_size_that_is_slower_than_the_others_lies_above_their_line() -> None:
    sizes = list(range(60, 70))
    seconds_S = np.array([1e-4 + 1e-6 * size for size in sizes])
    seconds_S[4] *= 1.1
    above = excess(sizes, seconds_S)
    assert int(np.argmax(above)) == 4
    assert above[4] == pytest.approx(0.1, abs=0.03)


def test_rules_that_do_nothing_to_a_batch_that_is_not_raised_learn_the_same() -> None:
    plain, same_steps = RULES[2], RULES[-1]
    found = [aucs(DATA, rule, batch=64, times=1, rate=RATE, passes=1, seed=0) for rule in (RULES[0], plain, same_steps)]
    assert found[0] == found[1] == found[2]


def test_rates_of_the_rules() -> None:
    by_name = {rule.name: rule for rule in RULES}
    rates = {name: [rule.rate_at(step, 100, rate=0.1, times=8.0) for step in (0, 99)] for name, rule in by_name.items()}
    assert rates["reference"] == rates["rate unchanged"] == [0.1, 0.1]
    assert rates["root rule"] == pytest.approx([0.1 * 8**0.5] * 2)
    assert rates["linear, warm-up"] == pytest.approx([0.8 / 15, 0.8])
    assert rates["linear, warm-up, cosine"][1] == pytest.approx(0.08, rel=0.01)


def test_parameters_that_do_not_fit_say_what_does() -> None:
    with pytest.raises(ConfigError, match="must divide batch_size = 128, got 3; use 64"):
        gradient_accumulation.run(micro_batch_sizes=(2, 3))
    with pytest.raises(ConfigError, match="multiple of batch_size = 8, got 100; use 96"):
        replacement.run(num_rows=100)
    with pytest.raises(ConfigError, match="seeds must be at least 2, for intervals; got 1"):
        normalisation.run(seeds=1)
    with pytest.raises(ConfigError, match="a batch of 512 rows is never filled by 100; use"):
        weight_decay.run(num_rows=100)
    with pytest.raises(ConfigError, match="batch_sizes must have at least 2 values, got 1"):
        weight_decay.run(batch_sizes=(8,))
    with pytest.raises(ConfigError, match=r"periods must be at least 2, .* got 1"):
        devices.run(periods=(1, 4))
    with pytest.raises(ConfigError, match=r"tilt must be between -1.5 and 0, .* got 0.2"):
        escape.run(tilt=0.2)


def test_sentences_follow_the_result() -> None:
    sizes = (8, 64)
    assert "small batches did not help" in escape.sentence(sizes, [0.5, 0.5], [0.5, 0.5], [0.5, 0.5])
    assert "not the small batch itself" in escape.sentence(sizes, [0.9, 0.0], [0.9, 0.0], [0.9, 0.9])
    assert "the batch itself matters" in escape.sentence(sizes, [0.9, 0.0], [0.9, 0.0], [0.9, 0.1])
    gain = {"a": [0.1, 0.1], "b": [0.1, 0.1]}
    assert weight_decay.sentence(sizes, {"a": [0.1, 0.2], "b": [0.1, 0.2]}, gain).endswith("as claimed.")
    assert weight_decay.sentence(sizes, {"a": [0.1, 0.1], "b": [0.2, 0.1]}, gain).endswith("against the claim.")
    assert warmup_length.sentence(sizes, [0.0, 0.1], [0.0, 0.1]).endswith("as claimed.")
    assert warmup_length.sentence(sizes, [0.1, 0.1], [0.0, 0.0]).endswith("against the claim.")
    faults = rate_or_batch.planted([30.0], [8])
    right: dict[str, Sequence[rate_or_batch.Verdict | None]] = {fault.name: [fault.expected] for fault in faults}
    assert "4 of 4 planted states, and it never took" in rate_or_batch.sentence(faults, right)
    swapped = right | {"batch 8": ["learning_rate_too_high"]}
    assert "took batch 8 for the other" in rate_or_batch.sentence(faults, swapped)


def test_a_sentence_on_devices_names_the_best_period() -> None:
    one = devices.Outcome(mean_weights=0.5, single=0.6, mean_prediction=0.5, spread=0.0)
    better = devices.Outcome(mean_weights=0.4, single=0.4, mean_prediction=0.4, spread=0.0)
    found = {"every step": one, "every 4 steps": better, "never": one, "never, started apart": one}
    assert "averaging every 4 steps (0.4000)" in devices.sentence(4, found)
    assert "0.1000 nats worse" in devices.sentence(4, found)


def test_the_log_loss_of_a_network_that_knows_nothing() -> None:
    torch.testing.assert_close(log_losses(torch.zeros(2, 5), torch.ones(1, 5)), torch.full((2,), float(np.log(2.0))))
