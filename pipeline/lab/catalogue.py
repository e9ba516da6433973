"""Every experiment of the laboratory, in the order in which they are told."""

from pipeline.lab import (
    best_rate,
    data_efficiency,
    decay_or_grow,
    devices,
    epochs,
    escape,
    gradient_accumulation,
    gradient_descent,
    gradient_variance,
    hardware,
    large_batch_rules,
    mixed_precision,
    noise_scale,
    normalisation,
    power_of_two,
    rate_or_batch,
    replacement,
    sharpness,
    temperature,
    time_to_target,
    warmup_length,
    weight_decay,
)
from pipeline.lab.experiment import Run

_FOUNDATIONS: tuple[Run, ...] = (
    gradient_descent.run,
    epochs.run,
    gradient_variance.run,
    hardware.run,
    time_to_target.run,
    best_rate.run,
    noise_scale.run,
    data_efficiency.run,
    sharpness.run,
    temperature.run,
)
"""What a mini-batch is, what it costs, and what it does to a step."""

_PRACTICE: tuple[Run, ...] = (
    escape.run,
    large_batch_rules.run,
    gradient_accumulation.run,
    mixed_precision.run,
    decay_or_grow.run,
    replacement.run,
    weight_decay.run,
    normalisation.run,
    power_of_two.run,
    warmup_length.run,
    devices.run,
    rate_or_batch.run,
)
"""What follows for training."""

EXPERIMENTS: tuple[Run, ...] = (*_FOUNDATIONS, *_PRACTICE)
