"""The MLflow model registry: a published model that serves what training computed, under the alias `champion`; one that is not
proven yet, under the alias `challenger`.

Enters: the folder of a predictor, and rows with the probabilities that it gave in training. Leaves: a registered
version; or an error, and the champion stays who it was.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.errors import CheckpointError, TidemarkError, TrackingUnavailable
from pipeline.config import TablePrecision, UpdateConfig
from pipeline.evaluation.metrics import log_odds
from pipeline.outcome import UpdateReport
from pipeline.publishing.report import verdict
from pipeline.publishing.tracking import UPDATE_TAG, find_run, open_experiment, quiet_mlflow, update_id

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

CHAMPION = "champion"
"""Alias of the version that serves."""
CHALLENGER = "challenger"
"""Alias of a version that has learned more and is not proven yet; of none where the champion is the last that was learned."""

_SERVING_CODE = Path(__file__).with_name("serving.py")
_SERVED_WITH = (
    "mlflow",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
)
_MODEL_TAG = "tidemark.logged_model"  # MLflow's own link needs its global tracking URI, and is not read back
_TOLERANCE: Mapping[TablePrecision, float] = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.25}
"""Of log odds, so that a click rate of 1 % is held as closely as one of 50 %: batches of another size add up in another order,
and narrow embeddings are rounded."""
_TOLD_APART = (1e-9, 1 - 1e-4)
"""Probabilities beyond are taken for these: close to 1 float32 has no more digits for their log odds."""


def register_model(
    config: UpdateConfig,
    report: UpdateReport,
    predictor_folder: Path,
    example: pd.DataFrame,
    example_probabilities: npt.NDArray[np.float32],
) -> str:
    """Logs, checks and registers a model, and makes it the champion, or the challenger if it was not published.

    Args:
        config: names the registry and how many versions it keeps.
        report: the update that made the model; its run, where there is one, is linked.
        predictor_folder: what `load_predictor` reads.
        example: rows with raw ids and numbers, at least one; kept with the model as its input example.
        example_probabilities: `[R]`, what training computed for them.

    Returns:
        The version, such as `"12"`.

    Raises:
        CheckpointError: the logged model answers the example otherwise than training did, by more than tables of its precision
            may; nothing was registered.
        TrackingUnavailable: the registry cannot be reached or written; whoever was champion stays so.
    """
    try:
        with quiet_mlflow():
            return _register(config, report, predictor_folder, example, example_probabilities)
    except TidemarkError:
        raise
    except Exception as error:
        raise _unavailable(error) from error


def promote_checkpoint(config: UpdateConfig, dataset: str, version: int) -> bool:
    """Makes the registered model of checkpoint `version` the champion; False where the registry keeps none.

    Raises:
        TrackingUnavailable: the registry cannot be reached or written; whoever was champion stays so.
    """
    name = f"{dataset}-{config.model_name}"
    try:
        with quiet_mlflow():
            client, _ = open_experiment(config)
            found = [
                made
                for made in client.search_model_versions(f"name = '{name}'")
                if made.tags.get("checkpoint_version") == str(version)
            ]
            if not found:
                return False
            newest = max(found, key=lambda made: int(made.version))
            client.set_registered_model_alias(name, CHAMPION, newest.version)
            _withdraw_earlier(client, name, version)
            return True
    except TidemarkError:
        raise
    except Exception as error:
        raise _unavailable(error) from error


def champion_checkpoint(config: UpdateConfig, dataset: str) -> int | None:
    """The checkpoint that the registry's champion was made from; None where there is no champion.

    Raises:
        TrackingUnavailable: the registry cannot be reached.
    """
    name = f"{dataset}-{config.model_name}"
    try:
        with quiet_mlflow():
            client, _ = open_experiment(config)
            models = client.search_registered_models(filter_string=f"name = '{name}'")
            champion = models[0].aliases.get(CHAMPION) if models else None
            if champion is None:
                return None
            checkpoint = client.get_model_version(name, champion).tags.get("checkpoint_version", "")
            return int(checkpoint) if checkpoint.isdigit() else None
    except TidemarkError:
        raise
    except Exception as error:
        raise _unavailable(error) from error


def withdraw_challenger(config: UpdateConfig, dataset: str) -> bool:
    """Takes the alias `challenger` away; False where no version has it.

    Raises:
        TrackingUnavailable: the registry cannot be reached or written; the alias stays.
    """
    name = f"{dataset}-{config.model_name}"
    try:
        with quiet_mlflow():
            client, _ = open_experiment(config)
            models = client.search_registered_models(filter_string=f"name = '{name}'")
            if not any(CHALLENGER in model.aliases for model in models):
                return False
            client.delete_registered_model_alias(name, CHALLENGER)
            return True
    except TidemarkError:
        raise
    except Exception as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> TrackingUnavailable:
    return TrackingUnavailable(
        f"the model registry could not be written ({type(error).__name__}: {error}); the champion stays as it was"
    )


def _register(
    config: UpdateConfig,
    report: UpdateReport,
    predictor_folder: Path,
    example: pd.DataFrame,
    example_probabilities: npt.NDArray[np.float32],
) -> str:
    client, experiment = open_experiment(config)
    run = find_run(client, experiment, UPDATE_TAG, update_id(report))
    run_id = str(run.info.run_id) if run else None
    logged = client.create_logged_model(
        experiment, name=report.model_name, source_run_id=run_id, model_type="ctr", tags=_tags(report)
    )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        _save(folder, logged, run_id, predictor_folder, example)
        _check_served(folder, example, example_probabilities, config.serving.table_precision)
        client.log_model_artifacts(logged.model_id, str(folder))
    _finish(client, logged, run_id)
    return _promote(client, f"{report.dataset}-{report.model_name}", logged, report, config.tracking.keep_models)


def _save(folder: Path, logged: Any, run_id: str | None, predictor_folder: Path, example: pd.DataFrame) -> None:
    """As `mlflow.pyfunc.log_model` does, less its two loads of the model and its guesses of requirements."""
    import mlflow
    from mlflow.models import Model

    mlflow.pyfunc.save_model(
        folder,
        mlflow_model=Model(
            artifact_path=logged.artifact_location, model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id
        ),
        python_model=str(_SERVING_CODE),
        artifacts={"model": str(predictor_folder)},
        signature=_signature(example),
        input_example=example,
        pip_requirements=_requirements(),
    )


def _signature(example: pd.DataFrame) -> "ModelSignature":
    """Every feature may be missing and has any type: the predictor reads ids as integers or words, lists as lists or
    separated strings, where MLflow's own types refuse a missing integer or an integer in a column of numbers."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    inputs = Schema([ColSpec(AnyType(), str(name), required=False) for name in example.columns])
    return ModelSignature(inputs=inputs, outputs=Schema([TensorSpec(np.dtype(np.float32), (-1,))]))


def _requirements() -> list[str]:
    """The versions that the model was trained with, of what serving imports."""
    installed = []
    for name in _SERVED_WITH:
        try:
            installed.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            continue  # one of fbgemm-gpu and fbgemm-gpu-cpu is always absent
    return installed


def _check_served(folder: Path, example: pd.DataFrame, expected_R: npt.NDArray[np.float32], precision: TablePrecision) -> None:
    import mlflow

    served_R = np.asarray(mlflow.pyfunc.load_model(str(folder)).predict(example))
    if served_R.shape != np.shape(expected_R):
        raise CheckpointError(f"the model answers {served_R.shape} for an example of {np.shape(expected_R)}; not registered")
    differences_R = np.abs(log_odds(served_R, _TOLD_APART) - log_odds(np.asarray(expected_R), _TOLD_APART))
    worst = int(np.argmax(differences_R))  # the first NaN, if there is one
    if not differences_R[worst] <= _TOLERANCE[precision]:
        way_out = "Compare the predictor's folder with the checkpoint"
        way_out += "" if precision == "fp32" else ", or set serving.table_precision = 'fp32'"
        raise CheckpointError(
            f"the logged model answers {served_R[worst]:.4g} where training gave {expected_R[worst]:.4g}: the log odds of the "
            f"example rows differ by up to {differences_R[worst]:.2g}, {_TOLERANCE[precision]:.2g} is allowed with tables in "
            f"{precision}; it was not registered, and the champion stays. {way_out}"
        )


def _finish(client: "MlflowClient", logged: Any, run_id: str | None) -> None:
    from mlflow.entities import LoggedModelOutput
    from mlflow.entities.logged_model_status import LoggedModelStatus

    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    if run_id:
        client.log_outputs(run_id, models=[LoggedModelOutput(logged.model_id, step=0)])


def _promote(client: "MlflowClient", name: str, logged: Any, report: UpdateReport, keep: int) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name, description=f"Click probability on {report.dataset}, kept fresh by updates.")
    made = client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=logged.source_run_id,
        tags=_tags(report) | {_MODEL_TAG: logged.model_id},
        description=verdict(report),
    )
    client.set_registered_model_alias(name, CHAMPION if report.outcome == "published" else CHALLENGER, made.version)
    if report.outcome == "published":
        _withdraw_earlier(client, name, report.version)
    _forget_old(client, name, keep)
    return str(made.version)


def _withdraw_earlier(client: "MlflowClient", name: str, champion: int) -> None:
    """Takes the alias of a challenger away that has not learned more than the checkpoint of the champion."""
    challenger = client.get_registered_model(name).aliases.get(CHALLENGER)
    if challenger is None:
        return
    checkpoint = client.get_model_version(name, challenger).tags.get("checkpoint_version", "")
    if not checkpoint.isdigit() or int(checkpoint) <= champion:
        client.delete_registered_model_alias(name, CHALLENGER)


def _forget_old(client: "MlflowClient", name: str, keep: int) -> None:
    """Deletes all but the last `keep` versions and their files; one that has an alias stays."""
    aliased = {str(version) for version in client.get_registered_model(name).aliases.values()}
    versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version))
    for version in versions[:-keep]:
        if str(version.version) in aliased:
            continue
        client.delete_model_version(name, version.version)
        if model_id := version.tags.get(_MODEL_TAG):
            delete_files(client.get_logged_model(model_id).artifact_location)
            client.delete_logged_model(model_id)


def delete_files(location: str) -> None:
    """Deletes the artifacts at an address of MLflow's."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    get_artifact_repository(location).delete_artifacts()


def _tags(report: UpdateReport) -> dict[str, str]:
    return {
        "dataset": report.dataset,
        "window_start": report.window_start.isoformat(),
        "checkpoint_version": str(report.version),
        "log_version": str(report.log_version),
        "git_commit": report.git_commit,
    }
