"""The model as it serves: raw ids and raw numbers in, probabilities out, equal to training's own.

<folder>/predictor.json        spec, architecture, running moments
        /weights.safetensors   tables and dense weights (averaged, where an average is kept)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import DataError
from data_schemas.examples import F32, Examples
from models.ctr import CtrModel, build_model
from models.embeddings import TableSlice
from models.memory import Memory
from models.tables import table_layout
from pipeline.config import ModelConfig
from pipeline.data.encode import encode, num_dense_columns
from pipeline.data.loader import to_examples
from pipeline.data.normalise import RunningMoments
from pipeline.evaluation.score import probabilities
from pipeline.model_state import ModelState, architecture, default_device
from pipeline.publishing.checkpoint import Moments

DESCRIPTION = "predictor.json"
WEIGHTS = "weights.safetensors"
MEMORY = "memory.safetensors"


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    spec: DatasetSpec
    model: ModelConfig
    moments: Moments


class Predictor:
    """A model that only predicts."""

    def __init__(
        self,
        model: CtrModel,
        dense_weights: Mapping[str, torch.Tensor],
        spec: DatasetSpec,
        moments: RunningMoments,
        memory: Memory,
    ) -> None:
        self.model = model
        self.dense_weights = dense_weights
        self.spec = spec
        self.moments = moments
        self.memory = memory

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
        """The same for rows of the click log; what is remembered has decayed until their last hour."""
        hour = int(examples.hour_R.max(initial=0))
        window = encode(examples, self.spec, self.memory, self.moments, hour=hour)
        device = next(self.model.net.parameters()).device
        return probabilities(self.model, self.dense_weights, window, device=device)


def export_predictor(state: ModelState, spec: DatasetSpec, model: ModelConfig, folder: Path) -> None:
    """Writes what serving needs, and no optimizer state, into `folder`, which must not exist yet."""
    folder.mkdir(parents=True)
    moments = Moments.of(state.moments)
    assert moments is not None, "a model that learned nothing is not published"
    description = _Description(spec=spec, model=model, moments=moments)
    (folder / DESCRIPTION).write_text(description.model_dump_json(indent=1))
    learner = state.learner
    tensors = {f"dense.{name}": tensor for name, tensor in learner.dense_weights(averaged=True).items()}
    tensors |= {f"tables.{piece.name}": piece.tensor for piece in learner.model.tables.slices(with_optimizer=False)}
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / WEIGHTS)
    save_arrays(state.memory.arrays(), folder / MEMORY)


def load_predictor(folder: Path) -> Predictor:
    """The predictor in `folder`; nothing in it is executed."""
    description = _Description.model_validate_json((folder / DESCRIPTION).read_bytes())
    spec = description.spec
    device = default_device()
    model = build_model(
        architecture(description.model),
        table_layout(spec),
        num_dense=num_dense_columns(spec),
        sparse_optimizer="rowwise_adagrad",
        sparse_learning_rate=1.0,
        wide_learning_rate=1.0,
        device=device,
        seed=0,
    )
    tensors = load_file(folder / WEIGHTS)
    tables = {name.removeprefix("tables."): tensor for name, tensor in tensors.items() if name.startswith("tables.")}
    slices = {name: [TableSlice(name=name, row=0, column=0, tensor=tensor)] for name, tensor in tables.items()}
    model.tables.load_slices(slices, with_optimizer=False)
    dense = {name.removeprefix("dense."): tensor.to(device) for name, tensor in tensors.items() if name.startswith("dense.")}
    memory = Memory(spec)
    memory.load(load_arrays(folder / MEMORY))
    return Predictor(model, dense, spec, description.moments.running(), memory)


def _as_click_log(frame: pd.DataFrame, spec: DatasetSpec) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for feature in spec.logged_categorical():
        values = _column(frame, feature.name)
        kind = pa.int64() if feature.type == "integer" else pa.string()
        if feature.many:
            lists = [_as_list(value, feature.separator) for value in values]
            columns[feature.name] = _convert(feature.name, lists, pa.list_(kind))
        else:
            columns[feature.name] = _convert(feature.name, [_as_id(value, feature.type) for value in values], kind)
    for number in spec.numeric:
        columns[number.name] = _convert(number.name, [_or_none(v) for v in _column(frame, number.name)], pa.float32())
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
    derived = [feature.name for feature in spec.categorical if feature.from_time]
    derived += [name for name, there in (("counters", spec.counters), ("ages", spec.ages), ("history", spec.history)) if there]
    if "event_time" not in frame.columns:
        if derived:
            raise DataError(f"the request has no column 'event_time', which {derived} are derived from")
        return pa.array(np.zeros(len(frame), "datetime64[us]")).cast(pa.timestamp("us", "UTC"))
    times = pd.to_datetime(frame["event_time"], utc=True, errors="coerce")
    if times.isna().any():
        raise DataError(f"event_time {frame['event_time'][times.isna()].iloc[0]!r} is no time; use ISO 8601")
    return pa.array(times.to_numpy("datetime64[us]")).cast(pa.timestamp("us", "UTC"))


def _or_none(value: object) -> object:
    return None if value is None or value is pd.NA or value != value else value


def _as_id(value: object, kind: str) -> object:
    value = _or_none(value)
    if value is None or value == "":
        return None
    if kind == "integer":
        whole = (isinstance(value, float) and value.is_integer()) or (
            isinstance(value, str) and value.strip().lstrip("-").isdigit()
        )
        return int(value) if whole else value  # type: ignore[call-overload]
    return str(value)


def _as_list(value: object, separator: str) -> object:
    if isinstance(value, str):
        return [part for part in value.split(separator) if part]
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    return None if _or_none(value) is None else [value]
