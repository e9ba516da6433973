"""Every experiment of the laboratory, in the order in which they are told."""

from pipeline.lab import (
    best_rate,
    data_efficiency,
    epochs,
    gradient_descent,
    gradient_variance,
    hardware,
    noise_scale,
    sharpness,
    temperature,
    time_to_target,
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

_PRACTICE: tuple[Run, ...] = ()
"""What follows for training."""

EXPERIMENTS: tuple[Run, ...] = (*_FOUNDATIONS, *_PRACTICE)
