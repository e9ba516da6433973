"""What the plan of a pass did to rows, in words.

Enters: settings and what a pass did. Leaves: notes of the report.
"""

from collections.abc import Iterator

from pipeline.config import TrainingConfig
from pipeline.training.batch_size import TYPICAL_NOISE_SCALE
from pipeline.training.learn import Learned
from pipeline.training.learner import Learner


def plan_notes(training: TrainingConfig, learned: Learned, learner: Learner, num_rows: int) -> Iterator[str]:
    """Rows left out, how much and why; and what could not be done as set."""
    if learned.thinned_rows:
        rates = [record.keep_rate for record in learned.plan if record.keep_rate < 1]
        reason = next(record.reason for record in learned.plan if record.keep_rate < 1)
        yield (
            f"{learned.thinned_rows:,} of {num_rows:,} rows were left out for want of time, at keep rates from "
            f"{min(rates):.3g} to {max(rates):.3g}; those kept carry one over it as weight ({reason})"
        )
    if learner.net.note:
        yield learner.net.note
    noise = learner.noise_scale
    if training.measures_noise and noise.last is None:
        yield _without_noise_scale(training, learner)
    elif training.measures_noise and noise.kept_last and (training.scales_by_noise or noise.at_least == noise.last):
        yield (
            f"the gradient was too small against its noise in the last {noise.kept_last} measurements; the noise scale of "
            f"{noise.last:,.0f} rows before them was kept"
        )
    uses_reference = training.batch_policy != "fixed" or training.learning_rate_scaling != "none"
    if uses_reference and training.reference > num_rows:
        yield f"the window's {num_rows:,} rows are fewer than the reference batch of {training.reference:,}"


def _without_noise_scale(training: TrainingConfig, learner: Learner) -> str:
    said = ["the gradient noise scale is not measured yet"]
    if not learner.noise_scale.measurable:
        said = ["the gradient noise scale is not measured in fp16, nor for batches of one micro-batch of a compiled network"]
    if training.scales_by_noise:
        said.append("rates are those of the reference batch")
    if training.plans_batches:
        calm = "the smallest batch" if learner.noise_scale.measurable else "the reference batch or a larger one"
        said.append(f"{TYPICAL_NOISE_SCALE:,.0f} rows stood for it where time was short")
        said.append(f"where it sufficed, {calm} that sees all rows was taken")
    return "; ".join(said)
