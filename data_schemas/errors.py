"""Every error that tidemark raises on purpose.

    TidemarkError
    ├── SpecError            a data set's TOML is wrong: the field is named
    ├── ConfigError          a setting is wrong or two settings contradict each other
    ├── DataError            rows or files cannot be used
    │   ├── BrokenFile       a landing file cannot be read; it is quarantined whole
    │   ├── CommitConflict   another process wrote to the click log at the same time; read it again and retry
    │   └── NothingToLearn   there are no rows for a window
    ├── CheckpointError      a saved model cannot be used
    │   ├── CorruptCheckpoint    a file differs from its hash, or is missing
    │   └── SpecMismatch         the checkpoint was trained with another spec or model
    ├── LearningDiverged     the loss stayed non-finite; nothing was published
    ├── GroupFailed          of processes that train together one was lost, or they did not come together
    │   └── StoppedByFirst       the first of them failed, and tells why
    ├── TrackingUnavailable  the MLflow server does not answer; the run waits in the spool
    └── UpdateInProgress     another update holds the state folder's lock

A message says what was wrong, the value, and the way out.
"""


class TidemarkError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = 1
    """Of a command that ends with it."""


class SpecError(TidemarkError, ValueError):
    """A data set declaration is wrong."""


class ConfigError(TidemarkError, ValueError):
    """A setting is out of range, unknown, or contradicts another."""


class DataError(TidemarkError):
    """Rows or files cannot be used."""


class BrokenFile(DataError):
    """A landing file cannot be read at all."""


class CommitConflict(DataError):
    """Another process has written to the same table since it was read."""


class NothingToLearn(DataError):
    """No rows are waiting for this window."""


class CheckpointError(TidemarkError):
    """A saved model cannot be used."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint's file is missing or differs from the hash in its manifest."""


class SpecMismatch(CheckpointError):
    """A checkpoint was trained with another data set spec or another model."""


class LearningDiverged(TidemarkError):
    """The loss stayed non-finite over several steps in a row."""


class GroupFailed(TidemarkError):
    """Processes that train one model together have lost one of them, or did not come together."""


class StoppedByFirst(GroupFailed):
    """The first of them failed in something that it does alone; it tells why."""


class TrackingUnavailable(TidemarkError):
    """The MLflow server does not answer."""


class UpdateInProgress(TidemarkError):
    """Another process holds the lock of this state folder."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later."""
