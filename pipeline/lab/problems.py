"""Small problems that experiments share: from those with a closed form to the model of this project on generated clicks.

Letters: R rows, D features, P parameters.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from data_schemas.click_log import validate
from data_schemas.dataset import load_spec
from data_schemas.examples import I64, concatenate
from models.memory import Memory
from pipeline.config import load_config, overridden
from pipeline.data.encode import EncodedWindow, encode
from pipeline.data.loader import to_examples
from pipeline.data.synthetic import SyntheticConfig, SyntheticStream
from pipeline.evaluation.metrics import measure
from pipeline.evaluation.score import probabilities
from pipeline.model_state import restore_or_create
from pipeline.training.learner import Learner

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LinearRegression:
    """Rows `x ~ N(0, diag(curvature))`, labels `x w* + noise`; the loss of a row is half its squared error.

    At weights w the population's gradient is H (w - w*), H = diag(curvature), and the gradient of a single row has the
    covariance `H (e' H e) + H e e' H + noise^2 H`, with e = w - w*: the fourth moments of a normal (Isserlis 1918).
    """

    curvature_D: F64
    """Variance of each feature."""
    true_weights_D: F64
    noise: float
    """Standard deviation of the labels around the truth."""

    @classmethod
    def of(cls, num_features: int, *, condition: float = 10.0, noise: float = 1.0, seed: int = 0) -> "LinearRegression":
        """Variances fall evenly on a log scale from 1 to 1 / `condition`."""
        rng = np.random.default_rng([seed, 1])
        return cls(
            curvature_D=np.geomspace(1.0, 1.0 / condition, num_features),
            true_weights_D=rng.normal(size=num_features),
            noise=noise,
        )

    def rows(self, num_rows: int, seed: Sequence[int]) -> tuple[F64, F64]:
        """`[R, D]` features and `[R]` labels."""
        rng = np.random.default_rng(list(seed))
        features_RD = rng.normal(size=(num_rows, len(self.curvature_D))) * np.sqrt(self.curvature_D)
        return features_RD, features_RD @ self.true_weights_D + self.noise * rng.normal(size=num_rows)

    def gradient(self, weights_D: F64) -> F64:
        """`[D]` of the population."""
        return np.asarray(self.curvature_D * (weights_D - self.true_weights_D), np.float64)

    def covariance(self, weights_D: F64) -> F64:
        """`[D, D]` of the gradient of a single row."""
        error_D = weights_D - self.true_weights_D
        spread = float(error_D @ (self.curvature_D * error_D)) + self.noise**2
        gradient_D = self.gradient(weights_D)
        return np.asarray(spread * np.diag(self.curvature_D) + np.outer(gradient_D, gradient_D), np.float64)

    def excess_loss(self, weights_D: F64) -> float:
        """Of the population, over that of the truth."""
        error_D = weights_D - self.true_weights_D
        return 0.5 * float(error_D @ (self.curvature_D * error_D))


def linear_gradients(features_RD: F64, labels_R: F64, weights_D: F64) -> F64:
    """`[R, D]` gradient of half the squared error of each row."""
    return np.asarray(features_RD * (features_RD @ weights_D - labels_R)[:, None], np.float64)


def logistic_gradients(features_RD: F64, labels_R: F64, weights_D: F64) -> F64:
    """`[R, D]` gradient of the log loss of each row."""
    predicted_R = 1.0 / (1.0 + np.exp(-(features_RD @ weights_D)))
    return np.asarray(features_RD * (predicted_R - labels_R)[:, None], np.float64)


@dataclass(frozen=True, kw_only=True)
class NoisyQuadratic:
    """`k x^2 / 2`, seen through gradients `k x + noise`; the noise of a batch of b rows has the variance noise_variance / b."""

    curvature: float = 1.0
    noise_variance: float = 1.0
    """Of the gradient of a single row."""

    def steady_variance(self, learning_rate: float, batch_size: int = 1) -> float:
        """Of x after many steps of SGD: `lr / (k (2 - lr k)) * noise_variance / b`; infinite from lr k = 2 on."""
        left = 2.0 - learning_rate * self.curvature
        return learning_rate / (self.curvature * left) * self.noise_variance / batch_size if left > 0 else math.inf

    def descend(
        self, learning_rate: float, *, batch_size: int = 1, steps: int, particles: int, seed: Sequence[int], start: float = 0.0
    ) -> F64:
        """`[steps, particles]` places after each step of SGD, of independent particles."""
        rng = np.random.default_rng(list(seed))
        noise = rng.normal(scale=math.sqrt(self.noise_variance / batch_size), size=(steps, particles))
        places, place = np.empty((steps, particles)), np.full(particles, start)
        for step in range(steps):
            place = place - learning_rate * (self.curvature * place + noise[step])
            places[step] = place
        return places


@dataclass(frozen=True, kw_only=True)
class TwoBasins:
    """A tilted double well `height ((x^2 - 1)^2 + tilt x)`: a poor minimum near -1, a good one near +1, a barrier between."""

    height: float = 1.0
    tilt: float = -0.15
    """Below 0, so that the right minimum is the deeper one; above -1.5, so that there are two."""
    noise_variance: float = 1.0
    """Of the gradient of a single row."""

    def loss(self, place: F64) -> F64:
        """At each place."""
        return np.asarray(self.height * ((place**2 - 1.0) ** 2 + self.tilt * place), np.float64)

    def gradient(self, place: F64) -> F64:
        """Without noise."""
        return np.asarray(self.height * (4.0 * place * (place**2 - 1.0) + self.tilt), np.float64)

    def stationary(self) -> tuple[float, float, float]:
        """The poor minimum, the top of the barrier, the good minimum."""
        poor, top, good = sorted(float(root.real) for root in np.roots([4.0, 0.0, -4.0, self.tilt]))
        return poor, top, good

    def descend(self, learning_rate: float, *, batch_size: int, steps: int, particles: int, seed: Sequence[int]) -> F64:
        """`[steps, particles]` places after each step of SGD, of particles that start in the poor minimum."""
        rng = np.random.default_rng(list(seed))
        spread = math.sqrt(self.noise_variance / batch_size)
        place, places = np.full(particles, self.stationary()[0]), np.empty((steps, particles))
        for step in range(steps):
            place = place - learning_rate * (self.gradient(place) + rng.normal(scale=spread, size=particles))
            places[step] = place
        return places


@dataclass(frozen=True, kw_only=True)
class Clicks:
    """Rows of the synthetic stream without drift: those to learn, and as many as a third of them held out."""

    window: EncodedWindow
    """All rows, as the model of this project takes them."""
    learned: I64
    """Rows of the window to learn, in random order."""
    held_out: I64
    features_RD: torch.Tensor
    """`[R, D] float32`, all rows: numbers, and a column for each value of the fields with few values; for small networks."""
    labels_R: torch.Tensor
    """`[R] float32`."""
    stratum_R: npt.NDArray[np.int32]
    """`[R]` placement and label, to stratify by."""


FEW_VALUES = ("category", "device", "country", "placement", "hour_of_day")
"""Fields that `features_RD` has columns for."""


@lru_cache(maxsize=4)
def clicks(num_rows: int = 16_384, *, seed: int = 0) -> Clicks:
    """`num_rows` rows to learn; the same arguments give the same rows."""
    wanted = num_rows + num_rows // 3
    config = SyntheticConfig(
        seed=seed,
        hours=24,
        rows_per_hour=max(wanted // 20, 64),
        num_users=1_500,
        num_items=800,
        item_lifetime_hours=1_000.0,
        drift_strength=0.0,
        duplicate_share=0.0,
    )
    spec, stream = load_spec("synthetic"), SyntheticStream(config)
    tables = [hour.table for hour in map(stream.hour, range(config.hours))]
    now = config.hour_start(config.hours)
    accepted = [validate(raw, spec, now=now, rows=np.arange(1, raw.num_rows + 1)).accepted for raw in tables]
    examples = concatenate([to_examples(table.combine_chunks(), spec) for table in accepted])
    order = np.random.default_rng([seed, 7]).permutation(examples.num_rows)[:wanted]
    examples = examples.take(order)
    window = encode(examples, spec, Memory(spec), None, hour=int(examples.hour_R.max()) + 1)
    placement_R = np.unique(examples.single_ids["placement"], return_inverse=True)[1]
    return Clicks(
        window=window,
        learned=np.arange(num_rows),
        held_out=np.arange(num_rows, wanted),
        features_RD=torch.from_numpy(_features(window)),
        labels_R=torch.from_numpy(window.labels_R),
        stratum_R=(2 * placement_R + (window.labels_R > 0)).astype(np.int32),
    )


def _features(window: EncodedWindow) -> npt.NDArray[np.float32]:
    """`[R, D]`: a constant, the numbers, and a column of 0 and 1 for each value."""
    columns = [np.ones((window.num_rows, 1), np.float32), window.dense_RN]
    for name in FEW_VALUES:
        row_R = window.single_RK[:, window.single_keys.index(name)]
        columns.append((row_R[:, None] == np.unique(row_R)).astype(np.float32))
    features_RD = np.concatenate(columns, axis=1)
    return np.ascontiguousarray(features_RD[:, (np.ptp(features_RD, axis=0) > 0) | (np.arange(features_RD.shape[1]) == 0)])


Normalisation = Literal["none", "batch", "layer"]


def small_net(
    num_features: int,
    *,
    hidden: Sequence[int] = (32,),
    normalisation: Normalisation = "none",
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Sequential:
    """A network `[B, D] -> [B]` logits; without hidden layers a logistic regression that starts at zero."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    width = num_features
    for size in hidden:
        layers.append(nn.Linear(width, size))
        if normalisation != "none":
            layers.append(nn.BatchNorm1d(size) if normalisation == "batch" else nn.LayerNorm(size))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = size
    last = nn.Linear(width, 1)
    if not hidden:
        nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last, nn.Flatten(0))


def log_loss(net: nn.Module, features_BD: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Mean over the rows."""
    return nn.functional.binary_cross_entropy_with_logits(net(features_BD), labels_B)


def batches(rows: I64, batch_size: int, *, seed: Sequence[int]) -> Iterator[torch.Tensor]:
    """Without end: pass after pass over `rows`, each in an order of its own; the rest of a pass that fills no batch is left
    out, unless the batch holds all rows."""
    rng = np.random.default_rng(list(seed))
    size = min(batch_size, len(rows))
    while True:
        order = torch.from_numpy(rows[rng.permutation(len(rows))])
        for start in range(0, len(rows) - size + 1, size):
            yield order[start : start + size]


def descend(
    net: nn.Module,
    data: Clicks,
    *,
    batch_size: int,
    steps: int,
    optimizer: torch.optim.Optimizer,
    seed: Sequence[int],
    rate_at: Callable[[int], float] | None = None,
    after: Callable[[int], bool | None] | None = None,
) -> None:
    """Steps of a small network over the learned rows, changed in place.

    Args:
        rate_at: learning rate of each step, from 0; that of the optimizer by default.
        after: called with the number of steps done; ends the descent where it gives True.
    """
    net.train()
    for step, rows in zip(range(steps), batches(data.learned, batch_size, seed=seed), strict=False):
        if rate_at is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step)
        optimizer.zero_grad()
        log_loss(net, data.features_RD[rows], data.labels_R[rows]).backward()
        optimizer.step()
        if after is not None and after(step + 1):
            return


@torch.no_grad()
def loss_and_auc(net: nn.Module, data: Clicks, rows: I64) -> tuple[float, float]:
    """Log loss and AUC of a small network; infinite and one half where its outputs are not finite."""
    net.eval()
    logits_B = net(data.features_RD[rows])
    net.train()
    if not torch.isfinite(logits_B).all():
        return math.inf, 0.5
    loss = nn.functional.binary_cross_entropy_with_logits(logits_B, data.labels_R[rows])
    return float(loss), auc(data.labels_R[rows].numpy(), torch.sigmoid(logits_B.double()).numpy())


def new_learner(overrides: Sequence[str] = (), *, seed: int = 0) -> Learner:
    """The model of this project for the data set `synthetic`, new, in fp32; `learn` from `pipeline.training.learn` teaches it.

    Args:
        overrides: settings, such as `training.batch_size=64`.
    """
    with tempfile.TemporaryDirectory() as empty:
        fixed = ["dataset=synthetic", "training.precision=fp32", "training.weight_ema=0", f"training.seed={seed}"]
        config = overridden(load_config(None, fixed), [*overrides, f"state_dir={empty}"])
        return restore_or_create(config, load_spec("synthetic")).learner


def held_out_auc(learner: Learner, data: Clicks) -> float:
    """AUC of the project's model on the rows that were held out."""
    predicted_B = probabilities(
        learner.model, learner.dense_weights(averaged=False), data.window, data.held_out, device=learner.device
    )
    return auc(data.window.labels_R[data.held_out], predicted_B)


def auc(labels_B: npt.NDArray[np.float32], predicted_B: npt.NDArray[np.floating]) -> float:
    """Of rows of which some have label 1 and some 0."""
    found = measure(labels_B, predicted_B, np.zeros(len(labels_B), np.int64)).auc
    assert found is not None, "all rows have the same label"
    return found
