"""Every experiment of the laboratory, in the order in which they are told."""

from pipeline.lab.experiment import Run

_FOUNDATIONS: tuple[Run, ...] = ()
"""What a mini-batch is, what it costs, and what it does to a step."""

_PRACTICE: tuple[Run, ...] = ()
"""What follows for training."""

EXPERIMENTS: tuple[Run, ...] = (*_FOUNDATIONS, *_PRACTICE)
