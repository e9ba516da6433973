"""The line of step time: found from noisy steps, not moved by a stall, and slow again when the machine stays slow."""

import numpy as np
import pytest

from pipeline.training.step_time import StepTime, StepTimeFit

TRUE = StepTime(fixed_seconds=0.002, row_seconds=1e-5)


def _fed(seconds: float, *, stall: tuple[float, float] = (0, 0), prior: StepTime | None = None) -> StepTimeFit:
    """Steps of 512 and 2048 rows in turn, 5 % noise, four times as slow inside the stall."""
    rng, fit, now, number = np.random.default_rng(0), StepTimeFit(prior=prior), 0.0, 0
    while now < seconds:
        rows = 512 if number % 2 else 2048
        took = TRUE.seconds(rows) * rng.uniform(1.0, 1.1) * (4 if stall[0] <= now < stall[1] else 1)
        fit.add(steps=1, rows=rows, seconds=took)
        now, number = now + took, number + 1
    return fit


@pytest.mark.parametrize("stall", [(0, 0), (2.0, 3.0), (5.0, 6.0)])
def test_a_stall_of_a_second_does_not_move_the_line(stall: tuple[float, float]) -> None:
    line = _fed(6.0, stall=stall).line
    assert line.fixed_seconds == pytest.approx(TRUE.fixed_seconds, rel=0.15)
    assert line.row_seconds == pytest.approx(TRUE.row_seconds, rel=0.15)


def test_the_pace_says_how_much_time_stalls_take() -> None:
    assert _fed(30.0).pace == pytest.approx(1.04, abs=0.05)
    assert _fed(12.0, stall=(8.0, 12.0)).pace > 1.1


def test_the_pace_of_a_long_time_ahead_is_that_of_the_whole_pass() -> None:
    fit = _fed(40.0, stall=(36.0, 40.0))
    soon, minute, hour = (fit.pace_over(seconds) for seconds in (0.0, 60.0, 3600.0))
    assert soon == fit.pace > minute > hour > 1
    assert minute - hour == pytest.approx((fit.pace - hour) * 20 / 60, rel=0.1)
    assert fit.pace_over(float("inf")) == pytest.approx(60 / (40 - 3 + 20), rel=0.05)


def test_a_machine_that_stays_slow_gets_a_new_line() -> None:
    line = _fed(40.0, stall=(5.0, 60.0)).line
    assert line.seconds(512) == pytest.approx(4 * TRUE.seconds(512), rel=0.15)
    assert line.seconds(2048) == pytest.approx(4 * TRUE.seconds(2048), rel=0.15)


def test_one_size_keeps_the_ratio_of_an_earlier_update_and_finds_the_scale_anew() -> None:
    fit = StepTimeFit(prior=TRUE)
    for _ in range(10):
        fit.add(steps=2, rows=1024, seconds=2 * 2 * TRUE.seconds(512))
    assert fit.line.fixed_seconds == pytest.approx(2 * TRUE.fixed_seconds)
    assert fit.line.row_seconds == pytest.approx(2 * TRUE.row_seconds)


def test_a_pass_that_begins_slowly_is_not_taken_for_slow_until_it_stays_so() -> None:
    fit = StepTimeFit(prior=TRUE)
    for number in range(8):
        fit.add(steps=2, rows=1024, seconds=3 * 2 * TRUE.seconds(512))
        slower = fit.line.seconds(512) / TRUE.seconds(512)
        assert slower == pytest.approx(1.0 if number < 3 else 3.0)


def test_a_single_size_without_an_earlier_update_is_not_known() -> None:
    fit = StepTimeFit()
    for _ in range(3):
        fit.add(steps=1, rows=100, seconds=1.0)
    assert not fit.known
    for _ in range(2):
        fit.add(steps=1, rows=200, seconds=1.5)
    assert fit.known
    assert fit.line.seconds(300) == pytest.approx(2.0)


def _steps(fit: StepTimeFit, rows: int, seconds: float, *, slower: float = 1.0) -> None:
    took = 0.0
    while took < seconds:
        step = slower * TRUE.seconds(rows)
        fit.add(steps=1, rows=rows, seconds=step)
        took += step


@pytest.mark.parametrize("prior", [TRUE, None])
def test_a_size_that_was_met_in_a_stall_alone_is_forgotten(prior: StepTime | None) -> None:
    fit = StepTimeFit(prior=prior)
    for rows in (256, 512):
        _steps(fit, rows, 0.5)
    _steps(fit, 256, 20.0, slower=3.4)
    _steps(fit, 2048, 1.0, slower=3.4)
    for _ in range(10):
        for rows in (256, 512):
            _steps(fit, rows, 7.0)
    assert fit.line.fixed_seconds == pytest.approx(TRUE.fixed_seconds, rel=0.05)
    assert fit.line.row_seconds == pytest.approx(TRUE.row_seconds, rel=0.05)


def test_a_size_that_is_met_again_has_forgotten_the_stall() -> None:
    fit = StepTimeFit(prior=TRUE)
    _steps(fit, 256, 1.0)
    _steps(fit, 256, 20.0, slower=3.4)
    _steps(fit, 2048, 1.0, slower=3.4)
    _steps(fit, 256, 200.0)
    _steps(fit, 2048, 0.2)
    _steps(fit, 256, 0.2)
    assert fit.line.fixed_seconds == pytest.approx(TRUE.fixed_seconds, rel=0.05)


@pytest.mark.parametrize("times", [1.5, 0.6, 4.0, 0.25])
def test_what_two_sizes_told_stays_told_at_one_size_and_moves_by_a_factor_of_two_at_most(times: float) -> None:
    earlier = StepTime(fixed_seconds=times * TRUE.fixed_seconds, row_seconds=TRUE.row_seconds)
    fit = StepTimeFit(prior=earlier)
    for _ in range(20):
        for rows in (256, 512):
            _steps(fit, rows, 0.5)
    together = fit.line
    assert together.fixed_seconds / together.row_seconds == pytest.approx(200, rel=0.35)
    _steps(fit, 512, 300.0)
    moved = fit.line.fixed_seconds / fit.line.row_seconds / (200 * times)
    assert min(1 / times, 1) < moved < max(1 / times, 1)
    assert 0.5 <= moved <= 2
    assert fit.line.seconds(512) == pytest.approx(TRUE.seconds(512), rel=0.01)


def test_a_new_size_tells_in_the_end_where_all_stays_slow() -> None:
    fit = StepTimeFit()
    _steps(fit, 256, 1.0)
    _steps(fit, 256, 1.0, slower=4)
    _steps(fit, 512, 130.0, slower=4)
    _steps(fit, 1024, 1.0, slower=4)
    assert fit.line.fixed_seconds == pytest.approx(4 * TRUE.fixed_seconds, rel=0.05)
    assert fit.line.row_seconds == pytest.approx(4 * TRUE.row_seconds, rel=0.05)


def test_an_earlier_line_without_a_fixed_cost_counts_for_nothing() -> None:
    fit = StepTimeFit(prior=StepTime(fixed_seconds=0.0, row_seconds=1e-5))
    assert not fit.known
    for rows in (256, 512):
        _steps(fit, rows, 0.5)
    assert fit.known
    assert fit.line.fixed_seconds == pytest.approx(TRUE.fixed_seconds, rel=0.01)
    assert fit.for_the_next == fit.line
    assert StepTimeFit(prior=TRUE).for_the_next == TRUE


def test_steps_that_are_not_comparable_tell_until_others_do() -> None:
    """Here each bears a hundredth of a second alone, a tenth of which falls to comparable ones."""
    fit = StepTimeFit()
    fit.add(steps=4, rows=4 * 300, seconds=4 * (TRUE.seconds(300) + 0.01), comparable=False)
    fit.add(steps=8, rows=8 * 1024, seconds=8 * (TRUE.seconds(1024) + 0.001))
    assert fit.known
    assert fit.line.fixed_seconds > 2 * TRUE.fixed_seconds
    fit.add(steps=16, rows=16 * 512, seconds=16 * (TRUE.seconds(512) + 0.001))
    for _ in range(8):
        fit.add(steps=4, rows=4 * 300, seconds=4 * (TRUE.seconds(300) + 0.01), comparable=False)
    assert fit.line.fixed_seconds == pytest.approx(TRUE.fixed_seconds + 0.001, rel=0.15)


@pytest.mark.parametrize("makeshift_first", [True, False])
def test_of_a_size_that_was_met_both_ways_the_comparable_steps_tell(makeshift_first: bool) -> None:
    fit = StepTimeFit()
    order = [False, True] if makeshift_first else [True, False]
    for comparable in order:
        took = TRUE.seconds(512) + (0 if comparable else 0.05)
        fit.add(steps=4, rows=4 * 512, seconds=4 * took, comparable=comparable)
    fit.add(steps=4, rows=4 * 2048, seconds=4 * TRUE.seconds(2048))
    assert fit.line.fixed_seconds / fit.line.row_seconds == pytest.approx(TRUE.fixed_seconds / TRUE.row_seconds)
