"""Every setting of an update, in small frozen parts.

Enters: the data set's own settings, a TOML file, `TIDEMARK_*` environment variables, and command-line overrides; the later
wins.
Leaves: an `UpdateConfig`, checked; or a `ConfigError` that names the setting.
"""

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from data_schemas.dataset import DatasetSpec, escapes, load_spec
from data_schemas.errors import ConfigError
from pipeline.evaluation.gate import Limits
from pipeline.passwords import has_password, without_passwords
from sampling.plan import Rules
from sampling.strata import Allocation, StratifyBy
from sampling.thinning import Correction, Method

Precision = Literal["auto", "fp32", "bf16", "fp16"]
TablePrecision = Literal["fp32", "fp16", "int8"]
ModelKind = Literal["dlrm", "dcnv2", "deepfm", "linear"]
BatchPolicyName = Literal["fixed", "linear_ramp", "deadline", "goodput"]
RateScaling = Literal["none", "linear", "sqrt", "noise_scale"]
AlertEvent = Literal["held", "rejected", "suspicious", "failed", "alarm"]
"""How an update ended; `alarm`: it was published, and something was out of line."""
Sharding = Literal["auto", "table_wise", "column_wise", "row_wise", "data_parallel"]
RateDecay = Literal["constant", "step", "cosine"]

MICRO_BATCH_SIZES = (512, 1024, 2048, 4096)
"""That `training.micro_batch_size = "auto"` chooses from."""


T = TypeVar("T")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WindowConfig(_Part):
    """Which rows an update takes."""

    hours: Annotated[int, Field(ge=1, le=168)] = 1
    """Length of a window."""
    align_hour: Annotated[int, Field(ge=0, le=167)] = 0
    """Windows end at this hour (UTC) modulo `hours`: with 24 hours, 2 means from 02:00 to 02:00."""
    label_delay_minutes: Annotated[int, Field(ge=0)] = 0
    """A window is closed this long after its end, so that clicks can arrive."""
    max_rows: Annotated[int, Field(ge=1)] = 20_000_000
    """Rows of one window held in memory at once; the rest stays pending for the next update, and is reported."""


class ModelConfig(_Part):
    """The network over the embeddings."""

    kind: ModelKind = "deepfm"
    """How embeddings interact: DLRM (Naumov et al. 2019), DCNv2 (Wang et al. 2021) or DeepFM (Guo et al. 2017). `linear`: a
    weight an id, a cross and a dense column, as Vowpal Wabbit has them; no embeddings, so neither histories nor the time of
    day, which have nothing else."""
    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (128, 64)
    """Sizes of the hidden layers of the top network."""
    interaction_dim: Annotated[int, Field(ge=4)] = 16
    """Length to which embeddings of another length are projected before they interact."""
    cross_layers: Annotated[int, Field(ge=1)] = 2
    """DCNv2: number of cross layers."""
    cross_rank: Annotated[int, Field(ge=1)] = 32
    """DCNv2: rank of a cross layer's matrix."""


class TrainingConfig(_Part):
    """The step."""

    batch_size: Annotated[int, Field(ge=1)] = 256
    """Rows of a step, over all processes."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows that go through the dense network at once, in each process; bounds memory, keeps shapes static. `auto` measures
    time and memory when the model is first made, and the model keeps what it found: 512, or up to 4096 where `batch_size`
    (`min_batch_size`, where the policy plans batches) is as large. Where a step does not fit into memory it is halved, and the
    report says so."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """That torch spreads one operation over while rows are learned, in each process. `auto` measures what a pass is fastest
    with when the model is first made, up to what torch is given (OMP_NUM_THREADS, or the cores of this machine), and the model
    keeps what it found; with several processes it is what torch is given."""
    batch_policy: BatchPolicyName = "fixed"
    """What chooses the size of each batch. `fixed`: `batch_size` all along. `linear_ramp`: it grows from `batch_size` to
    `max_batch_size` over the pass. `deadline`: the smallest that still learns every row in time; rows are left out only where
    `max_batch_size` is not enough for all, and from there on as `goodput` does. `goodput`: the same where time suffices; where
    it is short, the size that gains most a second, on fewer rows."""
    min_batch_size: Annotated[int, Field(ge=1)] = 128
    """Smallest batch of `deadline` and `goodput`."""
    max_batch_size: Annotated[int, Field(ge=1)] = 8192
    """Largest batch of `linear_ramp`, `deadline` and `goodput`."""
    reference_batch_size: Annotated[int, Field(ge=0)] = 0
    """The batch that the learning rates and `weight_ema` were chosen for; 0 for `batch_size`."""
    learning_rate_scaling: RateScaling = "none"
    """How the dense rate follows the batch, from the reference batch: not, in proportion, with its root, or as far as the
    measured gradient noise scale says (McCandlish et al. 2018)."""
    sparse_learning_rate_scaling: RateScaling = "none"
    """The same for the embeddings and the wide part. Scaling it was measured to lose accuracy."""
    learning_rate_decay: RateDecay = "constant"
    """Of the dense rate over a window: not at all, halved after each quarter, or along a cosine to a tenth."""
    rewarm_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the dense rate rises to its value after a batch that is half as large again, or larger."""
    compile_dense_network: bool = False
    """Run the dense network through `torch.compile`; without a C++ compiler it runs as it is, and the report says so."""
    sparse_step_rows: Annotated[int, Field(ge=0)] = 2048
    """Embeddings step once in at least this many rows, with the gradients of all batches in them; 0 for once a batch."""
    precision: Precision = "auto"
    """Arithmetic of the dense network; `auto` measures what this machine is fastest at when the model is first made."""
    dense_optimizer: Literal["adam", "adagrad", "sgd", "lars", "lamb"] = "adam"
    """Of the dense network. `lars` and `lamb` scale each matrix's step to its norm, for very large batches; `lars` wants a
    dense_learning_rate of about 0.1."""
    dense_learning_rate: Annotated[float, Field(gt=0)] = 0.001
    """Of the dense network."""
    sparse_optimizer: Literal["adagrad", "rowwise_adagrad"] = "rowwise_adagrad"
    """Of the embeddings; the wide part always has per-coordinate Adagrad."""
    sparse_learning_rate: Annotated[float, Field(gt=0)] = 0.05
    """Of the embeddings."""
    wide_learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Of the wide part: one weight an id and a cross."""
    wide_beta: Annotated[float, Field(ge=0)] = 1.0
    """Gradient that a wide weight is taken to have seen before its first: its step is
    `wide_learning_rate * g / (wide_beta + sqrt(sum of g^2))`, with `g` the derivative of one row's log loss. Holds an id of few
    rows back; 0 for none."""
    accumulator_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the embeddings' and the wide part's sums of squared gradients at the start of each window, so that a model of
    many months still learns; 0.5 ** (1 / 24) halves them in 24 windows, 1 keeps them."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of a new model over which the dense rate rises to its value."""
    gradient_ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of dense gradients; 0 for none. Needs an optimizer without momentum of its own."""
    weight_ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the moving average of dense weights that is evaluated and published, in steps of the reference batch; 0: off."""
    sparse_gradient_ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the gradients of table rows, a sparse step; 0 for none. As much memory as the tables."""
    sparse_weight_ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of table rows, a sparse step, that is evaluated and published; 0 for none. As much memory as
    the tables."""
    cowclip: bool = False
    """Clip the gradient of each embedding row by how often its id occurs in a sparse step (Zheng et al. 2022)."""
    cowclip_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Bound of an occurrence, as a multiple of the row's length: r of the paper."""
    cowclip_least: Annotated[float, Field(ge=0)] = 1e-5
    """Least bound of an occurrence, for rows that are nearly zero: zeta of the paper."""
    share_gradients_every: Annotated[int, Field(ge=0)] = 1
    """With several processes: 1 adds the dense gradients of all up in every step. With k each process steps by its own rows,
    and their dense weights are averaged every k steps and at the end of a pass (local SGD, Stich 2019); with 0 at the end
    alone."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of everything that is drawn: first weights and the order of rows."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    """Steps in a row with a non-finite loss that are skipped before the update gives up; nothing is published then."""

    @model_validator(mode="after")
    def _smoothed_once(self) -> Self:
        if self.gradient_ema > 0 and self.dense_optimizer in ("adam", "lars", "lamb"):
            raise ValueError(
                f"gradient_ema = {self.gradient_ema} with dense_optimizer = '{self.dense_optimizer}' smooths the gradient "
                "twice; use dense_optimizer 'adagrad' or 'sgd', or gradient_ema 0"
            )
        return self

    @model_validator(mode="after")
    def _noise_of_all(self) -> Self:
        if self.share_gradients_every != 1 and self.measures_noise:
            raise ValueError(
                f"share_gradients_every = {self.share_gradients_every} leaves no gradient of the whole batch, of which "
                f"batch_policy = '{self.batch_policy}' or a scaling by noise_scale measures the noise scale; use "
                "share_gradients_every 1, or batch_policy 'fixed' or 'linear_ramp' without such a scaling"
            )
        return self

    @property
    def reference(self) -> int:
        """The reference batch in force."""
        return self.reference_batch_size or self.batch_size

    def batch_scale(self, batch_size: int) -> float:
        """A batch over the reference batch; 1 for a ramp without a reference of its own, which grows to take smaller steps."""
        if self.batch_policy == "linear_ramp" and not self.reference_batch_size:
            return 1.0
        return batch_size / self.reference

    @property
    def smallest_batch(self) -> int:
        """Rows of the smallest batch that the policy takes, over all processes; the end of a window apart."""
        return self.batch_size if self.batch_policy in ("fixed", "linear_ramp") else self.min_batch_size

    @property
    def micro_batch(self) -> int:
        """The micro-batch as set; of `auto` the smallest that it chooses from."""
        return MICRO_BATCH_SIZES[0] if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def scales_by_noise(self) -> bool:
        """Whether a learning rate follows the gradient noise scale."""
        return "noise_scale" in (self.learning_rate_scaling, self.sparse_learning_rate_scaling)

    @property
    def plans_batches(self) -> bool:
        """Whether batches are chosen from what was measured."""
        return self.batch_policy in ("deadline", "goodput")

    @property
    def measures_noise(self) -> bool:
        """Whether the gradient noise scale is needed."""
        return self.scales_by_noise or self.plans_batches

    @model_validator(mode="after")
    def _one_plan(self) -> Self:
        if self.plans_batches and self.min_batch_size > self.max_batch_size:
            raise ValueError(
                f"min_batch_size = {self.min_batch_size} is above max_batch_size = {self.max_batch_size}; "
                f"use a max_batch_size of at least {self.min_batch_size}"
            )
        if self.batch_policy == "linear_ramp":
            if self.batch_size > self.max_batch_size:
                raise ValueError(
                    f"batch_policy = 'linear_ramp' cannot grow from batch_size = {self.batch_size} to max_batch_size = "
                    f"{self.max_batch_size}; use a max_batch_size of at least {self.batch_size}"
                )
            if self.learning_rate_decay != "constant":
                raise ValueError(
                    "batch_policy = 'linear_ramp' grows the batch instead of decaying the rate, and learning_rate_decay = "
                    f"{self.learning_rate_decay!r} decays it as well; use learning_rate_decay 'constant'"
                )
            if self.learning_rate_scaling != "none":
                raise ValueError(
                    "batch_policy = 'linear_ramp' grows the batch at the same rate, and learning_rate_scaling = "
                    f"{self.learning_rate_scaling!r} undoes that; use learning_rate_scaling 'none'"
                )
        smallest, micro = self.smallest_batch, self.micro_batch
        if self.compile_dense_network and smallest % micro:
            name = "batch_size" if self.batch_policy in ("fixed", "linear_ramp") else "min_batch_size"
            least = -(-smallest // micro) * micro
            raise ValueError(
                f"compile_dense_network needs batches of whole micro-batches, and {name} = {smallest} is none of "
                f"micro_batch_size = {micro}; use {name} = {least}, or a smaller micro_batch_size"
            )
        return self


class SamplingConfig(_Part):
    """Which rows a step sees, in what order, and with what probability."""

    strata: tuple[StratifyBy, ...] = ()
    """What rows are grouped by; the item's popularity and the user's activity are counted in the window, and the item's age
    needs `ages` in the declaration."""
    stratified_batches: bool = False
    """Each batch mirrors the strata."""
    negative_keep_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the rows without a click that is learned; all clicks are."""
    allocation: Allocation = "proportional"
    """How what is kept of the rows without a click is spread over strata: the same rate in each, rows in proportion to the root
    of the stratum's count, the same number of rows, or `given_keep_rates`."""
    given_keep_rates: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """With `allocation` "given": the keep rate of each stratum by its name in the report, such as `"label=0" = 0.1`; a stratum
    that is not named is kept whole."""
    draw: Method = "poisson"
    """Each row by itself, or a fixed number of each stratum."""
    replacement: bool = False
    """The same row may be drawn several times; with `draw` "fixed"."""
    correction: Correction = "weights"
    """What makes up for rows left out: a kept row weighs one over its probability, or the logits are shifted in training."""
    max_rows_per_user: Annotated[int, Field(ge=0)] = 0
    """Rows of one user learned from a window at most, drawn at random; nothing makes up for the others. 0 for no cap."""
    max_rows_per_item: Annotated[int, Field(ge=0)] = 0
    """The same for one item."""
    negatives: Literal["none", "uniform", "popularity", "in_batch", "hard"] = "none"
    """How a log of clicks only gets rows that were not clicked, from the items that are live in the same hour: all alike, as
    their clicks to the `popularity_power`, as the items of other clicks of a batch, or the model's own top of
    `hard_candidates`. `none` is for logs with a label."""
    negatives_per_positive: Annotated[int, Field(ge=1, le=1000)] = 4
    """Drawn for each click, so that the published probability is that of a click among so many others."""
    popularity_power: Annotated[float, Field(ge=0, le=2)] = 0.75
    """The law of exposure: an item is taken to be shown as its clicks of the hour to this power."""
    negative_correction: Literal["weights", "logq", "none"] = "weights"
    """How rows that were drawn by another law than that of exposure are put right: by a weight, by a shift of the logits
    while learning (not with `hard`), or not at all."""
    negatives_trailing_hours: Annotated[int, Field(ge=0, le=168)] = 0
    """An item counts as live for so many hours after one in which it was clicked. Above 0 it leaks: clicks tell which items
    are live now, so a drawn item that is not betrays itself by its age."""
    in_batch_clicks: Annotated[int, Field(ge=2)] = 256
    """With `in_batch`: clicks of one hour whose items are each other's negatives."""
    hard_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """With `hard`: the share of a click's negatives that is the model's own top, rounded; at least one is left to chance."""
    hard_candidates: Annotated[int, Field(ge=2, le=1000)] = 16
    """With `hard`: items drawn for each click by the law of exposure, which the model then scores."""
    replay_share: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Share of past rows among those learned, in number and in weight, as far as they are held; against forgetting. 0 for none:
    then no past row is kept."""
    replay_capacity: Annotated[int, Field(ge=2, le=10_000_000)] = 100_000
    """Past rows kept with the model at most: half of them clicks, half not, of each a uniform sample of all that were ever
    learned. Another capacity starts the sample anew."""
    replay_age_power: Annotated[float, Field(ge=0, le=4)] = 0.0
    """Above 0: a held row is the likelier to be replayed the older it is, in proportion to its hours to this power; 0 for all
    alike."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.strata)) != len(self.strata):
            raise ValueError(f"strata names something twice: {list(self.strata)}; name each once")
        if (self.allocation == "given") != bool(self.given_keep_rates):
            raise ValueError("allocation 'given' and given_keep_rates go together; set both or neither")
        if self.allocation == "given" and self.negative_keep_rate < 1:
            raise ValueError("negative_keep_rate has no effect with allocation 'given'; leave it at 1.0")
        if self.replacement and self.draw == "poisson":
            raise ValueError("replacement needs draw 'fixed': 'poisson' draws a row once at most")
        return self

    @model_validator(mode="after")
    def _past_rows_carry_weights_alone(self) -> Self:
        shifts = self.correction == "logit_shift" or self.negative_correction == "logq"
        if self.replay_share and shifts:
            raise ValueError(
                f"replay_share = {self.replay_share} keeps weights of past rows and no shifts of their logits; set correction "
                "and negative_correction to 'weights', or replay_share to 0"
            )
        return self

    @model_validator(mode="after")
    def _hard_can_be_drawn(self) -> Self:
        if self.negatives != "hard":
            return self
        if not 2 <= self.negatives_per_positive <= self.hard_candidates:
            raise ValueError(
                f"negatives = 'hard' takes negatives_per_positive of hard_candidates, 2 or more, one of them left to chance; "
                f"got {self.negatives_per_positive} of {self.hard_candidates}"
            )
        if self.negative_correction == "logq":
            raise ValueError("negatives = 'hard' has no law for negative_correction = 'logq'; use 'weights' or 'none'")
        return self

    def rules(self) -> Rules:
        """As `sampling.plan` takes them."""
        return Rules(**self.model_dump(include={field.name for field in fields(Rules)}))


class BudgetConfig(_Part):
    """The deadline."""

    seconds: Annotated[float, Field(gt=0)] = 600.0
    """From the start of the update to the published model: load, evaluation, learning, checkpoint, publishing."""
    min_reserve_seconds: Annotated[float, Field(ge=0)] = 1.0
    """Least time kept back for what comes after learning; more is kept once updates have been measured."""


class ProcessesConfig(_Part):
    """The processes that train one model together."""

    count: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that a flow starts on its own machine. Where torchrun starts the flow, its own number holds."""
    sharding: Sharding = "auto"
    """How tables are spread: each whole in one process, cut by columns or by rows, or a copy in every process. `auto` cuts
    tables of at least 4096 rows by rows and leaves smaller ones whole. `column_wise` needs sparse_optimizer "adagrad"."""
    join_seconds: Annotated[float, Field(gt=0, le=3600)] = 45.0
    """In which all processes must have come together."""
    stall_seconds: Annotated[float, Field(gt=0)] = 600.0
    """That one waits for another inside an update before it gives up; longer than anything takes that the first does alone, but
    for `lock_wait_seconds`, which is added. A process that is killed is noticed at once."""


class EvaluationConfig(_Part):
    """What is measured."""

    max_rows: Annotated[int, Field(ge=1)] = 1_000_000
    """A larger window is evaluated on a uniform sample of this size, and says so."""
    probe_rows: Annotated[int, Field(ge=0)] = 256
    """Rows on which at most 36 steps of a window are looked at from outside, for the stability figures and the diagnosis; 0 for
    none. Needs one process."""
    frozen_after_updates: Annotated[int, Field(ge=0)] = 0
    """Keep the model of this update and evaluate it beside every later one, to show what freshness is worth; 0 for none."""


class AlarmsConfig(_Part):
    """What is looked at before a window is learned."""

    action: Literal["hold", "warn", "off"] = "hold"
    """What becomes of a window that does not look like those before it: it is held aside until a person releases or discards
    it, or the report says so and it is learned."""
    deviations: Annotated[float, Field(gt=0)] = 6.0
    """Robust standard deviations within which rows, click rate and missing values are in line."""
    burst_factor: Annotated[float, Field(ge=1)] = 1.5
    """A window is out of line where ten users' clicks exceed its click rate by so many times what any ten's did in the last
    seven days."""
    min_windows: Annotated[int, Field(ge=2)] = 24
    """Windows of the last seven days that must be known; before, nothing is out of line."""


class GateConfig(_Part):
    """What is asked of a model before it serves."""

    action: Literal["enforce", "observe", "off"] = "enforce"
    """A model that the gate rejects does not serve, and its window is held aside; or every model serves and the report says
    what the gate would have done; or nothing is compared, and no row is held out."""
    holdout_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of a window's users whose rows are not learned in it but judged on; they are learned with the next window."""
    false_rejections: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Chance that a model as good as the one that serves is rejected: half of it is spent on the first window's held-out rows,
    half of the rest each time that those of a further one are added."""
    auc_margin: Annotated[float, Field(gt=0)] = 0.02
    """The AUC difference must be known to so much, as half of a 95 % interval; else the model does not serve yet, and the next
    window's held-out rows are added."""
    max_windows: Annotated[int, Field(ge=1)] = 6
    """Windows whose held-out rows are added up at most; then a model without proof of harm serves."""
    min_copc: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Clicks over predicted clicks, at least, unless the model that serves is as far off."""
    max_copc: Annotated[float, Field(ge=1)] = 2.0
    """The same, at most."""
    max_churn: Annotated[float, Field(gt=0)] = 1.0
    """Mean absolute change of a held-out row's log odds, at most."""
    leak_factor: Annotated[float, Field(gt=0)] = 10.0
    """A gain of AUC so many robust deviations above the median of earlier gains is taken for a feature that knows the label."""
    min_history: Annotated[int, Field(ge=2)] = 12
    """Earlier gains that must be known for that."""
    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of steps whose loss was not finite, at most."""
    max_rows: Annotated[int, Field(ge=1000)] = 50_000
    """Held-out rows that models are compared on, about; of more, those of some users are taken."""
    bootstrap_samples: Annotated[int, Field(ge=50)] = 500
    """Samples of users that the intervals come from."""

    def limits(self) -> Limits:
        """As the gate takes them."""
        own = self.model_dump(exclude={"action", "holdout_share", "max_rows", "min_copc", "max_copc"})
        return Limits(**own, copc_bounds=(self.min_copc, self.max_copc))


class ServingConfig(_Part):
    """The model that is registered."""

    table_precision: TablePrecision = "fp32"
    """Of its tables, in the file and in memory: `fp16` halves them; `int8` makes embeddings about a third, with a scale and a
    bias for each row, and moves probabilities a little (docs/performance.md). The checkpoint, and what the gate judges, stay
    fp32."""


class TrackingConfig(_Part):
    """MLflow."""

    enabled: bool = True
    """Off: nothing is sent to MLflow."""
    uri: str = ""
    """Any MLflow tracking URI; empty: a sqlite file in the state folder. A server's password belongs into
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; that of a database may stand here, if this comes from the
    environment."""
    experiment: str = ""
    """Empty: `tidemark-` and the name of the data set, or of its file without `.toml`."""
    register_model: bool = True
    """Log the model and give it the alias `champion`."""
    keep_models: Annotated[int, Field(ge=1)] = 3
    """Registered versions whose files are kept."""

    @field_validator("uri")
    @classmethod
    def _names_nobody_to_a_server(cls, uri: str) -> str:
        if uri.startswith(("http://", "https://")) and without_passwords(uri) != uri:
            raise ValueError(
                "holds a name or a password, which error messages would repeat; leave it out, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
            )
        return uri


class AlertsConfig(_Part):
    """Where a person is told that an update did not simply publish its model."""

    webhook_url: SecretStr = SecretStr("")
    """Address that a small JSON is posted to. A secret: it is read from the environment and from nowhere else, and is in no
    log, report or run. https, or http on this machine; empty for none."""
    events: tuple[AlertEvent, ...] = ("held", "rejected", "suspicious", "failed", "alarm")
    """What is posted. A model of few rows is often `held` for some windows, until the proof is large enough; leave that out
    then."""
    timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 5.0
    """An alert that was not delivered in this time is given up, counted and logged; the update is over by then."""

    @field_validator("webhook_url")
    @classmethod
    def _is_safe(cls, webhook_url: SecretStr) -> SecretStr:
        address = webhook_url.get_secret_value()
        try:
            parts = urlsplit(address)
            scheme, host, _ = parts.scheme, parts.hostname, parts.port
        except ValueError:
            scheme, host = "", None
        printable = address.isascii() and address.isprintable() and " " not in address
        if address and not (printable and host and (scheme == "https" or (scheme == "http" and host in LOOPBACK))):
            raise ValueError("must be an address that begins with https://, or with http:// and is one of this machine's own")
        return webhook_url


LOOPBACK = ("localhost", "127.0.0.1", "::1")
ONLY_FROM_ENVIRONMENT = (("alerts", "webhook_url"),)
"""Secrets: a file may be shared, and a command line is shown to everybody on the machine."""


class MaintenanceConfig(_Part):
    """What the flows `compact` and `vacuum` do, and how long everything is kept."""

    compact_files: Annotated[int, Field(ge=2)] = 4
    """An hour of the click log with at least so many files is rewritten into one."""
    compact_after_hours: Annotated[int, Field(ge=0)] = 2
    """The newest hours of the click log are left alone: files still arrive for them."""
    removed_files_hours: Annotated[float, Field(ge=1)] = 168.0
    """Files that compaction or a replaced hour took out of the click log stay on disk for so long; longer than any update
    or reader of yours needs."""
    orphan_hours: Annotated[float, Field(ge=1)] = 24.0
    """Files that no commit ever named, of a killed process, go after so long; longer than any ingest takes."""
    log_days: Annotated[int, Field(ge=0)] = 0
    """Hours of the click log that ended longer ago leave it, but for files with rows that a model has not learned yet;
    0 keeps all."""
    quarantine_days: Annotated[int, Field(ge=0)] = 90
    """The same for rejected rows, from when they came; 0 keeps all."""
    runs_days: Annotated[int, Field(ge=0)] = 0
    """MLflow runs of updates that ended longer ago are deleted, with their artifacts, but for the champion's and the timeline;
    0 keeps all."""


class UpdateConfig(BaseSettings):
    """One update: rows in, a deadline, a fresh model out."""

    model_config = SettingsConfigDict(
        env_prefix="TIDEMARK_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        validate_default=True,
        hide_input_in_errors=True,
    )

    dataset: str = "synthetic"
    """Name of a shipped spec or path of a TOML file."""
    landing: str = "landing"
    """Folder in which click logs arrive: a local path or any fsspec address."""
    state_dir: Path = Path("state")
    """Folder of everything that tidemark keeps: click log, quarantine, checkpoints, MLflow database."""
    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "hourly"
    """Each model has its own state and its own cursor on the one click log."""
    lock_wait_seconds: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    """How long a command waits where another process has the model, before it gives up with exit code 75; not part of the
    budget."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 5
    """The newest that stay on disk, with what they build on; a corrupt one is replaced by the one before."""
    delta_checkpoints_from_mib: Annotated[int, Field(ge=0)] = 64
    """A model whose tables and counters take at least so many MiB on disk is saved whole now and then; the versions between
    hold what was touched since. A smaller one is always saved whole."""
    cluster: Annotated[str, Field(pattern=r"^(none|local:[1-9][0-9]{0,2}|(tcp|tls|ucx|ws|wss)://\S+)$")] = "none"
    """Where the landing folder's files are read and checked: `none`, here, one after the other; `local:2`, by two processes of
    this machine; `tcp://host:8786`, by the workers of the Dask scheduler there, who see the landing folder and `state_dir`
    under the same paths."""
    window: WindowConfig = WindowConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    budget: BudgetConfig = BudgetConfig()
    processes: ProcessesConfig = ProcessesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    gate: GateConfig = GateConfig()
    serving: ServingConfig = ServingConfig()
    tracking: TrackingConfig = TrackingConfig()
    alerts: AlertsConfig = AlertsConfig()
    maintenance: MaintenanceConfig = MaintenanceConfig()

    @field_validator("dataset", "landing", "state_dir")
    @classmethod
    def _is_a_path(cls, path: T) -> T:
        if "\0" in str(path):
            raise ValueError("a path cannot hold a NUL character; take it out")
        return path

    @field_validator("landing")
    @classmethod
    def _names_no_password(cls, landing: str) -> str:
        if has_password(landing):
            raise ValueError(
                "holds a password, and file names are stored with rejected rows; leave it out, and give it to fsspec in a "
                "variable of its own, such as FSSPEC_FTP_PASSWORD"
            )
        return landing

    @model_validator(mode="after")
    def _reference_fits(self) -> Self:
        reference, rows = self.training.reference_batch_size, self.window.max_rows
        if reference > rows:
            raise ValueError(
                f"training.reference_batch_size = {reference} is larger than any window: window.max_rows = {rows}; "
                f"use a window.max_rows of at least {reference}"
            )
        return self

    @property
    def log_path(self) -> Path:
        """The click log: a Delta table."""
        return self.state_dir / "click_log"

    @property
    def quarantine_path(self) -> Path:
        """Rows and files that broke the spec: a Delta table."""
        return self.state_dir / "quarantine"

    @property
    def model_dir(self) -> Path:
        """Checkpoints and history of this model."""
        return self.state_dir / "models" / self.model_name

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking URI in force."""
        return self.tracking.uri or f"sqlite:///{(self.state_dir / 'mlflow.db').resolve()}"

    @property
    def experiment(self) -> str:
        """The MLflow experiment in force."""
        return self.tracking.experiment or f"tidemark-{Path(self.dataset).stem}"


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> UpdateConfig:
    """The settings of the data set, then `path`, then the environment, then `overrides` such as `training.batch_size=1024`.

    >>> load_config(overrides=["budget.seconds=60"]).budget.seconds
    60.0

    Raises:
        ConfigError: no such file, not TOML, an unknown setting, or a value out of range.
        SpecError: the data set is unknown, or its declaration is wrong.
    """
    _refuse_unknown_variables()
    given, from_file = _nest(overrides), _read_toml(Path(path)) if path else {}
    try:
        of_dataset = load_spec(_chosen_dataset(given, from_file)).settings
        _refuse_secrets({"the command line": given, "the settings file": from_file, "the data set's [settings]": of_dataset})
        _refuse_escapes(of_dataset)
        layered = _layered(given, from_file, of_dataset)()
    except SettingsError as error:
        raise ConfigError(
            f"environment: {error}; a list is written as JSON, such as TIDEMARK_MODEL__HIDDEN='[128, 64]'"
        ) from error
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from error
    return UpdateConfig.model_construct(layered.model_fields_set, **dict(layered))  # a local class cannot be pickled


def spec_of(config: UpdateConfig) -> DatasetSpec:
    """The data set's declaration, as the model in force learns it.

    Raises:
        ConfigError: the model needs embeddings, and none is declared.
        SpecError: the data set is unknown, or its declaration is wrong.
    """
    spec = load_spec(config.dataset)
    spec = spec.linear() if config.model.kind == "linear" else spec
    require_embeddings(config.model.kind, spec)
    return spec


def require_embeddings(kind: ModelKind, spec: DatasetSpec) -> None:
    """A linear model has none, and every other one some.

    Raises:
        ConfigError: it is otherwise.
    """
    embedded = [feature.name for feature in spec.categorical if feature.embedding_dim]
    if kind == "linear" and embedded:
        raise ConfigError(
            f"model.kind = 'linear' learns a declaration without embeddings, and {embedded} of {spec.name!r} have one; take it "
            "from `spec_of`, or set embedding_dim = 0 and leave features of the time out"
        )
    if kind != "linear" and not embedded:
        raise ConfigError(
            f"model.kind = {kind!r} needs embeddings, and every feature of {spec.name!r} has embedding_dim = 0; "
            "set model.kind = 'linear', or give a feature an embedding_dim of 4 or more"
        )


def overridden(config: UpdateConfig, overrides: Sequence[str]) -> UpdateConfig:
    """The same settings, but for `overrides` such as `training.batch_size=1024`.

    >>> overridden(load_config(), ["budget.seconds=60"]).budget.seconds
    60.0

    Raises:
        ConfigError: an unknown setting, a value out of range, or settings that contradict each other.
    """
    given = _nest(overrides)
    _refuse_secrets({"an override": given})
    try:
        return UpdateConfig(**_merged(config.model_dump(), given))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from error


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        merged[name] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _refuse_unknown_variables() -> None:
    known = {f"tidemark_{name}" for name in UpdateConfig.model_fields}
    for name in os.environ:
        if name.lower().startswith("tidemark_") and name.lower().split("__")[0] not in known:
            raise ConfigError(f"the environment variable {name} names no setting; known are {', '.join(sorted(known)).upper()}")


def _refuse_secrets(places: Mapping[str, Mapping[str, Any]]) -> None:
    for place, layer in places.items():
        for part, name in ONLY_FROM_ENVIRONMENT:
            if part in layer and (not isinstance(layer[part], dict) or name in layer[part]):
                raise ConfigError(
                    f"{part}.{name} is a secret and is read from the environment only; take it out of {place} and set "
                    f"TIDEMARK_{part.upper()}__{name.upper()}"
                )
        tracking = layer.get("tracking")
        if isinstance(tracking, dict) and has_password(str(tracking.get("uri", ""))):
            raise ConfigError(
                f"tracking.uri holds a password, and secrets are read from the environment only; take it out of {place} and "
                "set TIDEMARK_TRACKING__URI"
            )


def _refuse_escapes(of_dataset: Mapping[str, Any]) -> None:
    """A declaration comes with the data, maybe from others: it may not choose where this machine reads and writes."""
    for name in ("landing", "state_dir"):
        value = of_dataset.get(name)
        if value is not None and (not isinstance(value, str) or escapes(value)):
            raise ConfigError(
                f"{name}: {value!r} in the data set's [settings] leaves the working folder; write a path below it, or give "
                f"{name} in a settings file, the environment or on the command line"
            )
    tracking = of_dataset.get("tracking", {})
    for name, given in (
        ("dataset", of_dataset),
        ("cluster", of_dataset),
        ("tracking.uri", tracking if isinstance(tracking, dict) else {}),
    ):
        if name.split(".")[-1] in given:
            raise ConfigError(
                f"{name}: no setting of a data set's [settings]; give it in a settings file, the environment or on the "
                "command line"
            )


def _chosen_dataset(given: dict[str, Any], from_file: dict[str, Any]) -> str:
    layers = (given, EnvSettingsSource(UpdateConfig)(), from_file)
    chosen = next((layer["dataset"] for layer in layers if "dataset" in layer), UpdateConfig.model_fields["dataset"].default)
    if not isinstance(chosen, str):
        raise ConfigError(f"dataset: must be the name of a shipped data set or the path of a TOML file, got {chosen!r}")
    return chosen


def _layered(given: dict[str, Any], from_file: dict[str, Any], of_dataset: dict[str, Any]) -> type[UpdateConfig]:
    class Layered(UpdateConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            command_line, file, dataset = (InitSettingsSource(settings_cls, v) for v in (given, from_file, of_dataset))
            return command_line, env_settings, file, dataset

    return Layered


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _nest(overrides: Sequence[str]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for override in overrides:
        name, sign, text = override.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"an override is written name=value, such as budget.seconds=60; got {override!r}")
        *parents, last = name.strip().split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise ConfigError(
                    f"{override!r} contradicts an override before it, which gives {parent} one value; keep one of them"
                )
        level[last] = _parse(text.strip())
    return nested


def _parse(text: str) -> Any:
    """A TOML value; any other text is itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _explain(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"]) or "settings"
    match problem["type"]:
        case "extra_forbidden":
            return f"{name}: unknown setting"
        case "value_error":
            return f"{name}: {problem['ctx']['error']}"
        case _ if problem["loc"][:1] == ("alerts",):
            return f"{name}: {problem['msg']}"  # what was given may be a secret
        case _:
            return f"{name}: {problem['msg']}, got {without_passwords(repr(problem['input']))}"
