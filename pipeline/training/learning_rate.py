"""The learning rate of a batch: scaled from that of a reference batch, decayed over a pass, warmed up after a jump.

Enters: a batch size, a noise scale, how far the pass is. Leaves: a rate.

Scaling: linear (Goyal et al. 2017), with the root (Krizhevsky 2014), or by what a batch gains in one step over the reference,
`(1 + N/b_ref) / (1 + N/b)` (McCandlish et al. 2018, eq. 2.8): linear while b << N, flat beyond.
"""

import math
from dataclasses import dataclass
from typing import assert_never

from pipeline.config import RateDecay, RateScaling, TrainingConfig

DECAY_POINTS = 100
"""The decay changes at so many points of a pass, so that a plan trace stays short."""
COSINE_END = 0.1
"""What a cosine decays to."""
JUMP = 1.5
"""A batch so many times the one before is a jump."""


def scaled(scaling: RateScaling, batch_size: float, reference: float, noise_scale: float | None) -> float:
    """Factor on the rate of the reference batch.

    >>> scaled("linear", 1024, 256, None), scaled("sqrt", 1024, 256, None), scaled("noise_scale", 1024, 256, 256.0)
    (4.0, 2.0, 1.6)

    Args:
        noise_scale: N in rows; 1 is returned by `noise_scale` while it is not known.
    """
    match scaling:
        case "none":
            return 1.0
        case "linear":
            return batch_size / reference
        case "sqrt":
            return math.sqrt(batch_size / reference)
        case "noise_scale":
            return 1.0 if noise_scale is None else (1 + noise_scale / reference) / (1 + noise_scale / batch_size)
        case _:
            assert_never(scaling)


def decayed(decay: RateDecay, progress: float) -> float:
    """Factor on the rate when a share `progress` in [0, 1] of the window's rows is done.

    >>> [decayed("step", progress) for progress in (0.0, 0.3, 0.99)], decayed("cosine", 1.0)
    ([1.0, 0.5, 0.125], 0.1)
    """
    at = math.floor(progress * DECAY_POINTS) / DECAY_POINTS
    match decay:
        case "constant":
            return 1.0
        case "step":
            return 0.5 ** min(math.floor(4 * at), 3)
        case "cosine":
            return COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * at)) / 2
        case _:
            assert_never(decay)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The rule by which rates follow the batch."""

    dense_rate: float
    """Of the reference batch."""
    reference: int = 0
    """Rows; 0 only where nothing is scaled."""
    scaling: RateScaling = "none"
    sparse_scaling: RateScaling = "none"
    decay: RateDecay = "constant"
    sparse_step_rows: int = 0
    """Rows of a sparse step at least: it is what the sparse rate is scaled by."""

    @classmethod
    def of(cls, training: TrainingConfig) -> "Rates":
        """As set."""
        return cls(
            dense_rate=training.dense_learning_rate,
            reference=training.reference,
            scaling=training.learning_rate_scaling,
            sparse_scaling=training.sparse_learning_rate_scaling,
            decay=training.learning_rate_decay,
            sparse_step_rows=training.sparse_step_rows,
        )

    def dense(self, batch_size: int, noise_scale: float | None, progress: float) -> float:
        """Rate of the dense optimizer, before warm-up."""
        factor = scaled(self.scaling, batch_size, self.reference, noise_scale) * decayed(self.decay, progress)
        return self.dense_rate * factor

    def sparse_factor(self, batch_size: int, noise_scale: float | None) -> float:
        """Factor on the rates of the embeddings and of the wide part."""
        own, reference = (max(size, self.sparse_step_rows) for size in (batch_size, self.reference))
        return scaled(self.sparse_scaling, own, reference, noise_scale)
