"""Back to a kept version: the model and what it has consumed of the click log, together.

Enters: the settings and a version. Leaves: CURRENT names that version, by one rename; the next update goes on from there and
learns again what came after it.
"""

from dataclasses import dataclass
from datetime import datetime

from data_schemas.errors import CheckpointError, TrackingUnavailable
from pipeline.config import UpdateConfig
from pipeline.data.windows import as_time
from pipeline.lock import alone
from pipeline.publishing.checkpoint import (
    Manifest,
    current_version,
    go_back_to,
    read_manifest,
    undone_versions,
    versions,
)


@dataclass(frozen=True, kw_only=True)
class RolledBack:
    """What a rollback did."""

    before: int | None
    """Version that served; None where CURRENT was missing."""
    version: int
    """That serves now."""
    log_version: int | None
    """Of the click log: what was added since waits for the next update."""
    learned_until: datetime
    """End of the last window that the version learned, UTC."""
    notes: tuple[str, ...]


def roll_back(config: UpdateConfig, version: int | None = None) -> RolledBack:
    """Makes a kept version current again.

    Args:
        config: names the model.
        version: to go back to; None: the newest whole one below the current.

    Raises:
        CheckpointError: there is no such version.
        CorruptCheckpoint: it is not whole; the current one stays.
        UpdateInProgress: an update of the model is running.
    """
    with alone(config.model_dir, "rollback", wait_seconds=config.lock_wait_seconds):
        before = current_version(config.model_dir)
        chosen = _chosen(config, before, version)
        manifest = read_manifest(config.model_dir, chosen)
        go_back_to(config.model_dir, chosen)
        notes = _follow_in_registry(config, manifest)
    return RolledBack(
        before=before,
        version=manifest.version,
        log_version=manifest.log_version,
        learned_until=as_time(manifest.window_end),
        notes=notes,
    )


def _chosen(config: UpdateConfig, current: int | None, version: int | None) -> int:
    kept = sorted([*versions(config.model_dir), *undone_versions(config.model_dir)])
    if version is None:
        older = [number for number in kept if current is None or number < current]
        if not older:
            raise CheckpointError(
                f"no version before {current} is kept in {config.model_dir}; keep_checkpoints = {config.keep_checkpoints} "
                "says how many are"
            )
        return older[-1]
    if version not in kept:
        raise CheckpointError(f"version {version} is not kept in {config.model_dir}; there are {_listed(kept)}")
    return version


def _listed(kept: list[int]) -> str:
    return ", ".join(str(number) for number in kept) or "none"


def _follow_in_registry(config: UpdateConfig, manifest: Manifest) -> tuple[str, ...]:
    """Moves the registry's champion to the same version; what could not be done is said."""
    if not (config.tracking.enabled and config.tracking.register_model):
        return ()
    from pipeline.publishing.registry import promote_checkpoint, withdraw_challenger  # imports MLflow, which takes a second

    try:
        withdraw_challenger(config, manifest.dataset)
        if promote_checkpoint(config, manifest.dataset, manifest.version):
            return ()
    except TrackingUnavailable as error:
        return (f"{error}; the checkpoint serves, the registry does not follow yet",)
    return (
        f"the registry keeps no model of version {manifest.version} (tracking.keep_models = {config.tracking.keep_models}): "
        "its champion stays as it is until the next update registers its own",
    )
