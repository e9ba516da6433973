"""Old runs leave MLflow.

Enters: the settings and a moment. Leaves: the runs of updates that ended before it marked as deleted, their artifacts gone; the
timelines, and the runs of models that have an alias, stay. `mlflow gc` then takes them out of the database as well.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from data_schemas.errors import TidemarkError, TrackingUnavailable
from pipeline.config import UpdateConfig
from pipeline.publishing.registry import delete_files
from pipeline.publishing.tracking import UPDATE_TAG, open_experiment, quiet_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient


def delete_runs(config: UpdateConfig, before: datetime, *, dry_run: bool = False) -> int:
    """The number of runs that were deleted, or would be.

    Args:
        config: names the experiment; runs of all models in it are looked at.
        before: aware; runs that ended earlier go.
        dry_run: count only.

    Raises:
        TrackingUnavailable: the server does not answer, or fails; runs that were deleted before stay deleted.
    """
    try:
        with quiet_mlflow():
            client, experiment = open_experiment(config)
            serving = _aliased_runs(client)
            old = [run for run in _ended(client, experiment, before) if run.info.run_id not in serving]
            for run in old:
                if not dry_run:
                    delete_files(run.info.artifact_uri)
                    client.delete_run(run.info.run_id)
            return len(old)
    except TidemarkError:
        raise
    except Exception as error:
        raise TrackingUnavailable(f"old runs could not be deleted ({type(error).__name__}: {error})") from error


def _ended(client: "MlflowClient", experiment: str, before: datetime) -> Iterator[Any]:
    """Runs of updates, which the timelines are not."""
    ended = f"attributes.end_time < {round(1000 * before.timestamp())}"
    token = None
    while True:
        page = client.search_runs([experiment], filter_string=ended, max_results=1000, page_token=token)
        yield from (run for run in page if UPDATE_TAG in run.data.tags)
        token = page.token
        if not token:
            return


def _aliased_runs(client: "MlflowClient") -> set[str]:
    """Runs that made a registered model which has an alias."""
    return {
        str(client.get_model_version(model.name, version).run_id)
        for model in client.search_registered_models()
        for version in model.aliases.values()
    }
