"""The published model as MLflow loads it: raw ids and numbers in, probabilities out.

MLflow copies this file into the model and runs it there (models from code: no pickle). tidemark must be installed
where it is served: `mlflow models serve -m "models:/<data set>-<model>@champion" --env-manager local`.

A request has a column for every feature of the data set; any value may be missing. A list is a JSON list or one
separated string. An
integer id above 2^53 belongs in a JSON string wherever another row of the request has none: JSON readers turn such a
column into floating-point numbers.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns about type hints of its own
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException

from data_schemas.errors import DataError

if TYPE_CHECKING:
    from pipeline.publishing.predictor import Predictor


class CtrPyfunc(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # mlflow is untyped here
    """Answers `POST /invocations`."""

    _predictor: "Predictor"

    def load_context(self, context: Any) -> None:
        """Reads the predictor from the model's artifact folder."""
        from pipeline.publishing.predictor import load_predictor

        self._predictor = load_predictor(Path(context.artifacts["model"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> npt.NDArray[np.float32]:
        """`[R]` click probabilities, the same as training computes for these rows.

        Raises:
            MlflowException: the request lacks a column or has a value of another type; the server answers 400 with the reason.
        """
        try:
            return self._predictor.predict(model_input)
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


mlflow.models.set_model(CtrPyfunc())
