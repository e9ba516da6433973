"""The model between two updates: restored, or new; and saved again.

Enters: the settings, the spec and the model's folder. Leaves: a `ModelState` that continues bit for bit where the last update
ended, or a new one.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import CorruptCheckpoint, SpecMismatch
from data_schemas.examples import I64, Examples
from models.ctr import Architecture, CtrModel, build_model
from models.embeddings import TableSlice
from models.id_table import SHARED_ROW, IdFigures, IdTables
from models.memory import Memory, column_names, linear_only_names
from models.tables import table_layout
from models.widening import (
    Labelled,
    additions,
    labelled_parameters,
    new_tables,
    place_by_name,
    refuse_first_dense_columns,
    widen,
)
from pipeline.config import ModelConfig, UpdateConfig, require_embeddings
from pipeline.data.encode import (
    EncodedWindow,
    dense_columns,
    linear_only_places,
    look_up_again,
    num_dense_columns,
    num_normalised,
)
from pipeline.data.normalise import RunningMoments
from pipeline.data.windows import Cursor, Window
from pipeline.evaluation.paired import Evidence
from pipeline.publishing.checkpoint import (
    TIMES_WITHOUT_WEIGHT,
    Base,
    Manifest,
    Moments,
    Sampled,
    base_of,
    current_version,
    head_version,
    is_due,
    load_cursor,
    load_dense,
    load_memory,
    load_rows,
    load_tables,
    next_version,
    pack_pending,
    point_to,
    publish_head,
    read_manifest,
    save_checkpoint,
    set_aside,
    versions,
)
from pipeline.publishing.table_files import changed_bytes, changed_files, whole_files
from pipeline.training.choose_threads import choose_threads
from pipeline.training.late_clicks import LateClicks
from pipeline.training.learn import Learned
from pipeline.training.learner import Arithmetic, Learner
from pipeline.training.optimizers import group_scalars, load_group_scalars
from pipeline.training.precision import choose_arithmetic
from pipeline.training.processes import Processes
from pipeline.training.replay import ReplayMemory
from pipeline.training.sharding import spread_tables
from pipeline.training.smoothing import MovingAverage
from pipeline.training.threads import torch_threads
from sampling.plan import SamplingPlan, as_table

log = logging.getLogger(__name__)

T = TypeVar("T")

GATE = "head.gate_F"
"""Name of the dense weight that only a DeepFM has which got new embeddings after it was trained."""

NOISE_SCALE = "noise_scale"
"""Name of what was measured of the gradient noise scale."""

EVIDENCE = "gate/"
"""Prefix of held-out rows that could not decide yet."""

COMPARED_WITH = "gate_champion"
"""Name of the version that they were predicted by, beside the one that they are kept with."""

GROUP = "optimizer_group."
"""Prefix of what the dense optimizer keeps once a group of parameters."""


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """A model and what it has consumed."""

    learner: Learner
    moments: RunningMoments | None
    """Of the dense columns; None before the first window."""
    memory: Memory
    """Counters and histories of every row consumed."""
    ids: IdTables
    """Ids that have a row of their own, where a feature asks for admission."""
    replay: ReplayMemory
    """Past rows that are learned again, where the settings ask for it."""
    late_clicks: LateClicks
    """What is known of them, where clicks are events of their own."""
    cursor: Cursor
    version: int
    """Of the checkpoint that it was restored from; 0 for a new model."""
    serving: int | None = None
    """The version that serves, where it is another: what this one learned since is not proven."""
    evidence: Evidence | None = None
    """Of its comparison with the one that serves, which could not decide."""
    base: Base | None = None
    """The whole version that its changes are marked against; None: the next one has to be whole."""
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
    for version in processes.from_first(lambda: _candidates(config)):
        try:
            state = _restored(version, config, spec, processes)
            state = state if state.serving is None else _with_whole_champion(state, config, processes)
            return replace(state, notes=(*notes, *state.notes))
        except CorruptCheckpoint as error:
            if processes.is_first:
                set_aside(config.model_dir, version)
            notes.append(f"{error}; went back to the checkpoint before")
            log.warning("%s; going back to the checkpoint before", error)
    if notes:
        raise CorruptCheckpoint(
            f"no checkpoint in {config.model_dir / 'checkpoints'} is whole: {'; '.join(notes)}. Restore one from a backup, "
            "or start a new model under another model_name; the click log is kept"
        )
    return _create(config, spec, processes)


def _with_whole_champion(state: ModelState, config: UpdateConfig, processes: Processes) -> ModelState:
    """The model that learned on, and a champion that it can be compared with; it serves itself where none is whole."""
    serving, notes = processes.from_first(lambda: _whole_champion(state, config))
    if not notes:
        return state
    return replace(state, serving=serving, evidence=None, notes=(*state.notes, *notes))


def _whole_champion(state: ModelState, config: UpdateConfig) -> tuple[int | None, list[str]]:
    """The version that serves, whole, or None where it is the state's own; and what had to be done for it."""
    folder, notes = config.model_dir, list[str]()
    for version in dict.fromkeys([state.serving, *versions(folder)[::-1]]):
        if version is None or version >= state.version:
            continue
        try:
            read_manifest(folder, version)
        except CorruptCheckpoint as error:
            set_aside(folder, version)
            log.warning("%s; it served", error)
            notes.append(f"{error}; it served, and was set aside")
            continue
        if not notes:
            return version, notes
        point_to(folder, version)
        notes.append(f"version {version} serves instead; what was compared with the other is not counted")
        return version, notes
    publish_head(folder, state.version)
    notes.append(f"no other version is whole: version {state.version}, which was not proven, serves")
    return None, notes


def restore_serving(config: UpdateConfig, spec: DatasetSpec, state: ModelState) -> ModelState:
    """The model that serves, where `state` is another.

    Raises:
        CorruptCheckpoint: it is not whole.
    """
    assert state.serving is not None
    return _restored(state.serving, config, spec, state.learner.processes)


def restore_version(config: UpdateConfig, spec: DatasetSpec, version: int) -> ModelState:
    """The model of a version that is kept, whole in this process, whatever others there are.

    Raises:
        SpecMismatch: it belongs to another spec or another kind of model.
        CorruptCheckpoint: it is not whole, or gone.
    """
    return _restored(version, config, spec, Processes())


def save(
    state: ModelState,
    window: Window,
    learned: Learned,
    config: UpdateConfig,
    spec: DatasetSpec,
    *,
    seed: tuple[int, ...],
    sampling: SamplingPlan | None = None,
    published: bool = True,
) -> ModelState:
    """Publishes the state after a window as the next version, or keeps it for the next update; the state as saved."""
    learner = state.learner
    state = as_saved(state, window, learned, config)
    version, cursor = state.version, state.cursor
    tables = learner.model.tables
    slices = [] if tables.saved_elsewhere else [*tables.slices(), *learner.sparse_step.slices()]
    first = learner.processes.is_first
    delta = _delta(state, slices, config, published=published)
    base = state.base if delta else None
    pending, bitmaps = pack_pending(cursor)
    manifest = Manifest(
        version=version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dataset=spec.name,
        spec_fingerprint=spec.fingerprint(),
        spec=spec,
        model_fingerprint=model_fingerprint(config),
        precision=learner.precision,
        micro_batch_size=learner.micro_batch_size,
        micro_batch_halvings=tuple(learner.halvings),
        fastest_threads=learner.fastest_threads,
        steps=learner.steps,
        average_steps={name: average.steps for name, average in (_averages(learner) | learner.sparse_step.averages()).items()},
        loss_scale=learner.scaler.state_dict(),
        log_id=cursor.log_id,
        log_version=cursor.log_version,
        window_start=window.start,
        window_end=window.end,
        window_seed=seed,
        permutation_position=learned.position,
        plan=tuple(vars(record) for record in learned.plan),
        sampling=Sampled(settings=config.sampling.model_dump(mode="json"), plan=as_table(sampling)) if sampling else None,
        pending=pending,
        released=cursor.released,
        moments=Moments.of(state.moments),
        decays=tuple(tables.decays) if delta else (),
    )
    manifest = save_checkpoint(
        config.model_dir,
        manifest,
        dense=_dense_tensors(learner) if first else {},
        tables=delta.tables if delta else whole_files(slices),
        memory=delta.memory if delta else _remembered(state) if first else {},
        rows=_kept_rows(state, None if published else current_version(config.model_dir) or 0) if first else {},
        pending=bitmaps,
        base=base,
        keep=config.keep_checkpoints,
        processes=learner.processes,
        published=published,
    )
    if base is None:
        for marked in (tables, state.memory, state.ids):
            marked.mark_saved()
    return replace(state, base=learner.processes.from_first(lambda: base_of(config.model_dir, manifest)))


@dataclass(frozen=True, kw_only=True)
class _Delta:
    """What changed since the base."""

    tables: Iterable[Mapping[str, torch.Tensor]]
    """What each file holds; copied as it is asked for."""
    memory: Mapping[str, npt.NDArray[Any]]
    """Nothing but in the first process."""


def _delta(state: ModelState, slices: Sequence[TableSlice], config: UpdateConfig, *, published: bool) -> _Delta | None:
    """None where the version is to be whole; the same on all processes.

    What is not published is no base for others, so that it is whole only where it has to be.
    """
    base, learner, processes = state.base, state.learner, state.learner.processes
    if base is None or base.bytes < config.delta_checkpoints_from_mib << 20:
        return None
    if base.version not in processes.from_first(lambda: versions(config.model_dir)):
        return None
    marked = learner.model.tables.changed
    changed = {name: processes.union(rows.rows()) for name, rows in marked.items()}
    memory = _remembered(state, changed=True) if processes.is_first else {}
    size = processes.total(changed_bytes(slices, changed) + sum(array.nbytes for array in memory.values()))
    if published and is_due(base, round(size)):
        return None
    return _Delta(tables=changed_files(slices, changed), memory=memory)


def _remembered(state: ModelState, *, changed: bool = False) -> dict[str, npt.NDArray[Any]]:
    """Counters, histories and ids as they are saved: all of them, or only what `changed` since the base."""
    return state.memory.arrays(changed=changed) | state.ids.arrays(changed=changed)


def fingerprint_of_copies(state: ModelState) -> str:
    """Of what every process keeps a copy of: dense weights and all that is remembered beside the tables.

    Of counters, histories and ids only what changed since the base, where there is one: the rest was found the same before.

    A checksum, against defects: it is not meant to withstand anybody.
    """
    found = 0
    kept = _remembered(state, changed=state.base is not None) | state.replay.arrays() | state.late_clicks.arrays()
    kept |= {f"dense.{name}": weight.detach().cpu().numpy() for name, weight in state.learner.parameters.items()}
    for name, array in sorted(kept.items()):
        found = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, zlib.crc32(name.encode(), found))
    return f"{found:08x} {Moments.of(state.moments)}"


def as_saved(state: ModelState, window: Window, learned: Learned, config: UpdateConfig) -> ModelState:
    """The state with the number and the cursor that `save` will give it; all processes call this."""
    cursor = window.cursor_after(learned.unreached_R)
    free = state.learner.processes.from_first(lambda: next_version(config.model_dir))
    return replace(state, cursor=cursor, version=max(state.version + 1, free))


def admit_ids(
    state: ModelState,
    examples: Examples,
    window: EncodedWindow,
    spec: DatasetSpec,
    *,
    hour: int,
    counted_rows: I64 | None = None,
) -> tuple[EncodedWindow, dict[str, IdFigures]]:
    """Counts a window's ids before it is learned; those seen often enough get rows that start as the shared row does.

    Args:
        state: changed in place.
        examples: all rows of the window.
        window: the same, as they were predicted.
        spec: of the model.
        hour: the start of the window, in hours since 1970.
        counted_rows: sightings of their ids; the others were drawn, or are learned later. None: all are.

    Returns:
        The window with the rows that its ids have now, and what happened, by feature with admitted ids.
    """
    counted = examples if counted_rows is None else examples.take(counted_rows)
    admissions = state.ids.admit(counted, hour)
    if not admissions:
        return window, {}
    learner = state.learner
    fresh = {name: admission.fresh_rows for name, admission in admissions.items()}
    learner.sparse_step.forget(fresh)
    learner.model.tables.start_rows(fresh, like=SHARED_ROW, add_up=learner.processes.add_up)
    figures = {name: admission.figures for name, admission in admissions.items()}
    all_counted = counted_rows is None or len(counted_rows) == examples.num_rows
    return look_up_again(window, examples, spec, state.ids, all_counted=all_counted), figures


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


def architecture(config: ModelConfig, *, gated: bool = False) -> Architecture:
    """The head's sizes as the settings have them; `gated` where `GATE` is among the dense weights."""
    return Architecture(
        kind=config.kind,
        hidden=config.hidden,
        common_dim=config.interaction_dim,
        cross_layers=config.cross_layers,
        cross_rank=config.cross_rank,
        gated=gated,
    )


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _candidates(config: UpdateConfig) -> list[int]:
    """Versions to try: what learned on since, then the one that CURRENT names, there or not, then the older ones; all there are
    without CURRENT."""
    current, newest_first = current_version(config.model_dir), versions(config.model_dir)[::-1]
    head = head_version(config.model_dir)
    on = [] if head is None else [head]
    return [*on, *newest_first] if current is None else [*on, current, *(number for number in newest_first if number < current)]


def _restored(version: int, config: UpdateConfig, spec: DatasetSpec, processes: Processes) -> ModelState:
    found = processes.from_first(lambda: _manifest_or_fault(config, version))
    if isinstance(found, CorruptCheckpoint):
        raise found
    _check_fit(found, config, spec)
    return _restore(found, config, spec, processes)


def _in_all(processes: Processes, load: Callable[[], T]) -> T:
    """What `load` gives, once no process has found anything corrupt; `load` exchanges nothing with the others.

    Raises:
        CorruptCheckpoint: one has, in all of them: they go back to the same version.
    """
    loaded: list[T] = []
    fault = ""
    try:
        loaded.append(load())
    except CorruptCheckpoint as error:
        fault = str(error)
    if faults := [told for told in processes.gather(fault) if told]:
        raise CorruptCheckpoint(faults[0])
    return loaded[0]


def _manifest_or_fault(config: UpdateConfig, version: int) -> Manifest | CorruptCheckpoint:
    """As a value, so that all processes can go on from either."""
    try:
        return read_manifest(config.model_dir, version)
    except CorruptCheckpoint as error:
        return error


def _kept_rows(state: ModelState, champion: int | None) -> dict[str, npt.NDArray[Any]]:
    """Past rows that are kept; those that are evidence only while it has not decided against a champion."""
    kept = state.replay.arrays() | state.late_clicks.arrays()
    if champion is None or state.evidence is None:
        return kept
    evidence = {f"{EVIDENCE}{name}": array for name, array in state.evidence.arrays().items()}
    return kept | evidence | {COMPARED_WITH: np.array([champion])}


def _evidence(kept: Mapping[str, npt.NDArray[Any]], champion: int | None) -> Evidence | None:
    """Of a comparison with this champion; none of one with another, which is no longer there."""
    evidence = {name.removeprefix(EVIDENCE): array for name, array in kept.items() if name.startswith(EVIDENCE)}
    if not evidence or (COMPARED_WITH in kept and int(kept[COMPARED_WITH][0]) != (champion or 0)):
        return None
    return Evidence.of_arrays(evidence)


def _check_fit(manifest: Manifest, config: UpdateConfig, spec: DatasetSpec) -> None:
    way_out = "start a new model under another model_name, or go back to the settings it was trained with"
    if manifest.model_fingerprint != model_fingerprint(config):
        raise SpecMismatch(
            f"model {config.model_name!r} in {config.model_dir} has another architecture or optimizer than the settings "
            f"[model] and [training] ask for; {way_out}"
        )
    grows = manifest.spec is not None and additions(manifest.spec, spec) is not None
    if manifest.spec_fingerprint != spec.fingerprint() and not grows:
        raise SpecMismatch(
            f"model {config.model_name!r} in {config.model_dir} was trained on spec {manifest.dataset!r} "
            f"({manifest.spec_fingerprint}), not on {spec.name!r} ({spec.fingerprint()}): its features differ by more than "
            f"added ones; {way_out}"
        )


def _model(
    config: UpdateConfig,
    spec: DatasetSpec,
    processes: Processes,
    device: torch.device,
    *,
    gated: bool = False,
    new: bool,
) -> CtrModel:
    require_embeddings(config.model.kind, spec)
    layout = table_layout(spec)
    spread = partial(
        spread_tables,
        processes=processes,
        device=device,
        layout=layout,
        sharding=config.processes.sharding,
        sparse_optimizer=config.training.sparse_optimizer,
        seed=config.training.seed,
        new=new,
    )
    return build_model(
        architecture(config.model, gated=gated),
        layout,
        num_dense=num_dense_columns(spec),
        linear_only=linear_only_places(spec),
        sparse_optimizer=config.training.sparse_optimizer,
        sparse_learning_rate=config.training.sparse_learning_rate,
        wide_learning_rate=config.training.wide_learning_rate,
        wide_beta=config.training.wide_beta,
        device=device,
        seed=config.training.seed,
        spread=spread,
    )


def _create(config: UpdateConfig, spec: DatasetSpec, processes: Processes) -> ModelState:
    device = default_device()
    model = _model(config, spec, processes, device, new=True)
    threads = choose_threads(config.training, spec, architecture(config.model), device=device, processes=processes)
    with torch_threads(threads.fastest if config.training.threads == "auto" else config.training.threads):
        chosen = processes.from_first(
            lambda: choose_arithmetic(
                config.training,
                model.net,
                deep_width=sum(model.layout.deep_dims),
                wide_width=len(model.layout.wide_keys),
                num_dense=num_dense_columns(spec),
                device=device,
                num_processes=processes.count,
            )
        )
    training = config.training.model_copy(update={"micro_batch_size": chosen.micro_batch_size})
    learner = Learner(model, training, precision=chosen.precision, device=device, processes=processes)
    learner.fastest_threads = threads.fastest
    return ModelState(
        learner=learner,
        moments=None,
        memory=Memory(spec),
        ids=IdTables(spec),
        replay=ReplayMemory.empty(config.sampling),
        late_clicks=LateClicks.nothing(spec),
        cursor=Cursor(),
        version=0,
        notes=(*threads.notes, *chosen.notes),
    )


def _restore(manifest: Manifest, config: UpdateConfig, spec: DatasetSpec, processes: Processes) -> ModelState:
    device = default_device()
    trained_on = manifest.spec or spec
    dense = _in_all(processes, lambda: load_dense(config.model_dir, manifest))
    before, after = table_layout(trained_on), table_layout(spec)
    gated = f"weight.{GATE}" in dense or (config.model.kind == "deepfm" and before.head_keys != after.head_keys)
    new = new_tables(before, after)
    model = _model(config, spec, processes, device, gated=gated, new=bool(new))
    asked = config.training.precision
    precision: Arithmetic = manifest.precision if asked == "auto" else asked
    training = config.training
    if training.micro_batch_size == "auto":
        size = manifest.micro_batch_size or training.micro_batch
        training = training.model_copy(update={"micro_batch_size": size})
    learner = Learner(model, training, precision=precision, device=device, processes=processes)
    learner.fastest_threads = manifest.fastest_threads
    if trained_on.fingerprint() != spec.fingerprint():
        dense = _widened(dense, learner, manifest, trained_on, spec, architecture(config.model, gated=gated))
    places = processes.from_first(lambda: _places(config, manifest))
    return _in_all(processes, lambda: _filled(learner, manifest, dense, config, spec, places, new=new))


@dataclass(frozen=True, kw_only=True)
class _Places:
    """What a model's folder says of a version beside its manifest."""

    current: int | None
    head: int | None
    base: Base | None
    """That the version after this one can build on."""


def _places(config: UpdateConfig, manifest: Manifest) -> _Places:
    folder = config.model_dir
    return _Places(current=current_version(folder), head=head_version(folder), base=base_of(folder, manifest))


def _filled(
    learner: Learner,
    manifest: Manifest,
    dense: Mapping[str, torch.Tensor],
    config: UpdateConfig,
    spec: DatasetSpec,
    places: _Places,
    *,
    new: Set[str],
) -> ModelState:
    """The state of a version whose dense part was read, with all else that its files hold."""
    model, trained_on = learner.model, manifest.spec or spec
    kept_averages = learner.sparse_step.averages().keys() & manifest.average_steps.keys()
    averages = [piece for piece in learner.sparse_step.slices() if piece.name.split(".")[0] in kept_averages]
    load_tables(config.model_dir, manifest, model.tables, averages=averages, new_tables=new)
    same = trained_on.fingerprint() == spec.fingerprint() and _average_kinds(learner) == manifest.average_steps.keys()
    _load_dense_tensors(learner, manifest, dense)
    moments = _widened_moments(manifest.moments.running(), trained_on, spec) if manifest.moments else None
    cursor = load_cursor(config.model_dir, manifest)
    memory, ids = Memory(spec), IdTables(spec)
    for arrays in load_memory(config.model_dir, manifest):
        memory.load(arrays)
        ids.load(arrays)
    kept = load_rows(config.model_dir, manifest)
    return ModelState(
        learner=learner,
        moments=moments,
        memory=memory,
        ids=ids,
        replay=ReplayMemory.load(kept, config.sampling, spec, num_normalised(spec)),
        late_clicks=LateClicks.load(kept, spec, num_normalised(spec)),
        cursor=cursor,
        version=manifest.version,
        serving=places.current if manifest.version == places.head else None,
        evidence=_evidence(kept, places.current),
        base=places.base if same else None,
        notes=(*_passed_over(manifest, trained_on), *_added(trained_on, spec)),
    )


def _passed_over(manifest: Manifest, trained_on: DatasetSpec) -> list[str]:
    """What an older tidemark saved and this one has no use for, in words."""
    times = [feature.name for feature in trained_on.categorical if feature.from_time]
    if manifest.format >= TIMES_WITHOUT_WEIGHT or not times:
        return []
    return [
        f"version {manifest.version} was saved by an older tidemark: the wide weights of {', '.join(times)} are left out, "
        "since a time has an embedding only; predictions are off by them until the bias has learned an hour"
    ]


def _added(old: DatasetSpec, new: DatasetSpec) -> list[str]:
    return [f"{added} is new: it starts from zero effect" for added in additions(old, new) or ()]


def _widened(
    dense: Mapping[str, torch.Tensor],
    learner: Learner,
    manifest: Manifest,
    old: DatasetSpec,
    new: DatasetSpec,
    shape: Architecture,
) -> dict[str, torch.Tensor]:
    """The saved dense tensors as a model with more inputs has them; all that is new has weight zero."""
    before, after = (
        labelled_parameters(shape, table_layout(spec), dense_columns(spec), linear_only_names(spec)) for spec in (old, new)
    )
    refuse_first_dense_columns(before, after)
    dense = dict(dense)
    names = [name.removeprefix("weight.") for name in dense if name.startswith("weight.")]
    if shape.gated and GATE not in names:
        dense |= _new_parameter(GATE, torch.ones(len(table_layout(old).head_keys)), learner, manifest)
    widened = {name: tensor for name, tensor in dense.items() if name.startswith(("random.torch", GROUP, "row_", NOISE_SCALE))}
    for kind in ("weight", *_averages(learner)):
        widened |= _widened_kind(f"{kind}.", "", dense, before, after)
    for key in {key.rpartition(".")[2] for key in dense if key.startswith("optimizer.")}:
        widened |= _widened_kind("optimizer.", f".{key}", dense, before, after)
    for name, parameter in learner.parameters.items():
        if f"weight.{name}" not in widened:
            widened |= _new_parameter(name, parameter.detach().clone(), learner, manifest)
    return widened


def _widened_kind(
    prefix: str, suffix: str, dense: Mapping[str, torch.Tensor], before: Sequence[Labelled], after: Sequence[Labelled]
) -> dict[str, torch.Tensor]:
    chosen = {
        key.removeprefix(prefix).removesuffix(suffix): tensor
        for key, tensor in dense.items()
        if key.startswith(prefix) and key.endswith(suffix)
    }
    return {f"{prefix}{name}{suffix}": tensor for name, tensor in widen(chosen, before, after).items()}


def _new_parameter(name: str, weight: torch.Tensor, learner: Learner, manifest: Manifest) -> dict[str, torch.Tensor]:
    """A parameter that was not trained yet: its averages are as if it had always been so."""
    tensors = {f"weight.{name}": weight}
    if learner.gradient_average is not None:
        tensors[f"gradient_average.{name}"] = torch.zeros_like(weight)
    if learner.weight_average is not None:
        correction = 1 - learner.weight_average.decay ** manifest.average_steps["weight_average"]
        tensors[f"weight_average.{name}"] = weight * correction
    return tensors


def _widened_moments(moments: RunningMoments, old: DatasetSpec, new: DatasetSpec) -> RunningMoments:
    """Those of more columns, of which nothing was seen where they are new."""
    names = [[*(number.name for number in spec.numeric), *column_names(spec)] for spec in (old, new)]
    places, widened = place_by_name(*names), RunningMoments.nothing_seen(len(names[1]))
    for column in ("count_N", "mean_N", "deviations_N"):
        getattr(widened, column)[places] = getattr(moments, column)
    return widened


def _dense_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in learner.parameters.items()}
    for name, parameter in learner.parameters.items():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    tensors |= {f"{GROUP}{name}": value for name, value in group_scalars(learner.optimizer).items()}
    for kind, average in _averages(learner).items():
        tensors |= {f"{kind}.{name}": total for name, total in average.sums.items()}
    if learner.noise_scale.measurements or learner.noise_scale.last is not None:
        tensors[NOISE_SCALE] = torch.tensor(learner.noise_scale.state(), dtype=torch.float64)
    return tensors | {"random.torch": torch.get_rng_state()}


def _load_dense_tensors(learner: Learner, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            if saved := _starting_with(f"optimizer.{name}.", tensors):
                on_host = {"step"}
                learner.optimizer.state[parameter] = {
                    key: value if key in on_host else value.to(parameter.device) for key, value in saved.items()
                }
    load_group_scalars(learner.optimizer, _starting_with(GROUP, tensors))
    for kind, average in _averages(learner).items():
        sums = {name: tensors[f"{kind}.{name}"] for name in average.sums}
        average.load(sums, manifest.average_steps[kind])
    for kind, of_rows in learner.sparse_step.averages().items():
        if kind in manifest.average_steps:
            of_rows.load(_starting_with(f"{kind}.", tensors), round(manifest.average_steps[kind]))
    if manifest.loss_scale and learner.precision == "fp16":
        learner.scaler.load_state_dict(dict(manifest.loss_scale))
    learner.steps = manifest.steps
    if NOISE_SCALE in tensors:
        learner.noise_scale.load(tensors[NOISE_SCALE].tolist())
    torch.set_rng_state(tensors["random.torch"])


def _starting_with(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _average_kinds(learner: Learner) -> Set[str]:
    """Names of all moving averages that are kept."""
    return _averages(learner).keys() | learner.sparse_step.averages().keys()


def _averages(learner: Learner) -> dict[str, MovingAverage]:
    both = {"gradient_average": learner.gradient_average, "weight_average": learner.weight_average}
    return {kind: average for kind, average in both.items() if average is not None}
