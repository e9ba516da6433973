"""What a plan left out, or could not do as set, is said in words."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.config import TrainingConfig
from pipeline.outcome import PlanRecord
from pipeline.training.learn import Learned
from pipeline.training.noise_scale import NoiseScale, Spread
from pipeline.training.plan_notes import plan_notes

ROWS = 1000


def notes(
    *, thinned: int = 0, keep_rates: tuple[float, ...] = (1.0,), noise: NoiseScale | None = None, **training: Any
) -> list[str]:
    plan = tuple(
        PlanRecord(step=n, position=n, batch_size=64, learning_rate=0.1, reason=f"why {rate}", keep_rate=rate)
        for n, rate in enumerate(keep_rates)
    )
    learned = Learned(
        rows=ROWS - thinned,
        unreached_R=np.zeros(ROWS, bool),
        position=ROWS,
        last_batch_size=64,
        plan=plan,
        loss_curve=(),
        steps=ROWS // 64,
        skipped_steps=0,
        skipped_rows=0,
        thinned_R=np.arange(ROWS) < thinned if thinned else None,
    )
    learner: Any = SimpleNamespace(net=SimpleNamespace(note=""), noise_scale=noise or NoiseScale())
    return list(plan_notes(TrainingConfig(**training), learned, learner, ROWS))


def test_a_fixed_batch_has_nothing_to_say() -> None:
    assert notes() == []


def test_rows_left_out_are_counted_with_their_rates_and_the_first_reason() -> None:
    (note,) = notes(thinned=300, keep_rates=(1.0, 0.75, 0.5))
    assert note == (
        "300 of 1,000 rows were left out for want of time, at keep rates from 0.5 to 0.75; those kept carry one over it as "
        "weight (why 0.75)"
    )


def test_a_window_smaller_than_the_reference_batch_is_noted() -> None:
    (note,) = notes(learning_rate_scaling="sqrt", reference_batch_size=4096)
    assert note == "the window's 1,000 rows are fewer than the reference batch of 4,096"
    assert notes(reference_batch_size=4096) == [], "nothing is scaled from it"


def test_a_noise_scale_that_is_not_known_or_was_kept_is_said() -> None:
    (unknown,) = notes(learning_rate_scaling="noise_scale")
    assert unknown == "the gradient noise scale is not measured yet; rates are those of the reference batch"
    (unknown,) = notes(batch_policy="goodput")
    assert "1,000 rows stood for it where time was short;" in unknown
    assert unknown.endswith("where it sufficed, the smallest batch that sees all rows was taken")
    (both,) = notes(batch_policy="goodput", learning_rate_scaling="noise_scale")
    assert "rates are those of the reference batch; 1,000 rows stood" in both
    (never,) = notes(batch_policy="goodput", noise=NoiseScale(measurable=False))
    assert "not measured in fp16" in never
    assert never.endswith("where it sufficed, the reference batch or a larger one that sees all rows was taken")
    noise = NoiseScale()
    noise.add(Spread(noise=300.0, signal=3.0))
    assert notes(learning_rate_scaling="noise_scale", noise=noise) == []
    noise.add(Spread(noise=300.0, signal=-1000.0))
    (kept,) = notes(learning_rate_scaling="noise_scale", noise=noise)
    assert "in the last 1 measurements; the noise scale of 100 rows before them was kept" in kept
    assert notes(batch_policy="goodput", noise=noise) == [kept], "and a plan goes by it, as nothing better is known"
    for signal in (3.0, 4.0, 2.0):
        noise.add(Spread(noise=300.0, signal=signal))
    sure = NoiseScale()
    for signal in (3.0, 2.9, 3.1, 3.0, -30.0):
        sure.add(Spread(noise=300.0, signal=signal))
    assert sure.kept_last
    assert notes(batch_policy="goodput", noise=sure) == [], "a plan goes by its limits"
