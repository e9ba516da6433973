"""Policies: the plan of the design, whole micro-batches, and the same contract for each."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_schemas.errors import ConfigError
from pipeline.config import TrainingConfig, load_config
from pipeline.training.batch_size import BatchPolicy, Decision, Size, batch_policy, best_size, quickest_batch, whole, worth
from pipeline.training.budget import Deadline, earlier_step_time, refuse_too_small, reserve_seconds
from pipeline.training.noise_scale import NoiseScale, Spread
from pipeline.training.step_time import StepTime, StepTimeFit

TIME = StepTime(fixed_seconds=0.002, row_seconds=1 / 60_000)
POLICIES = ("fixed", "linear_ramp", "deadline", "goodput")


def _known(noise_scale: float) -> NoiseScale:
    """So often measured to be this that it is certain."""
    known = NoiseScale()
    for _ in range(20):
        known.add(Spread(noise=noise_scale, signal=1.0))
    return known


def _training(**settings: Any) -> TrainingConfig:
    """Each step is looked up by itself, as the simulated passes here have it."""
    return TrainingConfig(sparse_step_rows=0, **settings)


def _size(how: Any = "goodput", **changed: Any) -> Size:
    given = {"remaining": 1_000_000, "seconds_left": 100.0, "step_time": TIME, "noise_scale": 3000.0, "at_least": 3000.0}
    bounds = {"smallest": 64, "reference": 512, "largest": 16_384, "micro_batch": 64}
    return best_size(how, **{**given, **bounds, **changed})


def test_time_enough_takes_the_smallest_batch_that_still_gains() -> None:
    assert _size(seconds_left=100.0) == _size("deadline", seconds_left=100.0)
    assert _size(seconds_left=100.0).batch_size == whole(3000 / 9, 64)
    assert _size(seconds_left=1e9, at_least=90.0).batch_size == 64


def test_with_time_enough_no_noise_scale_asks_for_more_than_the_reference() -> None:
    assert _size(seconds_left=1e9, noise_scale=1e6, at_least=1e6).batch_size == 512
    calm = whole(1_000_000 * 0.002 / (0.85 * 22 - 1_000_000 / 60_000), 64)
    assert _size(seconds_left=22.0, noise_scale=1e6, at_least=1e6).batch_size == calm > 512


def test_only_where_time_is_plentiful_the_noise_scale_counts_as_what_it_surely_is() -> None:
    assert _size(seconds_left=1e9, at_least=9 * 128.0).batch_size == 128
    assert _size(remaining=5_900_000, at_least=9 * 128.0) == _size(remaining=5_900_000)


def test_overload_is_answered_as_the_design_has_it() -> None:
    """N=3000, f=2 ms, d=1/60000 s, T=100 s, 5.9 M rows."""
    goodput, deadline = _size(remaining=5_900_000), _size("deadline", remaining=5_900_000)
    assert goodput.batch_size == pytest.approx(quickest_batch(3000, TIME), abs=64)
    assert goodput.keep_rate * 5_900_000 == pytest.approx(100 * goodput.batch_size / TIME.seconds(goodput.batch_size))
    assert deadline.keep_rate == 1
    assert deadline.batch_size == pytest.approx(5_900_000 * 0.002 / (100 - 5_900_000 / 60_000), rel=0.02)
    million = {size: size.keep_rate * 5.9 * worth(size.batch_size, 3000) for size in (goodput, deadline)}
    assert million[goodput] == pytest.approx(4.7, abs=0.1)
    assert million[deadline] == pytest.approx(3.8, abs=0.1)


@pytest.mark.parametrize("noise_scale", [300.0, 3000.0, 1e5])
def test_no_other_batch_gains_more_a_second_than_the_quickest(noise_scale: float) -> None:
    def gain(rows: float) -> float:
        return rows * worth(rows, noise_scale) / TIME.seconds(rows)

    quickest = quickest_batch(noise_scale, TIME)
    assert all(gain(quickest) > gain(factor * quickest) for factor in (0.1, 0.9, 0.99, 1.01, 1.1, 10))


def test_where_steps_cost_most_of_the_time_the_quickest_batch_has_no_bound() -> None:
    assert quickest_batch(100.0, TIME) == float("inf")


def test_deadline_leaves_rows_out_only_where_the_largest_batch_is_not_enough_and_then_does_as_goodput() -> None:
    enough, short = _size("deadline", remaining=5_950_000), _size("deadline", remaining=12_000_000)
    assert (enough.keep_rate, enough.batch_size) == (1, whole(5_950_000 * 0.002 / (100 - 5_950_000 / 60_000), 64))
    assert short == _size("goodput", remaining=12_000_000)
    assert short.keep_rate * 12_000_000 == pytest.approx(100 * short.batch_size / TIME.seconds(short.batch_size))


@pytest.mark.parametrize("micro", [64, 1024])
@pytest.mark.parametrize("noise_scale", [300.0, 1000.0, 30_000.0])
def test_in_overload_no_other_batch_that_is_allowed_gains_more_a_second(micro: int, noise_scale: float) -> None:
    def gain(rows: int) -> float:
        return rows * worth(rows, noise_scale) / TIME.seconds(rows)

    allowed = [64, 128, 256, 512, *range(micro, 16_385, micro)]
    chosen = _size(remaining=12_000_000, noise_scale=noise_scale, micro_batch=micro).batch_size
    assert gain(chosen) == max(gain(rows) for rows in allowed)


@given(
    remaining=st.integers(1, 10**8),
    seconds_left=st.floats(-10, 1e5) | st.just(float("inf")),
    noise_scale=st.floats(1e-3, 1e9),
    fixed=st.floats(0, 1),
    row=st.floats(1e-9, 1e-2),
    at_least=st.floats(0, 1e12),
    how=st.sampled_from(["deadline", "goodput"]),
)
def test_every_plan_is_allowed_and_fits(
    remaining: int, seconds_left: float, noise_scale: float, fixed: float, row: float, at_least: float, how: str
) -> None:
    time = StepTime(fixed_seconds=fixed, row_seconds=row)
    measured = {"noise_scale": noise_scale, "at_least": at_least}
    size = _size(how, remaining=remaining, seconds_left=seconds_left, step_time=time, **measured)
    assert 64 <= size.batch_size <= 16_384
    assert size.batch_size % 64 == 0
    assert 0 < size.keep_rate <= 1
    if size.keep_rate > 1e-4:
        steps = size.keep_rate * remaining / size.batch_size
        assert steps * time.seconds(size.batch_size) <= seconds_left * (1 + 1e-6)


@pytest.mark.parametrize(
    ("micro", "reference", "smallest", "largest", "other"),
    [
        (64, 1024, 64, 4096, 256),
        (128, 128, 128, 4096, 512),
        (125, 125, 125, 4000, 500),
        (1000, 125, 125, 4000, 500),
        (3, 3, 1, 4096, 12),
        (512, 1536, 128, 1536, 512),
        (64, 128, 128, 256, 256),
        (64, 128, 128, 128, 64),
        (125, 125, 125, 125, 62),
    ],
)
def test_costs_are_first_measured_by_sizes_far_apart(
    micro: int, reference: int, smallest: int, largest: int, other: int
) -> None:
    fit = StepTimeFit()
    bounds: Any = {"min_batch_size": smallest, "max_batch_size": largest, "reference_batch_size": reference}
    training = _training(batch_policy="deadline", batch_size=reference, micro_batch_size=micro, **bounds)
    decisions = _decisions(batch_policy(training, fit=fit), 1_000_000, 5.0)
    probed = {decision.batch_size for decision in decisions[:12] if "measuring" in decision.reason}
    assert probed == {reference, other}
    assert fit.known


@pytest.mark.parametrize(("measurable", "size"), [(True, 64), (False, 512)])
def test_while_nothing_is_measured_the_smallest_batch_is_taken_unless_it_never_will_be(measurable: bool, size: int) -> None:
    training = _training(
        batch_policy="deadline", min_batch_size=64, max_batch_size=4096, reference_batch_size=512, micro_batch_size=64
    )
    policy = batch_policy(training, fit=StepTimeFit(prior=TIME), noise=NoiseScale(measurable=measurable))
    assert {decision.batch_size for decision in _decisions(policy, 100_000, 1e6)} == {size}


def test_a_noise_scale_of_a_few_measurements_leaves_the_batch_of_overload_as_it_is() -> None:
    """One that is too small makes the largest batch look best, since tables learn as much in any."""
    unsure = NoiseScale()
    for signal in (300.0, -400.0, 250.0):
        unsure.add(Spread(noise=3000.0, signal=signal))
    assert unsure.last is not None
    assert unsure.last < 100
    training = _training(batch_policy="goodput", micro_batch_size=64, min_batch_size=64, max_batch_size=16_384)
    sizes = {
        _decisions(batch_policy(training, fit=StepTimeFit(prior=TIME), noise=noise), 3_000_000, 10.0)[0].batch_size
        for noise in (NoiseScale(), unsure)
    }
    assert len(sizes) == 1
    assert sizes.pop() == pytest.approx(quickest_batch(1000.0, TIME), abs=64)


@pytest.mark.parametrize("noise_scale", [30.0, 300.0, 10_000.0])
def test_a_noise_scale_that_is_certain_sets_the_batch_of_overload(noise_scale: float) -> None:
    training = _training(batch_policy="goodput", micro_batch_size=64, min_batch_size=64, max_batch_size=16_384)
    policy = batch_policy(training, fit=StepTimeFit(prior=TIME), noise=_known(noise_scale))
    best = min(quickest_batch(noise_scale, TIME), 16_384)
    assert _decisions(policy, 3_000_000, 10.0)[0].batch_size == pytest.approx(best, abs=64)


def test_steps_over_the_rest_of_a_window_do_not_tell_a_step_from_its_rows() -> None:
    """They bear alone what others share: here a hundredth of a second for whatever is looked up together."""
    fit = StepTimeFit(prior=TIME)
    policy = batch_policy(TrainingConfig(batch_policy="goodput", sparse_step_rows=8192), fit=fit)
    for _ in range(40):
        policy.observe(steps=8, rows=8192, seconds=8 * TIME.seconds(1024) + 0.01)
        policy.observe(steps=4, rows=2048, seconds=4 * TIME.seconds(512) + 0.01)
    assert fit.line.fixed_seconds / fit.line.row_seconds == pytest.approx(TIME.fixed_seconds / TIME.row_seconds)
    assert fit.line.seconds(1024) == pytest.approx(TIME.seconds(1024) + 0.01 / 8, rel=0.1)


def test_where_nothing_else_was_measured_the_rest_of_a_window_tells() -> None:
    fit = StepTimeFit()
    policy = batch_policy(TrainingConfig(batch_policy="goodput", sparse_step_rows=8192), fit=fit)
    policy.observe(steps=1, rows=8192, seconds=1.0)
    for size in (256, 1024, 256, 1024):
        policy.observe(steps=2, rows=2 * size, seconds=2 * TIME.seconds(size))
    assert fit.known
    assert fit.line.fixed_seconds == pytest.approx(TIME.fixed_seconds)


@pytest.mark.parametrize("rows", [560_000, 590_000, 600_000, 640_000])
def test_a_pass_that_leaves_rows_out_does_not_turn_to_the_largest_batch(rows: int) -> None:
    """The largest batch learns some 575,000 rows in these seconds: what is left at the end could be learned in it, and the rows
    that were left out until then would have been so for nothing."""
    passes = {}
    for how in ("deadline", "goodput"):
        training = _training(batch_policy=how, micro_batch_size=64, min_batch_size=64, max_batch_size=16_384)
        passes[how] = _decisions(batch_policy(training, fit=StepTimeFit(prior=TIME), noise=_known(3000.0)), rows, 10.0)
    best = max(decision.batch_size for decision in passes["goodput"])
    thinned = [decision.keep_rate < 1 for decision in passes["deadline"]]
    from_there_on = passes["deadline"][thinned.index(True) :] if any(thinned) else []
    assert all(decision.batch_size <= best for decision in from_there_on)
    assert any(thinned) == (rows > 575_000)


def _decisions(policy: BatchPolicy, rows: int, seconds: float, slower: float = 1.0) -> list[Decision]:
    """A pass on a simulated clock, in which each step takes what `TIME` says, times `slower`."""
    position, left, found = 0, seconds, []
    while position < rows:
        decision = policy.decide(step=len(found), position=position, remaining=rows - position, seconds_left=left)
        if decision is None or left <= 0:
            break
        found.append(decision)
        took = TIME.seconds(decision.batch_size) * slower
        position += max(round(decision.batch_size / decision.keep_rate), 1)
        left -= took
        policy.observe(steps=1, rows=decision.batch_size, seconds=took)
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_starts_with_an_allowed_batch_and_says_why(name: str) -> None:
    training = _training(batch_policy=name, batch_size=256, micro_batch_size=256, max_batch_size=4096)
    for decision in _decisions(batch_policy(training), 200_000, 30.0):
        assert 128 <= decision.batch_size <= 4096
        assert decision.batch_size % 256 == 0 or decision.batch_size == 128
        assert decision.reason
        assert decision.learning_rate == training.dense_learning_rate


def test_a_ramp_grows_to_the_largest_batch() -> None:
    training = _training(batch_policy="linear_ramp", batch_size=256, micro_batch_size=256, max_batch_size=4096)
    sizes = [decision.batch_size for decision in _decisions(batch_policy(training), 500_000, 1e9)]
    assert sizes[0] == 256
    assert sizes[-1] >= 3840
    assert all(after >= before for before, after in pairwise(sizes))


@pytest.mark.parametrize("name", ["deadline", "goodput"])
def test_overload_ends_in_time_with_what_could_be_afforded(name: str) -> None:
    training = _training(batch_policy=name, micro_batch_size=256, max_batch_size=4096)
    decisions = _decisions(batch_policy(training, noise=_known(3000.0)), 3_000_000, 20.0)
    assert min(decision.keep_rate for decision in decisions) < 0.6
    spent = sum(TIME.seconds(decision.batch_size) for decision in decisions)
    assert 0.95 * 20 < spent < 20.1


@pytest.mark.parametrize("name", ["deadline", "goodput"])
def test_the_seconds_of_a_short_window_are_used_to_the_end(name: str) -> None:
    """Eight steps, of which none is kept back; each plan is for 97 % of the seconds that are left, the last one's, too."""
    training = _training(batch_policy=name, micro_batch_size=1024, min_batch_size=1024, max_batch_size=1024)
    budget = 8 * TIME.seconds(1024)
    decisions = _decisions(batch_policy(training, fit=StepTimeFit(prior=TIME), noise=_known(3000.0)), 20_000, budget)
    assert [decision.batch_size for decision in decisions] == [1024] * 8
    left = 20_000 - sum(round(1024 / decision.keep_rate) for decision in decisions[:-1])
    assert 0.95 * 1024 < left * decisions[-1].keep_rate <= 1024, "of the rows that are left the last step has its own"


def test_a_slow_machine_is_met_with_larger_batches() -> None:
    training = _training(batch_policy="deadline", micro_batch_size=64, min_batch_size=64, max_batch_size=4096)
    quick, slow = (
        _decisions(batch_policy(training, fit=StepTimeFit(prior=TIME), noise=_known(1.0)), 100_000, 5.0, slower)[50]
        for slower in (1.0, 2.0)
    )
    assert slow.batch_size > 2 * quick.batch_size


@pytest.mark.parametrize("name", ["deadline", "goodput"])
def test_costs_are_not_measured_where_there_is_time_enough_whatever_they_are(name: str) -> None:
    training = _training(batch_policy=name, batch_size=1024, micro_batch_size=1024, max_batch_size=8192)
    policy = batch_policy(training, noise=_known(9 * 400.0))
    sizes = [decision.batch_size for decision in _decisions(policy, 200_000, 1e4)]
    assert sizes[:2] == [1024, 1024]
    assert set(sizes[2:]) == {512}


def test_a_stall_leaves_a_long_plan_nearly_whole() -> None:
    """Steps that take 1.3 s, in a pass of ten minutes that has time for all rows; for 30 s they take four times as long."""
    slow_steps = StepTime(fixed_seconds=100 * TIME.fixed_seconds, row_seconds=100 * TIME.row_seconds)
    training = _training(batch_policy="goodput", micro_batch_size=128, max_batch_size=8192)
    policy = batch_policy(training, fit=StepTimeFit(prior=slow_steps), noise=_known(3000.0))
    rows, position, learned, left = 240_000, 0, 0, 600.0
    while position < rows and left > 0:
        decision = policy.decide(step=0, position=position, remaining=rows - position, seconds_left=left)
        assert decision is not None
        took = slow_steps.seconds(decision.batch_size) * (4 if 500 < left < 530 else 1)
        position, left = position + round(decision.batch_size / decision.keep_rate), left - took
        policy.observe(steps=1, rows=decision.batch_size, seconds=took)
        learned += decision.batch_size
    assert position >= rows
    assert learned > 0.995 * rows


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"batch_policy": "fixed", "batch_size": 512}, 1.0),
        ({"batch_policy": "fixed", "batch_size": 512, "reference_batch_size": 128}, 4.0),
        ({"batch_policy": "goodput", "batch_size": 128}, 4.0),
        ({"batch_policy": "linear_ramp", "batch_size": 128}, 1.0),
    ],
)
def test_a_batch_is_measured_by_the_reference_batch(settings: dict[str, Any], scale: float) -> None:
    assert TrainingConfig(**settings).batch_scale(512) == scale


def test_a_jump_in_the_batch_warms_the_rate_up() -> None:
    training = _training(
        batch_policy="deadline",
        micro_batch_size=256,
        min_batch_size=256,
        max_batch_size=8192,
        learning_rate_scaling="linear",
        rewarm_steps=4,
    )
    fit = StepTimeFit(prior=TIME)
    policy = batch_policy(training, fit=fit, noise=_known(1.0))
    first = policy.decide(step=0, position=0, remaining=1_000_000, seconds_left=1e9)
    policy.observe(steps=1, rows=256, seconds=TIME.seconds(256))
    later = [policy.decide(step=n, position=10_000, remaining=990_000, seconds_left=18.0) for n in range(1, 7)]
    assert first is not None
    rates = [decision.learning_rate for decision in later if decision]
    end = training.dense_learning_rate * later[0].batch_size / 256  # type: ignore[union-attr]
    assert rates[-1] == pytest.approx(end)
    assert all(first.learning_rate < before < after for before, after in pairwise(rates[:4]))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.batch_policy=deadline", "training.min_batch_size=512", "training.max_batch_size=256"], "at least 512"),
        (["training.batch_policy=linear_ramp", "training.learning_rate_decay=cosine"], "learning_rate_decay"),
        (["training.batch_policy=linear_ramp", "training.learning_rate_scaling=linear"], "learning_rate_scaling"),
        (["training.batch_policy=linear_ramp", "training.max_batch_size=64"], "batch_size = 128"),
        (["training.reference_batch_size=4096", "window.max_rows=1000"], "window.max_rows of at least 4096"),
        (["training.compile_dense_network=true"], "use batch_size = 512"),
    ],
)
def test_contradictions_name_both_settings_and_what_works(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(overrides=overrides)


def test_a_budget_too_small_for_a_batch_beside_the_reserve_is_refused() -> None:
    config = load_config(overrides=["training.batch_policy=deadline", "training.min_batch_size=4096", "budget.seconds=2"])
    deadline = Deadline(started=0, budget_seconds=2.0, reserve_seconds=1.0)
    slow = StepTime(fixed_seconds=0.5, row_seconds=0.001)
    with pytest.raises(ConfigError, match=r"training.min_batch_size = 4096.*budget.seconds of at least 5.6"):
        refuse_too_small(config, deadline, slow)
    refuse_too_small(config, deadline, TIME)
    refuse_too_small(config, deadline, None)


def test_a_least_reserve_that_leaves_no_time_to_learn_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"budget\.min_reserve_seconds = 30 .*budget\.seconds = 30 .*must be above 30 s"):
        reserve_seconds([], budget_seconds=30, min_reserve_seconds=30)
    assert reserve_seconds([], budget_seconds=31, min_reserve_seconds=30) == 30


def test_the_step_time_of_the_latest_update_that_fitted_one_is_found() -> None:
    history = [{"fixed_seconds": 0.1, "row_seconds": 0.2}, {"fixed_seconds": None, "row_seconds": None}, {}]
    assert earlier_step_time(history) == StepTime(fixed_seconds=0.1, row_seconds=0.2)
    assert earlier_step_time([]) is None
