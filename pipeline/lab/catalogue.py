"""Every experiment of the laboratory, in the order in which they are told."""

from pipeline.lab import decay_or_grow, escape, gradient_accumulation, large_batch_rules, replacement, weight_decay
from pipeline.lab.experiment import Run

_FOUNDATIONS: tuple[Run, ...] = ()
"""What a mini-batch is, what it costs, and what it does to a step."""

_PRACTICE: tuple[Run, ...] = (
    escape.run,
    large_batch_rules.run,
    gradient_accumulation.run,
    decay_or_grow.run,
    replacement.run,
    weight_decay.run,
)
"""What follows for training."""

EXPERIMENTS: tuple[Run, ...] = (*_FOUNDATIONS, *_PRACTICE)
