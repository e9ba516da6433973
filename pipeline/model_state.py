"""The model between two updates: restored, or new; and saved again.

Enters: the settings, the spec and the model's folder. Leaves: a `ModelState` that continues bit for bit where the last update
ended, or a new one.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CorruptCheckpoint, SpecMismatch
from models.ctr import Architecture, CtrModel, build_model
from models.memory import Memory
from models.tables import table_layout
from pipeline.config import ModelConfig, UpdateConfig
from pipeline.data.encode import num_dense_columns
from pipeline.data.normalise import RunningMoments
from pipeline.data.windows import Cursor, Window
from pipeline.publishing.checkpoint import (
    Manifest,
    Moments,
    current_version,
    load_cursor,
    load_dense,
    load_memory,
    load_tables,
    pack_pending,
    read_manifest,
    save_checkpoint,
    versions,
)
from pipeline.training.learn import Learned
from pipeline.training.learner import Arithmetic, Learner
from pipeline.training.precision import choose_precision
from pipeline.training.processes import Processes, shard_tables
from pipeline.training.smoothing import MovingAverage

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """A model and what it has consumed."""

    learner: Learner
    moments: RunningMoments | None
    """Of the dense columns; None before the first window."""
    memory: Memory
    """Counters and histories of every row consumed."""
    cursor: Cursor
    version: int
    """Of the checkpoint that it was restored from; 0 for a new model."""
    notes: tuple[str, ...] = ()
    """What happened on the way, such as a corrupt checkpoint that was passed over."""


def restore_or_create(config: UpdateConfig, spec: DatasetSpec, processes: Processes | None = None) -> ModelState:
    """The current checkpoint's model; the newest whole one where the current is corrupt; a new model where there is none.

    Raises:
        SpecMismatch: the checkpoint belongs to another spec or another kind of model.
        CorruptCheckpoint: there are checkpoints, and none of them is whole.
    """
    processes = processes or Processes.started()
    notes: list[str] = []
    for version in _candidates(config):
        try:
            manifest = read_manifest(config.model_dir, version)
            _check_fit(manifest, config, spec)
            return replace(_restore(manifest, config, spec, processes), notes=tuple(notes))
        except CorruptCheckpoint as error:
            notes.append(f"{error}; went back to the checkpoint before")
            log.warning("%s; going back to the checkpoint before", error)
    if notes:
        raise CorruptCheckpoint(
            f"no checkpoint in {config.model_dir / 'checkpoints'} is whole: {'; '.join(notes)}. Restore one from a backup, "
            "or start a new model under another model_name; the click log is kept"
        )
    return _create(config, spec, processes)


def save(
    state: ModelState,
    window: Window,
    learned: Learned,
    config: UpdateConfig,
    spec: DatasetSpec,
    *,
    seed: tuple[int, ...],
) -> ModelState:
    """Publishes the state after a window as the next version; the state as saved."""
    learner = state.learner
    version = max([state.version, *versions(config.model_dir)]) + 1
    cursor = window.cursor_after(learned.unreached_R)
    pending, bitmaps = pack_pending(cursor)
    manifest = Manifest(
        version=version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dataset=spec.name,
        spec_fingerprint=spec.fingerprint(),
        model_fingerprint=model_fingerprint(config),
        precision=learner.precision,
        steps=learner.steps,
        average_steps={name: average.steps for name, average in _averages(learner).items()},
        loss_scale=learner.scaler.state_dict(),
        log_version=cursor.log_version,
        window_start=window.start,
        window_end=window.end,
        window_seed=seed,
        permutation_position=window.num_rows - int(learned.unreached_R.sum()),
        plan=tuple(vars(record) for record in learned.plan),
        pending=pending,
        moments=Moments.of(state.moments),
    )
    save_checkpoint(
        config.model_dir,
        manifest,
        dense=_dense_tensors(learner),
        tables=learner.model.tables,
        memory=state.memory.arrays(),
        pending=bitmaps,
        keep=config.keep_checkpoints,
        processes=learner.processes,
    )
    return replace(state, cursor=cursor, version=version)


def model_fingerprint(config: UpdateConfig) -> str:
    """16 hex digits over every setting that changes the shape of a weight or of an optimizer's state."""
    training = config.training
    text = json.dumps(
        [
            config.model.model_dump(),
            training.dense_optimizer,
            training.sparse_optimizer,
            training.gradient_ema > 0,
            training.weight_ema > 0,
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def architecture(config: ModelConfig) -> Architecture:
    """The head's sizes as the settings have them."""
    return Architecture(
        kind=config.kind,
        hidden=config.hidden,
        common_dim=config.interaction_dim,
        cross_layers=config.cross_layers,
        cross_rank=config.cross_rank,
    )


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _candidates(config: UpdateConfig) -> list[int]:
    """Versions to try, the current one first, then the older ones."""
    current = current_version(config.model_dir)
    return [] if current is None else [version for version in reversed(versions(config.model_dir)) if version <= current]


def _check_fit(manifest: Manifest, config: UpdateConfig, spec: DatasetSpec) -> None:
    way_out = "start a new model under another model_name, or go back to the settings it was trained with"
    if manifest.spec_fingerprint != spec.fingerprint():
        raise SpecMismatch(
            f"model {config.model_name!r} in {config.model_dir} was trained on spec {manifest.dataset!r} "
            f"({manifest.spec_fingerprint}), not on {spec.name!r} ({spec.fingerprint()}): its features differ; {way_out}"
        )
    if manifest.model_fingerprint != model_fingerprint(config):
        raise SpecMismatch(
            f"model {config.model_name!r} in {config.model_dir} has another architecture or optimizer than the settings "
            f"[model] and [training] ask for; {way_out}"
        )


def _model(config: UpdateConfig, spec: DatasetSpec, processes: Processes, device: torch.device) -> CtrModel:
    model = build_model(
        architecture(config.model),
        table_layout(spec),
        num_dense=num_dense_columns(spec),
        sparse_optimizer=config.training.sparse_optimizer,
        sparse_learning_rate=config.training.sparse_learning_rate,
        wide_learning_rate=config.training.wide_learning_rate,
        device=device,
        seed=config.training.seed,
    )
    model.tables = shard_tables(model.tables, processes, device)
    return model


def _create(config: UpdateConfig, spec: DatasetSpec, processes: Processes) -> ModelState:
    device = default_device()
    model = _model(config, spec, processes, device)
    precision = choose_precision(
        config.training.precision,
        model.net,
        deep_width=sum(model.layout.deep_dims),
        wide_width=len(model.layout.wide_keys),
        num_dense=num_dense_columns(spec),
        rows=config.training.micro_batch_size,
        device=device,
    )
    learner = Learner(model, config.training, precision=precision, device=device, processes=processes)
    return ModelState(learner=learner, moments=None, memory=Memory(spec), cursor=Cursor(), version=0)


def _restore(manifest: Manifest, config: UpdateConfig, spec: DatasetSpec, processes: Processes) -> ModelState:
    device = default_device()
    model = _model(config, spec, processes, device)
    asked = config.training.precision
    precision: Arithmetic = manifest.precision if asked == "auto" else asked
    learner = Learner(model, config.training, precision=precision, device=device, processes=processes)
    load_tables(config.model_dir, manifest, model.tables)
    _load_dense_tensors(learner, manifest, load_dense(config.model_dir, manifest))
    moments = manifest.moments.running() if manifest.moments else None
    cursor = load_cursor(config.model_dir, manifest)
    memory = Memory(spec)
    memory.load(load_memory(config.model_dir, manifest))
    return ModelState(learner=learner, moments=moments, memory=memory, cursor=cursor, version=manifest.version)


def _dense_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in learner.parameters.items()}
    for name, parameter in learner.parameters.items():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    for kind, average in _averages(learner).items():
        tensors |= {f"{kind}.{name}": total for name, total in average.sums.items()}
    return tensors | {"random.torch": torch.get_rng_state()}


def _load_dense_tensors(learner: Learner, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            prefix = f"optimizer.{name}."
            saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if saved:
                on_host = {"step"}
                learner.optimizer.state[parameter] = {
                    key: value if key in on_host else value.to(parameter.device) for key, value in saved.items()
                }
    for kind, average in _averages(learner).items():
        sums = {name: tensors[f"{kind}.{name}"] for name in average.sums}
        average.load(sums, manifest.average_steps[kind])
    if manifest.loss_scale and learner.precision == "fp16":
        learner.scaler.load_state_dict(dict(manifest.loss_scale))
    learner.steps = manifest.steps
    torch.set_rng_state(tensors["random.torch"])


def _averages(learner: Learner) -> dict[str, MovingAverage]:
    both = {"gradient_average": learner.gradient_average, "weight_average": learner.weight_average}
    return {kind: average for kind, average in both.items() if average is not None}
