"""The verdict on hand-made probes, and on streams that were built to have each fault."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.evaluation.diagnosis import Part, Prediction, StepProbe, diagnose, same_hour_before

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "diagnosis.py"


def _steps(same: float, other: float, *, part: Part = "dense", rows: int = 256, count: int = 8) -> list[StepProbe]:
    """Steps that change the log loss by so much."""
    probe = StepProbe(part=part, rows=rows, same_before=0.5, same_after=0.5 + same, other_before=0.5, other_after=0.5 + other)
    return [probe] * count


def _prediction(hour: int, *, auc: float | None = 0.7, log_loss: float = 0.5, error: float = 0.004) -> Prediction:
    return Prediction(hour=hour, log_loss=log_loss, log_loss_error=error, auc=auc, auc_error=None if auc is None else error)


HEALTHY = _steps(-0.0003, -0.0002)
DAYS = [_prediction(hour) for hour in range(72)]


def test_what_falls_on_both_and_is_predicted_as_before_is_healthy() -> None:
    found = diagnose(HEALTHY, _prediction(72), DAYS)
    assert (found.verdict, found.reason) == ("healthy", "")


@pytest.mark.parametrize(("part", "setting"), [("dense", "training.dense_learning_rate"), ("sparse", "sparse and wide")])
def test_a_rise_on_the_own_rows_is_a_rate_too_high_and_names_the_setting(part: Part, setting: str) -> None:
    found = diagnose([*HEALTHY, *_steps(0.05, 0.04, part=part, count=40)], _prediction(72), DAYS)
    assert found.verdict == "learning_rate_too_high"
    assert setting in found.reason


def test_a_step_that_ruins_other_rows_is_too_long_even_where_its_own_rows_gain() -> None:
    found = diagnose([*HEALTHY, *_steps(-0.03, 0.2, part="sparse")], _prediction(72), DAYS)
    assert found.verdict == "learning_rate_too_high"


def test_a_loss_that_is_no_number_is_a_rate_too_high() -> None:
    assert diagnose(_steps(float("nan"), 0.0), None, []).verdict == "learning_rate_too_high"


def test_a_fall_on_the_own_rows_alone_is_noise_where_the_batch_is_small() -> None:
    found = diagnose(_steps(-0.0005, 0.0, rows=8), _prediction(72), DAYS)
    assert found.verdict == "noise_limited"
    assert "raise training.batch_size" in found.reason
    assert diagnose(_steps(-0.0005, 0.0, rows=256), _prediction(72), DAYS).verdict == "healthy"
    assert diagnose(_steps(-0.0005, -0.0004, rows=8), _prediction(72), DAYS).verdict == "healthy"


def test_an_auc_below_the_same_hour_of_earlier_days_is_drift() -> None:
    found = diagnose(HEALTHY, _prediction(72, auc=0.6), DAYS)
    assert found.verdict == "drift"
    assert "3 earlier days" in found.reason
    assert diagnose(HEALTHY, _prediction(72, auc=0.6, error=0.05), DAYS).verdict == "healthy", "not certain"
    assert diagnose(HEALTHY, _prediction(72, auc=0.69, error=0.001), DAYS).verdict == "healthy", "certain, and small"


def test_a_jump_of_the_log_loss_is_drift_without_any_auc() -> None:
    assert diagnose(HEALTHY, _prediction(72, auc=None, log_loss=0.6), DAYS).verdict == "drift"
    assert diagnose(HEALTHY, _prediction(72, auc=None, log_loss=0.52), DAYS).verdict == "healthy"


def test_an_hour_is_judged_against_the_same_hour_only() -> None:
    """A model that is worse every night has not drifted tonight."""
    nights = [_prediction(hour, auc=0.6 if hour % 24 < 6 else 0.7) for hour in range(72)]
    assert diagnose(HEALTHY, _prediction(72, auc=0.6), nights).verdict == "healthy"
    assert diagnose(HEALTHY, _prediction(72 + 12, auc=0.6), nights).verdict == "drift"
    assert [past.hour for past in same_hour_before(_prediction(72), nights)] == [48, 24, 0]


def test_days_that_differ_among_themselves_make_no_drift() -> None:
    days = [_prediction(24 * day, auc=0.7 + 0.06 * (-1) ** day) for day in range(6)]
    assert diagnose(HEALTHY, _prediction(24 * 6, auc=0.62), days).verdict == "healthy"


def test_too_little_to_judge_by_is_said() -> None:
    found = diagnose(HEALTHY[:2], _prediction(5), DAYS[:5])
    assert found.verdict is None
    assert "fewer than 6 steps" in found.reason
    assert "the same hour of an earlier day" in found.reason


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_diagnosis", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_each_fault_is_named_on_a_stream_that_has_it() -> None:
    benchmark = _benchmark()
    assert {fault: found.verdict for fault, found in benchmark.diagnosed(200).items()} == benchmark.EXPECTED


@pytest.mark.slow
def test_nine_of_ten_seeds_of_each_fault_are_named() -> None:
    benchmark = _benchmark()
    right: Counter[str] = Counter()
    for seed in range(201, 211):
        for fault, found in benchmark.diagnosed(seed).items():
            right[fault] += found.verdict == benchmark.EXPECTED[fault]
    assert min(right[fault] for fault in benchmark.EXPECTED) >= 9, right
