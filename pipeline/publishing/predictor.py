"""The model as it serves: raw ids and raw numbers in, probabilities out, equal to training's own.

<folder>/predictor.json        spec, architecture, running moments, precision of the tables
        /weights.safetensors   tables and dense weights (averaged, where an average is kept)
"""

import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from data_schemas.dataset import Categorical, DatasetSpec
from data_schemas.errors import CorruptCheckpoint, DataError
from data_schemas.examples import F32, Examples
from models.ctr import CtrModel, DenseNet, ServedModel, build_model
from models.embeddings import TableSlice
from models.id_table import IdTables
from models.memory import Memory
from models.narrow_tables import NarrowTables, narrowed
from models.tables import table_layout, wide_weights_of_times
from pipeline.config import ModelConfig, TablePrecision
from pipeline.data.encode import encode, linear_only_places, num_dense_columns
from pipeline.data.loader import to_examples
from pipeline.data.normalise import RunningMoments
from pipeline.evaluation.score import probabilities
from pipeline.model_state import GATE, ModelState, architecture, default_device
from pipeline.publishing.checkpoint import Moments, reading, writing

log = logging.getLogger(__name__)

DESCRIPTION = "predictor.json"
WEIGHTS = "weights.safetensors"
MEMORY = "memory.safetensors"


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    spec: DatasetSpec
    model: ModelConfig
    moments: Moments
    table_precision: TablePrecision = "fp32"


class Predictor:
    """A model that only predicts."""

    def __init__(
        self,
        model: CtrModel | ServedModel,
        dense_weights: Mapping[str, torch.Tensor],
        spec: DatasetSpec,
        moments: RunningMoments,
        memory: Memory,
        ids: IdTables,
    ) -> None:
        self.model = model
        self.dense_weights = dense_weights
        self.spec = spec
        self.moments = moments
        self.memory = memory
        self.ids = ids

    def predict(self, frame: pd.DataFrame) -> F32:
        """Probability of a click for each row.

        Args:
            frame: a column for each feature, raw; lists as lists or joined by the feature's separator; None or NaN for
                missing. `event_time` as well, if the spec has features derived from it.

        Raises:
            DataError: a column is missing or has a value of another type; the message names it.
        """
        return self.predict_examples(to_examples(_as_click_log(frame, self.spec), self.spec))

    def predict_examples(self, examples: Examples) -> F32:
        """The same for rows of the click log; what is remembered has decayed until each row's own hour."""
        device = next(self.model.net.parameters()).device
        scored_R = np.empty(examples.num_rows, np.float32)
        for hour in np.unique(examples.hour_R):
            rows = np.flatnonzero(examples.hour_R == hour)
            window = encode(examples.take(rows), self.spec, self.memory, self.moments, hour=int(hour), ids=self.ids)
            scored_R[rows] = probabilities(self.model, self.dense_weights, window, device=device)
        return scored_R


def export_predictor(
    state: ModelState, spec: DatasetSpec, model: ModelConfig, folder: Path, *, table_precision: TablePrecision = "fp32"
) -> None:
    """Writes what serving needs, and no optimizer state, into `folder`, which must not exist yet; tables in
    `table_precision`, wide weights in 16 bits at least."""
    folder.mkdir(parents=True)
    moments = Moments.of(state.moments)
    assert moments is not None, "a model that learned nothing is not published"
    description = _Description(spec=spec, model=model, moments=moments, table_precision=table_precision)
    (folder / DESCRIPTION).write_text(description.model_dump_json(indent=1))
    learner = state.learner
    with learner.averaged() as dense_weights:
        tensors = {f"dense.{name}": tensor for name, tensor in dense_weights.items()}
        for piece in learner.model.tables.slices(with_optimizer=False):
            tensors |= {f"tables.{name}": tensor for name, tensor in _as_served(piece, table_precision).items()}
        with writing(folder):
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / WEIGHTS)
            save_arrays(state.memory.arrays() | state.ids.arrays(), folder / MEMORY)


def _as_served(piece: TableSlice, precision: TablePrecision) -> dict[str, torch.Tensor]:
    if precision == "fp32":
        return {piece.name: piece.tensor}
    table = piece.name.removesuffix(".weight")
    narrow = narrowed(piece.tensor, "fp16" if piece.name.startswith("wide.") else precision)
    return {f"{table}.{name}": tensor for name, tensor in narrow.items()}


def predictor_of(state: ModelState, spec: DatasetSpec) -> Predictor:
    """The predictor that serves once `state` is published; it shares the state's tables and memory.

    Predict inside `state.learner.averaged()`, which holds the tables' averages as they are published.
    """
    assert state.moments is not None, "a model that learned nothing is not published"
    learner = state.learner
    weights = learner.dense_weights(averaged=True)
    return Predictor(learner.model, weights, spec, state.moments, state.memory, state.ids)


def load_predictor(folder: Path) -> Predictor:
    """The predictor in `folder`; nothing in it is executed.

    Raises:
        CorruptCheckpoint: a file is missing, or is not what `export_predictor` writes.
    """
    with reading(folder):
        return _load_predictor(folder)


def _load_predictor(folder: Path) -> Predictor:
    description = _Description.model_validate_json((folder / DESCRIPTION).read_bytes())
    spec = description.spec
    device = default_device()
    tensors = load_file(folder / WEIGHTS)
    tables = {name.removeprefix("tables."): tensor for name, tensor in tensors.items() if name.startswith("tables.")}
    dense = {name.removeprefix("dense."): tensor.to(device) for name, tensor in tensors.items() if name.startswith("dense.")}
    if surplus := sorted(tables.keys() & wide_weights_of_times(table_layout(spec))):
        log.warning(
            "the model in %s was exported by an older tidemark: %s are left out, and its predictions are off by them; export "
            "it anew, or remove a frozen one, and the next update freezes another",
            folder,
            ", ".join(surplus),
        )
    model = _model_of(description, tables, gated=GATE in dense, device=device)
    memory, ids, kept = Memory(spec), IdTables(spec), load_arrays(folder / MEMORY)
    memory.load(kept)
    ids.load(kept)
    return Predictor(model, dense, spec, description.moments.running(), memory, ids)


def _model_of(
    description: _Description, tables: Mapping[str, torch.Tensor], *, gated: bool, device: torch.device
) -> CtrModel | ServedModel:
    """The network, without weights, over the tables as they were saved."""
    spec, kind = description.spec, architecture(description.model, gated=gated)
    layout, num_dense, linear_only = table_layout(spec), num_dense_columns(spec), linear_only_places(spec)
    if description.table_precision != "fp32":
        narrow = NarrowTables(layout, tables, precision=description.table_precision, device=device)
        return ServedModel(tables=narrow, net=DenseNet(kind, layout, num_dense, linear_only).to(device), layout=layout)
    if wrong := [name for name, tensor in tables.items() if tensor.dtype != torch.float32]:
        raise CorruptCheckpoint(f"tables in fp32 must hold float32: {wrong[0]} holds {tables[wrong[0]].dtype}")
    model = build_model(
        kind,
        layout,
        num_dense=num_dense,
        linear_only=linear_only,
        sparse_optimizer="rowwise_adagrad",
        sparse_learning_rate=1.0,
        wide_learning_rate=1.0,
        device=device,
        seed=0,
    )
    slices = {name: [TableSlice(name=name, row=0, column=0, tensor=tensor)] for name, tensor in tables.items()}
    model.tables.load_slices(slices, with_optimizer=False)
    return model


def _as_click_log(frame: pd.DataFrame, spec: DatasetSpec) -> pa.Table:
    """The request in the schema of the click log, its values read as ingestion reads them."""
    columns: dict[str, pa.Array] = {}
    for feature in spec.logged_categorical():
        kind = pa.int64() if feature.type == "integer" else pa.string()
        values = _column(frame, feature.name)
        if feature.many:
            lists = [_as_ids(value, feature) for value in values]
            columns[feature.name] = _convert(feature.name, lists, pa.list_(kind))
        else:
            columns[feature.name] = _convert(feature.name, [_as_id(value, feature) for value in values], kind)
    for number in spec.numeric:
        numbers = [_as_number(value, number.name) for value in _column(frame, number.name)]
        columns[number.name] = pa.array(np.array(numbers, np.float32), from_pandas=True)
    columns["event_time"] = _event_times(frame, spec)
    if spec.has_labels:
        columns["label"] = pa.array(np.zeros(len(frame), np.int8))
    return pa.table(columns)


def _column(frame: pd.DataFrame, name: str) -> Sequence[object]:
    if name not in frame.columns:
        raise DataError(f"the request has no column {name!r}; it has {list(frame.columns)}")
    return list(frame[name])


def _convert(name: str, values: Sequence[object], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise DataError(f"column {name!r} must hold {kind}: {error}") from error


def _event_times(frame: pd.DataFrame, spec: DatasetSpec) -> pa.Array:
    needing = [feature.name for feature in spec.categorical if feature.from_time]
    needing += [name for name, there in (("counters", spec.counters), ("ages", spec.ages), ("history", spec.history)) if there]
    if "event_time" not in frame.columns:
        if needing:
            raise DataError(f"the request has no column 'event_time', which {needing} depend on")
        return pa.array(np.zeros(len(frame), "datetime64[us]")).cast(pa.timestamp("us", "UTC"))
    for value in frame["event_time"]:
        if not isinstance(value, str | datetime):
            raise DataError(f"event_time {value!r} is no time; use ISO 8601, such as '2026-01-02T03:04:05Z'")
    times = pd.to_datetime(frame["event_time"], utc=True, errors="coerce", format="ISO8601")
    if times.isna().any():
        wrong = frame["event_time"][times.isna()].iloc[0]
        raise DataError(f"event_time {wrong!r} is no time; use ISO 8601, such as '2026-01-02T03:04:05Z'")
    return pa.array(times.to_numpy("datetime64[us]")).cast(pa.timestamp("us", "UTC"))


def _is_missing(value: object) -> bool:
    return value is None or value is pd.NA or value == "" or (isinstance(value, float) and np.isnan(value))


def _as_id(value: object, feature: Categorical) -> object:
    """JSON readers make floats of whole numbers; an id that was written 12 is read as 12, not 12.0."""
    if _is_missing(value):
        return None
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    if feature.type == "string":
        return str(value)
    return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+", value.strip()) else value


def _as_ids(value: object, feature: Categorical) -> list[object] | None:
    if isinstance(value, str):
        value = value.split(feature.separator)
    if isinstance(value, list | tuple | np.ndarray):
        return [_as_id(part, feature) for part in value if not _is_missing(part)]
    return None if _is_missing(value) else [_as_id(value, feature)]


def _as_number(value: object, name: str) -> float:
    if _is_missing(value):
        return float("nan")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(f"column {name!r} must hold numbers, got {value!r}") from error
